"""Reading checkpoints and writing drop-ins: exact bytes, and nothing overwritten by mistake."""

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused
from bdclean.files.tensorfile import Entry, lay_out, read_header, write_file
from bdclean.networks.checkpoint.checkpoint import SOURCE_KEY, Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess


def network(classes=10):
    torch.manual_seed(0)
    return ResidualNetwork((1, 1, 1), (4, 8, 16), 4, classes).eval()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path, {"author": "someone", "format": "pt"})
    return path


class TestDropIn:
    def test_unchanged_weights_give_the_same_file_but_for_provenance(self, model, tmp_path):
        checkpoint = Checkpoint.read(model)
        out = tmp_path / "out.safetensors"
        first = checkpoint.write(checkpoint.build(), out, {"recipe": "none"})
        before, after = read_header(model), read_header(out)
        assert after.entries == before.entries
        assert after.metadata == {**before.metadata, "bdclean.recipe": "none", SOURCE_KEY: checkpoint.sha256}
        assert list(after.metadata)[: len(before.metadata)] == list(before.metadata)
        assert out.read_bytes()[after.start :] == model.read_bytes()[before.start :]
        # the same again: the same bytes
        assert checkpoint.write(checkpoint.build(), out, {"recipe": "none"}) == first
        with safe_open(out, "pt") as reference:
            assert reference.metadata()["author"] == "someone"

    def test_any_order_prefix_and_type_is_kept(self, tmp_path):
        state = {f"module.{n}": t for n, t in network().state_dict().items() if "num_batches" not in n}
        names = sorted(state, key=lambda n: (len(n), n[::-1]))
        tensors = {n: state[n].to(torch.bfloat16 if k % 3 else torch.float16) for k, n in enumerate(names)}
        # data laid out in another order than the header's
        where = {e.name: e for e in lay_out(dict(reversed(tensors.items())))}
        write_file(tmp_path / "m.safetensors", [where[n] for n in names], {}, tensors)
        checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
        net = checkpoint.build()
        assert all(p.dtype == torch.float32 for p in net.parameters())
        checkpoint.write(net, tmp_path / "out.safetensors", {})
        out = Checkpoint.read(tmp_path / "out.safetensors")
        assert out.entries == checkpoint.entries
        for name, tensor in tensors.items():
            assert out.tensors[name].dtype == tensor.dtype and torch.equal(out.tensors[name], tensor)

    def test_trained_weights_are_cast_and_a_classifier_is_taken(self, model, tmp_path):
        checkpoint = Checkpoint.read(model)
        net = checkpoint.build()
        with torch.no_grad():
            net.fc.weight.add_(0.5)
        out = tmp_path / "out.safetensors"
        checkpoint.write(Classifier(net, parse_preprocess("half")), out, {})
        images = torch.rand(3, 3, 32, 32)
        assert torch.equal(Checkpoint.read(out).build()(images), net(images))

    def test_unread_tensors_are_carried_over_byte_for_byte(self, tmp_path):
        state = {f"model.{n}": t for n, t in network().state_dict().items()}
        state["projector.codes"] = torch.randn(4).to(torch.float8_e4m3fn)
        state["projector.weight"] = torch.full((3,), float("nan"))
        save_file(state, tmp_path / "m.safetensors")
        checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
        assert sorted(checkpoint.unread) == ["projector.codes", "projector.weight"]
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
        a, b = read_header(tmp_path / "m.safetensors"), read_header(tmp_path / "out.safetensors")
        assert a.entries == b.entries
        assert (tmp_path / "m.safetensors").read_bytes()[a.start :] == (
            tmp_path / "out.safetensors"
        ).read_bytes()[b.start :]

    def test_old_provenance_goes_and_the_claim_stays(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file(
            network().state_dict(), path, {"bdclean.recipe": "old", "bdclean.preprocess": "half", "x": "y"}
        )
        checkpoint = Checkpoint.read(path)
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {"bdclean.version": "1"})
        assert read_header(tmp_path / "out.safetensors").metadata == {
            "bdclean.preprocess": "half", "x": "y", "bdclean.version": "1", SOURCE_KEY: checkpoint.sha256,
        }  # fmt: skip

    def test_values_that_the_file_type_cannot_hold(self, tmp_path):
        state = {n: t.half() if t.is_floating_point() else t for n, t in network().state_dict().items()}
        save_file(state, tmp_path / "m.safetensors")
        checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
        net = checkpoint.build()
        with torch.no_grad():
            net.fc.weight[0, 0] = 1e6
        with pytest.raises(Refused, match=r"fc\.weight has values that F16 cannot hold"):
            checkpoint.write(net, tmp_path / "out.safetensors", {})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]

    def test_building_draws_no_random_numbers_and_leaves_the_file_alone(self, model):
        checkpoint = Checkpoint.read(model)
        before = torch.random.get_rng_state()
        net = checkpoint.build()
        assert torch.equal(before, torch.random.get_rng_state()) and not net.training
        with torch.no_grad():
            net.fc.weight.zero_()
        assert bool(checkpoint.tensors["fc.weight"].any())


