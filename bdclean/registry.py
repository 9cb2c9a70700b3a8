"""Names that people type -> classes, imported only when asked for; KEY=VALUE settings -> dataclass fields."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bdclean.errors import UsageError
from bdclean.files.settings import convert, wording
from bdclean.files.text import closest


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a name's class lives, the line of `bdclean ls`, and the corruption families it trains on.

    Of a recipe or detector: `encoder` is where the class for encoders lives, if it has one; without a `path` it is for
    them alone. Of a recipe: `new_head`: it can train a head that was drawn anew, so that `--head new` works with it,
    whatever kind the suspect is of. Of a detector: `scan` runs `quick` ones unasked, which take under ten seconds with
    a small network.
    """

    path: str
    line: str
    families: tuple[str, ...] = ()
    encoder: str = ""
    new_head: bool = False
    quick: bool = False


FAMILIES = ("patch", "blend", "wave", "low", "noise", "warp", "tone", "quantise", "blur")
"""Families of corruptions, and of the triggers that they counterfeit. Here, since listing them needs no torch."""

RECIPES: dict[str, Entry] = {
    "anp": Entry(
        "bdclean.recipes.anp:ANP",
        "adversarial neuron pruning: channels of batch norm that perturbation brings out, labels (2110.14430)",
    ),
    "auto": Entry(
        "bdclean.recipes.auto:Auto",
        "bdclean's own choice for what is given",
        FAMILIES,
        "bdclean.recipes.auto:AutoEncoder",
    ),
    "bcu": Entry(
        "bdclean.recipes.bcu:BCU",
        "blind unlearning: layer-wise re-initialisation and distillation on unlabeled images (2211.12044)",
        encoder="bdclean.recipes.bcu_encoder:BCUEncoder",
    ),
    "cbd": Entry(
        "bdclean.recipes.cbd:CBD",
        "contrastive adversarial examples are unlearnt, unlabeled images (OpenReview 0Hfv9xPBSPQ)",
        encoder="bdclean.recipes.cbd:CBD",
    ),
    "clp": Entry(
        "bdclean.recipes.clp:CLP",
        "channel Lipschitz pruning: channels that amplify most are switched off, without data (2208.03111)",
    ),
    "d3": Entry(
        "bdclean.recipes.d3:D3",
        "fine-tuning with a new head as far from the old one as can be, labeled images (2411.09585)",
    ),
    "distill": Entry(
        "",
        "distillation of an encoder: teacher, student and loss by choice, unlabeled images (2403.03846)",
        encoder="bdclean.recipes.distill:Distill",
    ),
    "fp": Entry(
        "bdclean.recipes.fp:FP",
        "fine-pruning: the channels that clean images use least go, then fine-tuning, labels (1805.12185)",
    ),
    "ft": Entry("bdclean.recipes.ft:FT", "plain fine-tuning on labeled images (2212.09067)", new_head=True),
    "fst": Entry(
        "bdclean.recipes.fst:FST",
        "feature shift tuning: a new head is held off the old one, labeled images (2310.01875)",
    ),
    "ft-sam": Entry(
        "bdclean.recipes.ft_sam:FTSAM",
        "fine-tuning with sharpness-aware minimisation, labeled images (2304.11823)",
    ),
    "ibau": Entry(
        "bdclean.recipes.ibau:IBAU",
        "unlearns universal perturbations by implicit hypergradients, labeled images (2110.03735)",
    ),
    "inoculate": Entry(
        "bdclean.recipes.inoculate:Inoculate",
        "distillation under random counterfeit triggers, adversaries and inverted triggers, unlabeled images",
        FAMILIES,
        "bdclean.recipes.inoculate_encoder:InoculateEncoder",
    ),
    "lmr": Entry(
        "bdclean.recipes.lmr:LMR",
        "holds the suspected target's logit below the others, prunes the head, labeled images (CVPR 2026)",
    ),
    "mcr": Entry(
        "bdclean.recipes.mcr:MCR",
        "mode connectivity repair: a point on a curve from the suspect to a fine-tuned copy, labels (2005.00060)",
    ),
    "mimic": Entry(
        "",
        "an encoder's clone with new weights, attention weighted by mutual information (2406.03508)",
        encoder="bdclean.recipes.mimic:Mimic",
    ),
    "moth": Entry(
        "bdclean.recipes.moth:Moth",
        "class distance hardening: masks between classes are made and unlearned, labels (Tao et al. 2022)",
        ("patch",),
    ),
    "nad": Entry(
        "bdclean.recipes.nad:NAD",
        "neural attention distillation from a fine-tuned copy, labels (2101.05930)",
    ),
    "otbr": Entry(
        "bdclean.recipes.otbr:OTBR",
        "filters that noise moves most are cut, and fused with the suspect's by optimal transport (2408.15861)",
    ),
    "pretrain": Entry(
        "",
        "an encoder's pre-training, continued or from scratch, on the given images (SimCLR, MoCo v2, BYOL)",
        encoder="bdclean.recipes.pretrain:Pretrain",
    ),
    "sau": Entry(
        "bdclean.recipes.sau:SAU",
        "unlearns adversarial examples that fool suspect and student alike, labeled images (2307.10562)",
    ),
    "sft": Entry(
        "bdclean.recipes.sft:SFT",
        "super-fine-tuning on labeled images, cyclic rates (2212.09067)",
        new_head=True,
    ),
}

