"""Odd tensors, torch's own files and files of other kinds: read, written back as they were, or refused by name."""

import json
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from bdclean.errors import Refused
from bdclean.files.tensorfile import Entry, read_header, write_file
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.runs.places import default_output


def weights(seed=0):
    torch.manual_seed(seed)
    return ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 10).state_dict()


def raw(path):
    return path.read_bytes()[read_header(path).start :]


def unchanged(path, out):
    """The written file without a change of weights: the same tensors byte for byte, and all metadata."""
    checkpoint = Checkpoint.read(path)
    checkpoint.write(checkpoint.build(), out, {})
    before, after = read_header(path), read_header(out)
    assert after.entries == before.entries and raw(out) == raw(path)
    assert before.metadata.items() <= after.metadata.items()
    assert all(k.startswith("bdclean.") for k in after.metadata.keys() - before.metadata.keys())
    return checkpoint


class TestOddTensors:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_every_precision_comes_back_bit_for_bit(self, dtype, tmp_path):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights().items()}
        state["fc.bias"] = (torch.rand(10, dtype=torch.float64) / 3).to(dtype)
        state["fc.bias"][0] = -0.0
        save_file(state, tmp_path / "m.safetensors", {"format": "pt", "ключ": "\u202e\n<b>"})
        checkpoint = unchanged(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
        network = checkpoint.build()
        assert all(p.dtype == torch.float32 for p in network.parameters())
        # One number changes: the others keep bits that float32 does not have.
        with torch.no_grad():
            network.fc.bias[1] = 0.5
        checkpoint.write(network, tmp_path / "out.safetensors", {})
        written = load_file(tmp_path / "out.safetensors")["fc.bias"]
        assert written[1] == 0.5 and torch.equal(written[2:], state["fc.bias"][2:])

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32]
    )
    def test_whole_numbers_and_eight_bits_are_no_weights(self, dtype, tmp_path):
        save_file(weights() | {"conv1.weight": torch.ones(4, 3, 3, 3).to(dtype)}, tmp_path / "m.safetensors")
        with pytest.raises(Refused, match=r"conv1\.weight is \w+; quantised weights are not supported"):
            Checkpoint.read(tmp_path / "m.safetensors")

    def test_names_metadata_and_shapes_of_every_kind(self, tmp_path):
        odd = [
            "a b",
            "ünï.çødé",
            "emoji\U0001f600",
            'quote"\\back',
            "tab\t.x",
            "..",
            "/etc/passwd",
            "",
            "a..b",
            "\x1b[1m",
        ]
        state = {f"model.{n}": t for n, t in weights().items()}
        tensors = dict(state)
        for k, name in enumerate(odd):
            tensors[name] = [torch.empty(0, 3), torch.tensor(1.5), torch.randn(2, 1, 2).half()][k % 3]
        save_file(
            tensors, tmp_path / "m.safetensors", {"": "empty", "k\x1b[31m": "<script>", "n": "x" * 10_000}
        )
        checkpoint = unchanged(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
        assert set(checkpoint.unread) == set(odd)

    def test_booleans_other_than_0_and_1_are_carried_over(self, tmp_path):
        state = {f"model.{n}": t for n, t in weights().items()} | {
            "mask": torch.tensor([2, 0, 255], dtype=torch.uint8)
        }
        entries, at = [], 0
        for name, tensor in state.items():
            length = tensor.numel() * tensor.element_size()
            kind = "BOOL" if name == "mask" else {torch.int64: "I64", torch.float32: "F32"}[tensor.dtype]
            entries.append(Entry(name, kind, tuple(tensor.shape), at, at + length))
            at += length
        write_file(tmp_path / "m.safetensors", entries, {}, state)
        unchanged(tmp_path / "m.safetensors", tmp_path / "out.safetensors")

    def test_a_file_in_the_order_and_strides_of_its_maker(self, tmp_path):
        state = {
            n: t.to(memory_format=torch.channels_last).clone() if t.ndim == 4 else t
            for n, t in weights().items()
        }
        torch.save(OrderedDict(reversed(state.items())), tmp_path / "m.pt")
        checkpoint = Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        assert [e.name for e in checkpoint.entries] == list(reversed(state))
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
        written = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(written[n], t) for n, t in state.items())

    def test_what_the_code_ties_may_be_in_the_file_once(self, tmp_path):
        (tmp_path / "tied.py").write_text(
            "from torch import nn\n"
            "class Tied(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.stem = nn.Conv2d(3, 4, 3, padding=1)\n"
            "        self.a = nn.Conv2d(4, 4, 3, padding=1)\n"
            "        self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False)\n"
            "        self.b.weight = self.a.weight\n"
            "        self.fc = nn.Linear(4, 5)\n"
            "    def forward(self, x):\n"
            "        return self.fc(self.b(self.a(self.stem(x))).mean((2, 3)))\n"
        )
        shapes = {"stem": (4, 3, 3, 3), "b": (4, 4, 3, 3), "fc": (5, 4)}
        state = {f"{n}.weight": torch.randn(s) for n, s in shapes.items()}
        state |= {"stem.bias": torch.zeros(4), "a.bias": torch.zeros(4), "fc.bias": torch.zeros(5)}
        # As safetensors' save_model leaves it.
        save_file(state, tmp_path / "m.safetensors", {"a.weight": "b.weight"})
        checkpoint = Checkpoint.read(tmp_path / "m.safetensors", "tied.py:Tied")
        network = checkpoint.build()
        assert network.a.weight is network.b.weight and torch.equal(network.a.weight, state["b.weight"])
        with torch.no_grad():
            network.a.weight.add_(1)
        checkpoint.write(network, tmp_path / "out.safetensors", {})
        written = load_file(tmp_path / "out.safetensors")
        assert written.keys() == state.keys() and torch.equal(written["b.weight"], state["b.weight"] + 1)