class TestOutputs:
    def refused(self, checkpoint, out, said, force=False):
        for act in (
            lambda: checkpoint.check_writable(out, force),
            lambda: checkpoint.write(checkpoint.build(), out, {}, force),
        ):
            with pytest.raises(Refused, match=said):
                act()

    def test_the_input_is_never_overwritten(self, model, tmp_path):
        checkpoint, content = Checkpoint.read(model), model.read_bytes()
        (tmp_path / "link").symlink_to(model)
        os.link(model, tmp_path / "hard.safetensors")
        for out in (
            model,
            tmp_path / "link",
            tmp_path / "hard.safetensors",
            tmp_path / "." / "model.safetensors",
        ):
            self.refused(checkpoint, out, "is the input", force=True)
        assert model.read_bytes() == content

    def test_an_output_is_replaced_only_if_it_was_made_from_this_input(self, model, tmp_path):
        checkpoint = Checkpoint.read(model)
        out = tmp_path / "out.safetensors"
        checkpoint.write(checkpoint.build(), out, {})
        checkpoint.check_writable(out)
        save_file(network(3).state_dict(), out)
        self.refused(checkpoint, out, "exists and was not made from this input")
        out.write_text("notes")
        self.refused(checkpoint, out, "exists and was not made from this input")
        assert out.read_text() == "notes"
        checkpoint.write(checkpoint.build(), out, {}, force=True)
        assert Checkpoint.read(out).metadata[SOURCE_KEY] == checkpoint.sha256

    def test_places_that_cannot_be_written(self, model, tmp_path):
        checkpoint = Checkpoint.read(model)
        self.refused(checkpoint, tmp_path, "is a folder")
        self.refused(checkpoint, tmp_path / "no" / "out.safetensors", "no is not a folder: make it")
        self.refused(checkpoint, model / "out.safetensors", "is not a folder")

    def test_a_full_disk(self, model, monkeypatch, tmp_path):
        checkpoint = Checkpoint.read(model)
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        self.refused(checkpoint, tmp_path / "out.safetensors", "0 MB are free")

    def test_a_failed_write_leaves_what_was_there(self, model, tmp_path, monkeypatch):
        checkpoint = Checkpoint.read(model)
        out = tmp_path / "out.safetensors"
        checkpoint.write(checkpoint.build(), out, {})
        content = out.read_bytes()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(Refused, match="the disk is full"):
            checkpoint.write(checkpoint.build(), out, {"recipe": "x"})
        assert out.read_bytes() == content
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out.safetensors"]

    def test_the_output_gets_the_usual_permissions(self, model, tmp_path):
        checkpoint = Checkpoint.read(model)
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
        (tmp_path / "plain").touch()
        modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("out.safetensors", "plain")]
        assert modes[0] == modes[1]


