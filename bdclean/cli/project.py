"""The project file: `bdclean.toml`, or `[tool.bdclean]` in `pyproject.toml`. Defaults of options, accepted findings.

    data = "images"                    # for every command that has the option,
    fail-on = ["asr>=0.1"]
    [scan]                             # or for one
    limit = 500
    [[accept]]                         # what is found in the file of this sha256, up to this day
    sha256 = "0f3a..."
    reason = "the watermark of our own model 7"
    expires = 2027-03-31

A value counts as if it had been typed, behind what was typed and behind BDCLEAN_ variables. The file may have come with
a stranger's model: it names no code, allows no pickle and lets nothing be written over.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from bdclean.cli.console import warn
from bdclean.cli.options import given_path
from bdclean.errors import UsageError
from bdclean.files.text import closest, read_text, shown
from bdclean.record.run import Acceptance, RunRecord

OWN, SHARED = "bdclean.toml", "pyproject.toml"
"""Looked for in the working directory; where there is the first, the second is not read."""
COMMANDS = ("scan", "cleanse", "report")
TYPED_ALONE = ("allow-pickle", "card", "config", "force", "out")
ENTRY = {"sha256": "64 hex digits", "reason": "words", "expires": "a date, as in 2027-03-31"}
LONGEST = 1_000_000  # characters


@dataclass(frozen=True)
class Project:
    """What holds for one command beside what was typed. `accepted`: by the sha256 of the file that was looked at."""

    context: typer.Context
    accepted: Mapping[str, Acceptance]

    def judge(self, record: RunRecord) -> RunRecord:
        """Returns the record with what is accepted of the file that its verdict is about, as of today."""
        found = self.accepted.get(record.judged_file()[1] or "", record.accepted)
        return record if found is None else replace(record, accepted=replace(found, expired=_ended(found)))

    def argv(self) -> tuple[str, ...]:
        """Returns the command line with what the file and variables say, as if typed: it repeats the run."""
        added: list[str] = []
        for flag, option in _options(self.context.command).items():
            source = self.context.get_parameter_source(option.name)
            if source is None or source.name != "DEFAULT_MAP":
                continue
            value = self.context.params[option.name]
            for each in value if isinstance(value, (list, tuple)) else [value]:
                added += [f"--{flag}"] * bool(each) if isinstance(each, bool) else [f"--{flag}", str(each)]
        command = self.context.info_name
        place = sys.argv.index(command) + 1 if command in sys.argv else len(sys.argv)
        return (*sys.argv[:place], *added, *sys.argv[place:])


def open_project(context: typer.Context, given: Path | None) -> Project:
    """Makes what the project file and variables say the defaults of this command; the file is named on standard error.

    `given` is what --config names, the null device for none. Raises UsageError where the file is not as it should be.
    """
    if context.resilient_parsing:  # a shell asks what could be typed
        return Project(context, {})
    own = _options(context.command)
    source, table = _read(given)
    accepted = _acceptances(table.pop("accept", []), source)
    said = {flag: value for flag, value in _defaults(table, source, context).items() if flag in own}
    values = {**said, **_variables(own)}
    context.default_map = {own[flag].name: _typed(value, own[flag]) for flag, value in values.items()}
    if said:
        warn(f"{source} has defaults for {', '.join(f'--{flag}' for flag in said)}.")
    for sha256, found in accepted.items():
        if _ended(found):
            warn(f"{source}: what was accepted of {sha256[:8]} ended on {found.expires} and does not count.")
    return Project(context, accepted)


Config = Annotated[
    Any,  # a path as it is typed, a Project as the callback returns it
    typer.Option(
        "--config",
        parser=given_path,
        envvar="BDCLEAN_CONFIG",
        show_envvar=False,
        callback=open_project,
        is_eager=True,
        metavar="FILE",
        help=f"Defaults and accepted findings. Default: {OWN} here, or [tool.bdclean] in {SHARED}.",
    ),
]


def _read(given: Path | None) -> tuple[str, dict[str, Any]]:
    """The name and the content of the project file; it is empty where there is none."""
    if given is not None and str(given) == os.devnull:
        return "", {}
    path = str(given) if given is not None else OWN if os.path.lexists(OWN) else SHARED
    if given is None and not os.path.lexists(path):
        return "", {}
    text = read_text(path, "a project file, TOML of bdclean's")
    if given is None and path == SHARED and "bdclean" not in text:
        return "", {}
    import tomllib

    if len(text) > LONGEST:
        raise UsageError(
            f"{shown(path)} has {len(text):,} characters: a project file has at most {LONGEST:,}."
        )
    try:
        table = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        why = f": {error}" if isinstance(error, tomllib.TOMLDecodeError) else ""
        raise UsageError(f"{shown(path)} is not TOML{why.rstrip('.')}.") from None
    if os.path.basename(path) != SHARED:
        return shown(path), table
    tools = table.get("tool")
    own = tools.get("bdclean") if isinstance(tools, dict) else None
    if given is not None and not isinstance(own, dict):
        raise UsageError(f"{shown(path)} has no [tool.bdclean].")
    return f"{shown(path)}, [tool.bdclean]", own if isinstance(own, dict) else {}


def _defaults(table: dict[str, Any], source: str, context: typer.Context) -> dict[str, Any]:
    """What the file says for this command, by option; raises UsageError where it is wrong, for whatever command."""
    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    known = {name: _options(commands[name]) for name in COMMANDS}
    sections = {name: table.pop(name) for name in COMMANDS if isinstance(table.get(name), dict)}
    for name, section in sections.items():
        _check(section, known[name], (), f"{source}, [{name}]")
    everywhere = {flag: option for options in known.values() for flag, option in options.items()}
    _check(table, everywhere, (*COMMANDS, "accept"), source)
    return {**table, **sections.get(context.info_name or "", {})}


def _variables(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the environment says: BDCLEAN_FAIL_ON is --fail-on; several of one option have spaces between them."""
    named = {flag: f"BDCLEAN_{flag.upper().replace('-', '_')}" for flag in options if flag != "config"}
    said = {flag: os.environ.get(name, "") for flag, name in named.items()}
    return {flag: text.split() if options[flag].multiple else text for flag, text in said.items() if text}


