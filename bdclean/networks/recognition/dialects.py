"""What people call the same tensor: wrappers around a network, and names that families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

# What wraps a module wherever it stands: DataParallel, torch.compile, FSDP, activation checkpointing, DeepSpeed.
ANYWHERE = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Averages of weights: Lightning modules (ema), ConvNeXt (model_ema), ema-pytorch (ema_model), PyTorch (swa_model), timm
# (state_dict_ema), FixMatch in PyTorch (ema_state_dict).
AVERAGES = r"(?:ema|model_ema|ema_model|swa_model|state_dict_ema|ema_state_dict)"
# Under which training code holds its network: PyTorch's ImageNet example (state_dict) and tutorial (model_state_dict),
# pycls (model_state), BackdoorBench, DeiT and Lightning (model), kuangliu (net), WaNet and Input-Aware (netC; netG is
# what makes their triggers), bdclean's own Classifier (network), mmpretrain and solo-learn (backbone), VISSL
# (base_model), transformers (timm_model), ema-pytorch (online_model), DINO (student).
HOLDERS = re.compile(
    rf"^(?:(?:{AVERAGES}|state_dict|model_state_dict|net_state_dict|model_state|model|model_raw|net|netC|network"
    r"|backbone|base_model|timm_model|online_model|student)\.)+"
)
# Words that are also parts of networks proper, tried last: SupContrast (encoder), open_clip (visual.trunk),
# byol-pytorch (online_encoder), DINO (teacher), SimCLRv2 in PyTorch (resnet), lightly (backbone.vit).
PARTS = re.compile(r"^(?:(?:encoder|trunk|visual|online_encoder|teacher|resnet|vit)\.)+")
AVERAGE = re.compile(rf"^(?:[\w]+\.)*?{AVERAGES}\.")
# A hostile name may be megabytes long, and a file may have a wrapper a tensor: the tests have both.
LONGEST, MOST_WRAPPERS = 200, 8
# What lies beside a network and is never part of what it computes: optimizer, counters and scaler (PyTorch's ImageNet
# example, MoCo v3, kuangliu's acc, akamaster's best_prec1), losses and metrics (Lightning with torchmetrics), heads of
# self-supervision (solo-learn, SwAV, CTRL, MoCo, SimSiam), n_averaged (PyTorch), decay (latent diffusion's LitEma),
# data_preprocessor (mmpretrain), callbacks and loops (Lightning), normalizer (MadryLab's robustness), WaNet's grids.
BESIDE = re.compile(
    r"^(?:[\w]*optim(?:izer)?[\w]*|[\w]*scheduler[\w]*|scaler|epochs?|[\w]*_step|steps?|iter(?:ation)?s?|n_averaged"
    r"|criterion[\w]*|loss|losses|loss_fn|[\w]*_loss|[\w]*metrics?|(?:train|val|test)_acc\w*|acc|accuracy|best_\w+"
    r"|[\w]*projector|[\w]*projection_head|proj_head|predictor|prototypes|queue|queue_ptr|decay|num_updates"
    r"|data_preprocessor|rng_state|[\w]*_rng_state|callbacks|hyper_parameters|loops|normalizer|identity_grid"
    r"|noise_grid)(?:\.|$)"
)

# What a layer that normalises pixels calls its mean, which is the group, and its standard deviation.
MOMENTS = r"(?:_|new_)?(?:(means?|mu)|stds?|sds|sigma)"
# nn.Sequential(Normalize(mean, std), network): what part 0 holds.
NORMALISE = re.compile(rf"0\.{MOMENTS}")


def views(
    names: Iterable[str], expected: Iterable[str] = ()
) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """A file's names without their wrappers, in each way that may be meant: name -> short name, and the names unread.

    With more and more wrappers taken off: first all tensors together (`backbone.conv1.weight` beside `fc.weight`),
    then without what is known to lie beside a network (`optimizer.`, `projector.`), then each wrapper's own, weights
    before their averages and most first, with whatever lies outside it (a text tower) unread. No view comes twice.
    `expected`: names that need no stripping. Behind a first layer that only normalises lies the network.
    """
    names, expected = list(names), set(expected)
    behind, aside = behind_normalisation(names)
    for view, unread in stripped(list(behind), expected):
        yield {behind[n]: short for n, short in view.items()}, tuple(behind[n] for n in unread) + aside
    yield from stripped(names, expected)


def stripped(names: list[str], expected: set[str]) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """`views` of names with no such layer before them."""
    if names and set(names) <= expected:
        yield {name: name for name in names}, ()
    seen: set[frozenset[tuple[str, str]]] = set()
    for strip in (plain, bare, unwrapped, inmost):
        for view, unread in groups(names, strip):
            key = frozenset(view.items())
            if view and key not in seen and len(set(view.values())) == len(view):
                seen.add(key)
                yield view, unread


def behind_normalisation(names: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Name without prefix -> name of what is part 1 of two, of which part 0 only normalises, and all other names."""
    behind: dict[str, str] = {}
    aside: list[str] = []
    layer = False
    for name in names:
        short = unwrapped(name[:LONGEST])
        if short.startswith("1.") and name.endswith(short):
            behind[short[2:]] = name
            continue
        aside.append(name)
        if NORMALISE.fullmatch(short):
            layer = True
        elif not BESIDE.match(short):
            return {}, ()
    return (behind, tuple(aside)) if layer and len(behind) + len(aside) == len(names) else ({}, ())


def groups(names: list[str], strip: Callable[[str], str]) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """All of `names`, then without what lies beside a network, then each wrapper's own."""
    short = {name: strip(name) for name in names}
    yield short, ()
    beside = {n: None for n in names if BESIDE.match(short[n][:LONGEST]) or BESIDE.match(n[:LONGEST])}
    if beside:
        yield {n: s for n, s in short.items() if n not in beside}, tuple(beside)
    for depth in ("outermost", "all"):
        wrapped: dict[str, dict[str, str]] = {}
        for name, inner in short.items():
            prefix = bare(name).removesuffix(inner) if bare(name).endswith(inner) else ""
            if depth == "outermost":
                prefix = prefix.partition(".")[0] + "." if prefix else ""
            wrapped.setdefault(prefix, {})[name] = inner
        if len(wrapped) == 1:
            return
        order = sorted(wrapped, key=lambda p: (bool(AVERAGE.match(p[:LONGEST])), -len(wrapped[p])))
        for prefix in order[:MOST_WRAPPERS]:
            own = wrapped[prefix]
            others = tuple(n for n in names if n not in own)
            # What stands beside a wrapper is another thing; what stands beside a bare network may be a part of it.
            if not prefix and not all(AVERAGE.match(n[:LONGEST]) or n in beside for n in others):
                continue
            yield own, others
            if any(n in own for n in beside):
                less = {n: s for n, s in own.items() if n not in beside}
                yield less, tuple(n for n in names if n not in less)


def plain(name: str) -> str:
    """The name as it is."""
    return name


def bare(name: str) -> str:
    """The name without what wraps modules wherever they stand."""
    return ANYWHERE.sub("", name)


def unwrapped(name: str) -> str:
    """The name within what holds the network."""
    return HOLDERS.sub("", bare(name))


def inmost(name: str) -> str:
    """The name within what holds the network, or a part of it that may hold all but the head."""
    name = unwrapped(name)
    return unwrapped(PARTS.sub("", name))
