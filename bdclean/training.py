"""The only optimisation loop: seeded, resumable to the same bits, with progress.

Everything random in step i of a stage is drawn from generators seeded with (seed, stage, i), and the order of the
images in epoch e from (seed, stage, e). The step number is therefore the whole state of all generators and of the
sampler, and a run resumed at step i draws what an uninterrupted one draws.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bdclean import saving
from bdclean.data.augment import crop, mirror
from bdclean.data.placing import place, take
from bdclean.data.scratch import allocate, available
from bdclean.errors import ENDING, Interrupted, Refused
from bdclean.memory import Roomy, keep_freed_memory
from bdclean.preprocessing import Classifier
from bdclean.saving import Saved


class Tell(Protocol):
    """Receives progress: `done` of `total` units of `stage`, with measures to show beside them."""

    def __call__(self, stage: str, done: int, total: int, **measures: float) -> None: ...


def quiet(stage: str, done: int, total: int, **measures: float) -> None:
    """A `Tell` that shows nothing."""


@dataclass(frozen=True)
class Precision:
    """How networks are trained: `bf16` runs forward passes under bfloat16 autocast; weights stay float32."""

    bf16: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        return ("bf16" if self.bf16 else "fp32") + ("+channels_last" if self.channels_last else "")

    @staticmethod
    def parse(name: str) -> Precision:
        return Precision("bf16" in name, "channels_last" in name)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def layout(self, images: Tensor) -> Tensor:
        return (
            images.contiguous(memory_format=torch.channels_last)
            if self.channels_last
            else images.contiguous()
        )


def seed_for(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on all `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass
class Run:
    """What a recipe may know of the run it is part of: never a trigger, a target class or a held-out image."""

    device: torch.device
    precision: Precision
    seed: int
    tell: Tell = quiet
    saved: Saved | None = None

    def generator(self, *parts: object) -> torch.Generator:
        """A generator on the run's device, seeded with the run's seed and `parts`."""
        return torch.Generator(self.device).manual_seed(seed_for(self.seed, *parts))

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Logits of `model` on float `pixels` [n 3 h w], in the run's precision and memory layout."""
        with self.precision.autocast(self.device):
            return model(self.precision.layout(pixels))

    def keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name from the resume state, else `make()`, kept in the resume state from now on."""
        if self.saved is None:
            return make()
        if name not in self.saved.kept:
            self.saved.kept[name] = make().detach()
        return self.saved.kept[name].to(self.device)


@dataclass
class Batch:
    """What a step is given: uint8 `images` [n 3 h w], their `labels` [n] or None, and its own seeded generator."""

    images: Tensor
    labels: Tensor | None
    step: int
    progress: float
    """Share of all steps done before this one, in [0, 1)."""
    generator: torch.Generator


@dataclass
class State:
    """What `fit` trains and on what. `schedule` maps a step number to a learning rate, or is None."""

    stage: str
    model: nn.Module
    optimiser: torch.optim.Optimizer
    images: Tensor
    labels: Tensor | None
    batch_size: int
    steps: int
    schedule: Callable[[int], float] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that `step` changes in place and that belong to the state."""


Step = Callable[[Batch], tuple[Tensor | None, dict[str, float]]]


def order(images: int, batch_size: int, step: int, seed: int, stage: str) -> Tensor:
    """Indices of the images of a step: consecutive shuffles of all of them, cut into batches of equal size."""
    first, parts = step * batch_size, []  # type: int, list[Tensor]
    while (need := batch_size - sum(len(part) for part in parts)) > 0:
        epoch, offset = divmod(first, images)
        generator = torch.Generator().manual_seed(seed_for(seed, stage, "epoch", epoch))
        parts.append(torch.randperm(images, generator=generator)[offset : offset + need])
        first += len(parts[-1])
    return torch.cat(parts)


