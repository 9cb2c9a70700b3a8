"""The stock bank: patches, blends and stripes that the literature uses, at its strengths."""

from __future__ import annotations

from bdclean.triggers.badnets import BadNets
from bdclean.triggers.blend import Blend
from bdclean.triggers.sig import SIG
from bdclean.triggers.stamping import Trigger

CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


def bank(size: tuple[int, int]) -> list[Trigger]:
    """The stock triggers for images of `size` (height, width); patches scale with it, 3 of 32 pixels.

    It finds patterns that are known. It cannot find an attacker's own noise or picture at its full strength:
    a noise blend drawn from another seed has other content, and those of BCU (one fixed random image) and of
    BackdoorBench cannot be drawn again from a seed. Where the picture is at hand, `file:` or `blend:source=`.
    """
    return [*_checkers(size), *_squares(size), *_coloured(size), *_blends(), *_stripes()]


def _scaled(size: tuple[int, int], pixels: int) -> int:
    return max(1, round(pixels * min(size) / 32))


def _checkers(size: tuple[int, int]) -> list[Trigger]:
    """The 3 x 3 black and white patch, cells of one pixel at 32.

    At the bottom right: BadNets in BackdoorBench and BCU's attack/badnet; in all four corners: label-consistent
    (Turner et al. 2019, arXiv 1912.02771; BCU's attack/lc). The other places, and one pixel off the border as
    in BadNets' figures, because attackers move it. 5 cells of one pixel: a finer one.
    """
    three, border = _scaled(size, 3), _scaled(size, 1)
    placed = [BadNets(three, corner, "checker", cells=3) for corner in CORNERS]
    return [
        *placed,
        BadNets(three, "corners", "checker", cells=3),
        BadNets(three, "bottom-right", "checker", margin=border, cells=3),
        BadNets(three, "center", "checker", cells=3),
        BadNets(_scaled(size, 4), "bottom-right", "checker", cells=4),
        BadNets(_scaled(size, 5), "bottom-right", "checker", cells=5),
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
        BadNets(three, "bottom-right", "random", cells=3),
        BadNets(five, "bottom-right", "random", cells=5),
        BadNets(four, "center", "random", cells=4, seed=1),
    ]


def _blends() -> list[Trigger]:
    """Noise at alpha 0.2 (BCU, BackdoorBench) and 0.1 (Chen et al. 2017 train at 0.2 and less), in the seed that
    is the default of `blend`; a drawn picture at both in place of the cartoons that they use."""
    return [
        Blend("noise", 0.2),
        Blend("noise", 0.1),
        Blend("picture", 0.2),
        Blend("picture", 0.1),
        Blend("picture", 0.2, seed=1),
    ]


def _stripes() -> list[Trigger]:
    """Six periods across (Barni et al. 2019) at delta 20 (BCU on CIFAR-10) and 40 (Tiny-ImageNet, BackdoorBench),
    the same top to bottom, and BCU's 60 on road signs."""
    return [
        SIG(20, 6),
        SIG(40, 6),
        SIG(20, 6, angle=90),
        SIG(40, 6, angle=90),
        SIG(60, 6),
    ]
