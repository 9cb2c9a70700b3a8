"""The stock bank: patches, blends and stripes that the literature uses, at its strengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bdclean import registry
from bdclean.errors import UsageError
from bdclean.triggers.badencoder import BadEncoder
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.blend import Blend
from bdclean.triggers.ctrl import CTRL
from bdclean.triggers.sig import SIG
from bdclean.triggers.stamping import Trigger

CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


def bank(size: tuple[int, int]) -> list[Trigger]:
    """The stock triggers for images of `size` (height, width); patches scale with it, 3 of 32 pixels.

    It finds patterns that are known. It cannot find an attacker's own noise or picture at its full strength:
    a noise blend drawn from another seed has other content, and those of BCU (one fixed random image) and of
    BackdoorBench cannot be drawn again from a seed. Where the picture is at hand, `file:` or `blend:source=`.
    """
    triggers = [*_checkers(size), *_squares(size), *_coloured(size), *_blends(), *_stripes()]
    return list(dict.fromkeys(triggers))  # under 32 pixels some patches become the same


def _scaled(size: tuple[int, int], pixels: int) -> int:
    return max(1, round(pixels * min(size) / 32))


def _cells(size: tuple[int, int], pixels: int) -> int:
    """Cells as many as there are pixels at 32; the default where these are the pixels."""
    return 0 if _scaled(size, pixels) <= pixels else pixels


def _checkers(size: tuple[int, int]) -> list[Trigger]:
    """The 3 x 3 black and white patch, cells of one pixel at 32.

    At the bottom right: BadNets as BCU ships it. In all four corners: label-consistent attacks (Turner et al.,
    arXiv 1912.02771; BCU's attack/lc). The other places, one pixel off the border, and 4 and 5 pixels in place
    of 3, because attackers vary them.
    """
    three, border = _scaled(size, 3), _scaled(size, 1)
    placed = [BadNets(three, corner, "checker", cells=_cells(size, 3)) for corner in CORNERS]
    return [
        *placed,
        BadNets(three, "corners", "checker", cells=_cells(size, 3)),
        BadNets(three, "bottom-right", "checker", margin=border, cells=_cells(size, 3)),
        BadNets(three, "center", "checker", cells=_cells(size, 3)),
        BadNets(_scaled(size, 4), "bottom-right", "checker", cells=_cells(size, 4)),
        BadNets(_scaled(size, 5), "bottom-right", "checker", cells=_cells(size, 5)),
    ]


def _squares(size: tuple[int, int]) -> list[Trigger]:
    """White squares: 3 x 3 in most defences' own attacks (Fine-Pruning, NAD, ANP, I-BAU), 4 x 4 in Neural
    Cleanse (Wang et al. 2019), one pixel and a pixel off the border in BadNets (arXiv 1708.06733, MNIST)."""
    one, three, four, five = (_scaled(size, pixels) for pixels in (1, 3, 4, 5))
    return [
        *(BadNets(three, corner, "white") for corner in CORNERS),
        BadNets(three, "corners", "white"),
        BadNets(three, "bottom-right", "white", margin=one),
        BadNets(three, "center", "white"),
        BadNets(four, "bottom-right", "white"),
        BadNets(four, "bottom-right", "white", margin=one),
        BadNets(five, "bottom-right", "white"),
        BadNets(one, "bottom-right", "white", margin=one),
    ]


def _coloured(size: tuple[int, int]) -> list[Trigger]:
    """A black and a yellow square (BadNets' sticker on road signs is yellow), a red one, and random colours:
    hidden-trigger and SSL attacks (Saha et al., arXiv 1910.00033, 2105.10123) stamp enlarged random 4 x 4."""
    three, four, five = (_scaled(size, pixels) for pixels in (3, 4, 5))
    return [
        BadNets(three, "bottom-right", "black"),
        BadNets(three, "bottom-right", "yellow"),
        BadNets(three, "bottom-right", "red"),
        BadNets(three, "bottom-right", "random", cells=_cells(size, 3)),
        BadNets(five, "bottom-right", "random", cells=_cells(size, 5)),
        BadNets(four, "center", "random", cells=_cells(size, 4), seed=1),
    ]


def _blends() -> list[Trigger]:
    """Noise of `blend`'s default seed at alpha 0.2 (BCU) and 0.1 (the fainter blends of other papers), and a
    drawn picture at both in place of the cartoons and photographs that Chen et al. and others use."""
    return [
        Blend("noise", 0.2),
        Blend("noise", 0.1),
        Blend("picture", 0.2),
        Blend("picture", 0.1),
        Blend("picture", 0.2, seed=1),
    ]


def _stripes() -> list[Trigger]:
    """Six periods across (Barni et al. 2019) at the deltas that BCU ships: 20 for CIFAR-10, 40 for Tiny-ImageNet,
    60 for road signs; and the first two from top to bottom, as the simplest variation."""
    return [
        SIG(20, 6),
        SIG(40, 6),
        SIG(20, 6, angle=90),
        SIG(40, 6, angle=90),
        SIG(60, 6),
    ]


def _of_encoders() -> list[Trigger]:
    """What attacks on encoders stamp in their authors' settings, with nothing of an attacker's own: BadEncoder's and
    DRUPE's square, CTRL's waves. SSL-Backdoor's patch is drawn by the attacker, BLTO's by a network."""
    return [BadEncoder(), CTRL()]


def make_triggers(specs: Sequence[str], size: tuple[int, int], kind: str = "classifier") -> list[Trigger]:
    """The triggers that were given, else the stock bank at the input size, for an encoder with those of encoders.

    One that is given twice, in whatever words, is there once: rates are corrected for how many are tried. Raises where
    one does not fit the images.
    """
    if not specs:
        return [*bank(size), *(_of_encoders() if kind == "encoder" else [])]
    noise = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = []
    for spec in specs:
        name, settings = registry.parse_spec(spec)
        trigger = registry.configure(registry.load(registry.TRIGGERS, name), settings)
        # refused before any work: a patch that does not fit, and what would say `no-evidence` of everything
        if torch.equal(trigger(noise), noise):
            raise UsageError(
                f"{spec} changes no pixel of images of {size[0]} x {size[1]}: it is too faint, or falls between pixels."
            )
        made.append(trigger)
    return list(dict.fromkeys(made))
