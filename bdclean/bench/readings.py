"""How often the rule for readings of the same tensors is right, refuses, and is wrong, on networks trained for it.

    python -m bdclean.bench readings --work DIR --data FOLDER --test FOLDER [--other FOLDER] [--epochs 6]

Each network is trained with one reading (activation, shortcut, stem, strides, heads), then read as a stranger's file
with images that it was not trained on: with labels, without, and with images of another kind.
Networks that are in DIR are not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.models.vision_transformer import VisionTransformer

from bdclean.data.augment import crop
from bdclean.data.imageset import ImageSet
from bdclean.data.loading import load_images
from bdclean.networks.ambiguity.choosing import Choice
from bdclean.networks.ambiguity.variant import read_off
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families.imagenet_resnet import stride_first
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.families.vgg import SmallVGG
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.recognition.variants import drop_pool, exchange, keep_stem_and_drop_pool
from bdclean.progress import quiet

HALF = parse_preprocess("half")


def networks(classes: int) -> dict[str, tuple[Callable[[], nn.Module], str]]:
    """Name -> how to build it, and the end of the name of the reading that is right."""
    small = partial(ResidualNetwork, (1, 1, 1), (8, 16, 32), 8, classes)
    wide = partial(PreActNetwork, (1, 1, 1), (16, 32, 64), 16, classes)
    large = partial(resnet.ResNet, resnet.BasicBlock, [1, 1, 1, 1], classes)
    deep = partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], classes, width_per_group=16)
    plain = partial(SmallVGG, (16, "M", 32, "M", 64, "M"), False, 4, ((None, 1024, classes),))
    normed = partial(SmallVGG, (16, "M", 32, "M", 64, "M"), True, 4, ((None, 1024, classes),))
    found: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "residual": (small, "-b-w8"),
        "shortcut-a": (partial(small, shortcut="a"), "-a-w8"),
        "shortcut-a-end": (partial(small, shortcut="a-end"), "-a-end-w8"),
        "wide": (wide, "wrn-10-1"),
        "wide-raw": (partial(wide, raw=True), "-raw"),
        "torchvision": (large, "1-1-1-1"),
        "torchvision-no-pool": (lambda: drop_pool(large()), "+no-pool"),
        "torchvision-stride1-no-pool": (lambda: keep_stem_and_drop_pool(large()), "+stride1-no-pool"),
        "bottleneck": (deep, "_1x16d"),
        "bottleneck-stride1x1": (partial(stride_first, deep), "_stride1x1"),
        "vgg": (plain, "-cifar"),
        "vgg-bn": (normed, "-bn-cifar"),
    }
    for name in ("silu", "gelu", "leaky", "elu", "hardswish"):
        found[f"residual-{name}"] = (lambda name=name: exchange("relu", name, small())), f"+{name}"  # type: ignore[misc]
    for name in ("silu", "elu"):
        found[f"vgg-{name}"] = (lambda name=name: exchange("relu", name, plain())), f"+{name}"  # type: ignore[misc]
    for heads in (1, 2, 4, 8):
        build = partial(VisionTransformer, 32, 8, 3, heads, 64, 128, num_classes=classes)
        found[f"vit-heads{heads}"] = (build, f"-h{heads}-p8-mlp128")
    return found


def train(build: Callable[[], nn.Module], images: ImageSet, epochs: float, seed: int) -> nn.Module:
    """The network after a short training with random crops."""
    torch.manual_seed(seed)
    network = build().train()
    steps = max(1, int(epochs * len(images) / 64))
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    assert images.labels is not None
    for _ in range(steps):
        drawn = torch.randint(0, len(images), (64,), generator=generator)
        pixels = crop(images.images[drawn], generator, 2)
        loss = F.cross_entropy(network(HALF.normalise(pixels)), images.labels[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def outcome(found: str, doubt: str | None, right: str, unusual: tuple[str, ...]) -> str:
    """`right`, `refused` or `wrong`."""
    if doubt:
        return "refused"
    rest = any(found.endswith(end) and end != right and len(end) > len(right) for end in unusual)
    return "right" if found.endswith(right) and not rest else "wrong"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench readings", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the networks are kept")
    parser.add_argument(
        "--data", type=Path, required=True, help="labeled images to train on, one folder a class"
    )
    parser.add_argument(
        "--test", type=Path, required=True, help="labeled images of the same classes to read with"
    )
    parser.add_argument("--other", type=Path, help="images of another kind")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--networks", default="", help="names, by default all")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    load = partial(load_images, size=(32, 32), limit=0, seed=0, tell=quiet)
    test = load(options.test, labeled=True)
    assert test.labels is not None
    ways = {"labels": (test.images, test.labels), "no labels": (test.images, None)}
    if options.other is not None:
        ways["other images"] = (load(options.other).images, None)
    made = networks(int(test.labels.max()) + 1)
    ends = tuple(right for _, right in made.values())
    counts: dict[str, Counter[str]] = {way: Counter() for way in ways}
    training: ImageSet | None = None
    print("| network | " + " | ".join(ways) + " |\n|" + "---|" * (len(ways) + 1))
    for name in options.networks.split(",") if options.networks else made:
        build, right = made[name]
        file = options.work / f"{name}.safetensors"
        if not file.exists():
            training = training or load(options.data, labeled=True)
            network = train(build, training, options.epochs, seed=sum(map(ord, name)))
            save_file(network.state_dict(), file, {"bdclean.preprocess": "half"})
        checkpoint, cells = Checkpoint.read(file), []
        for way, (images, labels) in ways.items():
            reading = read_off(checkpoint, Choice(HALF, float("nan"), "given"), images, labels, False)
            said = outcome(reading.arch.name, reading.doubt, right, ends)
            counts[way][said] += 1
            margin = "" if reading.margin is None else f" ({reading.margin:.2f})"
            cells.append(said + (f": {reading.arch.name}" if said == "wrong" else "") + margin)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for way, count in counts.items():
        print(f"{way}: {count['right']} right, {count['refused']} refused, {count['wrong']} wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
