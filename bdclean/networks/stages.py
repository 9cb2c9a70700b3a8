"""Stages and taps of any network, found by watching one forward pass.

Key prefixes say nothing for foreign code (a VGG has one `features`), so depth is read off what runs: weight modules in
the order of execution, cut where the resolution of their outputs falls; where it never does, by blocks.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn

from bdclean.networks.arch import Arch, Stage

# A network whose resolution never changes (a transformer, a plain perceptron) is cut into this many equal parts, as
# many as a ResNet has between stem and head.
PARTS = 4
# Convolutions without padding trim a map (Inception's, 149 to 147 pixels a side): only a clearly smaller one opens a
# stage.
TRIMMED = 0.75
# Several images pass at once: what a module gives for each of them can then be told from its tables (Swin v2's) and
# windows.
IMAGES = 2
# Parameters with two or more dimensions that are no layer's weights: Swin's tables, ViT's tokens, ConvNeXt's scales.
NO_WEIGHTS = re.compile(r"bias|scale|gamma|token|embed|(?:^|_)pos(?:_|ition|$)")


@dataclass
class Event:
    """One module's call: where it began and ended in the order of execution, and what came out."""

    name: str
    begin: int
    end: int = -1
    shape: tuple[int, ...] = ()
    calls: int = 1
    # Height times width of square maps [n c s s] or [n s s c]; 0 for anything else.
    pixels: int = 0

    @property
    def places(self) -> int:
        """Pixels of a map, or the number of tokens [n t c]."""
        return self.shape[1] if len(self.shape) == 3 and self.shape[0] == IMAGES else self.pixels


class NoTensor(ValueError):
    """The network runs, and gives something else than a tensor; the message says what, and what to do."""


def describe(
    name: str,
    build: Callable[[], nn.Module],
    size: tuple[int, int, int],
    alternatives: tuple[tuple[str, str], ...] = (),
    network: nn.Module | None = None,
) -> Arch:
    """The Arch of what `build` returns, from one pass over images of `size` on the meta device.

    `network`: one already built, to save building again. Code that cannot run on the meta device runs on the CPU.
    Raises ValueError when the network has no weights, or gives anything but one row of logits an image.
    """
    events, weighted, logits = watch(build, size, network)
    if len(logits) != 2 or logits[0] != IMAGES or not weighted:
        raise ValueError(
            f"gives an output of shape {list(logits)} for {IMAGES} images, not one row of logits for each"
        )
    head = weighted[-1]
    stages = cut(weighted, events)
    return Arch(
        name=name,
        build=build,
        input=size,
        classes=logits[-1],
        head=head,
        stages=stages,
        taps=find_taps(stages, events),
        alternatives=alternatives,
    )


def describe_encoder(
    name: str, build: Callable[[], nn.Module], size: tuple[int, int, int], feature: str
) -> Arch:
    """The Arch of a network without a head: what it gives is `feature`, [n width].

    Raises ValueError when it gives anything but one vector an image.
    """
    width = watch(build, size)[2]
    if len(width) != 2 or width[0] != IMAGES:
        raise ValueError(
            f"gives an output of shape {list(width)} for {IMAGES} images, not one vector for each"
        )

    def headed() -> nn.Module:
        return nn.Sequential(build(), nn.Linear(width[1], 2))

    made = describe(name, headed, size)
    # The network is the first of two in a sequence there.
    stages = tuple(
        replace(s, name=s.name.removeprefix("0."), modules=tuple(m.removeprefix("0.") for m in s.modules))
        for s in made.stages[:-1]
    )
    taps = tuple(tap.removeprefix("0.") for tap in made.taps if tap != "0")
    return replace(
        made, build=build, classes=0, head="", stages=stages, taps=taps, width=width[1], feature=feature
    )


def watch(
    build: Callable[[], nn.Module], size: tuple[int, int, int], network: nn.Module | None = None
) -> tuple[dict[str, Event], list[str], tuple[int, ...]]:
    """Every executed module's event, the weight modules in order of execution, and the shape of the output.

    Raises NoTensor where the output is none.
    """
    try:
        if network is None:
            with torch.device("meta"):
                network = build()
        return _watch(network, size, "meta")
    except (NotImplementedError, RuntimeError, TypeError):
        # Code that looks at values or makes tensors on a fixed device has no meta form. A true fault shows again here.
        return _watch(build(), size, "cpu")


