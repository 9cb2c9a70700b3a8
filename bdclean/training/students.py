"""What recipes do to a network beside training it: copies, augmentation, batch statistics."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.data.augment import crop, mirror
from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.run import Run


def triangular(step: float, up: float, down: float, floor: float, peak: float) -> float:
    """A learning rate that rises linearly from `floor` to `peak` in `up` steps, falls in `down`, and begins again."""
    at = step % (up + down)
    share = at / up if at < up else (up + down - at) / down
    return floor + (peak - floor) * share


def one_cycle(step: int, steps: int, peak: float) -> float:
    """A learning rate that rises linearly to `peak` in a quarter of the steps and falls along a cosine to almost 0."""
    rise = steps / 4
    if step < rise:
        return peak * (0.04 + 0.96 * step / rise)
    return peak * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2 + 1e-5


def cosine(step: int, steps: int, peak: float) -> float:
    """A learning rate that falls along a cosine from `peak` at the first step to 0 after `steps`."""
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def frozen(suspect: Classifier, run: Run) -> Classifier:
    """A copy of `suspect` as a teacher: on the run's device, in evaluation mode, without gradients."""
    teacher = copy.deepcopy(suspect).to(run.device).eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last) if run.precision.channels_last else teacher


Curve = list[dict[str, float]]


def joined(curve: Curve, more: Curve) -> Curve:
    """A curve that goes on with another one's steps."""
    return [*curve, *({**row, "step": row["step"] + curve[-1]["step"]} for row in more)]


def keep_trained(model: nn.Module, name: str, train: Callable[[], Curve], run: Run) -> Curve:
    """Trains `model` in place by `train` and returns its curve, unless the resume state holds what this led to.

    For what comes before a recipe's last stage: a resumed run takes it up at the stage at which it was stopped.
    """

    def trained() -> Tensor:
        curve = torch.frombuffer(bytearray(json.dumps(train()), "ascii"), dtype=torch.uint8)
        flat = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in model.state_dict().values()]
        return torch.cat([*(tensor.view(torch.uint8) for tensor in flat), curve])

    kept, first = run.keep(name, trained).cpu(), 0
    with torch.no_grad():
        for tensor in model.state_dict().values():
            part = kept[first : (first := first + tensor.numel() * tensor.element_size())]
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
    curve: Curve = json.loads(bytes(kept[first:].tolist()))
    return curve


def void(suspect: Classifier, arch: Arch, run: Run, *part: object) -> Classifier:
    """A network of the suspect's architecture with weights drawn anew, by the run's seed and `part`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.generator("void", *part).initial_seed())
        network = arch.build()
    return Classifier(network, suspect.preprocess)


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
PADDINGS, CROP_TOLERANCE = (8, 16, 32), 0.1
"""Crops are of an eighth of the image where that changes hardly more answers than a thirty-second does, else smaller.
Networks trained with crops of an eighth lose 2 to 14 points more of their answers, without any crops 8 to 29."""


def choose_augmentation(suspect: nn.Module, images: Tensor, run: Run) -> Augmentation:
    """Crops of an eighth of the image, or less where `suspect` minds it; mirroring only where it does not mind that.

    A crop may keep CROP_TOLERANCE fewer of its answers than the least does. Mirrored images must keep as large a share
    (less MIRROR_TOLERANCE) as images shifted within the crop: that is what a change that surely does not matter costs
    this network. Road signs and digits fail this. Uses up to 512 images.
    """
    generator = run.generator("augmentation")
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))[:512]]
    images = images.to(run.device)
    side = min(images.shape[2:])
    paddings = list(dict.fromkeys(max(1, round(side / part)) for part in PADDINGS))

    def kept(changed: Tensor) -> float:
        return float((answers(changed) == plain).float().mean())

    def answers(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([suspect(part).argmax(1) for part in x.split(128)])

    plain = answers(images)
    shifted = {padding: kept(crop(images, generator, padding)) for padding in paddings}
    padding = max(p for p in paddings if shifted[p] >= shifted[paddings[-1]] - CROP_TOLERANCE)
    mirrored = kept(images.flip(3)) >= shifted[padding] - MIRROR_TOLERANCE
    padding, mirrored = run.agreed(torch.tensor([padding, int(mirrored)])).tolist()
    return Augmentation(padding, bool(mirrored))


STATISTICS_PIXELS = 1 << 20
"""Batch norm's final statistics are means over parts of 256 images, or of so many pixels but 64 images or more."""


def uncorrupted(
    images: Tensor, augment: Callable[[Tensor, torch.Generator], Tensor], run: Run, passes: int = 2
) -> Iterator[Tensor]:
    """Augmented `images` (uint8 [n c h w]) in parts, `passes` times, for `set_batch_statistics` and `recentre`."""
    generator = run.generator("statistics")
    size = min(256, max(64, STATISTICS_PIXELS // images[0, 0].numel()))
    for _ in range(passes):
        # Shuffled, and parts of one size: each counts alike, whatever the order of the files.
        order = torch.randperm(len(images), generator=generator, device=run.device).cpu()
        for part in order.tensor_split(math.ceil(len(images) / size)):
            yield run.precision.layout(augment(images[part].to(run.device), generator))


def set_batch_statistics(model: nn.Module, batches: Callable[[], Iterator[Tensor]]) -> None:
    """Recompute the running statistics of every batch norm as the mean over `batches` of uncorrupted inputs.

    Nothing is done where the network has no batch norm. The networks's mode is left as it was.
    """
    norms = remembering(model)
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


def remembering(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of `model` that keep running statistics."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.running_mean is not None
        and m.running_var is not None
    ]


def recentre(model: nn.Module, batches: Callable[[], Iterator[Tensor]]) -> None:
    """Give every batch norm the statistics of `batches` without changing what the network computes.

    What the statistics of these images differ from the running ones goes into the scale and the shift, so that the
    network in evaluation mode stays the same function of its input. From there on it can be trained with the statistics
    of these images, whatever kind they are of. The statistics are those of the network as it is, all layers at once. A
    batch norm without scale and shift, or with channels that are not finite, is left as it was.
    """
    norms = [m for m in remembering(model) if m.affine]
    seen: dict[nn.Module, list[tuple[int, Tensor, Tensor]]] = {norm: [] for norm in norms}

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        axes = [k for k in range(x.ndim) if k != 1]
        variance, mean = torch.var_mean(x, axes, correction=0)
        seen[norm].append((x.numel() // x.shape[1], variance, mean))

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches():
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for norm in norms:
        if seen[norm]:
            _carry_over(norm, *zip(*seen[norm], strict=True))


def _carry_over(norm: nn.modules.batchnorm._BatchNorm, counts: Any, variances: Any, means: Any) -> None:
    """Give `norm` the pooled statistics of parts, float [channels] each; its scale and shift make up for them."""
    assert norm.running_mean is not None and norm.running_var is not None
    shares = torch.tensor(counts, device=norm.running_mean.device, dtype=torch.float32)[:, None] / sum(counts)
    means, variances = torch.stack(means), torch.stack(variances)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    was = (norm.running_var.float() + norm.eps).sqrt()
    scale = norm.weight.detach().float() * (variance + norm.eps).sqrt() / was
    shift = (
        norm.bias.detach().float() + norm.weight.detach().float() * (mean - norm.running_mean.float()) / was
    )
    if not all(bool(x.isfinite().all()) for x in (mean, variance, scale, shift)):
        return
    with torch.no_grad():
        for old, new in (
            (norm.running_mean, mean), (norm.running_var, variance), (norm.weight, scale), (norm.bias, shift)
        ):  # fmt: skip
            old.copy_(new)
