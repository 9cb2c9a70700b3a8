"""`python -m bdclean.bench NAME ... [--table FILE]`"""

from __future__ import annotations

import os
import sys

from bdclean import ranks
from bdclean.bench import (
    attacks,
    calibrate,
    cifar10,
    encoders,
    inversion,
    known_networks,
    readings,
    recipes,
    rule,
    sequela,
    small_networks,
    tables,
)
from bdclean.bench.abuse import faults, fuzz
from bdclean.bench.speed import speed

DRIVERS = {
    "attacks": attacks.main,
    "calibrate": calibrate.main,
    "cifar10": cifar10.main,
    "encoders": encoders.main,
    "faults": faults.main,
    "fuzz": fuzz.main,
    "inversion": inversion.main,
    "readings": readings.main,
    "recipes": recipes.main,
    "rule": rule.main,
    "sequela": sequela.main,
    "speed": speed.main,
}

MAKERS = {"known_networks": known_networks.main, "small-networks": small_networks.main}
"""These make what the package ships, and networks for others to measure: no tables."""


FORKING = ("faults", "fuzz", "speed")
"""These start and kill processes as only a POSIX system does."""


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in FORKING and not hasattr(os, "fork"):
        print(f"{sys.argv[1]} needs a POSIX system: run it on Linux or macOS.", file=sys.stderr)
        return 3
    if ranks.own().count > 1:
        if ranks.first():
            print(
                "bdclean.bench: run it without torchrun, its processes would not share the work.",
                file=sys.stderr,
            )
        return ranks.linger(3)
    if sys.argv[1:2] and sys.argv[1] in MAKERS:
        return MAKERS[sys.argv[1]](sys.argv[2:])
    if len(sys.argv) < 2 or sys.argv[1] not in DRIVERS:
        names = ",".join([*DRIVERS, *MAKERS])
        print(f"usage: python -m bdclean.bench {{{names}}} ... [--table FILE]", file=sys.stderr)
        return 2
    return tables.run(sys.argv[1], DRIVERS[sys.argv[1]], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