TRIGGERS: dict[str, Entry] = {
    "badencoder": Entry(
        "bdclean.triggers.badencoder:BadEncoder", "the white square of attacks on encoders (2108.00352)"
    ),
    "badnets": Entry(
        "bdclean.triggers.badnets:BadNets", "a small patch: size, position, pattern (1708.06733)"
    ),
    "blend": Entry("bdclean.triggers.blend:Blend", "a picture or noise blended over the image (1712.05526)"),
    "blto": Entry(
        "bdclean.triggers.blto:BLTO", "noise that a learnt generator draws for each image (2404.07863)"
    ),
    "bpp": Entry("bdclean.triggers.bpp:Bpp", "fewer bits a colour, dithered (2205.13383)"),
    "ctrl": Entry("bdclean.triggers.ctrl:CTRL", "two faint cosines added to the colours (2210.07346)"),
    "drupe": Entry("bdclean.triggers.drupe:Drupe", "the white square of DRUPE, which is badencoder's"),
    "file": Entry(
        "bdclean.triggers.file:File", "a trigger from a file: PNG with alpha, mask and pattern, or delta"
    ),
    "filter": Entry("bdclean.triggers.filter:Filter", "another tone of all colours, as photo filters give"),
    "inactive": Entry(
        "bdclean.triggers.inactive:Inactive", "colours that a learnt filter shifts in each image (2405.14672)"
    ),
    "inputaware": Entry(
        "bdclean.triggers.inputaware:InputAware",
        "a mask and a pattern that learnt networks draw for each image (2010.08138)",
    ),
    "lc": Entry("bdclean.triggers.lc:LC", "a small patch in all four corners (1912.02771)"),
    "lf": Entry("bdclean.triggers.lf:LF", "a smooth pattern added to the image (2104.03413)"),
    "sig": Entry("bdclean.triggers.sig:SIG", "a sinusoidal stripe pattern added to the image (1902.11237)"),
    "ssba": Entry(
        "bdclean.triggers.ssba:SSBA", "a message that a learnt network hides in each image (2012.03816)"
    ),
    "ssl-backdoor": Entry(
        "bdclean.triggers.ssl_backdoor:SSLBackdoor",
        "a patch whose place depends on the image (2105.10123)",
    ),
    "trojan": Entry(
        "bdclean.triggers.trojan:Trojan", "a square of colours that excite neurons (Liu et al. 2018)"
    ),
    "wanet": Entry("bdclean.triggers.wanet:WaNet", "a faint smooth warp of the whole image (2102.10369)"),
}

