"""The image size that a network was trained at, told by its statistics or its answers."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bdclean.networks.ambiguity.choosing import choose
from bdclean.networks.ambiguity.statistics import spread
from bdclean.networks.ambiguity.variant import GOOD, RATIO, fit, sample
from bdclean.networks.arch import Arch
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.normalisation import NAMED, parse_preprocess
from bdclean.networks.recognition.user_code import SMALL_FIRST
from bdclean.networks.recognition.variants import at_size
from bdclean.networks.stages import IMAGES, watch

# Image sides, beside the usual one, that people train convolutional networks at: CIFAR and GTSRB, GTSRB at its other
# usual size, Tiny ImageNet, STL-10, Imagenette (128 to 256), ImageNet; of grey images MNIST's, too.
SIDES = (32, 48, 64, 96, 128, 160, 192, 224, 256)
GREY_SIDES = (28, *SIDES)
# So many times the usual side are tried: a stem for small images makes large ones costly, and people take another.
LARGER = 2
# Images that tell the size of a network without batch norm of so many classes or more, the largest size beside the
# usual one that is tried, and the share of what they can tell that is enough.
FEW, FEW_SIDES, TELLS, LEAST_CLASSES = 32, 128, 0.5, 4
# The largest side that the user's code is tried at for its pictures alone.
LARGEST = 224


def own_size(
    checkpoint: Checkpoint,
    load: Callable[[Arch], Tensor],
    given: str = "auto",
    claimed: int | None = None,
    pictures: Sequence[tuple[int, int]] = (),
) -> Checkpoint:
    """`checkpoint` with the image size that it was trained at, where its batch norm or its answers say so clearly.

    Convolutional networks take images of any size. `load(arch)` reads images at `arch.input`, the same ones each time.
    `given`: the normalisation that the user says, or `auto`. `claimed`: the side that the file says, which holds unless
    the statistics of batch norm contradict it and fit another. `pictures`: height and width of some images as they
    are; the user's code is read at the size of most, where that is square and nothing else tells.
    """
    own, users = checkpoint.arch.input[1], checkpoint.arch.of_user
    if users and claimed is None:
        checkpoint = at_pictures(checkpoint, pictures)
    usual = checkpoint.arch if claimed is None else at_size(checkpoint.arch, claimed)
    # The user's code may look at values, which the meta device has none of.
    with torch.device("cpu" if users else "meta"), torch.random.fork_rng(devices=[]):
        outline = usual.build().eval()
    channels = usual.input[0]
    if not users and not takes_sizes(outline, channels, 2 * usual.input[1]):
        return checkpoint
    norms = (m for m in outline.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    remembers = any(norm.running_mean is not None for norm in norms)
    encoder = checkpoint.arch.kind == "encoder"
    if not remembers and checkpoint.arch.classes < LEAST_CLASSES:
        # Images of one class alone would look like the wrong size; an encoder has no answers that tell.
        return checkpoint
    if (claimed is not None and (encoder or not remembers)) or (users and not remembers):
        return checkpoint
    misfit = misfit_of_statistics if remembers else misfit_of_answers
    found: dict[int, float] = {}
    largest = LARGER * own if remembers else FEW_SIDES
    if users:  # a small stem makes large images costly: they are tried where the pictures are as large
        largest = max(largest, *(min(LARGEST, *size) for size in pictures), 0)
    tried = SMALL_FIRST if users else GREY_SIDES if channels == 1 else SIDES
    for side in dict.fromkeys((usual.input[1], own, *(s for s in tried if s <= largest))):
        arch = usual if side == usual.input[1] else at_size(usual, side)
        if users and not runs(arch):
            continue
        images = load(arch)
        # Too small for its pools, or no multiple of its blocks.
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            # A normalisation that does not fit must not make another size seem to fit better than the own one.
            told_by = dict.fromkeys((given, "auto"))
            found[side] = min(misfit(replace(checkpoint, arch=arch), images, each) for each in told_by)
        if found.get(usual.input[1], math.inf) < 1:
            return checkpoint
    best = min(found, key=lambda side: found[side], default=usual.input[1])
    if found.get(best, math.inf) * RATIO >= found.get(usual.input[1], math.inf):
        return checkpoint
    warned = checkpoint
    if claimed is not None:
        # Measured with 20 images of a network for 32 pixels: 0.7 there, 2.3 at 48, 3.9 at 64, 13.5 at 224.
        note = contradicted(claimed, best, read=best if found[best] < 1 else claimed)
        warned = replace(checkpoint, warnings=(*checkpoint.warnings, note))
    # An attack trains an encoder on other views than it was pre-trained on: then no size fits, and a wrong one may fit
    # least ill (BadEncoder's at 32: 1.8 there, 1.5 at 48). Nor is a claim given up for what fits least ill.
    if (not remembers or encoder or claimed is not None) and found[best] >= 1:
        return warned
    if not remembers:
        warned = replace(checkpoint, warnings=(*checkpoint.warnings, guessed(usual.input[1], best)))
    candidates = tuple(at_size(a, best) for a in checkpoint.candidates)
    return replace(warned, arch=at_size(usual, best), candidates=candidates)


def of_most(pictures: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The height and width that more than half of the pictures have."""
    size, count = Counter(pictures).most_common(1)[0] if pictures else ((0, 0), 0)
    return size if 2 * count > len(pictures) else None


