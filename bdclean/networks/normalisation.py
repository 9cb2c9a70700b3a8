"""Named normalisations and their SPEC: from pixels to what a network was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bdclean.errors import UsageError

Values = tuple[float, ...]
"""One value a channel that a network takes: three, or one of grey images."""


@dataclass(frozen=True)
class Preprocess:
    """(pixels - mean) / std, with pixels in [0, 1] (in [0, 255] for `raw255`) in RGB (BGR for `bgr`) or grey.

    `mean` and `std` are in the order in which the network takes the channels. `size`: (h, w) when it is not the
    architecture's own.
    """

    name: str
    mean: Values
    std: Values
    bgr: bool = False
    raw255: bool = False
    size: tuple[int, int] | None = field(default=None)

    @property
    def title(self) -> str:
        """Its name, else its SPEC."""
        return self.name or self.spec()

    def spec(self) -> str:
        """A text that `parse_preprocess` reads back to the same arithmetic."""
        known = NAMED.get(self.name)
        if known is not None and self.size is None and known.of_channels(len(self.mean)) == self:
            return self.name
        parts = [f"mean={'/'.join(map(repr, self.mean))}", f"std={'/'.join(map(repr, self.std))}"]
        if self.raw255:
            parts.append("scale=255")
        if self.bgr:
            parts.append("order=bgr")
        if self.size:
            parts.append(f"size={self.size[0]}/{self.size[1]}")
        return ",".join(parts)

    def affine(self) -> tuple[Values, Values]:
        """Factor and offset of each channel that the network takes, for pixels in [0, 1]."""
        scale = 255.0 if self.raw255 else 1.0
        return (
            tuple(scale / s for s in self.std),
            tuple(-m / s for m, s in zip(self.mean, self.std, strict=True)),
        )

    def of_channels(self, channels: int) -> Preprocess:
        """The same for images of so many channels: of three the mean is one's, and one is each of three's."""
        if len(self.mean) == channels:
            return self
        if channels == 1:
            stem = self.name.removesuffix("-bgr")
            mean, std = (round(sum(values) / len(values), 8) for values in (self.mean, self.std))
            made = replace(self, name=stem, mean=(mean,), std=(std,), bgr=False)
        else:
            made = replace(self, mean=self.mean * channels, std=self.std * channels)
        return made if "=" not in made.name else named(made)

    def gap(self, other: Preprocess) -> float:
        """The largest difference between what the two make of a pixel; infinite for different orders of channels."""
        if self.bgr != other.bgr:
            return math.inf
        pairs = zip(*self.affine(), *other.affine(), strict=True)
        return max(max(abs(x - v), abs(a + x - u - v)) for a, x, u, v in pairs)

    def swapped(self) -> Preprocess:
        """The same statistics of the same colours, in the other order of channels; of grey the same."""
        if len(self.mean) == 1:
            return self
        stem = self.name.removesuffix("-bgr")
        made = Preprocess(stem, self.mean[::-1], self.std[::-1], not self.bgr, self.raw255, self.size)
        known = "=" not in stem
        return replace(made, name=(stem + "-bgr" * made.bgr) if known else made.spec())

    def normalise(self, images: Tensor) -> Tensor:
        """What a network takes, float [n c h w], for uint8 images or float ones in [0, 1]."""
        x = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
        if self.bgr:
            x = x.flip(1)
        if self.raw255:
            x = x * 255
        shape = (1, -1, 1, 1)
        mean, std = (
            torch.tensor(v, device=x.device, dtype=x.dtype).view(shape) for v in (self.mean, self.std)
        )
        return (x - mean) / std


def _named(name: str, mean: Values, std: Values, raw255: bool = False) -> dict[str, Preprocess]:
    # In -bgr the statistics stay with their colours: the blue channel, now first, keeps blue's mean.
    made = Preprocess(name, mean, std, False, raw255)
    return {name: made, f"{name}-bgr": made.swapped()}


# The values that training code for these sets passes to Normalize. CIFAR-10's std is that of all pixels; a second one,
# the mean over images of their own std, is as common and is tried as well (ALSO).
NAMED: dict[str, Preprocess] = {
    **_named("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    **_named("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    **_named("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    **_named("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    **_named("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    **_named("gtsrb", (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    **_named("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    **_named("raw255", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), raw255=True),
    "mnist": Preprocess("mnist", (0.1307,), (0.3081,)),
    "fashion-mnist": Preprocess("fashion-mnist", (0.2860,), (0.3530,)),
}
ALSO = Preprocess("cifar10-image-std", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
RGB_CANDIDATES = (*(p for p in NAMED.values() if len(p.mean) == 3), ALSO)
# ImageNet's mean over colours, 0.449 and 0.226, is what networks that were trained on it in grey, or were given one
# channel later, are mostly used with; those of the other coloured sets are near it.
GREY_CANDIDATES = tuple(
    NAMED[name].of_channels(1) for name in ("none", "half", "imagenet", "mnist", "fashion-mnist", "raw255")
)


def candidates_of(channels: int) -> tuple[Preprocess, ...]:
    """The normalisations that networks of so many channels are tried under."""
    return GREY_CANDIDATES if channels == 1 else RGB_CANDIDATES


def parse_preprocess(text: str) -> Preprocess:
    """A named normalisation or `mean=a/b/c,std=a/b/c,size=h/w`; a name may be followed by `,size=h/w`.

    `mean=a,std=b` is the same for all channels. `scale=255` and `order=bgr` may be added. Raises UsageError.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    found: Preprocess | None = None
    if "=" not in first:
        found = NAMED.get(first)
        if found is None:
            raise UsageError(
                f"--preprocess {text!r}: known are auto, {', '.join(NAMED)}, or mean=a/b/c,std=a/b/c, "
                "or mean=a,std=b for grey images."
            )
    else:
        rest = [first, *rest]
    values: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or key not in ("mean", "std", "size", "scale", "order") or key in values:
            raise UsageError(
                f"--preprocess {text!r}: {part!r} is not mean=, std=, size=, scale= or order=, once each."
            )
        values[key] = value
    size = _size(values["size"], text) if "size" in values else None
    if found is not None:
        if values.keys() - {"size"}:
            raise UsageError(f"--preprocess {text!r}: after a name only size=h/w can follow.")
        return replace(found, size=size)
    mean, std = _values(values.get("mean", "0"), text), _values(values.get("std", "1"), text)
    channels = max(len(mean), len(std))
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    if min(std) <= 0:
        raise UsageError(f"--preprocess {text!r}: std must be above 0.")
    scale, order = values.get("scale", "1"), values.get("order", "rgb")
    if scale not in ("1", "255") or order not in ("rgb", "bgr"):
        raise UsageError(f"--preprocess {text!r}: scale is 1 or 255, order is rgb or bgr.")
    made = Preprocess("", mean, std, order == "bgr", scale == "255", size)
    return replace(made, name=made.spec())


def _values(text: str, whole: str) -> Values:
    try:
        values = tuple(float(part) for part in text.split("/"))
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        raise UsageError(f"--preprocess {whole!r}: {text!r} is not three numbers a/b/c, or one.")
    if not all(math.isfinite(v) for v in values):
        raise UsageError(f"--preprocess {whole!r}: {text!r} is not finite.")
    return values


def _size(text: str, whole: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) not in (1, 2) or not all(p.isdecimal() and 8 <= int(p) <= 2048 for p in parts):
        raise UsageError(f"--preprocess {whole!r}: size is h/w, each from 8 to 2048.")
    return int(parts[0]), int(parts[-1])


def named(preprocess: Preprocess) -> Preprocess:
    """The same arithmetic under its known name, where it has one; else under its SPEC."""
    for known in candidates_of(len(preprocess.mean)):
        same = replace(preprocess, name=known.name, size=None)
        close = all(
            abs(a - b) < 5e-4 for a, b in zip(same.mean + same.std, known.mean + known.std, strict=True)
        )
        if close and (same.bgr, same.raw255) == (known.bgr, known.raw255):
            return replace(known, size=preprocess.size)
    return replace(preprocess, name=preprocess.spec())
