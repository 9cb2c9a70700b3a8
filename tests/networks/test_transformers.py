"""Networks without batch norm, and such that work on tokens: recognised at any size, with depth, taps and recipes."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

from bdclean import registry
from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.ambiguity.choosing import choose
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import holds_weights
from bdclean.networks.taps import as_map, seeing
from bdclean.recipes.bcu import reinitialise
from bdclean.training.run import Precision, Run
from bdclean.training.students import set_batch_statistics

SECOND = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
TINY = {
    "vit": (partial(VisionTransformer, 32, 8, 4, 2, 16, 24, num_classes=5), "vit-4x16-h1-p8-mlp24", 32),
    "swin": (
        partial(SwinTransformer, [2, 2], 8, [1, 2], [2, 4], [4, 4], 2.0, num_classes=5),
        "swin-1-2-w8-window4",
        16,
    ),
    "swin-v2": (
        partial(SwinTransformer, [2, 2], 8, [1, 2], [2, 4], [4, 4], num_classes=5, **SECOND),
        "swin_v2-1-2-w8-window4",
        16,
    ),
    "convnext": (
        lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=5),
        "convnext-1-2-w8-16",
        224,
    ),
    "maxvit": (
        lambda: MaxVit((32, 32), 8, 4, [8, 16], [1, 2], 8, 0.0, num_classes=5),
        "maxvit-1-2-w8-16-partition4",
        32,
    ),
}


def saved(name, path):
    torch.manual_seed(0)
    network = TINY[name][0]().eval()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return network


@pytest.mark.parametrize("name", TINY)
def test_any_depth_and_width_is_recognised_and_built(name, tmp_path):
    network = saved(name, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    _, called, side = TINY[name]
    assert (checkpoint.arch.name, checkpoint.arch.input, checkpoint.arch.classes) == (
        called,
        (3, side, side),
        5,
    )
    # Heads are not in the shapes of a ViT: the right one is among the candidates.
    x, answers = torch.randn(2, 3, side, side), []
    for arch in [a for a in checkpoint.candidates if not a.unusual]:
        answers.append(checkpoint.build("cpu", arch)(x))
    assert any(torch.allclose(a, network(x), atol=1e-5) for a in answers)


@pytest.mark.parametrize("name", TINY)
def test_depth_taps_and_features(name, tmp_path):
    network = saved(name, tmp_path / "m.safetensors")
    arch = Checkpoint.read(tmp_path / "m.safetensors").arch
    owners = [n for n, m in network.named_modules() if n and holds_weights(m)]
    assert sorted(m for stage in arch.stages for m in stage.modules) == sorted(owners)
    assert [len(s.modules) for s in (arch.stages[0], arch.stages[-1])] == [1, 1]
    assert arch.taps
    with seeing(network, arch) as seen, torch.no_grad():
        logits = network(torch.randn(2, *arch.input))
    assert all(m.ndim == 4 and len(m) == 2 and m.shape[2] > 1 for m in seen.maps.values())
    sizes = [m.shape[2] for m in seen.maps.values()]
    assert sizes == sorted(sizes, reverse=True)
    head = network.get_submodule(arch.head)
    assert seen.features.shape == (2, head.in_features)
    assert torch.allclose(head(seen.features), logits, atol=1e-5)
    assert not network.get_submodule(arch.head)._forward_pre_hooks


def test_tokens_become_maps_without_the_class_token():
    tokens = torch.arange(10).float().view(1, 10, 1).expand(1, 10, 3)
    found = as_map(tokens)
    assert found.shape == (1, 3, 3, 3) and found[0, 0].flatten().tolist() == list(range(1, 10))
    assert as_map(torch.zeros(2, 15, 4)).shape == (2, 4, 1, 15)
    assert as_map(torch.zeros(2, 7, 7, 5)).shape == (2, 5, 7, 7)


def test_a_transformers_depth_is_cut_between_blocks(tmp_path):
    saved("vit", tmp_path / "m.safetensors")
    arch = Checkpoint.read(tmp_path / "m.safetensors").arch
    blocks = [{m.split(".")[2] for m in s.modules} for s in arch.stages[1:-1]]
    assert blocks == [{f"encoder_layer_{k}"} for k in range(4)]
    assert arch.taps[:3] == tuple(f"encoder.layers.encoder_layer_{k}" for k in range(3))


SETTINGS = {
    "bcu": {"epochs": "1", "batch_size": "8"},
    "inoculate": {
        "epochs": "1",
        "least_steps": "2",
        "batch_size": "8",
        "inversion_steps": "2",
        "adversary_steps": "1",
    },
}


@pytest.mark.parametrize("recipe", SETTINGS)
@pytest.mark.parametrize(
    "name",
    [
        "vit",
        pytest.param("swin-v2", marks=pytest.mark.slow),
        pytest.param("convnext", marks=pytest.mark.slow),
        pytest.param("maxvit", marks=pytest.mark.slow),
    ],
)
def test_recipes_work_and_change_the_weights(name, recipe, tmp_path):
    saved(name, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    side = min(checkpoint.arch.input[1], 32)
    pixels = torch.randint(
        256, (16, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    suspect = Classifier(checkpoint.build(), parse_preprocess("half")).eval()
    before = {k: v.clone() for k, v in suspect.network.state_dict().items()}
    method = registry.configure(registry.load(registry.RECIPES, recipe), SETTINGS[recipe])
    run = Run(torch.device("cpu"), Precision(), 0)
    result = method(suspect, checkpoint.arch, ImageSet(pixels, None, None), None, run)
    after = result.model.network.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    # every weight of every stage moved: none is out of the recipe's reach
    for stage in checkpoint.arch.stages:
        for module in stage.modules:
            names = [
                k for k in before if k.startswith(module + ".") and k.count(".") == module.count(".") + 1
            ]
            assert any(not torch.equal(before[k], after[k]) for k in names), module
    checkpoint.write(result.model, tmp_path / "out.safetensors", {"recipe": recipe})
    assert Checkpoint.read(tmp_path / "out.safetensors").arch.name == checkpoint.arch.name


def test_attention_is_redrawn_like_a_linear_layer():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(64, 2)
    reinitialise(attention, 1.0, torch.Generator().manual_seed(0))
    assert 0.11 < attention.in_proj_weight.abs().max() <= 1 / 8
    assert attention.in_proj_bias.abs().max() <= 1 / 8


def test_without_batch_norm_nothing_is_settled_and_the_claim_decides(tmp_path):
    network = saved("vit", tmp_path / "m.safetensors")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    set_batch_statistics(network, lambda: pytest.fail("no pass is needed"))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    save_file(before, tmp_path / "said.safetensors", {"bdclean.preprocess": "clip"})
    images = torch.randint(
        256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    claimed = choose(Checkpoint.read(tmp_path / "said.safetensors"), images)
    assert [(c.preprocess.name, c.source) for c in claimed] == [("clip", "metadata")]
    unsaid = choose(Checkpoint.read(tmp_path / "m.safetensors"), images)
    assert {c.source for c in unsaid} == {"spread of answers"}


def test_tables_of_whole_numbers_are_read_and_must_be_the_networks_own(tmp_path):
    network = saved("swin", tmp_path / "m.safetensors")
    key = "features.1.0.attn.relative_position_index"
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors")
    assert checkpoint.tensors[key].dtype == torch.int64
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(checkpoint.build()(x), network(x))
    tensors = {k: v.clone() for k, v in network.state_dict().items()}
    tensors[key][3] = 10**6
    save_file(tensors, tmp_path / "far.safetensors")
    with pytest.raises(Refused, match=f"{key} is not the table that the network computes"):
        Checkpoint.read(tmp_path / "far.safetensors").build()
    tensors[key] = tensors[key].to(torch.int8)
    tensors["head.weight"] = tensors["head.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(Refused, match="head.weight is I8; quantised weights"):
        Checkpoint.read(tmp_path / "int8.safetensors")
