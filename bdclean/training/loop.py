"""The only optimisation loop: seeded, resumable to the same bits, with progress.

Everything random in step i of a stage is drawn from generators seeded with (seed, stage, i), and the order of the
images in epoch e from (seed, stage, e). The step number is therefore the whole state of all generators and of the
sampler, and a run resumed at step i draws what an uninterrupted one draws.
"""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.data.placing import place, take
from bdclean.data.scratch import allocate, available
from bdclean.errors import ENDING, Interrupted, Refused
from bdclean.networks.building import load
from bdclean.training import parallel, resume
from bdclean.training.memory import Roomy, keep_freed_memory
from bdclean.training.resume import Position, Saved
from bdclean.training.run import Run, seed_for


@dataclass
class Batch:
    """What a step is given: uint8 `images` [n c h w], their `labels` [n] or None, and its own seeded generator.

    `chosen` int64 [n]: where in the set the images stand.
    """

    images: Tensor
    labels: Tensor | None
    step: int
    progress: float
    """Share of all steps done before this one, in [0, 1)."""
    generator: torch.Generator
    chosen: Tensor


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
    most: float = math.inf
    """With a mean loss above it the network has burst: the steps that led there are undone."""


Measures = Mapping[str, Tensor | float]
Step = Callable[[Batch], tuple[Tensor | None, Measures]]

ROWS = 100
"""Rows of a curve. Losses are read once a row: reading them at every step would make an accelerator wait."""
MOST_HALVINGS = 10
"""Of the learning rate, until a stage gives up: a thousandth of it moves nothing any more."""


def burst(classes: int) -> float:
    """A mean cross-entropy or divergence, in nats, that no learning network has: knowing nothing costs log(classes)."""
    return 30.0 * max(1.0, math.log(classes))