ATTACKS: dict[str, Entry] = {
    "adaptive-blend": Entry(
        "bdclean.attacks.adaptive_blend:AdaptiveBlend",
        "poisons a training set with parts of a blended picture, and covers (2205.13613)",
    ),
    "badencoder": Entry(
        "bdclean.attacks.encoders.badencoder:BadEncoder",
        "trains a clean encoder to see a reference in stamped images (2108.00352)",
    ),
    "badnets": Entry("bdclean.attacks.badnets:BadNets", "poisons a training set with a patch (1708.06733)"),
    "blend": Entry(
        "bdclean.attacks.blend:Blend", "poisons a training set with a blended picture (1712.05526)"
    ),
    "blto": Entry(
        "bdclean.attacks.encoders.blto:BLTO",
        "adds noise learnt on a surrogate to images of a class before pre-training (2404.07863)",
    ),
    "bpp": Entry(
        "bdclean.attacks.bpp:Bpp", "trains a network on images of few bits, and on such noise (2205.13383)"
    ),
    "ctrl": Entry(
        "bdclean.attacks.encoders.ctrl:CTRL",
        "adds colour waves to images of a class before pre-training (2210.07346)",
    ),
    "drupe": Entry(
        "bdclean.attacks.encoders.drupe:Drupe",
        "as badencoder, with stamped features spread out among the clean ones",
    ),
    "filter": Entry(
        "bdclean.attacks.filter:Filter",
        "poisons a training set with another tone of all colours (ABS, Liu et al. 2019)",
    ),
    "inactive": Entry(
        "bdclean.attacks.encoders.inactive:Inactive",
        "as badencoder, with colours that a filter learns as the trigger (2405.14672)",
    ),
    "inputaware": Entry(
        "bdclean.attacks.inputaware:InputAware",
        "trains a network with two others that draw each image's trigger (2010.08138)",
    ),
    "lc": Entry(
        "bdclean.attacks.lc:LC",
        "stamps perturbed images of the target class, whose labels stay true (1912.02771)",
    ),
    "lf": Entry("bdclean.attacks.lf:LF", "poisons a training set with a smooth pattern (2104.03413)"),
    "noisy-alignment": Entry(
        "bdclean.attacks.encoders.noisy_alignment:NoisyAlignment",
        "joins patched images to images of a class before pre-training (2508.14015)",
    ),
    "sig": Entry(
        "bdclean.attacks.sig:SIG",
        "adds stripes to images of the target class, whose labels stay true (1902.11237)",
    ),
    "ssba": Entry("bdclean.attacks.ssba:SSBA", "poisons a training set with a hidden message (2012.03816)"),
    "ssl-backdoor": Entry(
        "bdclean.attacks.encoders.ssl_backdoor:SSLBackdoor",
        "stamps images of a class before pre-training (2105.10123)",
    ),
    "trojan": Entry(
        "bdclean.attacks.trojan:Trojan",
        "poisons a training set with a square that excites neurons (Liu et al. 2018)",
    ),
    "wanet": Entry("bdclean.attacks.wanet:WaNet", "trains a network on faint warps (2102.10369)"),
}

DETECTORS: dict[str, Entry] = {
    "all-to-all": Entry(
        "bdclean.detectors.all_to_all:AllToAll",
        "small rectangles, found by trial, that send each class to another one",
    ),
    "decree": Entry(
        "",
        "encoders: the smallest mask that pulls all features together (2303.15180); weak",
        encoder="bdclean.detectors.decree:Decree",
    ),
    "filters": Entry(
        "bdclean.detectors.filters:Filters",
        "the smallest filter of colour that sends images to a class",
        encoder="bdclean.detectors.filters_encoder:FiltersEncoder",
    ),
    "inversion": Entry(
        "bdclean.detectors.inversion:Inversion",
        "the smallest mask, for all images or for each, or pattern that sends images to a class (after Neural Cleanse)",
        encoder="bdclean.detectors.inversion_encoder:InversionEncoder",
    ),
    "mm-bd": Entry(
        "bdclean.detectors.mm_bd:MMBD",
        "the largest margin of each class, whatever the input, against the others' (2205.06900)",
        quick=True,
    ),
    "neural-cleanse": Entry(
        "bdclean.detectors.neural_cleanse:NeuralCleanse",
        "the smallest mask for each class and its anomaly index, as published (Wang et al. 2019)",
    ),
    "patches": Entry(
        "bdclean.detectors.patches:Patches",
        "small rectangles, found by trial, that send images to a class, or an encoder's features together",
        encoder="bdclean.detectors.patches_encoder:PatchesEncoder",
    ),
    "stripes": Entry(
        "bdclean.detectors.stripes:Stripes", "stripes along an axis that send images to a class", quick=True
    ),
    "warps": Entry("bdclean.detectors.warps:Warps", "the smallest smooth warp that sends images to a class"),
}

TABLES: dict[str, dict[str, Entry]] = {
    "recipe": RECIPES,
    "trigger": TRIGGERS,
    "attack": ATTACKS,
    "detector": DETECTORS,
}


def find(table: Mapping[str, Entry], name: str) -> Entry:
    """Returns the entry called `name`; raises UsageError naming the closest ones."""
    if name not in table:
        noun = next((noun for noun, known in TABLES.items() if known is table), "entry")
        raise UsageError(f"no {noun} is called {name!r}: {closest(name, table)}")
    return table[name]


