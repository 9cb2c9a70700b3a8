"""What is known of a network besides its weights: how to build it, its input, and its layers by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

# Channels that images are read in, grey or RGB, as a network takes them.
CHANNELS = (1, 3)


@dataclass(frozen=True)
class Stage:
    """Weight modules (convolutions, linear layers) of one depth, in the order in which they run."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Arch:
    """A network's structure.

    `taps` name the modules whose outputs end the stages between stem and head: maps [n c h w] or [n h w c], or tokens
    [n t c]. `input` is the channels that the network takes, of CHANNELS, and the height and width of its images. What
    goes into the module `head` are the features; `seeing` reads both in one pass. An encoder has no head
    and no classes: what it gives are the features [n width], and `feature` says what they are.
    """

    name: str
    build: Callable[[], nn.Module] = field(compare=False, repr=False)
    input: tuple[int, int, int]
    classes: int
    head: str
    stages: tuple[Stage, ...]
    taps: tuple[str, ...]
    # (name, reason) of others whose tensors have the same names and shapes: shapes do not show strides or activations.
    alternatives: tuple[tuple[str, str], ...] = ()
    # A variant that nobody names: it counts only where it fits clearly better than the usual network.
    unusual: bool = False
    # Of an encoder alone: the feature's size, what it is (pooled, class token, ...), which authors' layout the file
    # has, the normalisation that they use, by name or SPEC, where nothing else says one, and the module, an identity,
    # that is the head of such a network where it has one.
    width: int = 0
    feature: str = ""
    layout: str = ""
    usual_preprocess: str = ""
    head_place: str = ""

    @property
    def kind(self) -> str:
        return "classifier" if self.head else "encoder"

    @property
    def of_user(self) -> bool:
        """Whether it is the user's own code, which says nothing of the size of its images."""
        return self.name.startswith("user:")


@dataclass(frozen=True)
class Proposal:
    """A network that a file's tensors suggest, before it is checked name by name and shape by shape."""

    name: str
    build: Callable[[], nn.Module]
    input: tuple[int, int, int]
    # Other networks with the same tensors; each is built only if asked for.
    others: tuple[tuple[Proposal, str], ...] = ()
    # Auxiliary heads (GoogLeNet's, Inception's), by the beginnings of their names: they may be in a file, and never run
    # on an image to be judged.
    idle: tuple[str, ...] = ()
    # Builds the network with those heads, to check their shapes.
    whole: Callable[[], nn.Module] | None = None
    unusual: bool = False


class Family(Protocol):
    """A kind of network: reads its own dialects and derives depth, widths and classes from shapes."""

    def rename(self, name: str) -> str:
        """The family's own name for a tensor."""

    def propose(self, shapes: Shapes) -> Iterator[Proposal]:
        """Networks of this family that could hold tensors of these names and shapes; none may fit exactly."""

    def named_proposals(self, classes: int) -> Iterator[Proposal]:
        """The family's well-known members, for `--arch NAME` and to name the nearest."""


# Running counts, which files of PyTorch before 0.4.1 lack (akamaster's, torchvision's older weights); no prediction
# needs them.
COUNTER = "num_batches_tracked"