def fit(step: Step, state: State, run: Run) -> list[dict[str, float]]:
    """Run `step` for `state.steps` batches and return the curve: a row about every hundredth of the way.

    `step` returns a loss, which is then minimised (or None where it has optimised by itself), and measures to show.
    Raises Refused where the loss is no longer finite or the memory too small, and Interrupted after SIGINT, SIGTERM or
    SIGHUP with the state saved.
    """
    done, curve, sums = 0, [], {}  # type: int, list[dict[str, float]], dict[str, float]
    if run.saved is not None and run.saved.stage == state.stage:
        done, curve, sums = run.saved.done, list(run.saved.curve), dict(run.saved.sums)
        if done > state.steps:
            raise Refused(
                f"the resume state {run.saved.path} says that {done} steps of {state.stage} are done, and it has "
                f"{state.steps}: delete it and start anew without --resume."
            )
        _restore(state, run.saved.tensors)
        run.saved.tensors = {}  # its memory is free from here on
    if run.device.type == "cpu":
        keep_freed_memory()
    images = place(state.images, run.device)
    labels = state.labels.to(run.device) if state.labels is not None else None
    host = available() if run.device.type == "cpu" else None
    changing = [*state.model.buffers(), *state.extra.values()]
    roomy = Roomy(state.model.parameters(), changing, host, lambda size: allocate((size,), 0)[0])
    saved_at, started, first = time.monotonic(), time.monotonic(), done
    every = max(1, state.steps // 100)
    with _deferred_signals() as caught:
        while done < state.steps:
            chosen = order(len(images), min(state.batch_size, len(images)), done, run.seed, state.stage).to(
                run.device
            )
            seed = seed_for(run.seed, state.stage, "step", done)
            batch = Batch(
                take(images, chosen, run.device),
                labels[chosen] if labels is not None else None,
                done,
                done / state.steps,
                torch.Generator(run.device),
            )
            if state.schedule is not None:
                for group in state.optimiser.param_groups:
                    group["lr"] = state.schedule(done)

            def passes(batch: Batch = batch, seed: int = seed) -> tuple[Tensor | None, dict[str, float]]:
                torch.manual_seed(seed)  # dropout draws from the global generator
                batch.generator.manual_seed(seed)
                loss, measures = step(batch)
                if loss is not None:
                    state.optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                return loss, measures

            loss, measures = roomy(passes, state.stage)
            if loss is not None:
                state.optimiser.step()
                measures = {"loss": loss.item(), **measures}
            if not all(map(math.isfinite, measures.values())):
                raise Refused(
                    f"{state.stage} diverged at step {done + 1} of {state.steps} ({measures}): "
                    "lower the learning rate with --set."
                )
            done += 1
            for name, value in measures.items():
                sums[name] = sums.get(name, 0.0) + value
            if done % every == 0 or done == state.steps:
                since = done - int(curve[-1]["step"] if curve else 0)
                curve.append({"step": done, **{name: value / since for name, value in sums.items()}})
                sums = {}
            rate = (done - first) * min(state.batch_size, len(images)) / (time.monotonic() - started)
            run.tell(state.stage, done, state.steps, **measures, images_per_second=rate)
            if run.saved is not None and (
                caught or time.monotonic() - saved_at > saving.SAVE_EVERY_SECONDS or done == state.steps
            ):
                run.saved.save(state.stage, done, curve, sums, _tensors(state))
                saved_at = time.monotonic()
            if caught:
                kept = (
                    f"; its state is in {run.saved.path}, go on with --resume"
                    if run.saved is not None
                    else ""
                )
                raise Interrupted(
                    f"interrupted at step {done} of {state.steps} of {state.stage}{kept}.", 128 + caught[0]
                )
    return curve


def _tensors(state: State) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for index, slots in state.optimiser.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{slot}"] = value
    tensors.update({f"extra.{name}": tensor for name, tensor in state.extra.items()})
    return tensors


def _restore(state: State, tensors: Mapping[str, Tensor]) -> None:
    try:
        state.model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
        optimiser = copy.deepcopy(state.optimiser.state_dict())
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, slot = name.split(".", 2)
                optimiser["state"].setdefault(int(index), {})[slot] = tensor
        state.optimiser.load_state_dict(optimiser)
        with torch.no_grad():
            for name, tensor in state.extra.items():
                tensor.copy_(tensors[f"extra.{name}"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise Refused(
            f"the resume state does not fit this network ({error}): start anew without --resume."
        ) from error


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of acting on them: no step is cut in two. The second one acts.

    A signal that this process was told to ignore (by nohup, say) stays ignored.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        if caught:
            raise Interrupted("interrupted twice; the state last saved is kept.", 128 + number)
        caught.append(number)

    heeded = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def triangular(step: float, up: float, down: float, floor: float, peak: float) -> float:
    """A learning rate that rises linearly from `floor` to `peak` in `up` steps, falls in `down`, and begins again."""
    at = step % (up + down)
    share = at / up if at < up else (up + down - at) / down
    return floor + (peak - floor) * share


def frozen(suspect: Classifier, run: Run) -> Classifier:
    """A copy of `suspect` as a teacher: on the run's device, in evaluation mode, without gradients."""
    teacher = copy.deepcopy(suspect).to(run.device).eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last) if run.precision.channels_last else teacher


@dataclass(frozen=True)
class Augmentation:
    """Per-image random crops after padding, and mirroring where the suspect does not mind it."""

    padding: int
    mirrored: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = crop(images, generator, self.padding)
        return mirror(images, generator) if self.mirrored else images

    def describe(self) -> str:
        return f"crops with {self.padding} pixels of padding, " + (
            "mirrored" if self.mirrored else "not mirrored"
        )


MIRROR_TOLERANCE = 0.05


def choose_augmentation(suspect: nn.Module, images: Tensor, run: Run) -> Augmentation:
    """Crops of an eighth of the image; mirroring only where `suspect` keeps its answers on mirrored images.

    It must keep them on as large a share (less MIRROR_TOLERANCE) as on images shifted within the crop: that is what a
    change that surely does not matter costs this network. Road signs and digits fail this. Uses up to 512 images.
    """
    generator = run.generator("augmentation")
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))[:512]]
    images = images.to(run.device)
    padding = max(1, round(min(images.shape[2:]) / 8))

    def answers(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([suspect(part).argmax(1) for part in x.split(128)])

    plain = answers(images)
    shifted = (answers(crop(images, generator, padding)) == plain).float().mean()
    mirrored = (answers(images.flip(3)) == plain).float().mean()
    return Augmentation(padding, bool(mirrored >= shifted - MIRROR_TOLERANCE))


def probe_precision(
    model: nn.Module, images: Tensor, device: torch.device, wanted: str = "auto"
) -> Precision:
    """The precision in which a training step of `model` is fastest, checked against float32.

    Times a forward and a backward pass of `images` (uint8 [n 3 h w], at most 64 are used) in float32 and in bfloat16
    autocast with channels_last, twice each. bfloat16 is taken where it needs less than 0.9 of the time and its logits
    agree with float32's (relative error under 0.1). `wanted` other than auto is obeyed (`fp16` is measured as bf16).
    """
    if wanted == "fp32":
        return Precision()
    if wanted in ("bf16", "fp16"):
        return Precision(bf16=True, channels_last=True)
    images = images[:64].to(device)
    seconds: dict[Precision, float] = {}
    logits: dict[Precision, Tensor] = {}
    for precision in (Precision(), Precision(bf16=True, channels_last=True)):
        copied = copy.deepcopy(model).to(device).eval()
        if precision.channels_last:
            copied = copied.to(memory_format=torch.channels_last)
        times = []
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            try:
                with precision.autocast(device):
                    out = copied(precision.layout(images.float() / 255))
                out.float().logsumexp(1).sum().backward()
            except (RuntimeError, NotImplementedError):
                return Precision()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[precision], logits[precision] = min(times[1:]), out.detach().float()
    exact, quick = Precision(), Precision(bf16=True, channels_last=True)
    error = (logits[quick] - logits[exact]).norm() / logits[exact].norm().clamp_min(1e-6)
    return quick if seconds[quick] < 0.9 * seconds[exact] and error < 0.1 else exact


def set_batch_statistics(model: nn.Module, batches: Callable[[], Iterator[Tensor]]) -> None:
    """Recompute the running statistics of every batch norm as the mean over `batches` of uncorrupted inputs.

    Nothing is done where the network has no batch norm. The networks's mode is left as it was.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return
    training, momenta = model.training, [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in batches():
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
