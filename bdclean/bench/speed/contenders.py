"""What the speed table times, each as `make(...) -> function()`, to be run in a process of its own (`pairs.Worker`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from bdclean import registry
from bdclean.bench.speed.pairs import CLOCKS, settled
from bdclean.bench.speed.plain_bcu import PillowImages, PlainBCU, augmentation
from bdclean.bench.speed.plain_distillation import PlainDistillation, views
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.data.sources.folder import search
from bdclean.measuring.assessment import assess
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.trial import Trial, make_predictor
from bdclean.networks.ambiguity.choosing import choose
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.progress import quiet
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan
from bdclean.runs.suspect import Suspect
from bdclean.training.run import Run, probe_precision
from bdclean.triggers.bank import make_triggers
from bdclean.triggers.stamping import Trigger

BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Subject:
    """A network and the folder of images that it is timed on."""

    name: str
    file: Path
    images: Path
    limit: int
    device: str
    clock: str = "wall"
    kind: str = "classifier"

    def read(self) -> tuple[Suspect, ImageSet]:
        checkpoint = Checkpoint.read(self.file, kind=self.kind)
        size = (checkpoint.arch.input[1], checkpoint.arch.input[2])
        images = load_images(self.images, size, limit=self.limit, tell=quiet)
        choices = choose(checkpoint, images.images)
        return Suspect(checkpoint, checkpoint.arch, choices, torch.device(self.device)), images

    @property
    def inputs(self) -> Inputs:
        return Inputs(data=self.images, device=self.device, limit=self.limit, kind=self.kind)


def bare_forward(subject: Subject) -> Callable[[], float]:
    """Images a second of the network alone: float32 inputs ready on the device, best batch and memory layout."""
    suspect, images = subject.read()
    model = suspect.classifier(suspect.choices[0])
    with torch.inference_mode():
        ready = model.normalise(images.images.to(suspect.device))
    clock = CLOCKS[subject.clock]

    def rate(layout: torch.memory_format, size: int, count: int) -> float:
        network = model.network.to(memory_format=layout)
        batches = [part.contiguous(memory_format=layout) for part in ready[:count].split(size)]
        with torch.inference_mode():
            network(batches[0])
            settled(suspect.device)
            start = clock()
            for batch in batches:
                network(batch)
            settled(suspect.device)
        return min(count, len(ready)) / (clock() - start)

    tried = {
        (layout, size): rate(layout, size, max(size, 512))
        for layout in (torch.contiguous_format, torch.channels_last)
        for size in BATCHES
        if size <= len(ready)
    }
    layout, size = max(tried, key=lambda key: tried[key])
    return lambda: rate(layout, size, len(ready))


def forwarded_through(bench: Trial) -> Callable[[], int]:
    """Counts, from now on, the images that go through the network of `bench`, a classifier's."""
    assert isinstance(bench.predict, Predictor)
    count = 0

    def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += len(arguments[0])

    bench.predict.model.register_forward_pre_hook(add)
    return lambda: count


class CountingControls:
    """A trigger that counts the images that its controls stamp."""

    name: ClassVar[str] = "counting"

    def __init__(self, trigger: Trigger):
        self.trigger, self.family, self.stamped = trigger, trigger.family, 0

    def spec(self) -> str:
        return self.trigger.spec()

    def __call__(self, images: Tensor) -> Tensor:
        return self.trigger(images)

    def controls(
        self, count: int, generator: torch.Generator, channels: int = 3
    ) -> list[Callable[[Tensor], Tensor]]:
        def counted(images: Tensor, stamp: Callable[[Tensor], Tensor]) -> Tensor:
            self.stamped += len(images)
            return stamp(images)

        drawn = self.trigger.controls(count, generator, channels)
        return [partial(counted, stamp=stamp) for stamp in drawn]


def measuring(subject: Subject) -> Callable[[], float]:
    """Images a second of `assess`: triggers stamped, networks run, rates and bounds worked out, controls measured."""
    suspect, images = subject.read()
    bench = open_bench(subject, suspect, images)
    triggers = make_triggers((), (images.images.shape[2], images.images.shape[3]))
    clock = CLOCKS[subject.clock]

    forwarded = forwarded_through(bench)

    def run() -> float:
        before, start = forwarded(), clock()
        list(assess(bench, triggers[::6]))
        settled(suspect.device)
        return (forwarded() - before) / (clock() - start)

    return run


