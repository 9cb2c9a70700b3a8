"""The rows of the tables of `bench sequela`: a cell has the values of all seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bdclean.bench.encoders import number
from bdclean.record.rates import Rate
from bdclean.record.run import RAN, RunRecord
from bdclean.record.sequela import CONTROL, REFERENCE, SUSPECT, TRIGGER, UNPOISONED, Injection, Reactivation

NETWORK = ("network", "clean accuracy", "attack success", "base rate", "seconds", "n: accuracy", "attack")
MEMBERS = (
    "members", "network", "AUC: loss", "LiRA", "TPR at 1 %: loss", "LiRA", "TPR at 0.1 %: loss", "LiRA", "n: members",
    "non-members",
)  # fmt: skip
LEFT = ("output", "what an attacker does", "trigger", "control", "twin: trigger", "control", "n")
SUSPECT_NAME = "as it was trained"
WORDS = {"reinjection": "re-injection", "retuning": "re-tuning"}


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def by_seed(values: Sequence[float | None], digits: int) -> str:
    """A cell with a value of each seed, `-` where there is none."""
    return " / ".join(number(value, digits) or "-" for value in values)


def percent(rates: Sequence[Rate | None], digits: int = 1) -> str:
    values = [None if rate is None else rate.value for rate in rates]
    return by_seed([None if value is None else 100 * value for value in values], digits)


def counted(rates: Sequence[Rate | None]) -> str:
    """How many images rates are of: one number where it is that of all seeds."""
    counts = list(dict.fromkeys(f"{rate.n:,}" for rate in rates if rate is not None))
    return " / ".join(counts)


def network_lines(made: dict[str, list[RunRecord]], trigger: str) -> Iterator[str]:
    """Rows of the first table, of the records of each recipe, one a seed; what was cleansed is in each of them.

    Rates are of `trigger`, a SPEC; a recipe that is not told it may have others measured, and not it.
    """
    first = next(iter(made.values()))
    for name, records in {SUSPECT_NAME: first, **made}.items():
        sides = [record.before if name == SUSPECT_NAME else record for record in records]
        rows = [
            next((each for each in side.triggers if each.trigger == trigger), None)
            if side is not None
            else None
            for side in sides
        ]
        accuracies = [
            next((Rate(each.value, each.n) for each in side.measures if each.name == "clean_accuracy"), None)
            if side is not None
            else None
            for side in sides
        ]
        asr = [each.asr if each else None for each in rows]
        seconds = [None if name == SUSPECT_NAME else record.seconds for record in records]
        yield row(
            name, percent(accuracies), percent(asr), percent([each.base_rate if each else None for each in rows]),
            by_seed(seconds, 0), counted(accuracies), counted(asr),
        )  # fmt: skip


def member_lines(told: dict[str, list[dict[str, list[Rate]]]], non_members: int) -> Iterator[str]:
    """Rows of the second table: what `told` says of each network, one a seed."""
    for group in ("training", "cleansing"):
        for name, seeds in told.items():
            loss, ratio = ([of[f"{group} {way}"] for of in seeds] for way in ("loss", "LiRA"))
            cells = [by_seed([of[0].value for of in way], 3) for way in (loss, ratio)]
            cells += [percent([of[at] for of in way], 2) for at in (1, 2) for way in (loss, ratio)]
            yield row(f"{group} images", name, *cells, counted([of[0] for of in loss]), f"{non_members:,}")


def left_lines(recipe: str, records: Sequence[RunRecord], seeds: Sequence[int]) -> Iterator[str]:
    """Rows of the third table of an output, from its scans, one a seed; what was not measured says why."""
    found = [record.sequela for record in records]
    injections = [{_injected(each): each for each in of.injections} if of else {} for of in found]
    changes = [{(each.model, each.change): each for each in of.reactivation} if of else {} for of in found]
    for part, poisoned, images in dict.fromkeys(key[:3] for of in injections for key in of):
        what = f"{WORDS[part]}, {poisoned:,} of {images:,} images poisoned"

        def after(
            model: str, stamped: str, key: tuple[str, int, int] = (part, poisoned, images)
        ) -> list[Injection | None]:
            return [of.get((*key, model, stamped)) for of in injections]

        first = TRIGGER if poisoned else UNPOISONED
        cells = [after(model, stamped) for model in (SUSPECT, REFERENCE) for stamped in (first, CONTROL)]
        yield row(
            recipe,
            what,
            *(" / ".join(map(_risen, each)) for each in cells),
            counted([_last(x) for x in cells[0]]),
        )
    for change in dict.fromkeys(key[1] for of in changes for key in of):
        pairs = [_rates(changes, model, change) for model in (SUSPECT, REFERENCE)]
        yield row(recipe, change, percent(pairs[0]), "", percent(pairs[1]), "", counted(pairs[0]))
    for seed, record in zip(seeds, records, strict=True):
        missing = [
            f"{each.what}: {each.reason}" for each in record.skipped if each.what.startswith("sequela")
        ]
        if record.outcome != RAN:
            missing = [record.problem.message if record.problem is not None else record.verdict]
        for reason in missing:
            yield row(recipe, f"not measured with seed {seed}: {reason}", *[""] * (len(LEFT) - 2))


def _injected(of: Injection) -> tuple[str, int, int, str, str]:
    return of.part, of.poisoned, of.images, of.model, of.stamped


def _rates(
    changes: Sequence[dict[tuple[str, str], Reactivation]], model: str, change: str
) -> list[Rate | None]:
    found = [of.get((model, change)) for of in changes]
    return [each.asr if each else None for each in found]


def _last(of: Injection | None) -> Rate | None:
    return of.scores[-1].asr if of is not None and of.scores else None


def _risen(of: Injection | None) -> str:
    """The last attack success rate that was scored, and when half of the images obeyed."""
    if of is None:
        return "-"
    return f"{percent([_last(of)])} ({f'>{of.until:,}' if of.reached is None else f'{of.reached:,}'})"