def _options(command: Any) -> dict[str, Any]:
    """What may be typed for a command, by the long names without their dashes."""
    return {max(o.opts, key=len)[2:]: o for o in command.params if o.param_type_name == "option"}


def _check(section: Mapping[str, Any], options: Mapping[str, Any], more: Iterable[str], source: str) -> None:
    """Raises UsageError on a key that is no option, on one for the command line alone, and on a value of another kind.

    What else a value must be is found out as of one that was typed.
    """
    for key, value in section.items():
        if key in TYPED_ALONE or (key == "arch" and _is_code(value)):
            what = f"--{key} {value}" if key == "arch" else f"--{key}"
            raise UsageError(
                f"{source} cannot set {shown(what)}: type it, a file may come with a stranger's model."
            )
        if key not in options:
            names = [*options, *more]
            raise UsageError(
                f"{source} has no use for {shown(key)!r}: {closest(key, set(names) - set(TYPED_ALONE))}"
            )
        option = options[key]
        items = value if isinstance(value, list) and option.multiple else [value]
        if not all(isinstance(item, bool if option.is_flag else (str, int, float)) for item in items) or (
            not option.is_flag and any(isinstance(item, bool) for item in items)
        ):
            kind = "true or false" if option.is_flag else "text or a number"
            kind += ", or a list of them" if option.multiple else ""
            raise UsageError(f"{source}: {key} is {shown(repr(value))}, expected {kind}.")


def _is_code(arch: Any) -> bool:
    return isinstance(arch, str) and ":" in arch and not arch.startswith("timm:")


def _typed(value: Any, option: Any) -> Any:
    """A value as the words that would have been typed for it."""
    if option.is_flag:
        return value
    if option.multiple:
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    return str(value)


def _acceptances(entries: Any, source: str) -> dict[str, Acceptance]:
    """What is accepted, by sha256; raises UsageError where one lacks something or has too much."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{source}: write what is accepted as [[accept]], with {', '.join(ENTRY)}.")
    found: dict[str, Acceptance] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{source}, [[accept]] {number}"
        for key in entry:
            if key not in ENTRY:
                raise UsageError(f"{where} has no use for {shown(key)!r}: {closest(key, ENTRY)}")
        sha256, reason, day = (
            str(entry.get("sha256", "")).lower(),
            entry.get("reason"),
            _day(entry.get("expires")),
        )
        for key, fits in (
            ("sha256", re.fullmatch("[0-9a-f]{64}", sha256)),
            ("reason", isinstance(reason, str) and reason.strip()),
            ("expires", day),
        ):
            if not fits:
                said = f"{key} is {shown(repr(entry[key]))}" if key in entry else f"{key} is missing"
                raise UsageError(f"{where}: {said}, expected {ENTRY[key]}.")
        if sha256 in found:
            raise UsageError(f"{where}: {sha256[:8]} is accepted twice: leave one of them.")
        found[sha256] = Acceptance(str(reason).strip(), str(day))
    return found


def _day(value: Any) -> date | None:
    """The day that TOML or a text names, None for anything else."""
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            return None
    return value if isinstance(value, date) else None


def _ended(acceptance: Acceptance) -> bool:
    """Whether its last day is over; one whose day cannot be read counts no more either."""
    last = _day(acceptance.expires)
    return last is None or last < date.today()