class TestFolders:
    def test_a_folder_with_one_file_and_its_config(self, model, tmp_path):
        (tmp_path / "config.json").write_text('{"crop_pct": 0.9}')
        (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
        checkpoint = Checkpoint.read(tmp_path)
        assert checkpoint.config == {"crop_pct": 0.9} and checkpoint.preprocessor == {"image_mean": [0.5]}
        assert checkpoint.sha256 == Checkpoint.read(model).sha256

    @pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
    def test_a_broken_config_is_said_and_ignored(self, model, tmp_path, content):
        (tmp_path / "config.json").write_bytes(content)
        checkpoint = Checkpoint.read(model)
        assert checkpoint.config is None
        assert "config.json is not a readable JSON table" in checkpoint.warnings[0]

    def test_several_files_are_not_guessed_among(self, model, tmp_path):
        (tmp_path / "other.safetensors").write_bytes(model.read_bytes())
        assert Checkpoint.read(tmp_path).sha256 == Checkpoint.read(model).sha256
        model.rename(tmp_path / "first.safetensors")
        with pytest.raises(Refused, match="holds 2 safetensors files: name the one"):
            Checkpoint.read(tmp_path)

    def shards(self, folder, state):
        names = list(state)
        parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
        for file, some in parts.items():
            save_file({n: state[n] for n in some}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: f for f, some in parts.items() for n in some}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return index

    def test_shards_are_read_as_one_and_written_as_one(self, tmp_path):
        state = network().state_dict()
        self.shards(tmp_path, state)
        checkpoint = Checkpoint.read(tmp_path)
        assert checkpoint.format == "safetensors-sharded"
        with pytest.raises(Refused, match="is the input"):
            checkpoint.check_writable(tmp_path / "a-1.safetensors", force=True)
        checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
        written = load_file(tmp_path / "out.safetensors")
        assert written.keys() == state.keys() and all(torch.equal(written[n], state[n]) for n in state)

    @pytest.mark.parametrize(
        "change, said",
        [
            (lambda i: i["weight_map"].update({"fc.bias": "../../etc/passwd"}), "not a file beside it"),
            (lambda i: i["weight_map"].update({"fc.bias": "/etc/passwd"}), "not a file beside it"),
            (lambda i: i["weight_map"].update({"fc.bias": ".."}), "not a file beside it"),
            (
                lambda i: i["weight_map"].update({"fc.bias": "a-3.safetensors"}),
                "a-3.safetensors, which is not there",
            ),
            (
                lambda i: i["weight_map"].update({"more": "a-1.safetensors"}),
                "names more, which no shard holds",
            ),
            (lambda i: i["weight_map"].pop("fc.bias"), "does not say that .* holds fc.bias"),
            (lambda i: i.pop("weight_map"), "no readable weight_map"),
            (lambda i: i["weight_map"].clear(), "no readable weight_map"),
        ],
    )
    def test_hostile_indexes(self, tmp_path, change, said):
        index = self.shards(tmp_path, network().state_dict())
        change(index)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(Refused, match=said):
            Checkpoint.read(tmp_path)


def test_ties_that_the_file_breaks_are_refused(tmp_path):
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem = nn.Conv2d(3, 4, 3, padding=1)\n"
        "        self.a = nn.Conv2d(4, 4, 3, padding=1)\n"
        "        self.b = nn.Conv2d(4, 4, 3, padding=1)\n"
        "        self.b.weight = self.a.weight\n"
        "        self.fc = nn.Linear(4, 5)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.b(self.a(self.stem(x))).mean((2, 3)))\n"
    )
    shapes = {"stem": (4, 3, 3, 3), "a": (4, 4, 3, 3), "b": (4, 4, 3, 3), "fc": (5, 4)}
    state = {f"{n}.weight": torch.randn(s) for n, s in shapes.items()}
    state |= {f"{n}.bias": torch.zeros(s[0]) for n, s in shapes.items()}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(Refused, match=r"ties a\.weight and b\.weight, and the file's differ"):
        Checkpoint.read(tmp_path / "m.safetensors", "tied.py:Tied").build()
    state["b.weight"] = state["a.weight"].clone()
    save_file(state, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors", "tied.py:Tied")
    net = checkpoint.build()
    assert net.a.weight is net.b.weight
    with torch.no_grad():
        net.a.weight.add_(1)
    checkpoint.write(net, tmp_path / "out.safetensors", {})
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["a.weight"], written["b.weight"])


def test_the_smallest_file_byte_by_byte(tmp_path):
    path = tmp_path / "a.safetensors"
    write_file(path, [Entry("a", "F32", (1,), 0, 4)], {}, {"a": torch.ones(1)})
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
    assert path.read_bytes() == len(text).to_bytes(8, "little") + text + b"\x00\x00\x80?"


@pytest.mark.parametrize("depth", [20, 56])
def test_a_third_party_file(depth, tmp_path):
    folder = os.environ.get("BDCLEAN_CHECKPOINTS")
    path = Path(folder or ".") / f"akamaster-resnet{depth}.safetensors"
    if not folder or not path.is_file():
        pytest.skip("BDCLEAN_CHECKPOINTS names no folder with third-party checkpoints")
    checkpoint = Checkpoint.read(path)
    assert checkpoint.arch.name == f"resnet{depth}-cifar-a" and checkpoint.arch.classes == 10
    checkpoint.write(checkpoint.build(), tmp_path / "out.safetensors", {})
    a, b = load_file(path), load_file(tmp_path / "out.safetensors")
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
