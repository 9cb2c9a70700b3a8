"""What a file, or the JSON beside it, says of its normalisation and of how pictures are resized: a stranger's claim.

A wrong one can hide a backdoor at unchanged accuracy, so others than that are compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from bdclean.data.decode import FILTERS, STRETCH, Resize
from bdclean.errors import UsageError
from bdclean.networks.normalisation import Preprocess, Values, named, parse_preprocess
from bdclean.networks.recognition.dialects import LONGEST, MOMENTS

SMALLEST_CROP = 0.1
CONVNEXT_CROP, CONVNEXT_STRETCHED = 224 / 256, 384
"""Transformers' ConvNextImageProcessor: the crop where its config says none, and from which size on it stretches."""
OWN_LAYER = "the file's mean and std"
"""What tells a normalisation where a layer before the network has kept it: part 0 of two, RobustBench's `normalize`,
MadryLab's `normalizer`."""
LAYER = re.compile(rf"(?:.+\.)?(?:0|normali[sz]er?)\.{MOMENTS}")


def claim(
    metadata: Mapping[str, str], config: object, preprocessor: object, layer: Preprocess | None = None
) -> tuple[Preprocess, str] | None:
    """What the file or the JSON beside it says, and which of them says it; None where neither does.

    `layer`: what a layer before the network does, of which only the size may be said elsewhere.
    """
    said = metadata.get("bdclean.preprocess")
    if said is not None:
        try:
            return parse_preprocess(said), "metadata"
        except UsageError:
            return None
    tables = _tables(config, preprocessor)
    if layer is not None:
        return replace(layer, size=next(filter(None, map(_claimed_size, tables)), None)), OWN_LAYER
    for table in tables:
        mean = table.get("mean", table.get("image_mean"))
        std = table.get("std", table.get("image_std"))
        mean, std = _numbers(mean), _numbers(std)
        if table.get("do_normalize") is False:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if mean is None or std is None or min(std) <= 0:
            continue
        raw = table.get("do_rescale") is False or table.get("rescale_factor") in (1, 1.0)
        return named(Preprocess("", mean, std, False, raw, _claimed_size(table))), "config.json"
    return None


def layer_claim(tensors: Mapping[str, Tensor], unread: Iterable[str]) -> Preprocess | None:
    """What a layer before the network does to pixels, by its mean and std among the `unread`; None without both.

    Of pixels in [0, 255] where a mean is above 1.
    """
    found: dict[bool, set[Values | None]] = {True: set(), False: set()}
    for name in unread:
        match = LAYER.fullmatch(name) if len(name) <= LONGEST else None
        if match and tensors[name].is_floating_point() and tensors[name].numel() in (1, 3):
            # Six digits, as people write them: 0.4914 comes out of float32 as 0.49140000343.
            values = [float(f"{value:.6g}") for value in tensors[name].double().reshape(-1).tolist()]
            found[match[1] is not None].add(_numbers(values))
    if len(found[True]) != 1 or len(found[False]) != 1:
        return None
    mean, std = found[True].pop(), found[False].pop()
    if mean is None or std is None or min(std) <= 0:
        return None
    return named(Preprocess("", mean, std, False, max(mean) > 1))


def claimed_resize(config: object, preprocessor: object) -> Resize:
    """How the JSON beside the file says that pictures are brought to the input size; stretched where it does not say.

    timm's `crop_pct` (crop_mode center) and `interpolation`; of transformers' processors `do_center_crop` with
    `crop_size`, ConvNeXt's `crop_pct`, and `resample`.
    """
    for table in _tables(config, preprocessor):
        named_filter = table.get("interpolation", table.get("resample"))
        if isinstance(named_filter, int) and not isinstance(named_filter, bool):
            named_filter = next((name for name, value in FILTERS.items() if value == named_filter), None)
        share = _claimed_crop(table)
        known = isinstance(named_filter, str) and named_filter in FILTERS
        if known or share is not None:
            return Resize(share, str(named_filter) if known else STRETCH.interpolation)
    return STRETCH


def _claimed_crop(table: dict) -> float | None:
    share: object = table.get("crop_pct")
    size = table.get("size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    if "input_size" in table:
        if table.get("crop_mode", "center") != "center":
            return None
    elif "ConvNext" in str(table.get("image_processor_type", table.get("feature_extractor_type"))):
        share = CONVNEXT_CROP if share is None else share
        if not isinstance(edge, int) or edge >= CONVNEXT_STRETCHED:
            return None
    elif table.get("do_center_crop") is True:
        crop = table.get("crop_size")
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if not isinstance(crop, int) or not isinstance(edge, int) or not 0 < edge <= 1 << 16:
            return None
        share = crop / edge
    if isinstance(share, (int, float)) and not isinstance(share, bool) and SMALLEST_CROP <= share <= 1:
        return float(share)
    return None


def _tables(config: object, preprocessor: object) -> list[dict]:
    """Where timm (root, `pretrained_cfg`), OpenCLIP and Hugging Face (`preprocessor_config.json`) keep mean and std."""
    found = []
    for table in (preprocessor, config):
        if isinstance(table, dict):
            inner = [
                table.get(k)
                for k in ("pretrained_cfg", "default_cfg", "preprocessor_config", "preprocess_cfg")
            ]
            found += [t for t in (*inner, table) if isinstance(t, dict)]
    return found


def _numbers(value: object) -> Values | None:
    """Three numbers, of one three times: for grey images they become one again."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value] * 3
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 3):
        return None
    # abs() and not isfinite(): a whole number of a stranger's may be too large for a float
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e6 for v in value):
        return None
    a, b, c = (float(v) for v in (value if len(value) == 3 else list(value) * 3))
    return a, b, c


def _claimed_size(table: dict) -> tuple[int, int] | None:
    """timm's input_size [c, h, w]; Hugging Face's crop_size or size, a number or a table."""
    shape = table.get("input_size")
    if isinstance(shape, (list, tuple)) and len(shape) == 3:
        pair: tuple[object, object] = (shape[1], shape[2])
    else:
        size = table.get("crop_size") if table.get("do_center_crop") else None
        size = size or table.get("size")
        if isinstance(size, dict):
            edge = size.get("shortest_edge")
            size = (size.get("height", edge), size.get("width", edge))
        pair = (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    h, w = pair
    if isinstance(h, int) and isinstance(w, int) and 8 <= h <= 2048 and 8 <= w <= 2048:
        return h, w
    return None
