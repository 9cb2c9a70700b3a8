"""Transformers and CLIP's networks: DINO, DINOv2, MAE, MoCo v3, CLIP, held to timm's networks with the same weights."""

import json
import re

import pytest
import torch
from networks.layout_files import drawn, held, read
from torch import nn

from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.families.token_transformer import QuickGELU

timm = pytest.importorskip("timm")

SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2}


def network(name="vit_base_patch16_224", classes=0, **more):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return drawn(timm.create_model(name, pretrained=False, num_classes=classes, **(SMALL | more)))


def under(prefix, net):
    return {prefix + n: t.clone() for n, t in net.state_dict().items()}


def plain():
    return network(img_size=64)


def heads(prefix):
    return {
        f"{prefix}head.mlp.0.weight": torch.randn(8, 128),
        f"{prefix}head.last_layer.weight_g": torch.ones(9, 1),
    }


def decoder():
    return {
        "mask_token": torch.randn(1, 1, 64), "decoder_pos_embed": torch.randn(1, 17, 64),
        "decoder_embed.weight": torch.randn(64, 128), "decoder_blocks.0.norm1.weight": torch.ones(64),
        "decoder_norm.bias": torch.ones(64), "decoder_pred.weight": torch.randn(768, 64),
    }  # fmt: skip


LAYOUTS = [
    ("DINO, the teacher", lambda n: under("teacher.module.backbone.", n) | heads("teacher.module.")
     | {k: t + 1 for k, t in under("student.module.backbone.", n).items()} | heads("student.module.")),
    ("DINO", lambda n: under("backbone.", n) | heads("")),
    ("a transformer of DINO, MAE or timm without its head", lambda n: under("", n)),
    ("MAE", lambda n: under("", n) | decoder()),
    ("MoCo v3, the base encoder", lambda n: under("module.base_encoder.", n)
     | {"module.base_encoder.head.0.weight": torch.randn(4, 128), "module.predictor.0.weight": torch.randn(4, 4)}),
    ("solo-learn", lambda n: under("backbone.", n) | {"classifier.weight": torch.randn(10, 128),
     "classifier.bias": torch.zeros(10), "projector.0.weight": torch.randn(4, 128)}),
    ("lightly", lambda n: under("backbone.vit.", n) | {"decoder.mask_token": torch.randn(1, 1, 64)}),
    ("lightly, the teacher", lambda n: under("teacher_backbone.vit.", n) | under("student_backbone.vit.", plain())),
]  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: c[0])
def test_each_layout(case, tmp_path):
    layout, named = case
    net = plain()
    checkpoint = read(tmp_path / "m.safetensors", named(net))
    assert checkpoint.arch.layout == layout and checkpoint.arch.feature == "class token after the norm"
    assert checkpoint.arch.input == (3, 64, 64)
    assert checkpoint.arch.taps[-1] == "blocks.1" and checkpoint.arch.stages[0].modules == (
        "patch_embed.proj",
    )
    held(checkpoint, net, tmp_path, 64)


def test_a_classifier_of_timms_names_is_no_encoder_unless_asked(tmp_path):
    net = network(img_size=64)
    state = under("", net) | {"head.weight": torch.randn(10, 128), "head.bias": torch.zeros(10)}
    assert read(tmp_path / "m.safetensors", state).arch.kind == "classifier"
    checkpoint = Checkpoint.read(tmp_path / "m.safetensors", kind="encoder")
    assert set(checkpoint.unread) == {"head.weight", "head.bias"}
    held(checkpoint, net, tmp_path, 64)


def test_moco_v3s_small_transformer_has_heads_of_32(tmp_path):
    net = network(img_size=32, embed_dim=384, num_heads=12, depth=1)
    state = under("module.base_encoder.", net) | {"module.predictor.0.weight": torch.randn(4, 4)}
    held(read(tmp_path / "m.safetensors", state), net, tmp_path, 32)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2(registers, chunked, tmp_path):
    net = network("vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2", img_size=70)
    state = under("", net)
    if registers:
        # The authors' files have a position for the class token; timm has added it to the token.
        first = torch.randn(1, 1, 128)
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - first
    state["mask_token"] = torch.randn(1, 128)
    if chunked:
        state = {re.sub(r"^blocks\.", "blocks.0.", n): t for n, t in state.items()}
    for prefix in ("", "teacher.backbone."):
        file = {prefix + n: t for n, t in state.items()}
        if prefix:
            file["teacher.dino_head.mlp.0.weight"] = torch.randn(4, 128)
        checkpoint = read(tmp_path / "m.safetensors", file)
        assert checkpoint.arch.layout == ("DINOv2, the teacher" if prefix else "DINOv2")
        assert checkpoint.arch.input == (3, 70, 70) and prefix + "mask_token" in checkpoint.unread
        assert checkpoint.arch.name.startswith("dinov2-vit") and ("reg4" in checkpoint.arch.name) == bool(
            registers
        )
        held(checkpoint, net, tmp_path, 70)
    # At other sizes the positions are stretched.
    assert checkpoint.build()(torch.randn(1, 3, 42, 56)).shape == (1, 128)