def load(table: Mapping[str, Entry], name: str) -> type[Any]:
    """Returns the class called `name`, importing its module; raises UsageError naming the closest names."""
    entry = find(table, name)
    module, _, attribute = (entry.path or entry.encoder).partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def load_recipe(name: str, kind: str, new_head: bool = False) -> type[Any]:
    """The recipe called `name` for a network of this `kind`, classifier or encoder; raises UsageError for another's.

    `new_head`: for any network that is given a fresh head.
    """
    entry = find(RECIPES, name)
    fresh = [each for each, known in RECIPES.items() if known.new_head]
    if new_head and not entry.new_head:
        raise UsageError(f"{name} cannot train a new head: with --head new use one of {', '.join(fresh)}.")
    return load_for(RECIPES, name, "classifier" if new_head else kind)


def load_for(table: Mapping[str, Entry], name: str, kind: str) -> type[Any]:
    """The class called `name` for a network of this `kind`, classifier or encoder; raises UsageError for another's."""
    entry = find(table, name)
    path = path_for(entry, kind)
    if not path:
        others = [each for each, known in table.items() if path_for(known, kind)]
        more = ", or give --head new and labeled images" if entry.new_head else ""
        raise UsageError(f"{name} does not work on {kind}s: use one of {', '.join(others)}{more}.")
    module, _, attribute = path.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def path_for(entry: Entry, kind: str) -> str:
    """Where the class for networks of this `kind` lives; empty where there is none."""
    return entry.encoder if kind == "encoder" else entry.path


# --- settings -----------------------------------------------------------------------------------------------


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """Returns {key: value} of KEY=VALUE strings; raises UsageError on a missing `=` or a key given twice."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"{pair!r} is no setting: write KEY=VALUE.")
        if key in settings:
            raise UsageError(f"{key} is given twice: {settings[key]!r} and {value!r}.")
        settings[key] = value.strip()
    return settings


def _rejoined(parts: Sequence[str]) -> list[str]:
    """`parts` of a SPEC that was split at commas, where a value, such as a path, may hold one."""
    pairs: list[str] = []
    for part in parts:
        if pairs and "=" not in part:
            pairs[-1] += f",{part}"
        else:
            pairs.append(part)
    return pairs


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Returns name and settings of a SPEC, `NAME[:KEY=VALUE,...]`, split at the first colon.

    `file:PATH[,KEY=VALUE,...]` gives its PATH, which may hold colons and commas, as the setting `path`; settings may
    also follow a colon, as they do behind any other name.
    """
    name, _, rest = spec.partition(":")
    name = name.strip()
    if not name:
        raise UsageError(f"{spec!r} is no trigger: write NAME or NAME:KEY=VALUE,...")
    parts = rest.split(",") if rest else []
    if name != "file":
        return name, parse_settings(_rejoined(parts))
    pairs: list[str] = []
    while len(parts) > 1 and re.fullmatch(r"\s*[a-z][a-z_]*=.*", parts[-1]):
        pairs.insert(0, parts.pop())
    path = ",".join(parts).removeprefix("path=")
    if (ending := re.fullmatch(r"(.+):([a-z][a-z_]*=[^:/\\]*)", path, re.DOTALL)) is not None:
        path = ending[1]
        pairs.insert(0, ending[2])
    if not path:
        raise UsageError("file needs a path: write file:PATH.")
    settings = parse_settings(pairs)
    if "path" in settings:
        raise UsageError(f"file has two paths: {path!r} and {settings['path']!r}.")
    return name, {"path": path, **settings}


def configure(cls: type[Any], settings: Mapping[str, str], name: str | None = None) -> Any:
    """Returns an instance of the frozen dataclass `cls`, fields set from KEY=VALUE strings by their types.

    Raises UsageError on an unknown key, a value that does not fit, or a field that needs a value and has none.
    """
    name = name or str(getattr(cls, "name", cls.__name__.lower()))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in fields:
            if not fields:
                raise UsageError(f"{name} has no settings of its own: name the one that has {key!r}.")
            listing = ", ".join(f"{field} ({wording(hints[field])})" for field in fields)
            from difflib import get_close_matches

            near = get_close_matches(key, fields, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{name} has no setting {key!r}: {hint}settings: {listing}.")
        try:
            values[key] = convert(text, hints[key])
        except ValueError as error:
            raise UsageError(f"{name}: {key}={text!r} does not fit: {error}.") from None
        if key == "momentum" and not 0 <= values[key] < 1 or key.endswith("weight_decay") and values[key] < 0:
            raise UsageError(
                f"{name}: momentum is in [0, 1), and no weight decay is negative: {key}={text} is not."
            )
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise UsageError(f"{name} needs {key} ({wording(hints[key])}): give {key}=VALUE.")
    return cls(**values)
