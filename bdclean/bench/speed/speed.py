"""How fast bdclean is, as ratios measured side by side in one run, which a busy machine hurts alike.

`python -m bdclean.bench speed [--device cuda|cpu] [--only NAME] [--data cifar10.tar.gz] [--checkpoints DIR]
[--records DIR] [--work DIR]`. Contenders run in processes of their own, in turn; shown is the median of the pairs'
ratios, their lowest and highest. With `--work` every cell is one JSON file there, and cells that exist are not measured
again. Without `--data` the sample models and their images are used alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from bdclean.bench import tables
from bdclean.bench.cifar10 import unpack
from bdclean.bench.encoders import small_encoder, write
from bdclean.bench.speed.contenders import (
    CountingControls,
    Subject,
    bare_forward,
    forwarded_through,
    measuring,
    open_bench,
    plain_distillation,
    plain_steps,
    recipe_steps,
    whole_scan,
)
from bdclean.bench.speed.pairs import CLOCKS, Cell, Worker, interleaved, process, ratios
from bdclean.measuring.assessment import assess
from bdclean.measuring.rows import CONTROL_IMAGES
from bdclean.measuring.trial import SCREENED
from bdclean.progress import quiet
from bdclean.recipes.inoculate import Inoculate
from bdclean.record.run import BACKDOORED, RAN, RunRecord
from bdclean.runs.scan import scan
from bdclean.triggers.bank import make_triggers

SAMPLES = Path(__file__).parents[3] / "sample_models"
PASSES_OVER = 1000
"""A scan's forward passes are counted with so many images."""


@dataclass(frozen=True)
class Place:
    """Where a run of the table finds its networks and images, and how often it repeats."""

    subjects: tuple[Subject, ...]
    work: Path
    records: Path | None
    repetitions: int

    @property
    def smallest(self) -> Subject:
        return self.subjects[-1]


def scanning(place: Place) -> Iterator[Cell]:
    """(1) Images a second of a scan over those of a bare forward loop of the same network at its best batch."""
    for subject in place.subjects:
        with Worker(bare_forward, subject) as bare:
            for make, what in ((measuring, "measuring"), (whole_scan, "file to record")):
                with Worker(make, subject) as ours:
                    mine, theirs = interleaved(ours, bare, place.repetitions)
                yield Cell.of(
                    f"scan-{'measure' if make is measuring else 'whole'}-{subject.name}",
                    f"scan over bare forward passes, {what}, {subject.name}",
                    ratios(mine, theirs),
                    ">= 0.9",
                    f"{sorted(mine)[len(mine) // 2]:,.0f} over {sorted(theirs)[len(theirs) // 2]:,.0f} images/s",
                    ours=mine,
                    theirs=theirs,
                )


def screening(place: Place) -> Iterator[Cell]:
    """(2) Images forwarded by screening and what it lets through, over every trigger of the bank on every image.

    And the forward passes of a whole scan, with its controls and detectors, over the images.
    """
    for subject in place.subjects:
        suspect, images = subject.read()
        bench = open_bench(subject, suspect, images)
        triggers = [
            CountingControls(trigger)
            for trigger in make_triggers((), (images.images.shape[2], images.images.shape[3]))
        ]
        through = forwarded_through(bench)
        rows = [measured.row for measured in assess(bench, triggers)]
        forwarded = through()
        everything = len(triggers) * len(images)
        share = (forwarded - sum(trigger.stamped for trigger in triggers)) / everything
        with_controls = everything + len(triggers) * 19 * min(CONTROL_IMAGES, len(images))
        survivors = sum(row.target_source == SCREENED for row in rows)
        yield Cell.of(
            f"screening-{subject.name}",
            f"share of images forwarded, {subject.name}",
            [share],
            "<= 0.15",
            f"{survivors} of {len(triggers)} triggers measured, {len(images)} images; "
            f"with controls {forwarded / with_controls:.3f}",
        )
        record = scan(subject.file, replace(subject.inputs, limit=PASSES_OVER), tell=quiet)
        assert record.forward_passes is not None and record.data is not None
        yield Cell.of(
            f"passes-{subject.name}",
            f"forward passes of a scan over the images, {subject.name}",
            [record.forward_passes],
            f"<= {25 if record.verdict == BACKDOORED else 12}",
            f"{record.verdict}, {record.data.images} images, {len(triggers)} triggers",
        )