def test_timms_own_registers(tmp_path):
    net = network("vit_small_patch14_reg4_dinov2", img_size=70)
    held(read(tmp_path / "m.safetensors", under("", net)), net, tmp_path, 70)


def openai(name):
    """OpenAI's name for a tensor of timm's CLIP transformer."""
    for pattern, to in (
        (r"^patch_embed\.proj\.", "conv1."), (r"^cls_token", "class_embedding"),
        (r"^pos_embed", "positional_embedding"), (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
        (r"^blocks", "transformer.resblocks"), (r"norm([12])", r"ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"fc1", "c_fc"), (r"fc2", "c_proj"),
    ):  # fmt: skip
        name = re.sub(pattern, to, name)
    return name


def clip(quick=True):
    """timm's CLIP transformer, and its tensors by OpenAI's names."""
    net = network(f"vit_base_patch32_clip_{'quickgelu_' if quick else ''}224", 48, img_size=64)
    with torch.no_grad():
        net.head.bias.zero_()
    state = {openai(n): t.clone() for n, t in net.state_dict().items() if not n.startswith("head.")}
    state["proj"] = net.head.weight.detach().T.clone()
    for name in ("class_embedding", "positional_embedding"):
        state[name] = state[name].reshape(state[name].shape[-1 if name.startswith("c") else -2 :])
    return net, state


TEXT = {"text_projection": torch.randn(4, 48), "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.randn(9, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}  # fmt: skip


def test_openais_clip_in_half_precision(tmp_path):
    net, state = clip()
    file = {f"visual.{n}": t.half() for n, t in state.items()} | TEXT
    file |= {n: torch.tensor(k) for k, n in enumerate(("input_resolution", "context_length", "vocab_size"))}
    checkpoint = read(tmp_path / "m.safetensors", file)
    assert checkpoint.arch.name.endswith("-quickgelu") and len(checkpoint.unread) == len(TEXT) + 3
    assert checkpoint.arch.taps[-1] == "blocks.1"
    assert checkpoint.arch.usual_preprocess == "clip" and checkpoint.arch.feature == "class token, projected"
    net.half().float()
    held(checkpoint, net, tmp_path, 64)


@pytest.mark.parametrize("quick", [False, True])
def test_openclips_config_says_the_activation(quick, tmp_path):
    net, state = clip(quick)
    with_text = {f"visual.{n}": t for n, t in state.items()} | TEXT
    unsure = read(tmp_path / "open_clip_model.safetensors", with_text)
    assert {a.name.endswith("quickgelu") for a in unsure.candidates if not a.unusual} == {False, True}
    said = {"quick_gelu": True} if quick else {}
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3}
    text = json.dumps({"model_cfg": {"embed_dim": 48, **said}, "preprocess_cfg": cfg})
    (tmp_path / "open_clip_config.json").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    checkpoint = Checkpoint.read(tmp_path)
    assert {a.name.endswith("quickgelu") for a in checkpoint.candidates if not a.unusual} == {quick}
    said_pixels = claim(checkpoint.metadata, checkpoint.config, checkpoint.preprocessor)
    assert said_pixels is not None and said_pixels[0].std == (0.25,) * 3
    held(checkpoint, net, tmp_path, 64)


def test_openclip_around_timm(tmp_path):
    net, _ = clip(quick=False)
    state = {f"visual.trunk.{n}": t for n, t in net.state_dict().items() if not n.startswith("head.")}
    state["visual.head.proj.weight"] = net.head.weight.detach().clone()
    checkpoint = read(tmp_path / "m.safetensors", state | {"text.token_embedding.weight": torch.randn(3, 4)})
    held(checkpoint, net, tmp_path, 64)


def resnet(name):
    """OpenAI's name for a tensor of timm's CLIP ResNet."""
    for pattern, to in (
        (r"^stem\.conv(\d)\.conv\.", r"conv\1."), (r"^stem\.conv(\d)\.bn\.", r"bn\1."),
        (r"^stages\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}."), (r"shortcut\.conv\.conv\.", "downsample.0."),
        (r"shortcut\.conv\.bn\.", "downsample.1."), (r"conv(\d)_\dx\d\.conv\.|conv(2)_kxk\.conv\.", None),
        (r"conv(\d)_\dx\d\.bn\.|conv(2)_kxk\.bn\.", "bn"), (r"^head\.pos_embed", "attnpool.positional_embedding"),
        (r"^head\.proj", "attnpool.c_proj"), (r"^head\.([qkv])\.", r"attnpool.\1_proj."),
    ):  # fmt: skip
        if to in (None, "bn"):
            name = re.sub(pattern, lambda m, to=to: f"{to or 'conv'}{m[1] or m[2]}.", name)
        else:
            name = re.sub(pattern, to, name)
    return name


def test_clips_resnet(tmp_path):
    net = drawn(timm.create_model("resnet50_clip", pretrained=False, img_size=64))
    state = {resnet(n): t.clone() for n, t in net.state_dict().items()}
    path = tmp_path / "m.safetensors"
    assert read(path, state).arch.layout == "CLIP, the image encoder alone"  # BadEncoder's
    checkpoint = read(path, {f"visual.{n}": t for n, t in state.items()} | TEXT)
    assert checkpoint.arch.name == "clip-rn50" and checkpoint.arch.input[1] == 64
    held(checkpoint, net, tmp_path, 64, tolerance=1e-3)


def hugging(name):
    for pattern, to in (
        (r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."), (r"attn\.proj\.", "attention.output.dense."),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."),
    ):  # fmt: skip
        name = re.sub(pattern, to, name)
    return name


def split(state, words):
    """Query, key and value apart."""
    out = {}
    for name, tensor in state.items():
        if "attn.qkv." not in name:
            out[name] = tensor
            continue
        for word, piece in zip(words, tensor.chunk(3), strict=True):
            out[name.replace("attn.qkv.", word)] = piece.clone()
    return out


QKV = ("attention.attention.query.", "attention.attention.key.", "attention.attention.value.")


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_dinov2_of_transformers(prefix, tmp_path):
    net = network("vit_small_patch14_dinov2", img_size=70)
    state = {prefix + hugging(n): t for n, t in split(under("", net), QKV).items()}
    state[prefix + "embeddings.mask_token"] = torch.randn(1, 128)
    path = tmp_path / "model.safetensors"
    checkpoint = read(path, state)
    assert checkpoint.arch.layout == "DINOv2 (transformers)" and len(checkpoint.unread) == 1
    held(checkpoint, net, tmp_path, 70)
    if prefix:
        # Its classifier has a head of twice the width: no encoder, unless asked for.
        state |= {"classifier.weight": torch.randn(5, 256), "classifier.bias": torch.zeros(5)}
        with pytest.raises(Refused):
            read(path, state)
        assert len(Checkpoint.read(path, kind="encoder").unread) == 3


def test_mae_of_transformers(tmp_path):
    net = plain()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    names = {"norm1.": "layernorm_before.", "norm2.": "layernorm_after."}
    names |= {"mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense."}
    state = {}
    for name, tensor in split(under("", net), QKV).items():
        for old, new in names.items():
            name = name.replace(old, new)
        state["vit." + hugging(name)] = tensor
    state |= {
        "decoder.mask_token": torch.randn(1, 1, 64),
        "decoder.decoder_embed.weight": torch.randn(64, 128),
    }
    checkpoint = read(tmp_path / "m.safetensors", state)
    assert checkpoint.arch.layout == "MAE (transformers)"
    held(checkpoint, net, tmp_path, 64)


@pytest.mark.parametrize("projected", [False, True])
def test_clip_of_transformers(projected, tmp_path):
    net, _ = clip()
    state = {}
    for name, tensor in split(
        under("", net), ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
    ).items():
        for pattern, to in (
            (r"^cls_token", "embeddings.class_embedding"), (r"^pos_embed", "embeddings.position_embedding.weight"),
            (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^blocks\.", "encoder.layers."),
            (r"^norm_pre\.", "pre_layrnorm."), (r"^norm\.", "post_layernorm."),
            (r"attn\.proj\.", "self_attn.out_proj."), (r"norm([12])\.", r"layer_norm\1."),
        ):  # fmt: skip
            name = re.sub(pattern, to, name)
        state["vision_model." + name] = tensor
    weight = state.pop("vision_model.head.weight")
    state.pop("vision_model.head.bias")
    cls = state["vision_model.embeddings.class_embedding"]
    state["vision_model.embeddings.class_embedding"] = cls.reshape(-1)
    table = state["vision_model.embeddings.position_embedding.weight"]
    state["vision_model.embeddings.position_embedding.weight"] = table[0]
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    if projected:
        state |= {
            "visual_projection.weight": weight,
            "text_model.embeddings.token_embedding.weight": torch.randn(4, 4),
        }
    else:
        net.head = nn.Identity()
    checkpoint = read(tmp_path / "m.safetensors", state)
    assert any(isinstance(m, QuickGELU) for m in checkpoint.build().modules())
    held(checkpoint, net, tmp_path, 64)


def test_a_timm_folder_without_classes(tmp_path):
    net = drawn(timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=0))
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "mobilenetv3_small_050", "num_classes": 0})
    )
    checkpoint = read(tmp_path / "model.safetensors", under("", net))
    assert checkpoint.arch.name == "timm:mobilenetv3_small_050" and checkpoint.arch.layout == "timm"
    held(checkpoint, net, tmp_path, 64)