def _watch(
    network: nn.Module, size: tuple[int, int, int], device: str
) -> tuple[dict[str, Event], list[str], tuple[int, ...]]:
    events: dict[str, Event] = {}
    clock = 0
    previous: tuple[object, int] = (None, 0)

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal clock
            clock += 1
            if name in events:
                events[name].calls += 1
            else:
                events[name] = Event(name, clock)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            nonlocal clock, previous
            clock += 1
            pixels = 0
            if isinstance(output, torch.Tensor):
                pixels = pixels_of(module, inputs[0] if inputs else None, output, previous)
            previous = (output, pixels)
            if events[name].end < 0:
                events[name].end, events[name].pixels = clock, pixels
                if isinstance(output, torch.Tensor):
                    events[name].shape = tuple(output.shape)

        return hook

    handles = []
    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name)))
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(IMAGES, *size, device=device))
    finally:
        for handle in handles:
            handle.remove()
        network.train(was_training)
    if not isinstance(output, torch.Tensor):
        kind = type(output).__name__
        what = "nothing" if output is None else f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
        raise NoTensor(f"returns {what}: wrap it so that forward gives the logits alone")
    return events, _weighted(network, events), tuple(output.shape)


def pixels_of(module: nn.Module, given: object, output: torch.Tensor, previous: tuple[object, int]) -> int:
    """Height times width of the maps that `module` gives; 0 for other outputs.

    Windows of tokens [n windows tokens c] can look like maps (MaxViT's): so linear layers and their norms say that
    their channels are last, and what only moves things about says nothing. `previous`: the output before this one, and
    its pixels.
    """
    if output.ndim != 4 or output.shape[0] != IMAGES:
        return 0
    _, a, b, c = output.shape
    first, last = b * c if b == c else 0, a * b if a == b else 0
    if type(module) in (nn.Linear, nn.LayerNorm):
        return last
    if next(module.children(), None) is None and next(module.parameters(), None) is None:
        if not isinstance(given, torch.Tensor) or given.shape != output.shape:
            return 0
        if given is previous[0]:
            return previous[1]
    return first or last


def _weighted(network: nn.Module, events: dict[str, Event]) -> list[str]:
    """Names of the modules that own weights, in the order in which they run.

    One that is never called itself (ViT's and Swin's attention read the weight of their output projection directly)
    follows the module registered before it.
    """
    order: list[str] = []
    late: list[tuple[str, str | None]] = []
    previous = None
    for name, module in network.named_modules():
        if not name or not holds_weights(module):
            continue
        if name in events:
            order.append(name)
        else:
            late.append((name, previous))
        previous = name
    order.sort(key=lambda n: events[n].begin)
    for name, before in late:
        order.insert(order.index(before) + 1 if before in order else 0, name)
    return order


def holds_weights(module: nn.Module) -> bool:
    """Whether `module` itself has a weight: a matrix or a kernel, and no table, token or scale."""
    return any(p.ndim >= 2 and not NO_WEIGHTS.search(n) for n, p in module.named_parameters(recurse=False))


def cut(weighted: list[str], events: dict[str, Event]) -> tuple[Stage, ...]:
    """Stem (the first weight module), one stage a resolution, head (the last weight module)."""
    if len(weighted) == 1:
        return (Stage("head", tuple(weighted)),)
    inner = weighted[1:-1]
    groups = _by_resolution(inner, events)
    if len(groups) == 1 and len(inner) >= PARTS:
        groups = _by_blocks(inner)
    stages = [Stage("stem", (weighted[0],))]
    for k, group in enumerate(groups):
        name = _stage_name(group, weighted, k + 1)
        # A module of the network may be called like the number of another stage (ShuffleNet's `stage2`).
        taken = any(stage.name == name for stage in stages)
        stages.append(Stage(f"{name}-{k + 1}" if taken else name, tuple(group)))
    return (*stages, Stage("head", (weighted[-1],)))


def _by_blocks(names: list[str]) -> list[list[str]]:
    """PARTS groups of about as many modules each, cut between a transformer's blocks (ViT, MLP-Mixer, ConvMixer)."""
    units = _units(names, "")
    # Blocks may lie in a module of their own beside others (a DeiT with two heads).
    while (largest := max(units, key=len)) != names and len(largest) * 2 > len(names):
        finer = _units(names, _ancestor(largest))
        if len(finer) == len(units):
            break
        units = finer
    # All of them may lie in one module (`layers` of timm's Swin).
    if len(units) == 1:
        units = _units(names, _ancestor(names))
    # A ViT of three blocks.
    if len(units) < PARTS:
        units = [[name] for name in names]
    groups: list[list[str]] = [[] for _ in range(PARTS)]
    done = 0
    for unit in units:
        # The part that the unit's middle falls into.
        groups[min(PARTS - 1, int((done + len(unit) / 2) * PARTS / len(names)))] += unit
        done += len(unit)
    return [group for group in groups if group]


