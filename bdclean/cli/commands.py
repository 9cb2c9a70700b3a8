"""The command line: parses, prints, draws progress, exits. The one place where errors become exit codes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdclean.cli import examples, options
from bdclean.cli.console import emit, warn
from bdclean.cli.project import Config
from bdclean.errors import Refused, UsageError

if TYPE_CHECKING:
    from bdclean.cli.progress import Progress
    from bdclean.data.shared import Shared
    from bdclean.record.gate import Gate
    from bdclean.record.run import RunRecord


# What a command needs is imported by its job: the help and the lists are to appear at once.
Job = Callable[[], int]
"""What a command has parsed. It runs after Typer is done, because Typer turns Ctrl-C and broken pipes into exit 1."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode=None,
    help="Find backdoors in vision checkpoints, make cleansed drop-in replacements, and show the evidence.",
    epilog=examples.ALL,
)


def _listed() -> list[str]:
    """Returns what stands behind `bdclean ls`."""
    from bdclean.cli.catalogue import LISTS, SINGULAR

    return [*LISTS, *SINGULAR]


def _named(context: typer.Context) -> list[str]:
    """Returns what stands behind that."""
    from bdclean.cli.catalogue import SINGULAR

    return sorted(SINGULAR.get(context.params.get("what") or "", ()))


What = Annotated[
    str | None,
    typer.Argument(
        metavar="WHAT",
        autocompletion=_listed,
        help="recipes, triggers, detectors, architectures, schema; or recipe, trigger, detector with a NAME.",
    ),
]
Named = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        autocompletion=_named,
        help="One of them, in full.",
    ),
]


# --- commands -----------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, with its commit where that is known.")
    ] = False,
) -> None:
    if version:
        from bdclean.cli.version import named

        emit(f"bdclean {named()}\n")
        raise typer.Exit


@app.command(epilog=examples.SCAN)
def scan(
    models: options.Models,
    data: options.Data = None,
    test: options.Test = None,
    labeled: options.Labeled = None,
    classes: options.Classes = None,
    trigger: options.Triggers = None,
    target: options.Target = "auto",
    detector: options.Detectors = None,
    reference: options.Reference = None,
    sequela: options.Sequela = None,
    members: options.Members = None,
    non_members: options.NonMembers = None,
    fail_on: options.FailOn = None,
    arch: options.Arch = None,
    kind: options.Kind = "auto",
    preprocess: options.Preprocess = "auto",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = None,
    limit: options.Limit = 2000,
    seed: options.Seed = 0,
    strict: options.Strict = False,
    allow_pickle: options.AllowPickle = False,
    no_pictures: options.NoPictures = False,
    form: options.Format = None,
    out: options.ReportOut = None,
    record: options.Record = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    project: Config = None,
) -> Job:
    """Look for backdoors in checkpoints: stamp triggers on images and measure where they send the predictions.

    Exits 1 if one is found. Only the triggers that were tried are judged; others are not excluded.
    """
    from bdclean.runs.options import Inputs

    inputs = Inputs(
        data=data, test=test, labeled=labeled, classes=classes, arch=arch, kind=kind, preprocess=preprocess,
        reference=reference,
        device=device, precision=precision, batch_size=batch_size, limit=limit, seed=seed, strict=strict,
        allow_pickle=allow_pickle, pictures=not no_pictures, argv=project.argv(),
        sequela=options.split_names(sequela), members=members, non_members=non_members,
    )  # fmt: skip

    def job() -> int:
        from bdclean.cli.arguments import (
            check_detectors,
            check_inputs,
            check_sequela,
            check_target,
            check_there,
            check_triggers,
            expand_models,
        )
        from bdclean.cli.batch import run_all
        from bdclean.cli.console import Shown
        from bdclean.cli.places import Records, check_place, record_place, report_place
        from bdclean.record import gate
        from bdclean.report.formats import choose_format

        judge = gate.parse(fail_on or ())
        place = report_place(out)
        shown = Shown(choose_format(form, place), place, verbose)
        shown.check()
        triggers = check_triggers(trigger)
        detectors = check_detectors(detector)
        if data is None and test is None and labeled is None:
            raise UsageError("scan needs images: give --data PATH (or --test, or --labeled).")
        aim = check_target(target)
        check_inputs(inputs)
        check_sequela(inputs, of_two=False)
        paths = expand_models(models)
        files = [Path(path) for path in paths]
        if place is not None:
            check_place(place, files)
        kept = record_place(record)
        if place is not None and kept is not None and place.resolve() == kept.resolve():
            raise UsageError(
                f"{place} cannot be both the report and the record: give another --out or --record."
            )
        records = Records.at(kept, files)

        @cache
        def shared() -> Shared:  # among the models; made late, because it imports torch
            from bdclean.data.shared import Shared

            return Shared()

        def one(path: str, progress: Progress) -> RunRecord:
            check_there(path, inputs, triggers)
            from bdclean.data.processors import use_usable
            from bdclean.runs.scan import scan as work
            from bdclean.training.parallel import join

            use_usable()
            join(inputs.device)
            return work(
                Path(path),
                inputs,
                triggers=triggers,
                target=aim,
                detectors=detectors,
                fail_on=tuple(fail_on or (gate.DEFAULT,)),
                tell=progress,
                shared=shared() if len(paths) > 1 else None,
            )

        return run_all("scan", paths, one, judge, shown, records, quiet, project)

    return job


