"""`python -m bdclean.bench NAME ... [--table FILE]`"""

from __future__ import annotations

import sys

from bdclean.bench import cifar10, known_networks, readings, rule, tables
from bdclean.bench.abuse import faults, fuzz
from bdclean.bench.speed import speed

DRIVERS = {
    "cifar10": cifar10.main,
    "faults": faults.main,
    "fuzz": fuzz.main,
    "known_networks": known_networks.main,
    "readings": readings.main,
    "rule": rule.main,
    "speed": speed.main,
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in DRIVERS:
        print(f"usage: python -m bdclean.bench {{{','.join(DRIVERS)}}} ... [--table FILE]", file=sys.stderr)
        return 2
    return tables.run(sys.argv[1], DRIVERS[sys.argv[1]], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
