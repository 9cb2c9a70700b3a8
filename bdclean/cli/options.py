"""The options and arguments of the commands, as Typer reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bdclean.files.text import no_path
from bdclean.record.gate import DEFAULT
from bdclean.report.formats import FORMATS
from bdclean.runs.options import SEQUELA


def given_path(text: str) -> Path:
    """Returns what an option names; raises typer.BadParameter where that is nothing."""
    why = no_path(text)
    if why is not None:
        raise typer.BadParameter(why)
    return Path(text)


def split_names(text: str | None) -> tuple[str, ...]:
    """Returns the names between the commas of `text`, each once, in their order."""
    return () if text is None else tuple(dict.fromkeys(name.strip() for name in text.split(",")))


# --- what a shell completes: nothing is looked up before it asks ---------------------------------------------


def names(noun: str) -> Callable[[], list[str]]:
    """Returns what gives the names that are registered as `noun`."""

    def known() -> list[str]:
        from bdclean.registry import TABLES

        return sorted(TABLES[noun])

    return known


# --- options ------------------------------------------------------------------------------------------------


Data = Annotated[
    Path | None,
    typer.Option(
        "--data", parser=given_path, metavar="PATH", help="Images: a folder, .tar, .tar.gz, .npz or .parquet."
    ),
]
Test = Annotated[
    Path | None,
    typer.Option(
        "--test", parser=given_path, metavar="PATH", help="Images to measure on, instead of a part of --data."
    ),
]
Labeled = Annotated[
    Path | None,
    typer.Option(
        "--labeled",
        parser=given_path,
        metavar="PATH",
        help="Images with labels: one folder per class, or in the file.",
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        parser=given_path,
        metavar="FILE",
        help="Class names in the head's order, or a CSV or list of file,label.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch", metavar="NAME", help="A name (bdclean ls architectures) or your code, FILE.py:NAME."
    ),
]
Kind = Annotated[str, typer.Option("--kind", metavar="KIND", help="auto, classifier or encoder.")]
Preprocess = Annotated[
    str,
    typer.Option(
        "--preprocess",
        metavar="NAME",
        help="auto; none, half, imagenet, cifar10, cifar100, gtsrb, clip, raw255, each also with -bgr; mnist, "
        "fashion-mnist; or mean=a/b/c,std=a/b/c. Behind any of them ,size=h/w.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="auto, cpu, cuda or cuda:N; torchrun gives each process its own."
    ),
]
Precision = Annotated[str, typer.Option("--precision", metavar="NAME", help="auto, fp32, bf16 or fp16.")]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="COUNT", min=1, help="Images at a time; chosen if not given."),
]
Limit = Annotated[
    int,
    typer.Option("--limit", metavar="COUNT", min=0, help="Use at most N images, a seeded draw; 0 is all."),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="NUMBER", min=0, help="Makes every random choice repeatable."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse the run if an image is unreadable.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read plain tensors from a pickle.")]
NoPictures = Annotated[bool, typer.Option("--no-pictures", help="Put none of the images into a record.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        autocompletion=lambda: list(FORMATS),
        metavar="NAME",
        help=f"{', '.join(FORMATS)}. Default: what a report's --out ends in, else table.",
    ),
]
Record = Annotated[
    Path | None,
    typer.Option(
        "--record", parser=given_path, metavar="PATH", help="A file, or a folder for <stem>-<sha256>.json."
    ),
]
CONDITIONS = "asr>=0.1, clean_accuracy<0.8, ...; inconclusive; never."
FailOn = Annotated[
    list[str] | None,
    typer.Option("--fail-on", metavar="CONDITION", help=f"{CONDITIONS} Default: {DEFAULT}."),
]
Triggers = Annotated[
    list[str] | None,
    typer.Option(
        "--trigger",
        metavar="SPEC",
        autocompletion=names("trigger"),
        help="NAME[:KEY=VALUE,...] or file:PATH; default the stock bank.",
    ),
]
Sequela = Annotated[
    str | None,
    typer.Option(
        "--sequela",
        metavar="NAMES",
        help=f"What a repair leaves behind, minutes each: {','.join(SEQUELA)} (path: of cleanse).",
    ),
]
Members = Annotated[
    Path | None,
    typer.Option(
        "--members",
        parser=given_path,
        metavar="PATH",
        help="For membership: images that MODEL was trained on. --limit is not about them.",
    ),
]
NonMembers = Annotated[
    Path | None,
    typer.Option(
        "--non-members",
        parser=given_path,
        metavar="PATH",
        help="For membership: others like them; 1,000 tell a rate at 1 %, 5,000 at 0.1 %.",
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on standard error.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="List every row.")]


# --- of one command ---------------------------------------------------------------------------------------------


Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Files or folders; - reads their paths.")
]
Target = Annotated[
    str,
    typer.Option("--target", metavar="CLASS", help="auto, a number, each (class) or next (label + 1)."),
]
Detectors = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        metavar="NAME",
        autocompletion=names("detector"),
        help="Runs it, else those under ten seconds; bdclean ls detectors.",
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        parser=given_path,
        metavar="FILE",
        help="A clean network like MODEL: the floor of an encoder's rates; beside a classifier in --sequela.",
    ),
]
ReportOut = Annotated[
    Path | None,
    typer.Option("--out", parser=given_path, metavar="PATH", help="Write the report there, not to stdout."),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A safetensors file, or a folder with one.")]
Recipe = Annotated[
    str,
    typer.Option("--recipe", metavar="NAME", autocompletion=names("recipe"), help="See: bdclean ls recipes."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the recipe.",
    ),
]
Head = Annotated[
    str,
    typer.Option(
        "--head", metavar="NAME", help="keep, or new: for the classes of the labeled images (ft, sft)."
    ),
]
PseudoLabels = Annotated[
    bool,
    typer.Option("--pseudo-labels", help="For a recipe that needs labels: the suspect's answers on --data."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        parser=given_path,
        metavar="PATH",
        help="Default: MODEL with .clean.safetensors; of a folder a folder, MODEL.clean, with its config.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output made from another model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same run was stopped.")]
Records = Annotated[
    list[str],
    typer.Argument(metavar="RECORD...", help="Records, or folders of them; - reads standard input."),
]
Card = Annotated[
    Path | None,
    typer.Option(
        "--card",
        parser=given_path,
        metavar="README.md",
        help="Keep the Backdoor audit section of this model card up to date; nothing else in it changes.",
    ),
]
FailOnShown = Annotated[
    list[str] | None, typer.Option("--fail-on", metavar="CONDITION", help=f"{CONDITIONS} Default: never.")
]
