"""torch.save with newer pickle protocols: read as ever, and nothing is run that was not before."""

import argparse
import collections
import io
import os
import pickletools

import numpy as np
import pytest
import torch

from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.protocols import NoProtocol2, in_protocol_2, newer
from bdclean.networks.families.residual import ResidualNetwork


def saved(value, protocol, zipped=True):
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def training_file(network):
    """A table as training scripts write it: a network's, an optimizer's, arguments, text that comes twice, bytes."""
    return {
        "net": network.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "net": "net"}]},
        "args": argparse.Namespace(arch="net", data="collections", seen=b"\x00\xff" * 3),
        "text": "é" * 300,
        "best": (0.5, None, True, 2**40, [1, 2], collections.OrderedDict(net=np.float64(0.25))),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_file_of_a_newer_protocol_is_read_like_one_of_protocol_2(tmp_path, protocol, zipped):
    torch.manual_seed(0)
    network = ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 10)
    read = {}
    for number in (2, protocol):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(saved(training_file(network), number, zipped))
        with pytest.raises(Refused, match="is a pickle and can run code"):
            Checkpoint.read(path)
        read[number] = Checkpoint.read(path, allow_pickle=True)
    old, new = read.values()
    assert new.arch.name == old.arch.name and new.names == old.names and new.warnings == old.warnings
    assert list(new.tensors) == list(old.tensors)
    assert all(torch.equal(new.tensors[name], tensor) for name, tensor in old.tensors.items())
    assert all(torch.equal(new.state()[name], tensor) for name, tensor in network.state_dict().items())


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_a_newer_protocol_is_refused_as_in_protocol_2(tmp_path, monkeypatch, protocol, zipped):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt").write_bytes(saved({"w": torch.ones(2), "x": Runs()}, protocol, zipped))
    with pytest.raises(Refused, match=r"more than plain tensors \(a pickled (posix|nt).mkdir\)"):
        Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value, instruction", [({"s": {1, 2}}, "EMPTY_SET"), ({"b": bytearray(b"ab")}, "BYTEARRAY8")]
)
def test_what_has_no_words_in_protocol_2_is_named(tmp_path, value, instruction):
    (tmp_path / "m.pt").write_bytes(saved({"w": torch.ones(2)} | value, 5))
    with pytest.raises(Refused, match=f"more than plain tensors and tables .{instruction} of a newer"):
        Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)


def test_a_name_that_is_used_again_after_it_named_a_class():
    """`collections` and `OrderedDict` are kept by the pickle for a class, and then are keys and values."""
    table = collections.OrderedDict(collections="OrderedDict", OrderedDict="collections")
    raw = b"\x80\x04" + b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93)R(h\x00h\x01h\x01h\x00u."
    rewritten = in_protocol_2(raw)
    assert {opcode.proto for opcode, _, _ in pickletools.genops(rewritten)} <= {0, 1, 2}
    assert torch._weights_only_unpickler.load(io.BytesIO(rewritten)) == table


def test_rewriting_neither_grows_without_end_nor_fails_on_damage():
    name = b"\x8c\xff" + b"a" * 255 + b"\x94"
    again = b"\x80\x04" + name + name + b"\x93" + b"h\x00" * 10_000 + b"."
    assert len(in_protocol_2(again)) < 4 * len(again)
    with pytest.raises(ValueError, match="without end"):
        in_protocol_2(again[:-1] + b"h\x00h\x01\x93" * 10_000 + b".")
    generator = np.random.default_rng(0)
    good = saved({"w": torch.ones(2), "args": argparse.Namespace(x="y")}, 4, zipped=False)
    assert newer(good) and not newer(saved({}, 2, zipped=False))
    for _ in range(300):
        damaged = bytearray(good)
        damaged[generator.integers(2, len(good))] = generator.integers(0, 256)
        try:
            in_protocol_2(bytes(damaged))
        except (ValueError, OverflowError, NoProtocol2):
            pass