def bcu(place: Place) -> Iterator[Cell]:
    """(3) Seconds of an update of a plain BCU over those of the recipe `bcu`."""
    for subject in place.subjects:
        steps = 4
        with Worker(recipe_steps, subject, "bcu", {}, "bcu", steps) as ours:
            for name, from_disk, gradients, note in (
                ("files", True, True, "image files opened each epoch, teacher with gradients"),
                (
                    "memory",
                    False,
                    False,
                    "Pillow images in memory, teacher without gradients, as the authors' code",
                ),
            ):
                with Worker(plain_steps, subject, steps, from_disk, gradients) as plain:
                    found, theirs = interleaved(ours, plain, place.repetitions)
                mine = [stages["bcu"][1] for stages in found]
                yield Cell.of(
                    f"bcu-{name}-{subject.name}",
                    f"plain BCU over bcu, an update, {subject.name}",
                    ratios(theirs, mine),
                    f">= {10 if subject.device.startswith('cuda') else 5}" if gradients else "",
                    f"{note}; {sorted(theirs)[len(theirs) // 2]:.3g} over {sorted(mine)[len(mine) // 2]:.3g} s",
                    ours=mine,
                    theirs=theirs,
                )


def encoders(place: Place) -> Iterator[Cell]:
    """(8) An encoder's scan over bare forward passes, and seconds of an update of a plain distillation over ours.

    The weights are random: what is timed does not depend on them.
    """
    file = place.work / "encoder.safetensors"
    write(small_encoder(0), {}, file)
    subject = replace(place.subjects[0], name="encoder", file=file, kind="encoder")
    with Worker(bare_forward, subject) as bare, Worker(whole_scan, subject) as ours:
        mine, theirs = interleaved(ours, bare, place.repetitions)
    yield Cell.of(
        "scan-whole-encoder",
        "scan over bare forward passes, file to record, encoder",
        ratios(mine, theirs),
        ">= 0.9",
        f"{sorted(mine)[len(mine) // 2]:,.0f} over {sorted(theirs)[len(theirs) // 2]:,.0f} images/s, "
        f"{subject.limit} images of {subject.images.name}",
        ours=mine,
        theirs=theirs,
    )
    steps = 4
    with Worker(plain_distillation, subject, steps) as plain:
        for name, settings, stage in (
            ("distill", {"student": "void"}, "distill-0"),
            ("mimic", {"mi": "uniform"}, "mimic"),
        ):
            with Worker(recipe_steps, subject, name, settings, stage, steps) as recipe:
                found, others = interleaved(recipe, plain, place.repetitions)
            seconds = [stages[stage][1] for stages in found]
            yield Cell.of(
                f"{name}-encoder",
                f"plain distillation over {name}, an update, encoder",
                ratios(others, seconds),
                ">= 4",
                "Pillow images in memory, teacher with gradients, three passes of the student, hooks set anew; "
                f"{sorted(others)[len(others) // 2]:.3g} over {sorted(seconds)[len(seconds) // 2]:.3g} s",
                ours=seconds,
                theirs=others,
            )


