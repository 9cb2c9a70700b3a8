"""The entry point. Ours is imported inside `try`: an uncaught exception would exit 1, a verdict's code."""

import os
import sys


def main() -> None:
    """Runs the command line and exits with the code that README lists."""
    try:
        _fill_closed_streams()
        from bdclean import ranks

        ranks.hush()
        from bdclean.cli.main import run

        code = ranks.linger(run(sys.argv[1:]))
        _end_output()
    except BaseException as error:
        code = _broken(error)
    sys.exit(code)


def _end_output() -> None:
    """Sends what code of others prints on its way out to standard error: the result is whole."""
    try:
        sys.stdout.flush()
        os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):
        pass  # it is closed, or nobody reads it


def _fill_closed_streams() -> None:
    """Gives the numbers 0 to 2 to nothing where they are closed: a file of ours that got one would be written into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _broken(error: BaseException) -> int:
    """Says that bdclean itself cannot be started, leaves a record of it if that much works, and returns 70."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    try:
        import traceback

        traceback.print_exception(error)
        print(f"bdclean: bdclean cannot be started: {type(error).__name__}: {error}", file=sys.stderr)
        from bdclean.cli.defects import leave_record

        leave_record(sys.argv, error)
    except BaseException:
        pass  # what is broken may be what these lines need; the exit code must be right all the same
    return 70


if __name__ == "__main__":
    main()