WRAPS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet"},
    "net": lambda s: {"net": s, "acc": 93.1, "epoch": 100},
    "model in module": lambda s: {"model": {f"module.{n}": t for n, t in s.items()}, "args": {"lr": 0.1}},
    "optimizer": lambda s: {
        "state_dict": s,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(4, 3, 3, 3)}},
            "param_groups": [{"lr": 0.1}],
        },
    },
    "average": lambda s: {"model": s, "model_ema": {n: t.clone() for n, t in weights(1).items()}},
    "average alone": lambda s: {"state_dict_ema": s},
}


class TestTorchFiles:
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("wrap", WRAPS)
    def test_tables_are_found_and_nothing_is_lost(self, wrap, legacy, tmp_path):
        state = weights()
        path = tmp_path / "m.pth"
        torch.save(WRAPS[wrap](state), path, _use_new_zipfile_serialization=not legacy)
        checkpoint = Checkpoint.read(path, allow_pickle=True)
        network = checkpoint.build()
        assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())
        assert (
            checkpoint.format == "pickle" and default_output(path, None) == tmp_path / "m.clean.safetensors"
        )
        checkpoint.write(network, default_output(path, None), {})
        written = load_file(tmp_path / "m.clean.safetensors")
        prefix = "module." if wrap == "model in module" else ""
        assert all(torch.equal(written[prefix + n], t) for n, t in state.items())
        beside = {"optimizer": 1, "average": len(state)}.get(wrap, 0)
        assert len(checkpoint.unread) == beside and len(written) == len(state) + beside
        if wrap == "optimizer":
            assert checkpoint.unread == ("optimizer.state.0.momentum_buffer",)
        said = " ".join(checkpoint.warnings)
        assert ("not tensors" in said) == (wrap in ("state_dict", "net", "model in module", "optimizer"))
        assert ("an average of the weights" in said) == (wrap == "average")

    def test_shared_and_strange_tensors(self, tmp_path):
        state = weights()
        shared = torch.randn(64)
        more = {
            "a": shared,
            "b": shared[:32],
            "c": shared.view(8, 8).t(),
            "d": torch.randn(4, dtype=torch.complex64).conj(),
        }
        more |= {
            "e": torch.tensor([True, False]),
            "f": torch.ones(3).to(torch.float8_e5m2),
            "g": torch.empty(0, 2),
        }
        more["h"] = torch.nn.Parameter(torch.ones(2))
        torch.save({"state_dict": state, "rest": more}, tmp_path / "m.pt")
        checkpoint = Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        assert set(checkpoint.unread) == {f"rest.{n}" for n in more}
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
        written = load_file(tmp_path / "out.safetensors")
        for name, tensor in more.items():
            assert written[f"rest.{name}"].dtype == tensor.dtype
            if tensor.is_complex():
                assert torch.equal(written[f"rest.{name}"], tensor.resolve_conj())
            else:
                assert torch.equal(written[f"rest.{name}"].float(), tensor.detach().float())

    @pytest.mark.parametrize("legacy", [False, True])
    def test_numpy_numbers_beside_the_weights_are_left_out_and_never_built(self, legacy, tmp_path):
        rest = {
            "best": np.float64(0.93),
            "epoch": np.int64(7),
            "losses": np.arange(5.0),
            "kind": np.dtype("f4"),
        }
        torch.save(
            {"state_dict": weights(), **rest}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy
        )
        checkpoint = Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        assert torch.equal(checkpoint.tensors["fc.weight"], weights()["fc.weight"])
        (note,) = checkpoint.warnings
        assert "not tensors" in note and "best" in note and "losses" in note
        torch.save({"a": torch.zeros(2), "b": np.array([{}], object)}, tmp_path / "o.pt")
        with pytest.raises(Refused):  # no network, and nothing of the object is made
            Checkpoint.read(tmp_path / "o.pt", allow_pickle=True)

    def test_a_file_from_a_gpu_is_read_without_one(self, tmp_path):
        """CUDA storages, made here by writing the device's name into an archive."""
        torch.save(weights(), tmp_path / "cpu.pt")
        with zipfile.ZipFile(tmp_path / "cpu.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
            for member in old.infolist():
                data = old.read(member)
                if member.filename.endswith("data.pkl"):
                    assert b"X\x03\x00\x00\x00cpu" in data
                    data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                new.writestr(member.filename, data)
        checkpoint = Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        assert torch.equal(checkpoint.tensors["fc.weight"], weights()["fc.weight"])

    @pytest.mark.parametrize(
        "content, said",
        [
            (
                torch.nn.Linear(2, 2),
                r"more than plain tensors \(a pickled torch.nn.modules.linear.Linear\): save the",
            ),
            (
                {"state_dict": {"a": torch.ones(3).to_sparse()}},
                "a is sparse, which a safetensors file cannot hold",
            ),
            (
                {"a": torch.ones(1).expand(1 << 40)},
                "a would be 4,398,046,511,104 bytes, more than the file's",
            ),
            (
                {"x": torch.ones(2), "model": {"y": torch.ones(2)}, "model.y": torch.ones(2)},
                "would both be called y",
            ),
            (torch.ones(3), "no table of tensors"),
        ],
    )
    def test_what_is_no_table_of_tensors(self, content, said, tmp_path):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(Refused, match=said):
            Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)

    def test_a_table_in_itself_and_an_archive_that_grows(self, tmp_path):
        table = {"a": torch.ones(2)}
        table["state_dict"] = table
        torch.save(table, tmp_path / "m.pt")
        with pytest.raises(Refused, match="tables within tables|both be called a"):
            Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)
        torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "big.pt")
        with zipfile.ZipFile(tmp_path / "big.pt") as old:
            with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as new:
                for member in old.infolist():
                    new.writestr(member.filename, old.read(member))
        with pytest.raises(Refused, match="would unpack to"):
            Checkpoint.read(tmp_path / "m.pt", allow_pickle=True)

    def test_a_folder_with_a_torch_file(self, tmp_path):
        torch.save(weights(), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text('{"x": 1}')
        with pytest.raises(Refused, match="pytorch_model.bin is a pickle and can run code .* --allow-pickle"):
            Checkpoint.read(tmp_path)
        assert Checkpoint.read(tmp_path, allow_pickle=True).config == {"x": 1}


def zipped(*names):
    def make(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return make


OTHERS = {
    "m.pt": (zipped("m/data.pkl", "m/constants.pkl", "m/code/x.py"), "a TorchScript archive, which is a program"),
    "m.keras": (zipped("config.json", "model.weights.h5"), "a Keras model"),
    "m.npz": (zipped("arr_0.npy"), "a NumPy archive"),
    "m.zip": (zipped("model.safetensors"), "a zip archive"),
    "m.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "a Keras or other HDF5 file"),
    "m.onnx": (b"\x08\x08\x12\x07pytorch" + b"\0" * 99, "an ONNX graph"),
    "m.ckpt.data-00000-of-00001": (b"\0" * 99, "a TensorFlow checkpoint"),
    "m.gguf": (b"GGUF" + b"\0" * 99, "a GGUF file"),
    "m.tflite": (b"\x1c\0\0\0TFL3" + b"\0" * 99, "a TensorFlow Lite model"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the weights"),
    "page.safetensors": (b"\n<!DOCTYPE html><html>", "a web page, not the weights"),
    "m.tar.gz": (b"\x1f\x8b\x08" + b"\0" * 99, "a gzip archive"),
    "broken.pt": (b"PK\x03\x04" + b"\0" * 99, "a damaged zip archive"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("allowed", [False, True])
def test_other_formats_are_called_by_their_names(name, allowed, tmp_path):
    content, said = OTHERS[name]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(Refused, match=f"{name} is {said}.*: .*[.]$") as caught:
        Checkpoint.read(path, allow_pickle=allowed)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("m.pt", "m"),
        ("m.tar.pth", "m.tar"),
        ("m.safetensors", "m"),
        ("m.safetensors.index.json", "m"),
        ("m", "m"),
        ("m.v2", "m.v2"),
    ],
)
def test_an_output_is_always_called_safetensors(name, expected, tmp_path):
    assert default_output(tmp_path / name, None) == tmp_path / f"{expected}.clean.safetensors"


def test_shards_become_one_file_that_takes_their_place(tmp_path):
    state = weights()
    names = list(state)
    for file, some in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({n: state[n] for n in some}, tmp_path / file, {"format": "pt"})
    index = {"weight_map": {n: "ab"[k % 2] + ".safetensors" for k, n in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.read(tmp_path)
    out = tmp_path / "model.clean.safetensors"
    checkpoint.write(checkpoint.build(), out, {})
    # Written once more beside its input, which it is not.
    checkpoint.write(checkpoint.build(), out, {})
    written = load_file(out)
    assert written.keys() == state.keys() and all(torch.equal(written[n], state[n]) for n in state)
    assert read_header(out).metadata["format"] == "pt"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_known_by_its_content_whatever_it_is_called(zipped, tmp_path):
    path = tmp_path / "m.safetensors"
    torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refused, match="is a pickle and can run code"):
        Checkpoint.read(path)
    assert Checkpoint.read(path, allow_pickle=True).format == "pickle"


def test_a_shard_that_is_a_torch_file_is_not_called_damaged(tmp_path):
    torch.save(weights(), tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(weights(), "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        Refused, match="names the shard a.safetensors, which is a pickle whatever its name says"
    ):
        Checkpoint.read(tmp_path)


class TestSecondFiles:
    """A folder's other weights, which whoever uses it may load."""

    def folder(self, tmp_path):
        save_file(weights(), tmp_path / "model.safetensors")
        return tmp_path

    def test_one_file_among_things_that_are_no_weights(self, tmp_path):
        folder = self.folder(tmp_path)
        (folder / "README.md").write_text("x" * 100_000)
        torch.save(weights(), folder / "optimizer.pt")
        save_file({"projector": torch.rand(300, 7)}, folder / "projector.safetensors")
        assert Checkpoint.read(folder).second == {}

    def test_half_precision_and_torch_files_are_found_by_content(self, tmp_path):
        folder = self.folder(tmp_path)
        halves = {f"net.{name}": t.half() if t.is_floating_point() else t for name, t in weights(1).items()}
        save_file(halves, folder / "model.fp16.safetensors")
        torch.save(weights(2), folder / "old.weights")
        checkpoint = Checkpoint.read(folder)
        assert set(checkpoint.second) == {"model.fp16.safetensors", "old.weights"}
        assert all(said in checkpoint.warnings for said in checkpoint.second.values())
        assert "holds the same network" in checkpoint.second["model.fp16.safetensors"]
        assert "may hold the same network" in checkpoint.second["old.weights"]
        assert Checkpoint.read(folder / "model.safetensors").second == {}  # the user said which one counts

    def test_an_average_in_the_same_file_counts_too(self, tmp_path):
        other = {f"ema.{name}": t for name, t in weights(3).items()}
        save_file(weights() | other, tmp_path / "m.safetensors")
        checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
        assert list(checkpoint.second) == list(checkpoint.carried) == ["ema."]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.fc.lora_A.weight", "LoRA adapters .* merge them"),
        ("layers.0.q_proj.qweight", "quantised weights.*: give"),
        ("_flat_param", "FSDP shard .* gather the full state dict"),
        ("fc.weight_g", "weight norm.* take it off"),
        ("fc.parametrizations.weight.original0", "parametrization, .* take it off"),
    ],
)
def test_a_refusal_says_what_kind_of_tensors_these_are(name, said, tmp_path):
    save_file({name: torch.rand(8, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(Refused, match=said):
        Checkpoint.read(tmp_path / "m.safetensors")


def test_a_replaced_head_is_told_from_another_network_by_what_is_shared(tmp_path):
    state = resnet18(num_classes=5).state_dict()
    for kind in ("weight", "bias"):
        state[f"fc.2.{kind}"] = state.pop(f"fc.{kind}")
        state[f"fc.0.{kind}"] = torch.zeros(512, 512) if kind == "weight" else torch.zeros(512)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(Refused, match="nearest is resnet18 .*, of whose 102 tensors it has 100: give"):
        Checkpoint.read(tmp_path / "m.safetensors")