def inoculation(place: Place) -> Iterator[Cell]:
    """(4) Seconds of inoculate over those of bcu at its 100 epochs: updates timed, then multiplied by their number."""
    subject = place.subjects[0]
    short = 10
    with (
        Worker(recipe_steps, subject, "inoculate", {"inversion_steps": str(short)}, "inoculate", 10) as ours,
        Worker(recipe_steps, subject, "bcu", {}, "bcu", 4) as theirs,
    ):
        mine, others = interleaved(ours, theirs, max(2, place.repetitions // 2))
    whole = Inoculate().inversion_steps / short
    estimates = [
        (
            sum(math.prod(found[name]) * (whole if name.startswith("invert") else 1) for name in found),
            math.prod(other["bcu"]),
        )
        for found, other in zip(mine, others, strict=True)
    ]
    seconds = sorted(estimates)[len(estimates) // 2]
    yield Cell.of(
        f"inoculate-bcu-{subject.name}",
        f"inoculate over bcu at 100 epochs, seconds, {subject.name}",
        [a / b for a, b in estimates],
        "",
        f"estimated from timed updates: {seconds[0]:,.0f} over {seconds[1]:,.0f} s; {subject.limit} images; "
        + results(place.records),
        steps=[mine[0], others[0]],
    )


def results(records: Path | None) -> str:
    """Accuracy, attack success and seconds of both recipes in records of the `cifar10` bench, in one sentence."""
    if records is None:
        return "results: see the cifar10 bench"
    found = []
    for path in sorted(records.glob("*.json")):
        try:
            record = RunRecord.from_json(json.loads(path.read_text()))
        except Exception:
            continue  # another file's JSON
        if record.recipe is None or record.recipe.name not in ("inoculate", "bcu") or record.outcome != RAN:
            continue
        accuracy = record.measure("clean_accuracy")
        worst = max((row.asr.value or 0 for row in record.triggers if row.asr), default=0.0)
        shown = "" if accuracy is None or accuracy.value is None else f"accuracy {100 * accuracy.value:.2f}, "
        found.append(
            f"{path.stem}: {record.verdict}, {shown}highest ASR {100 * worst:.1f}, {record.seconds:.0f} s"
        )
    return "; ".join(found) or f"no records of either in {records}"


def starting(place: Place) -> Iterator[Cell]:
    """(5) Seconds of `--help`, `ls` and `report` over those of `python -c "import typer, rich"`."""
    record = place.work / "start.json"
    subject = replace(place.smallest, limit=200)
    scan(subject.file, subject.inputs, tell=quiet).write(record)
    bare = (sys.executable, "-c", "import typer, rich")
    clock = place.smallest.clock
    for arguments in (("--help",), ("ls", "recipes"), ("report", str(record))):
        command = (sys.executable, "-m", "bdclean", *arguments)
        mine, theirs = interleaved(
            partial(seconds_of, command, clock), partial(seconds_of, bare, clock), 5 * place.repetitions
        )
        yield Cell.of(
            f"start-{arguments[0].strip('-')}",
            f"start of {' '.join(('bdclean', arguments[0]))} over importing typer and rich",
            ratios(mine, theirs),
            "<= 1.5",
            f"{1000 * sorted(mine)[len(mine) // 2]:.0f} over {1000 * sorted(theirs)[len(theirs) // 2]:.0f} ms",
        )


def seconds_of(command: tuple[str, ...], clock: str) -> float:
    ended = process(command)
    return ended.cpu if clock == "cpu" else ended.wall


RECOGNISE = """
import sys, time
import torch
first = time.perf_counter()
import torchvision
start = time.perf_counter()
from bdclean.networks.checkpoint.checkpoint import Checkpoint
found = Checkpoint.read(sys.argv[1])
print(time.perf_counter() - start, found.arch.name, start - first)
"""


RECOGNISE_ALL = """
import time
from bdclean.networks.recognition.identify import identify
from bdclean.networks.recognition.recognition import build_shapes, well_known
made = {proposal.name: build_shapes(proposal)[1] for proposal in well_known(1000)}
identify(made["resnet18"], None, None)
for name, shapes in made.items():
    start = time.perf_counter()
    identify(shapes, None, None)
    print(time.perf_counter() - start, name)
"""


def recognition(place: Place) -> Iterator[Cell]:
    """(6) Seconds from torch and torchvision imported to a checkpoint recognised and read, or recognised alone."""
    everything = subprocess.run(
        [sys.executable, "-c", RECOGNISE_ALL], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    slowest = sorted(((float(seconds), name) for seconds, name in map(str.split, everything)), reverse=True)
    yield Cell.of(
        "recognition-slowest",
        f"recognition of the slowest of {len(slowest)} known networks by names and shapes, seconds",
        [slowest[0][0]],
        "<= 1",
        f"{slowest[0][1]}; next {slowest[1][1]} {slowest[1][0]:.2f}; median {slowest[len(slowest) // 2][0]:.2f}",
    )
    features = torchvision.models.vgg16_bn(num_classes=10).features
    made = {
        "torchvision-resnet50": torchvision.models.resnet50(),
        "vgg16-small": nn.ModuleDict({"features": features, "classifier": nn.Linear(512, 10)}),
    }
    files = {subject.name: subject.file for subject in place.subjects}
    for name, network in made.items():
        files[name] = place.work / f"{name}.safetensors"
        save_file(dict(network.state_dict()), files[name])
    for name, file in files.items():
        found = [
            subprocess.run(
                [sys.executable, "-c", RECOGNISE, str(file)], capture_output=True, text=True, check=True
            ).stdout.split()
            for _ in range(place.repetitions)
        ]
        yield Cell.of(
            f"recognition-{name}",
            f"recognition of {name}, seconds after torch and torchvision are imported",
            [float(words[0]) for words in found],
            "<= 1",
            f"read as {found[0][1]}, {file.stat().st_size / 2**20:.1f} MiB; torchvision's import takes "
            f"{min(float(words[2]) for words in found):.2f} s",
        )


IMPORTED = "import bdclean.runs.scan, bdclean.runs.cleanse, bdclean.recipes.inoculate"


def memory(place: Place) -> Iterator[Cell]:
    """(7) Resident memory of scan and cleanse beyond that of the imported libraries, over images + network."""
    libraries = [process((sys.executable, "-c", IMPORTED)).peak_mib for _ in range(place.repetitions)]
    for subject in place.subjects:
        _, images = subject.read()
        payload = (images.images.numel() + subject.file.stat().st_size) / 2**20
        shared = [
            "--data",
            str(subject.images),
            "--limit",
            str(subject.limit),
            "--device",
            subject.device,
            "-q",
        ]
        # One trigger of each kind: more of them take longer, not more room.
        shared += ["--trigger", "badnets", "--trigger", "blend", "--trigger", "sig"]
        short = ("--set", "epochs=1", "--set", "least_steps=5", "--set", "inversion_steps=5")
        out = str(place.work / "memory.safetensors")
        commands = {
            "scan": ("scan", str(subject.file), *shared),
            "cleanse": (
                "cleanse",
                str(subject.file),
                *shared,
                "--recipe",
                "inoculate",
                *short,
                "--out",
                out,
                "--force",
            ),
        }
        for name, arguments in commands.items():
            peaks = [process((sys.executable, "-m", "bdclean", *arguments)).peak_mib for _ in range(2)]
            yield Cell.of(
                f"memory-{name}-{subject.name}",
                f"memory of {name} beyond the libraries' over images + network, {subject.name}",
                [(peak - min(libraries)) / payload for peak in peaks],
                "",
                f"peak {max(peaks):,.0f} MiB, libraries alone {min(libraries):,.0f} MiB, "
                f"images + network {payload:.1f} MiB",
            )


DRIVERS: dict[str, Callable[[Place], Iterator[Cell]]] = {
    "start": starting,
    "recognition": recognition,
    "screening": screening,
    "scan": scanning,
    "bcu": bcu,
    "inoculate": inoculation,
    "encoders": encoders,
    "memory": memory,
}


def subjects(data: Path | None, checkpoints: Path | None, device: str, clock: str) -> tuple[Subject, ...]:
    """The networks of the table: the sample model, and with `data` (CIFAR-10) those of `checkpoints` before it."""
    sample = SAMPLES / "signs-badnets.safetensors"
    if not sample.exists():
        raise SystemExit(f"{SAMPLES} is not there: run this from a checkout, not from an installed package.")
    found = [Subject("signs", sample, SAMPLES / "images" / "unlabeled", 1200, device, clock)]
    if data is not None and checkpoints is not None:
        file = checkpoints / "akamaster-resnet20.safetensors"
        found.insert(0, Subject("resnet20", file, data / "train", 2000, device, clock))
    return tuple(found)


def machine(device: str, clock: str) -> dict[str, str | int]:
    """What a figure depends on: for the line under the table and for each cell."""
    return tables.machine(device) | {"clock": clock}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench speed", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(DRIVERS), action="append", help="repeatable; default all")
    parser.add_argument("--data", type=Path, help="cifar10.tar.gz, or the folder it unpacks to")
    parser.add_argument("--checkpoints", type=Path, help="folder with akamaster-resnet20.safetensors")
    parser.add_argument("--records", type=Path, help="folder of the cifar10 bench's records, for results")
    parser.add_argument("--work", type=Path, help="where cells are kept; default nowhere")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for busy machines")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        data = unpack(options.data, work) if options.data else None
        found = subjects(data, options.checkpoints, options.device, options.clock)
        place = Place(found, work, options.records, options.repetitions)
        where = machine(options.device, options.clock)
        print(
            "| what | ratio | lowest to highest | goal | met | how |\n|---|---|---|---|---|---|", flush=True
        )
        for name in options.only or DRIVERS:
            for cell in cells(name, place, where):
                print(row(cell), flush=True)
        print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    return 0


def cells(name: str, place: Place, where: dict[str, str | int]) -> Iterator[Cell]:
    """The cells of one driver: those on disk where the driver had ended, else measured and written."""
    ended = place.work / f"speed-{name}.json"
    if ended.exists():
        yield from (Cell(**entry) for entry in json.loads(ended.read_text()))
        return
    start, made = time.monotonic(), []
    for cell in DRIVERS[name](place):
        cell.machine = dict(where)
        made.append(cell)
        yield cell
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    unfinished = ended.with_suffix(".part")
    unfinished.write_text(json.dumps([asdict(cell) for cell in made], indent=1))
    unfinished.replace(ended)


def row(cell: Cell) -> str:
    """One line of the Markdown table."""
    met = {True: "yes", False: "no", None: ""}[cell.met]
    spread = f"{cell.low:.3g} to {cell.high:.3g} (n {cell.n})" if cell.n > 1 else ""
    return f"| {cell.what} | {cell.value:.3g} | {spread} | {cell.goal} | {met} | {cell.note} |"
