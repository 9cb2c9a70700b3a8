"""The *Backdoor audit* section of a model card: made anew from records, with every other byte of the file kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from bdclean.errors import Refused
from bdclean.files.text import MARKS
from bdclean.record.run import FAILS, INCONCLUSIVE, RAN, SUSPICIOUS, RunRecord
from bdclean.report import markdown, wording
from bdclean.report.document import LIMITS, RATES, Page, sentence, summary, was
from bdclean.report.ranking import rank
from bdclean.report.rows import Table, success

TITLE = "Backdoor audit"
BEGIN, END = "<!-- bdclean audit: begin -->", "<!-- bdclean audit: end -->"
NOTE = "Written by `bdclean report RECORD --card FILE`, which replaces what stands between its two marks."
FRONT_MATTER = re.compile(r"---[ \t]*\r?\n.*?^(---|\.\.\.)[ \t]*\r?$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(rf"^ {{0,3}}#{{1,6}}[ \t]+{TITLE}[ \t]*#*[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
TITLED = ("model", "written")  # facts of a report that a heading of the card says
MOST_ROWS = 10  # that do not pass: a card is no report


def updated(card: bytes, records: Sequence[RunRecord], source: str) -> bytes:
    """Returns the bytes of a card with its audit section made of `records`, at the end where it had none.

    The section takes the card's encoding (UTF-8, or UTF-16 with a mark) and line endings; all else stays byte for byte.
    Raises Refused, naming the card as `source`, where that is no text or it is not clear which section is to be
    replaced.
    """
    mark, encoding = next(((m, e) for m, e in MARKS if card.startswith(m)), (b"", "utf-8"))
    try:
        text = card[len(mark) :].decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise Refused(f"{source} is not text: expected a model card, Markdown as UTF-8 or UTF-16.")
    ending = re.search(r"\r\n|\n|\r", text)
    newline = ending[0] if ending else "\n"
    section = newline.join([BEGIN, *_lines(records), END])
    place = _place(text, source)
    if place is None:
        gap = "" if not text else newline * 2
        gap = gap.removeprefix(_blank(text, newline))
        last = newline if not text or text.endswith(("\n", "\r")) else ""
        text = f"{text}{gap}{section}{last}"
    else:
        text = f"{text[: place[0]]}{section}{text[place[1] :]}"
    return mark + text.encode(encoding)


def _blank(text: str, newline: str) -> str:
    """The line endings that the text ends in, at most two."""
    return next((newline * count for count in (2, 1) if text.endswith(newline * count)), "")


def _place(text: str, source: str) -> tuple[int, int] | None:
    """Where the section begins and ends; None where there is none. Front matter is never looked into."""
    matter = FRONT_MATTER.match(text)
    first = matter.end() if matter else 0
    begins, ends = (
        [at.start() for at in re.finditer(re.escape(m), text) if at.start() >= first] for m in (BEGIN, END)
    )
    own = (begins[0], ends[0] + len(END)) if begins and ends else (0, 0)
    others = [at.start() for at in HEADING.finditer(text, first) if not own[0] <= at.start() < own[1]]
    if len(begins) > 1 or len(ends) > 1 or (begins and others):
        lines = sorted({_line(text, at) for at in (*begins, *others)} or {_line(text, at) for at in ends})
        raise Refused(
            f"{source} has several audit sections (lines {', '.join(map(str, lines))}): leave one of them; nothing was "
            "changed."
        )
    if len(begins) != len(ends) or own[0] > own[1]:
        line = _line(text, (begins or ends)[0])
        raise Refused(
            f"{source} has an audit section that is not whole (line {line}): it begins with {BEGIN} and ends with "
            f"{END}; nothing was changed."
        )
    if others:
        raise Refused(
            f"{source} has a section {TITLE} that is not bdclean's (line {_line(text, others[0])}): rename it, or put "
            f"it between {BEGIN} and {END} to have it replaced; nothing was changed."
        )
    return own if begins else None


def _line(text: str, at: int) -> int:
    """The number of the line that a place is in, from 1."""
    return len(text[: at + 1].splitlines())


def _lines(records: Sequence[RunRecord]) -> list[str]:
    pages = [markdown.render([_page(record)], level=3).strip("\n") for record in records]
    return "\n\n".join([f"## {TITLE}", NOTE, *pages, LIMITS]).split("\n")


def _page(record: RunRecord) -> Page:
    """What a card says of one run: the verdict, what was tried and when, and the rows that do not pass."""
    ran = record.outcome == RAN
    found = Page(
        record.output.path if record.output is not None else record.checkpoint.path,
        verdict=record.verdict if ran else f"{record.verdict} ({record.outcome})",
        sentence=f"{was(record)}{sentence(record)}",
        facts=[
            (name, value)
            for name, value in (*_facts(record), *summary(record))
            if value and name not in TITLED
        ],
    )
    rows = sorted((row for row in record.rows() if row.outcome in (FAILS, INCONCLUSIVE)), key=rank)
    if rows:
        cells = [
            [
                row.trigger,
                wording.NOTHING if row.target is None else str(row.target),
                success(row),
                row.outcome,
            ]
            for row in rows[:MOST_ROWS]
        ]
        more = f" {len(rows) - MOST_ROWS} more do not pass, either." if len(rows) > MOST_ROWS else ""
        columns = ["trigger", "target", "ASR %", "outcome"]
        found.tables = [Table("Triggers that do not pass", columns, cells, f"{RATES}{more}")]
    return found


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """When and with what the run was made, on which bytes, and what it tried."""
    version = record.versions.get("bdclean")
    said = [
        record.started[:10],  # the day, of ISO 8601
        f"bdclean {version}" if version else "",
        "" if record.seed is None else f"seed {record.seed}",
    ]
    sha256 = record.output.sha256 if record.output is not None else record.checkpoint.sha256
    firing = [finding.detector for finding in record.findings if finding.verdict == SUSPICIOUS]
    detectors = [
        f"{name} (suspicious)" if name in firing else name
        for name in dict.fromkeys(finding.detector for finding in record.findings)
    ]
    return [
        ("checked", ", ".join(each for each in said if each)),
        ("sha256", sha256 or ""),
        ("tried", _tried(record)),
        ("looked for without a trigger", ", ".join(detectors)),
    ]


def _tried(record: RunRecord) -> str:
    """Which triggers were tried, how many settings of each, and what the worst row of each came to."""
    worst = {row.trigger: row for row in sorted(record.rows(), key=rank, reverse=True)}
    names = Counter(trigger.partition(":")[0] for trigger in worst)
    outcomes = Counter(row.outcome for row in sorted(worst.values(), key=rank))
    if not worst:
        return "no trigger"
    return (
        f"{len(worst)} triggers ({', '.join(f'{name} {count}' for name, count in sorted(names.items()))}): "
        f"{', '.join(f'{name} {count}' for name, count in outcomes.items())}"
    )
