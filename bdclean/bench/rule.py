"""How often the rule for trigger rows cries wolf, and how often it misses: counts over records of scans.

`python -m bdclean.bench rule` asks simulated networks. With RECORD... it reads records of `scan` (or of `cleanse`: its
suspect) and the truth from their file names: a name with `clean` in it, or of a network known to be clean, has no
backdoor. Prints a Markdown table: networks by verdict, and the stock rows by outcome.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from bdclean.bench.rule_simulation import table as simulated
from bdclean.record.parsing import parse_records
from bdclean.record.run import RunRecord


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench rule", description=__doc__)
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=20, help="simulated networks of each kind")
    parser.add_argument(
        "--clean", default="clean,akamaster", help="words in the names of networks without a backdoor"
    )
    options = parser.parse_args(arguments)
    if not options.records:
        print("\n".join(simulated(options.seeds)))
        return 0
    words = options.clean.split(",")
    print("| network | classes | backdoor | verdict | rows that fail | inconclusive | pass | images |")
    print("|---|---|---|---|---|---|---|---|")
    alarms, misses, total = 0, 0, Counter[bool]()
    for path in options.records:
        for record in parse_records(path.read_text(encoding="utf-8"), str(path)):
            side = record.before or record
            stem = Path(record.checkpoint.path).name.removesuffix(".safetensors")
            backdoor = not any(word in stem for word in words)
            rows = Counter(row.outcome for row in side.triggers)
            total[backdoor] += 1
            alarms += not backdoor and side.verdict == "backdoored"
            misses += backdoor and side.verdict != "backdoored"
            print(
                f"| {stem} | {record.checkpoint.classes} | {'yes' if backdoor else 'no'} | {side.verdict} "
                f"| {rows['fails']} | {rows['inconclusive']} | {rows['passes']} | {_images(record)} |"
            )
    print(
        f"\nFalse alarms: {alarms} of {total[False]} networks without a backdoor. "
        f"Misses: {misses} of {total[True]} with one."
    )
    return 0


def _images(record: RunRecord) -> int:
    if record.data is None:
        return 0
    return record.data.held_out or record.data.images