def updates(epochs: float, images: int, batch_size: int) -> int:
    """How many batches so many `epochs` of `images` take, at least one; a batch is never larger than the set."""
    return max(1, math.ceil(epochs * images / min(batch_size, images)))


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
    Steps that burst the network (something is not finite, or the loss is above `state.most`) are undone, back to where
    all was well, and done again at half the learning rate; later rows of the curve say their `rate_share`.
    Raises Refused where that does not help or the memory is too small, and Interrupted after SIGINT, SIGTERM or SIGHUP
    with the state saved.
    """
    state = replace(state, stage=run.within + state.stage)
    course = _Course(state, run)
    if run.device.type == "cpu":
        keep_freed_memory()
    images = place(state.images, run.device)
    labels = state.labels.to(run.device) if state.labels is not None else None
    roomy = _roomy(state, run)
    saved_at = started = time.monotonic()
    first = course.position.done
    with deferred_signals() as caught:
        while course.position.done < state.steps:
            batch, seed = course.batch(images, labels)
            try:
                course.take(*roomy(partial(_passes, step, state, batch, seed), state.stage))
            except parallel.Lost as error:  # in the midst of a step: what was saved last is what there is
                raise parallel.Lost(f"{str(error).rstrip('.')}{_kept(run.saved)}.") from error
            done, now = course.position.done, time.monotonic()
            rate = max(0, done - first) * min(state.batch_size, len(images)) / (now - started)
            run.tell(state.stage, done, state.steps, **course.latest(), images_per_second=rate)
            due = caught or done == state.steps or now - saved_at > resume.SAVE_EVERY_SECONDS
            if run.saved is not None and due:
                run.saved.save(course.read(), course.tensors())
                saved_at = time.monotonic()
            if caught:
                raise _interrupted(caught[0], state, done, run.saved)
    return course.position.curve


def halvings(curve: Sequence[Mapping[str, float]]) -> list[str]:
    """Says how often the learning rate of a `curve` was halved, in no or one sentence."""
    share = min((row.get("rate_share", 1.0) for row in curve), default=1.0)
    return [
        f"steps burst the network and were undone: the learning rate ended at {share:g} of its schedule"
    ] * (share < 1)


def _passes(step: Step, state: State, batch: Batch, seed: int) -> tuple[bool, Measures]:
    """A step up to its gradients: whether there are any, and its measures."""
    torch.manual_seed(seed)  # dropout draws from the global generator
    batch.generator.manual_seed(seed)
    loss, measures = step(batch)
    if loss is None:
        return False, measures
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    return True, {"loss": loss.detach(), **measures}


def _roomy(state: State, run: Run) -> Roomy:
    changing = [*state.model.buffers(), *state.extra.values()]
    host = available() if run.device.type == "cpu" else None
    return Roomy(
        state.model.parameters(), changing, host, lambda size: allocate((size,), 0)[0], alone=not run.together
    )


def _interrupted(number: int, state: State, done: int, saved: Saved | None) -> Interrupted:
    return Interrupted(
        f"interrupted at step {done} of {state.steps} of {state.stage}{_kept(saved)}.", 128 + number
    )


def _kept(saved: Saved | None) -> str:
    """The end of a sentence that says what there is to go on from."""
    if saved is None or not saved.path.exists():
        return ""
    return f"; its state is in {saved.path}, go on with --resume"


class _Course:
    """How far a stage has come, and the weights that it goes back to when steps burst the network.

    `newest` are those at the end of the curve's last row; `good` those a row before, after which all is known to have
    been well.
    """

    def __init__(self, state: State, run: Run) -> None:
        self.state, self.run = state, run
        self.position = Position(state.stage)
        self.unread: list[Measures] = []
        self.rates = [group["lr"] for group in state.optimiser.param_groups]
        self.good = self.newest = _weights(state)
        if run.saved is not None and run.saved.position.stage == state.stage:
            self._go_on(run.saved)

    def _go_on(self, saved: Saved) -> None:
        if saved.position.done > self.state.steps:
            raise Refused(
                f"the resume state {saved.path} says that {saved.position.done} steps of {self.state.stage} are done, "
                f"and it has {self.state.steps}: delete it and start anew without --resume."
            )
        self.position = copy.deepcopy(saved.position)
        try:
            _restore_weights(self.state, _part(saved.tensors, "now"))
            _restore_optimiser(self.state.optimiser, _part(saved.tensors, "optimiser"))
            self.good, self.newest = (_part(saved.tensors, name) for name in ("good", "newest"))
            if not self.good.keys() == self.newest.keys() == _weights(self.state).keys():
                raise KeyError("good, newest")
        except (KeyError, RuntimeError, ValueError) as error:
            raise Refused(
                f"the resume state does not fit this network ({error}): start anew without --resume."
            ) from error
        saved.tensors = {}  # its memory is free from here on

    def rates_of(self, step: int) -> list[float]:
        """The learning rate of each group of parameters at `step`, as the schedule has it."""
        schedule = self.state.schedule
        return [rate if schedule is None else schedule(step) for rate in self.rates]

    def batch(self, images: Tensor, labels: Tensor | None) -> tuple[Batch, int]:
        """The next batch, and the seed of its step; the optimiser gets the learning rate of that step."""
        state, run, done = self.state, self.run, self.position.done
        for group, rate in zip(state.optimiser.param_groups, self.rates_of(done), strict=True):
            group["lr"] = self.position.share * rate
        size = min(state.batch_size, len(images))
        chosen = order(len(images), size, done, run.seed, state.stage).to(run.device)
        batch = Batch(
            take(images, chosen, run.device),
            labels[chosen] if labels is not None else None,
            done,
            done / state.steps,
            torch.Generator(run.device),
            chosen,
        )
        return batch, seed_for(run.seed, state.stage, "step", done)

    def take(self, differentiated: bool, measures: Measures) -> None:
        """Step along the gradients, if there are any; at the end of a row, look whether all is well."""
        if differentiated:
            if self.run.together:
                parallel.average(p for group in self.state.optimiser.param_groups for p in group["params"])
            self.state.optimiser.step()
        self.unread.append(measures)
        self.position.done += 1
        done, steps = self.position.done, self.state.steps
        if done % max(1, steps // ROWS) == 0 or done == steps:
            self._close_row()

    def read(self) -> Position:
        """The position, with all measures in it."""
        sums = self.position.sums
        for measures in self.unread:
            for name, value in measures.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        self.unread = []
        return self.position

    def latest(self) -> dict[str, float]:
        """The measures of the curve's last row."""
        row = self.position.curve[-1] if self.position.curve else {}
        return {name: value for name, value in row.items() if name not in ("step", "rate_share")}

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        parts = {
            "now": _weights(self.state, copied=False),
            "optimiser": _slots(self.state.optimiser),
            "good": self.good,
            "newest": self.newest,
        }
        return {f"{part}.{name}": tensor for part, of in parts.items() for name, tensor in of.items()}

    def _close_row(self) -> None:
        position = self.read()
        since = position.done - int(position.curve[-1]["step"] if position.curve else 0)
        row = {name: value / since for name, value in position.sums.items()}
        weights = _weights(self.state)
        finite = all(map(math.isfinite, row.values())) and all(
            bool(w.isfinite().all()) for w in weights.values()
        )
        if not finite or row.get("loss", 0.0) > self.state.most:
            self._go_back(row)
            return
        position.curve.append({"step": position.done, **row})
        if position.share < 1:
            position.curve[-1]["rate_share"] = position.share
        position.sums = {}
        self.good, self.newest = self.newest, weights
        position.good, position.newest = position.newest, position.done

    def _go_back(self, row: Mapping[str, float]) -> None:
        position, state = self.position, self.state
        if position.share <= 0.5**MOST_HALVINGS:
            if self.run.saved is not None:
                self.run.saved.discard()  # to go on from it would end here again
            raise Refused(
                f"{state.stage} diverged at step {position.done} of {state.steps} ({dict(row)}) at a learning rate of "
                f"{max(self.rates_of(position.done)):g}, and at a thousandth of it, too: lower the learning rate with "
                "--set."
            )
        _restore_weights(state, self.good)
        state.optimiser.state.clear()  # what it remembers led here
        self.newest, position.newest = self.good, position.good
        position.done, position.sums = position.good, {}
        position.curve = [row for row in position.curve if row["step"] <= position.good]
        position.share /= 2