@app.command(epilog=examples.CLEANSE)
def cleanse(
    model: options.Model,
    data: options.Data = None,
    test: options.Test = None,
    labeled: options.Labeled = None,
    classes: options.Classes = None,
    recipe: options.Recipe = "auto",
    settings: options.Settings = None,
    head: options.Head = "keep",
    pseudo_labels: options.PseudoLabels = False,
    trigger: options.Triggers = None,
    out: options.Out = None,
    force: options.Force = False,
    resume: options.Resume = False,
    sequela: options.Sequela = None,
    members: options.Members = None,
    non_members: options.NonMembers = None,
    fail_on: options.FailOn = None,
    arch: options.Arch = None,
    kind: options.Kind = "auto",
    preprocess: options.Preprocess = "auto",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = None,
    limit: options.Limit = 5000,
    seed: options.Seed = 0,
    strict: options.Strict = False,
    allow_pickle: options.AllowPickle = False,
    no_pictures: options.NoPictures = False,
    form: options.Format = None,
    record: options.Record = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    project: Config = None,
) -> Job:
    """Make a cleansed drop-in replacement and measure it before and after. The input is never overwritten.

    Triggers only measure: a recipe never sees them, nor the images that are measured on.
    """
    from bdclean.runs.options import Inputs

    inputs = Inputs(
        data=data, test=test, labeled=labeled, classes=classes, arch=arch, kind=kind, preprocess=preprocess,
        device=device, precision=precision, batch_size=batch_size, limit=limit, seed=seed, strict=strict,
        allow_pickle=allow_pickle, pictures=not no_pictures, argv=project.argv(),
        sequela=options.split_names(sequela), members=members, non_members=non_members,
    )  # fmt: skip

    def job() -> int:
        from bdclean.cli.arguments import (
            check_head,
            check_inputs,
            check_paths,
            check_recipe,
            check_sequela,
            check_there,
            check_triggers,
        )
        from bdclean.cli.batch import run_all
        from bdclean.cli.console import Shown
        from bdclean.cli.places import Records, record_place
        from bdclean.files.writing import alone, check, is_special, sweep
        from bdclean.record import gate
        from bdclean.registry import parse_settings
        from bdclean.report.formats import choose_format
        from bdclean.runs.places import default_output, is_folder, record_beside, resume_state

        judge = gate.parse(fail_on or ())
        shown = Shown(choose_format(form), None, verbose)
        shown.check()
        check_paths("MODEL", [model])
        triggers, chosen = check_triggers(trigger), parse_settings(settings or ())
        check_recipe(recipe, chosen)
        check_head(head)
        if data is None and labeled is None:
            raise UsageError(
                "cleanse needs images: give --data PATH (they need no labels), or --labeled PATH."
            )
        check_inputs(inputs)
        check_sequela(inputs, of_two=True)
        output = default_output(Path(model), out, head == "new")
        folder = is_folder(output, Path(model), head == "new")
        place = record_place(record) or record_beside(output, folder)
        state = resume_state(output)
        states = (state, state.with_suffix(".json"))
        if place in states:
            raise UsageError(f"{place} is where the resume state goes: give another --record.")
        if place == output:
            raise UsageError(
                f"{place} cannot be both the model and its record: give another --out or --record."
            )
        if is_special(output):
            raise Refused(f"{output} is no regular file: give --out a file name.")
        # a file in a folder that is there, else as good a place as the folder: whether this one may be is told later
        check(output / place.name if folder and os.path.isdir(output) else output)
        records = Records.at(place, [Path(model)], spent=states)

        def one(path: str, progress: Progress) -> RunRecord:
            check_there(path, inputs, triggers)
            from bdclean.data.processors import use_usable
            from bdclean.runs.cleanse import cleanse as work
            from bdclean.training.parallel import join

            use_usable()
            join(inputs.device)
            return work(
                Path(path),
                inputs,
                recipe=recipe,
                settings=chosen,
                new_head=head == "new",
                pseudo_labels=pseudo_labels,
                triggers=triggers,
                out=output,
                force=force,
                resume=resume,
                fail_on=tuple(fail_on or (gate.DEFAULT,)),
                tell=progress,
            )

        with alone(output):
            for path in states if folder else (output, *states):
                sweep(path)
            if os.path.exists(state) and not resume:
                warn(f"{state} of a run that was stopped is not used and will be replaced: --resume goes on.")
            return run_all("cleanse", [model], one, judge, shown, records, quiet, project)

    return job


