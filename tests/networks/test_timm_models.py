"""timm's folders: the network that the config names if it has exactly the file's tensors; nothing else in it acts."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdclean.errors import Refused, UsageError
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.recognition import timm_models
from bdclean.runs.options import Inputs
from bdclean.runs.suspect import input_size

timm = pytest.importorskip("timm", reason="timm is an extra")


def make(folder, name, config=None, classes=7, prefix="", **settings):
    """A folder as timm writes it for the hub, with random weights."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=classes, **settings).eval()
    for key, buffer in network.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    # Tied weights are kept once, as safetensors' save_model does.
    state = {t.data_ptr() if t.numel() else n: (n, t) for n, t in reversed(network.state_dict().items())}
    state = {prefix + n: t.contiguous() for n, t in reversed(state.values())}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    usual = {"architecture": name, "num_classes": classes, "model_args": settings,
             "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9,
                                "interpolation": "bicubic", "num_classes": classes}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(usual if config is None else config))
    return network


def same(network, checkpoint):
    x = torch.randn(2, *checkpoint.arch.input)
    with torch.no_grad():
        return torch.equal(network(x), checkpoint.build()(x))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("mobilenetv3_small_050", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
        pytest.param("convnextv2_atto", {}, marks=pytest.mark.slow),
        pytest.param("regnety_002", {}, marks=pytest.mark.slow),
        pytest.param("coat_lite_tiny", {"img_size": 64}, marks=pytest.mark.slow),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
    ],
)
def test_a_folder_is_read_and_its_output_stands_alone(name, settings, tmp_path):
    network = make(tmp_path, name, **settings)
    checkpoint = Checkpoint.read(tmp_path)
    assert (checkpoint.arch.name, checkpoint.arch.classes, checkpoint.unread) == (f"timm:{name}", 7, ())
    side = settings.get("img_size", 64)
    assert checkpoint.arch.input == (3, side, side) and same(network, checkpoint)
    (tmp_path / "away").mkdir()
    checkpoint.write(checkpoint.build(), tmp_path / "away" / "out.safetensors", {})
    before, after = (
        load_file(tmp_path / "model.safetensors"),
        load_file(tmp_path / "away" / "out.safetensors"),
    )
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    again = Checkpoint.read(tmp_path / "away" / "out.safetensors")
    assert again.arch.name == checkpoint.arch.name and same(network, again)