def at_pictures(checkpoint: Checkpoint, pictures: Sequence[tuple[int, int]]) -> Checkpoint:
    """The user's network for pictures of the size that most have, if that is square, none of a photo, and accepted."""
    height, width = of_most(pictures) or (0, 0)
    if height != width or height in (0, checkpoint.arch.input[1]) or height > max(SMALL_FIRST):
        return checkpoint
    arch = at_size(checkpoint.arch, height)
    candidates = tuple(at_size(a, height) for a in checkpoint.candidates)
    return replace(checkpoint, arch=arch, candidates=candidates) if runs(arch) else checkpoint


def runs(arch: Arch) -> bool:
    """Whether the user's code gives one row for each image of this size."""
    try:
        with torch.random.fork_rng(devices=[]):
            given = watch(arch.build, arch.input)[2]
    except Exception:  # a stranger's code may raise anything
        return False
    return len(given) == 2 and given[0] == IMAGES


def guessed(usual: int, best: int) -> str:
    """What is warned of where answers alone tell the size."""
    return (
        f"the network's answers tell images from one another at {best}x{best} and hardly at the usual "
        f"{usual}x{usual}: it is read at {best}x{best} (--preprocess NAME,size=H/W says it)."
    )


def contradicted(claimed: int, best: int, read: int) -> str:
    """What is warned of where statistics speak against the size that a file claims."""
    return (
        f"the file or its config says that images are {claimed}x{claimed}, and batch norm's statistics on these speak "
        f"for {best}x{best}: it is read at {read}x{read} (--preprocess NAME,size=H/W says it)."
    )


def misfit_of_statistics(checkpoint: Checkpoint, images: Tensor, given: str) -> float:
    """How far batch norm's statistics are off on `images`; below 1 as far as they are on a network's own kind."""
    few, _ = sample(images, None)
    distance = fit(checkpoint, checkpoint.arch, choose(checkpoint, few, given)[0], few, None).distance
    return math.inf if distance is None else distance / GOOD


def misfit_of_answers(checkpoint: Checkpoint, images: Tensor, given: str) -> float:
    """How little the network's answers to `images` tell one from another; below 1 where they tell enough.

    A small ConvNeXt trained at 32 pixels gave answers that told 3.2 nats (of 3.8) there, 0.6 at 48 and 0.1 at 224.
    """
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:FEW]
    few, network = images[drawn], checkpoint.build()
    said = claim(checkpoint.metadata, checkpoint.config, checkpoint.preprocessor, checkpoint.layer)
    ways = [said[0]] if said is not None else [NAMED[name] for name in ("none", "half", "imagenet")]
    if given != "auto":
        ways = [parse_preprocess(given)]
    told = max(0.0, *(spread(network, few, way.of_channels(few.shape[1]))[1] for way in ways))
    return TELLS * math.log(min(len(few), checkpoint.arch.classes)) / max(told, 1e-6)


def takes_sizes(outline: nn.Module, channels: int, side: int) -> bool:
    """Whether the network of images of `channels`, built on the meta device, takes those of `side`, too."""
    try:
        with torch.inference_mode():
            return outline(torch.zeros(1, channels, side, side, device="meta")).ndim == 2
    except (RuntimeError, ValueError, AssertionError):
        return False