def _units(names: list[str], prefix: str) -> list[list[str]]:
    """Runs of neighbours that lie in the same child of `prefix`, or outside it together."""
    depth = len(prefix.split(".")) if prefix else 0
    units: list[list[str]] = []
    last = None
    for name in names:
        inside = not prefix or name.startswith(prefix + ".")
        key = ".".join(name.split(".")[: depth + 1]) if inside else ""
        if key != last or not units:
            units.append([])
        units[-1].append(name)
        last = key
    return units


def _by_resolution(names: list[str], events: dict[str, Event]) -> list[list[str]]:
    pixels = [events[name].pixels if name in events else 0 for name in names]
    ends = sorted((e.end, e.pixels) for e in events.values())
    at = [end for end, _ in ends]
    largest = [*accumulate((p for _, p in reversed(ends)), max)][::-1]
    groups: list[list[str]] = []
    last = -1
    for k, name in enumerate(names):
        # A dip, after which something larger ends, is a side branch on pooled features (squeeze-and-excitation) or on
        # windows of tokens: it belongs to what it sits in. So does what has no map, until the last map has ended.
        here = bisect_right(at, events[name].end) if name in events else 0
        later = largest[here] if here < len(largest) else 0
        if groups and (pixels[k] < later or pixels[k] > TRIMMED * last or pixels[k] == last):
            groups[-1].append(name)
        else:
            groups.append([name])
            last = max(pixels[k], later)
    return _whole_blocks(groups, dict(zip(names, pixels, strict=True)))


def _whole_blocks(groups: list[list[str]], pixels: dict[str, int]) -> list[list[str]]:
    """Move the layers of a block that lowers the resolution in its middle into the stage that it opens.

    A bottleneck's first 1x1 convolution still has the old resolution, and its shortcut may run before it (RegNet's,
    ShuffleNet's); without this they would count one stage too early. A block that goes on in later stages is none
    (HRNet's, FastViT's).
    """
    for k in range(len(groups) - 1):
        early, later = groups[k], groups[k + 1]
        block = _ancestor([early[-1], later[0]])
        if not block:
            continue
        inside = [n for n in early if n.startswith(block + ".")]
        grown = False
        while "." in block:
            block = block.rpartition(".")[0]
            wider = [n for n in early if n.startswith(block + ".")]
            if any(pixels[n] != pixels[later[0]] for n in wider if n not in inside):
                break
            grown |= len(wider) > len(inside)
            inside = wider
        holder = _ancestor([*inside, later[0]])
        elsewhere = any(n.startswith(holder + ".") for g in groups[k + 2 :] for n in g)
        if (len(inside) < len(early) or grown) and not elsewhere and inside == early[-len(inside) :]:
            groups[k], groups[k + 1] = early[: -len(inside)], inside + later
    return [group for group in groups if group]


def _ancestor(names: list[str]) -> str:
    """The innermost module that contains all of `names`; empty for the network itself."""
    parts = [n.split(".") for n in names]
    depth = 0
    while all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return ".".join(parts[0][:depth])


def _stage_name(group: list[str], weighted: list[str], number: int) -> str:
    """The module that holds exactly this stage, as `layer3`; else `stage<number>`."""
    holder = _ancestor(group) if len(group) > 1 else ""
    if holder and {n for n in weighted if n.startswith(holder + ".")} == set(group):
        return holder
    return f"stage{number}"


def find_taps(stages: tuple[Stage, ...], events: dict[str, Event]) -> tuple[str, ...]:
    """For each stage with maps or tokens: the module that ends last before the next stage begins, as large as they are.

    That is the outermost block (`layer2` rather than `layer2.1.bn2`); in a plain sequence, what follows the last
    convolution: its norm and activation.
    """
    taps = []
    for stage, following in zip(stages[1:-1], stages[2:], strict=True):
        ran = [events[n] for n in stage.modules if n in events]
        called = [e for e in ran if e.places > 1]
        if not called:
            continue
        # The stage's own resolution is the most frequent: a first layer may have the one before (Inception v4's), a
        # side branch on pooled features a smaller one.
        counts = Counter(e.places for e in called)
        last = max(called, key=lambda e: (counts[e.places], e.end))
        # What follows the last tokens alone (CLIP's projection of the class token) ends no stage.
        begin = max((e.end for e in ran if len(e.shape) != 2), default=max(e.end for e in ran))
        end = min((events[n].begin for n in following.modules if n in events), default=begin)
        # A module that is called again would be seen as it was last.
        ended = [
            e for e in events.values() if e.calls == 1 and begin <= e.end < end and e.places == last.places
        ]
        # A block that holds some of the stage (WideResNet's, Swin's) comes before a norm or activation that follows it.
        holding = [e for e in ended if any(n.startswith(e.name + ".") for n in stage.modules)]
        taps.append(max(holding or ended, key=lambda e: e.end, default=last).name)
    return tuple(taps)