def test_shards_wrappers_tags_and_another_class_count(tmp_path):
    network = make(tmp_path, "mobilenetv3_small_050", prefix="timm_model.")
    config = {
        "architecture": "mobilenetv3_small_050.lamb_in1k",
        "num_classes": 1000,
        "model_type": "timm_wrapper",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(state)
    for file, some in (("a.safetensors", names[:50]), ("b.safetensors", names[50:])):
        save_file({n: state[n] for n in some}, tmp_path / file)
    index = {"weight_map": {n: "a.safetensors" if k < 50 else "b.safetensors" for k, n in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.read(tmp_path)
    assert checkpoint.arch.classes == 7 and same(network, checkpoint)


def test_arch_names_timm_without_a_config(tmp_path):
    network = make(tmp_path, "mobilenetv3_small_050", config={})
    checkpoint = Checkpoint.read(tmp_path, "timm:mobilenetv3_small_050")
    assert checkpoint.arch.classes == 7 and same(network, checkpoint)
    with pytest.raises(UsageError, match="timm has no network mobilenet_small"):
        Checkpoint.read(tmp_path, "timm:mobilenet_small")
    with pytest.raises(Refused, match="timm:resnet10t does not have these"):
        Checkpoint.read(tmp_path, "timm:resnet10t")


HOSTILE = [
    "hf-hub:someone/model", "hf_hub:x", "local-dir:/etc", "../../etc/passwd", "os.system", "timm.models.resnet",
    "resnet10t\n", "", "RESNET10T", "a" * 10_000, "__init__", "_pretrained", 7, None, ["resnet10t"], {"x": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_other_name_is_looked_up(name, tmp_path):
    make(tmp_path, "mobilenetv3_small_050", config={"architecture": name})
    assert not (isinstance(name, str) and timm_models.registered(name))
    with pytest.raises(Refused):
        found = Checkpoint.read(tmp_path)
        # Torchvision's own names may fit without the config.
        assert found.arch.name.startswith("timm:")


def test_only_harmless_settings_are_passed_on():
    given = {
        "pretrained": True, "checkpoint_path": "/etc/passwd", "pretrained_cfg": {"file": "/etc/passwd"},
        "pretrained_cfg_overlay": {"url": "http://x"}, "features_only": True, "cache_dir": "/", "scriptable": True,
        "img_size": 10**9, "depth": 10**9, "patch_size": True, "embed_dim": "64", "depths": [10**9], "dims": [8] * 99,
        "mlp_ratio": float("nan"), "act_layer": "os.system", "global_pool": "__class__",
        "norm_layer": "x", "block": "y", "qkv_bias": 1, "num_heads": -1, "window_size": [7, 10**6],
    }  # fmt: skip
    assert timm_models.settings({"model_args": given}) == {}
    good = {
        "img_size": [32, 48],
        "depth": 2,
        "mlp_ratio": 3,
        "act_layer": "silu",
        "class_token": False,
        "depths": [1, 2],
    }
    kept = timm_models.settings({"model_args": good, "global_pool": "avg"})
    assert kept == good | {"img_size": (32, 48), "depths": (1, 2), "global_pool": "avg"}
    for broken in (None, [], "x", 7):
        assert timm_models.settings({"model_args": broken}) == {}


def test_a_claim_that_does_not_fit_is_not_believed(tmp_path):
    from bdclean.networks.families.residual import ResidualNetwork

    state = ResidualNetwork((1, 1, 1), (4, 8, 16), 4, 5).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "mobilenetv3_small_050", "num_classes": 5}')
    checkpoint = Checkpoint.read(tmp_path)
    assert checkpoint.arch.name == "resnet8-cifar-b-w4" and "it was not believed" in checkpoint.warnings[0]
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        Refused, match=r"timm:mobilenetv3_small_050 does not have this 1 tensor|these 1 tensors"
    ):
        Checkpoint.read(tmp_path)


def test_another_network_with_the_same_tensors_stays_a_candidate(tmp_path):
    """resnetblur18 has resnet18's tensors and blurs where that strides: images must tell, not the config."""
    network = make(tmp_path, "resnetblur18")
    found = Checkpoint.read(tmp_path)
    assert [a.name for a in found.candidates] == ["timm:resnetblur18", "resnet18"]
    assert found.arch.alternatives[0][0] == "resnet18" and same(network, found)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(found.build()(x), found.build(arch=found.candidates[1])(x), atol=1e-3)
    make(tmp_path, "resnet18")
    assert [a.name for a in Checkpoint.read(tmp_path).candidates] == ["timm:resnet18"]


def test_an_encoder_is_refused(tmp_path):
    make(
        tmp_path, "mobilenetv3_small_050", config={"architecture": "mobilenetv3_small_050", "num_classes": 0}
    )
    with pytest.raises(Refused, match="num_classes 0, an encoder"):
        Checkpoint.read(tmp_path)


def test_the_config_claims_pixels_and_size(tmp_path):
    make(tmp_path, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    checkpoint = Checkpoint.read(tmp_path)
    said = claim(checkpoint.metadata, checkpoint.config, None)
    assert said is not None and (said[0].name, said[0].size, said[1]) == ("half", (64, 64), "config.json")
    # The claimed 64x64 is none that this network takes.
    assert input_size(checkpoint, Inputs()) == (32, 32)
    with pytest.raises(Refused, match="cannot be run on images of 64x64: leave size out, it is 32x32"):
        input_size(checkpoint, Inputs(preprocess="half,size=64/64"))


class TestWithoutTimm:
    @pytest.fixture(autouse=True)
    def _without(self, monkeypatch):
        self.hide = lambda: monkeypatch.setitem(sys.modules, "timm", None)

    def test_a_file_that_needs_it_says_how_to_get_it(self, tmp_path):
        make(tmp_path, "mobilenetv3_small_050")
        self.hide()
        with pytest.raises(
            Refused, match=r"timm's mobilenetv3_small_050: pip install 'bdclean\[timm\]', then run"
        ):
            Checkpoint.read(tmp_path)
        with pytest.raises(Refused, match=r"needs timm, which is not installed: pip install"):
            Checkpoint.read(tmp_path, "timm:mobilenetv3_small_050")

    def test_what_torchvision_has_needs_no_timm_but_nothing_is_guessed(self, tmp_path):
        network = make(tmp_path, "resnet18")
        self.hide()
        checkpoint = Checkpoint.read(tmp_path)
        assert checkpoint.arch.name == "resnet18" and same(network, checkpoint)
        (tmp_path / "config.json").write_text('{"architecture": "resnetblur18"}')
        with pytest.raises(Refused, match="timm's resnetblur18, and the tensors also fit resnet18"):
            Checkpoint.read(tmp_path)