def whole_scan(subject: Subject) -> Callable[[], float]:
    """Images a second of the use case `scan` with the stock bank, from the file to the record."""
    clock, forwarded = CLOCKS[subject.clock], 0

    def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal forwarded
        forwarded += len(arguments[0]) if isinstance(module, Classifier) else 0

    # Counted in a run of its own, since hooks cost time; it makes the timed ones warm, too.
    with register_module_forward_pre_hook(count):
        scan(subject.file, subject.inputs, tell=quiet)

    def run() -> float:
        start = clock()
        scan(subject.file, subject.inputs, tell=quiet)
        return forwarded / (clock() - start)

    return run


def open_bench(subject: Subject, suspect: Suspect, images: ImageSet) -> Trial:
    """The suspect on `images`, held against its own answers."""
    predict = make_predictor(
        suspect.classifier(suspect.choices[0]), suspect.device, subject.inputs.batch_size, images.images
    )
    clean = predict(images.images)
    return Trial(predict, images.images, clean, clean, suspect.arch.classes, False, True, 0.2, 0)


class Enough(Exception):
    """Raised from within `tell` when enough steps have been timed."""


def recipe_steps(
    subject: Subject, name: str, settings: dict[str, str], last: str, steps: int
) -> Callable[[], dict[str, tuple[int, float]]]:
    """For each stage of a recipe, how many updates it makes and the seconds of one, in the mean after the first.

    Runs until `steps` updates of stage `last` are done, in the precision that `cleanse` would choose.
    """
    suspect, images = subject.read()
    classifier = suspect.classifier(suspect.choices[0])
    precision = probe_precision(classifier, images.images, suspect.device)
    recipe = registry.configure(registry.load_recipe(name, subject.kind), settings)
    clock = CLOCKS[subject.clock]

    def run() -> dict[str, tuple[int, float]]:
        times: dict[str, list[float]] = {}
        totals: dict[str, int] = {}

        def tell(stage: str, done: int, total: int, **measures: float) -> None:
            settled(suspect.device)
            times.setdefault(stage, []).append(clock())
            totals[stage] = total
            if stage == last and done > steps:
                raise Enough

        try:
            recipe(
                classifier, suspect.arch, images.unlabeled(), None, Run(suspect.device, precision, 0, tell)
            )
        except Enough:
            pass
        return {
            stage: (totals[stage], (at[-1] - at[0]) / (len(at) - 1))
            for stage, at in times.items()
            if len(at) > 1
        }

    return run


def plain_steps(
    subject: Subject, steps: int, from_disk: bool, teacher_gradients: bool
) -> Callable[[], float]:
    """Seconds of an update of the plain BCU, in the mean over `steps` after the first."""
    suspect, _ = replace(subject, limit=min(subject.limit, 512)).read()
    files = drawn_files(subject)
    size = (suspect.arch.input[1], suspect.arch.input[2])
    plain = PlainBCU(
        suspect.checkpoint.build("cpu", suspect.arch),
        PillowImages(files, augmentation(suspect.choices[0].preprocess, size), from_disk),
        suspect.device,
        batch_size=min(256, len(files)),
        teacher_gradients=teacher_gradients,
    )
    return partial(seconds_a_step, plain.step, suspect.device, CLOCKS[subject.clock], steps)


def plain_distillation(subject: Subject, steps: int) -> Callable[[], float]:
    """Seconds of an update of the plain distillation, in the mean over `steps` after the first."""
    suspect, _ = replace(subject, limit=min(subject.limit, 512)).read()
    arch = suspect.arch
    plain = PlainDistillation(
        suspect.checkpoint.build("cpu", arch),
        PillowImages(drawn_files(subject), views(suspect.choices[0].preprocess, arch.input[1]), False),
        arch.taps,
        arch.width,
        suspect.device,
    )
    return partial(seconds_a_step, plain.step, suspect.device, CLOCKS[subject.clock], steps)


def drawn_files(subject: Subject) -> list[Path]:
    """As many image files of `subject` as it is timed on."""
    found = search(subject.images)
    files = [found.root / file for file in found.files]
    return [files[k] for k in torch.randperm(len(files))[: subject.limit].tolist()]


def seconds_a_step(
    step: Callable[[], None], device: torch.device, clock: Callable[[], float], steps: int
) -> float:
    """Seconds of `step`, in the mean over `steps` after the first."""
    step()
    settled(device)
    start = clock()
    for _ in range(steps):
        step()
    settled(device)
    return (clock() - start) / steps
