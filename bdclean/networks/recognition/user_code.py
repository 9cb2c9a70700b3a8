"""--arch FILE.py:NAME or package.module:NAME: a network from the user's own code, run because they asked for it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from bdclean.errors import Refused, UsageError
from bdclean.files.text import shown
from bdclean.networks.arch import Arch, Shape
from bdclean.networks.recognition.channels import check_readable
from bdclean.networks.recognition.dialects import views
from bdclean.networks.recognition.matching import Match, differences, listed, needed
from bdclean.networks.stages import NoTensor, describe

# Shapes seldom show the input's size: the first of these that the code accepts is taken, until images tell of another
# one; --preprocess size=h/w wins.
# They are those of CIFAR and GTSRB (32, 48), ImageNet (224, 384), Tiny ImageNet, MNIST in colours, STL-10, Imagenette
# (128, 256) and Inception; of grey images MNIST's comes first.
SMALL_FIRST = (32, 224, 64, 28, 96, 48, 128, 256, 299, 384)
GREY_FIRST = (28, *(side for side in SMALL_FIRST if side != 28))


def fit_user_code(spec: str, shapes: Mapping[str, Shape]) -> Match:
    """The network that NAME gives, if its tensors are exactly these.

    NAME is a class or a function, called without arguments, or with num_classes where it takes that and the file's head
    differs. Raises UsageError when NAME is not there, Refused when it fails or does not fit.
    """
    made = load(spec)
    nearest: tuple[int, list[str]] | None = None
    failure = ""
    for build in ways_to_call(made, shapes):
        try:
            with torch.random.fork_rng(devices=[]):
                network = build()
        except Exception as error:  # a stranger's code may raise anything
            failure = f"{type(error).__name__}: {error}"
            continue
        if not isinstance(network, nn.Module):
            raise UsageError(
                f"{spec} does not give a network but {kind_of(network)}: name a class or function that returns a "
                "torch.nn.Module."
            )
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for names, unread in views(shapes, expected):
            own = {names[n]: tuple(shapes[n]) for n in names}
            differing = differences(own, needed(expected, own, network))
            if not differing:
                return Match(arch_of(spec, build, network), names, unread)
            if nearest is None or len(differing) < nearest[0]:
                nearest = (len(differing), differing)
    if nearest is None:
        raise Refused(f"{spec} cannot be built: {shown(failure)}.")
    raise Refused(
        f"{spec} does not have these {len(shapes)} tensors ({listed(nearest[1])}): give the code that made the file."
    )


def kind_of(value: object) -> str:
    """`nothing` for None, else `an object of type int`."""
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


def load(spec: str) -> object:
    """What NAME is in the user's file or module."""
    place, _, name = spec.rpartition(":")
    if not place or not name or name.endswith(".py"):  # the colon of a drive: C:\\nets\\own.py
        raise UsageError(f"--arch {spec} is not FILE.py:NAME or package.module:NAME.")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    except (UsageError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"--arch {spec}: {error}.") from None
    except BaseException as error:  # also sys.exit() in a stranger's script
        raise Refused(f"{place} failed when imported: {type(error).__name__}: {shown(str(error))}.") from None
    made: object = module
    for part in name.split("."):
        if not hasattr(made, part):
            known = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and n[:1] != "_")[:8])
            raise UsageError(f"{place} has no {name}; it has {known or 'no functions or classes'}.")
        made = getattr(made, part)
    if not callable(made):
        raise UsageError(f"{spec} is not a class or function that gives a network.")
    return made


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"--arch: {path} does not exist.")
    name = f"bdclean_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--arch: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their module up by name.
    sys.modules[name] = module
    with _importable(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        return importlib.import_module(name)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's file import its neighbours, as it could when run from there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def ways_to_call(made: object, shapes: Mapping[str, Shape]) -> Iterator[Callable[[], nn.Module]]:
    """Ways to call NAME: as it is, then with each class count that the file's matrices allow."""
    if isinstance(made, nn.Module):
        yield partial(copy.deepcopy, made)
        return
    assert callable(made)
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    takes = "num_classes" in parameters
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if not required:
        yield made
    if takes:
        # The head is nearly always the matrix that comes last; in a sorted file it may be any.
        rows = dict.fromkeys(s[0] for s in reversed(list(shapes.values())) if len(s) == 2 and s[0] > 0)
        for classes in rows:
            yield partial(made, num_classes=classes)
    elif required:
        yield made


def arch_of(spec: str, build: Callable[[], nn.Module], network: nn.Module) -> Arch:
    """The Arch of the user's network, at the first usual input size that it accepts.

    What takes RGB images gets them, also where its own code makes them grey for a first layer of one channel; else the
    images are grey. Raises Refused where neither runs, or what comes out is no tensor.
    """
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    # A stem that shrinks its input at once is made for large images, though it may accept small ones.
    shrinks = first is not None and (first.kernel_size[0] >= 7 or first.stride[0] > 2)
    why: dict[int, str] = {}
    for channels, usual in ((3, SMALL_FIRST), (1, GREY_FIRST)):
        for side in sorted(usual, key=lambda s: s != 224) if shrinks else usual:
            try:
                with torch.random.fork_rng(devices=[]):
                    return describe(f"user:{spec.rpartition(':')[2]}", build, (channels, side, side))
            except NoTensor as error:  # it ran: no other size or channels will help
                raise Refused(f"{spec} {shown(str(error))}.") from None
            except Exception as error:  # a stranger's code may raise anything
                why.setdefault(channels, f"an image of {side}x{side}: {type(error).__name__}: {error}")
    own = first.in_channels if first is not None else 3
    check_readable(spec, own)
    raise Refused(f"{spec} cannot be run on {shown(why[own])}.")
