"""Files that lie: each gets one sentence, nothing of theirs is run, and nothing is allocated on their word."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused
from bdclean.files.tensorfile import read_header, read_tensors
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families.residual import ResidualNetwork


def network(classes=10):
    torch.manual_seed(0)
    return ResidualNetwork((1, 1, 1), (4, 8, 16), 4, classes).eval()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path, {"author": "someone", "format": "pt"})
    return path


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}


class TestHostileFiles:
    @pytest.mark.parametrize(
        "content, said",
        [
            (b"", "has only 0 bytes"),
            (b"\x00" * 9, "has only 9 bytes"),
            (b"\xff" * 64, "give a header of 18446744073709551615 bytes"),
            (raw(b"{}" * 20, length=1 << 40), "give a header of 1099511627776 bytes"),
            (raw(b"{}" * 20, length=9_999_999), "is truncated: its header should have 9999999 bytes"),
            (
                raw(b"{}" * 20, length=99_999_999),
                "has a header of 99,999,999 bytes, more than the 10,000,000",
            ),
            (raw(b"hello world"), "it is not JSON"),
            (raw(b"[" * 100_000), "it is not JSON"),
            (raw(b'{"a": 1e9999999999}'), "a number is too large"),
            (raw(b"\xff\xfe{}aaaa"), "it is not JSON"),
            (raw(b"[1, 2, 3]"), "not a table of tensors"),
            (raw(b'{"a": {}, "a": {}}'), "a name occurs twice"),
            (raw({"a": [1]}), "a is not described by a table"),
            (raw({"__metadata__": {"a": 1}}), "its metadata is not a table of texts"),
            (raw({"__metadata__": "x" * 9}), "its metadata is not a table of texts"),
            (raw(one("F31")), "the unknown type F31"),
            (raw(one(["F32"])), "a has no type"),
            (raw(one(shape=[-1]), bytes(8)), "a shape that is not a list of whole numbers"),
            (raw(one(shape=[2.0]), bytes(8)), "a shape that is not a list of whole numbers"),
            (raw(one(shape=[True, 2]), bytes(8)), "a shape that is not a list of whole numbers"),
            (raw(one(shape=[2**31, 2**29]), bytes(8)), "which does not fill its 8 bytes"),
            (raw(one(shape=[2**33, 2**33]), bytes(8)), "whose size is beyond 63 bits"),
            (raw(one(shape=[2**62, 4]), bytes(8)), "whose size is beyond 63 bits"),
            (raw(one(shape=[0, 2**62, 4], offsets=[0, 0])), "whose size is beyond 63 bits"),
            (raw(one(shape=[2**63], offsets=[0, 0])), "a whole number is beyond 63 bits"),
            (raw(one(shape=[10**4000] * 40, offsets=[0, 0])), "a whole number is beyond 63 bits"),
            (raw(one(shape=[1] * 65, offsets=[0, 4]), bytes(4)), "has 65 axes"),
            (raw(b'{"__metadata__": {"a": "\\ud800"}}'), "half of a surrogate pair"),
            (raw(b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":NaN}}'), "NaN is no number"),
            (raw(b" {}       "), "not a table of tensors"),
            (raw(b"[" + b"[]," * 700_000 + b"[]]"), "holds more than 1,200,000 values"),
            (b"<!DOCTYPE html><html></html>", "is a web page"),
            (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
            (raw(one(offsets=[8, 0]), bytes(8)), "which does not fill its -8 bytes"),
            (raw(one(offsets=[0, 8, 16]), bytes(8)), "offsets that are not two whole numbers"),
            (raw(one(offsets=[0, 8]), bytes(7)), "is truncated: its tensors need 8 bytes and 7 are there"),
            (raw(one(offsets=[2**60, 2**60 + 8]), bytes(8)), "a leaves a gap before it"),
            (raw(one(), bytes(9)), "has 1 bytes after its last tensor that no tensor owns"),
            (raw(one(b=one()["a"]), bytes(8)), "b overlaps another tensor"),
            (raw(one(b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}), bytes(12)), "b overlaps"),
            (
                raw(one(b={"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}), bytes(20)),
                "b leaves a gap",
            ),
            (raw({}), "holds no tensors"),
            (raw(one("I32"), bytes(8)), "no known architecture"),
            (raw({"\x1b[2Jx\n" + "y" * 999: {"dtype": "?"}}), r"\x1b[2Jx\nyyy"),
        ],
    )
    def test_each_lie_gets_a_sentence(self, tmp_path, content, said):
        path = tmp_path / "m.safetensors"
        path.write_bytes(content)
        with pytest.raises(Refused) as caught:
            Checkpoint.read(path)
        message = str(caught.value)
        assert said in message and message.endswith(".") and len(message) < 1500
        assert message.isprintable()

    @pytest.mark.parametrize("cut", [8, 100, 3000, -1])
    def test_truncation_anywhere(self, model, cut):
        content = model.read_bytes()
        model.write_bytes(content[:cut])
        with pytest.raises(Refused, match="truncated|only 8 bytes"):
            Checkpoint.read(model)

    def test_a_lying_size_allocates_nothing(self, tmp_path):
        path = tmp_path / "m.safetensors"
        path.write_bytes(raw(one("F64", [2**40], [0, 2**43])))
        with pytest.raises(Refused, match="truncated"):
            Checkpoint.read(path)

    def test_a_file_that_changes_between_checks_and_reading(self, model):
        header = read_header(model)
        other = one("F32", [2], [0, 8])
        content = model.read_bytes()
        model.write_bytes(raw(other, bytes(len(content))))
        with pytest.raises(Refused, match="changed while it was read"):
            read_tensors(model, header)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_values_that_cannot_be_run(self, model, value, dtype):
        tensors = load_file(model)
        tensors["layer2.0.conv1.weight"] = tensors["layer2.0.conv1.weight"].to(dtype)
        tensors["layer2.0.conv1.weight"].view(-1)[3] = value
        save_file(tensors, model)
        with pytest.raises(Refused, match=r"layer2\.0\.conv1\.weight holds 1 NaN or infinite values"):
            Checkpoint.read(model)

    def test_negative_variance(self, model):
        tensors = load_file(model)
        tensors["bn1.running_var"][0] = -1
        save_file(tensors, model)
        with pytest.raises(Refused, match=r"bn1\.running_var holds negative variances"):
            Checkpoint.read(model)

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]
    )
    def test_quantised_weights(self, model, dtype):
        tensors = load_file(model)
        tensors["conv1.weight"] = tensors["conv1.weight"].to(dtype)
        save_file(tensors, model)
        with pytest.raises(Refused, match=r"conv1\.weight is \w+; quantised weights are not supported"):
            Checkpoint.read(model)

    def test_no_such_file_and_no_file_at_all(self, tmp_path):
        with pytest.raises(Refused, match="does not exist"):
            Checkpoint.read(tmp_path / "nothing.safetensors")
        with pytest.raises(Refused, match="holds no safetensors file"):
            Checkpoint.read(tmp_path)
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(Refused, match="not a regular file"):
            Checkpoint.read(tmp_path / "pipe")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_no_permission_to_read(self, model):
        model.chmod(0)
        with pytest.raises(Refused, match="cannot be read: permission denied"):
            Checkpoint.read(model)


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


class TestPickles:
    @pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_is_refused_whatever_its_name(self, tmp_path, name, zipped):
        torch.save(network().state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(Refused) as caught:
            Checkpoint.read(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name} is a pickle and can run code when loaded: "
            "convert it where you trust it, or pass --allow-pickle to read plain tensors only."
        )

    @pytest.mark.parametrize("key", [None, "state_dict", "model", "net"])
    def test_plain_tensors_are_read_when_allowed_and_written_as_safetensors(self, tmp_path, key):
        state = network().state_dict()
        torch.save({key: state, "epoch": 3} if key else state, tmp_path / "m.pt")
        checkpoint = Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        assert checkpoint.format == "pickle"
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
        written = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(written[n], t) for n, t in state.items()) and written.keys() == state.keys()

    @pytest.mark.parametrize(
        "content, said",
        [
            (Payload(), "holds more than plain tensors"),
            ({"model": Payload()}, "holds more than plain tensors"),
            (torch.nn.Linear(2, 2), "holds more than plain tensors"),
            ([1, 2], "holds no table of tensors"),
            ({}, "holds no table of tensors"),
            ({"a": 1}, "holds no table of tensors"),
            ({3: torch.ones(2)}, "no known architecture has this 1 tensor"),
            (
                {"a": torch.ones(2, dtype=torch.complex128)},
                "a is complex128, which a safetensors file cannot hold",
            ),
        ],
    )
    def test_code_is_never_run(self, tmp_path, content, said):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(Refused, match=said):
            Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        assert not Path("ran").exists()

    def test_damaged(self, tmp_path):
        (tmp_path / "m.pt").write_bytes(b"PK\x03\x04" + bytes(100))
        with pytest.raises(Refused, match="is a damaged zip archive: fetch it again"):
            Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)


class TestContainers:
    def test_a_tar_without_a_single_image_is_refused(self, tmp_path):
        import tarfile

        from bdclean.data.sources.opening import open_images

        with tarfile.open(tmp_path / "d.tar", "w") as archive:
            link = tarfile.TarInfo("0.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        with pytest.raises(Refused, match="holds no images"):
            open_images(tmp_path / "d.tar")

    def test_what_reading_images_raises_is_not_taken_for_a_size_that_does_not_fit(self, model):
        from bdclean.networks.ambiguity.size import own_size

        def load(arch):
            raise ValueError("a defect")

        with pytest.raises(ValueError, match="a defect"):
            own_size(Checkpoint.read(model), load)