@app.command(epilog=examples.REPORT)
def report(
    records: options.Records,
    out: options.ReportOut = None,
    form: options.Format = None,
    card: options.Card = None,
    fail_on: options.FailOnShown = None,
    verbose: options.Verbose = False,
    project: Config = None,
) -> Job:
    """Show records again, in any format; several are compared. Exits 0 unless --fail-on says otherwise."""

    def job() -> int:
        from bdclean.cli.arguments import check_paths
        from bdclean.cli.console import Shown
        from bdclean.cli.places import check_card, check_place, gather, report_place, update_card
        from bdclean.record import gate
        from bdclean.report.formats import choose_format

        judge = gate.parse(fail_on or ())
        place = report_place(out)
        shown = Shown(choose_format(form, place), place, verbose)
        check_paths("RECORD", records)
        found, torn, files = gather(records)
        if place is not None:
            check_place(place, files)
        if card is not None:
            check_card(card, place, files)
        if not found:
            raise Refused(str(torn[0]) if len(torn) == 1 else f"{', '.join(records)}: no run in it.")
        found = [project.judge(record) for record in found]
        for error in torn:
            warn(f"left out: {error}")
        if card is not None and torn:
            warn(f"{card} is left as it is: its audit would lack what could not be read.")
        elif card is not None:
            update_card(card, found)
        shown.show(found)
        codes = [3] if torn else []
        return gate.exit_code([*codes, *(_judged(judge, found) if fail_on else [0])])

    return job


@app.command(epilog=examples.LS)
def ls(
    what: What = None,
    name: Named = None,
) -> Job:
    """List what there is, or show one recipe, trigger or detector with its settings and limits."""

    def job() -> int:
        from bdclean.cli.catalogue import listing, lists

        emit(lists() if what is None else listing(what, name))
        return 0

    return job


@app.command(epilog=examples.DOCTOR)
def doctor() -> Job:
    """Show versions, devices, threads and disk, for a bug report."""

    def job() -> int:
        from bdclean.cli.doctor import doctor as examine

        found, usable = examine()
        emit(found)
        return 0 if usable else 3

    return job


def _judged(judge: Gate, records: Sequence[RunRecord]) -> list[int]:
    """Returns the exit codes of records shown again: what --fail-on asks for, and nothing else."""
    codes = []
    for record in records:
        reached, missing = judge.check(record)
        for line in [*reached, *missing]:
            warn(f"{record.checkpoint.path}: {line}")
        codes.append(1 if reached else 3 if missing else 0)
    return codes