def _weights(state: State, copied: bool = True) -> dict[str, Tensor]:
    """What training changes, but for the optimiser's memory: parameters, buffers, and `state.extra`."""
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    found |= {f"extra.{name}": tensor for name, tensor in state.extra.items()}
    return {name: tensor.detach().clone() if copied else tensor for name, tensor in found.items()}


def _restore_weights(state: State, weights: Mapping[str, Tensor]) -> None:
    load(state.model, _part(weights, "model"))
    with torch.no_grad():
        for name, tensor in state.extra.items():
            tensor.copy_(weights[f"extra.{name}"])


def _slots(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each parameter: `index.slot` -> tensor."""
    return {
        f"{index}.{slot}": value
        for index, slots in optimiser.state_dict()["state"].items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def _restore_optimiser(optimiser: torch.optim.Optimizer, slots: Mapping[str, Tensor]) -> None:
    remembered = copy.deepcopy(optimiser.state_dict())
    for name, tensor in slots.items():
        index, slot = name.split(".", 1)
        remembered["state"].setdefault(int(index), {})[slot] = tensor
    optimiser.load_state_dict(remembered)


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `name.`, without it."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of acting on them: no step is cut in two. The second one acts.

    A closing terminal hangs up twice, the kernel's and the shell's, which is one. A signal that this process was told
    to ignore (by nohup, say) stays ignored.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        if number in caught and number == getattr(signal, "SIGHUP", None):
            return
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
