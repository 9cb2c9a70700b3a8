"""The entry point. Ours is imported inside `try`: an uncaught exception would exit 1, a verdict's code."""

import sys


def main() -> None:
    """Runs the command line and exits with the code that README lists."""
    try:
        from bdclean.cli import run

        code = run(sys.argv[1:])
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        else:
            code = 130 if isinstance(error, KeyboardInterrupt) else 70
    sys.exit(code)


if __name__ == "__main__":
    main()
