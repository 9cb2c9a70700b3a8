"""Vision transformers of self-supervision and CLIP with timm's names: DINO, DINOv2, MAE, MoCo v3, OpenAI's, OpenCLIP's.

They differ in a few parts that names and shapes show (layer scale, registers, a gated perceptron, a norm before the
blocks, a projection), and in three that nothing shows: attention heads, the activation of CLIP's perceptrons, epsilon.
The module `head` is there for what a classifier would add; an encoder's is taken off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.networks.arch import Proposal, Shapes
from bdclean.networks.families.counting import numbered
from bdclean.networks.families.vit import USUAL_HEAD, head_counts

# (width, depth) -> the letter that authors give a size.
SIZES = {(192, 12): "ti", (384, 12): "s", (768, 12): "b", (1024, 24): "l", (1280, 32): "h", (1408, 40): "g",
         (1536, 40): "g", (1664, 48): "bigg"}  # fmt: skip
# Heads of widths whose heads are not 64 wide: MAE's and OpenCLIP's huge ones, OpenCLIP's g and bigG.
HEADS = {1280: 16, 1408: 16, 1664: 16}
# Epsilon of the layer norms: CLIP keeps PyTorch's, the others write 1e-6.
CLIP_EPSILON, EPSILON = 1e-5, 1e-6
# DINO and DINOv2 stretch their table of positions to this much more than a whole number of patches.
OFFSET = 0.1
# OpenAI's and OpenCLIP's names by timm's.
RENAMED = [
    (re.compile(p), to)
    for p, to in (
        (r"^conv1\.", "patch_embed.proj."),
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^proj$", "proj.weight"),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"(^blocks\.\d+\.)ln_([12])\.", r"\1norm\2."),
        (r"(^blocks\.\d+\.)ls_([12])\.", r"\1ls\2."),
        (r"(^blocks\.\d+\.attn\.)in_proj_(weight|bias)$", r"\1qkv.\2"),
        (r"(^blocks\.\d+\.attn\.)out_proj\.", r"\1proj."),
        (r"(^blocks\.\d+\.mlp\.)c_fc\.", r"\1fc1."),
        (r"(^blocks\.\d+\.mlp\.)c_proj\.", r"\1fc2."),
        (r"^reg_token$", "register_tokens"),  # timm's
        # DINOv2 trained in chunks for FSDP counts its blocks on through all of them.
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    )
]


@dataclass(frozen=True)
class Form:
    """The numbers of a transformer.

    `positions`: rows of the table of positions; `projected`: what the feature is projected to, 0 for nothing; `rows`:
    whether the projection is [out in] like a linear layer's, or OpenAI's [in out]; `flat`: whether class token and
    positions are kept without leading ones; `averaged`: the feature is the mean of the patches, normed afterwards.
    """

    width: int
    depth: int
    heads: int
    patch: int
    inner: int
    positions: int
    registers: int = 0
    layer_scale: bool = False
    gated: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    projected: int = 0
    rows: bool = False
    flat: bool = False
    averaged: bool = False
    quick: bool = False
    epsilon: float = EPSILON

    @property
    def side(self) -> int:
        """Patches a side; the class token may have no position of its own (timm's, with registers)."""
        return math.isqrt(self.positions)

    @property
    def class_position(self) -> bool:
        return self.side**2 != self.positions


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Scale(nn.Module):
    """One learned factor a channel (layer scale)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention with one matrix for query, key and value."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        query, key, value = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, t, c))


class Perceptron(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.act = QuickGELU() if quick else nn.GELU()
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedPerceptron(nn.Module):
    """DINOv2-g's: one half of the inner layer gates the other."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and perceptron, each behind a norm and added to its input."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        c = form.width
        self.norm1 = nn.LayerNorm(c, eps=form.epsilon)
        self.attn = Attention(c, form.heads, form.qkv_bias)
        self.ls1 = Scale(c) if form.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(c, eps=form.epsilon)
        self.mlp = GatedPerceptron(c, form.inner) if form.gated else Perceptron(c, form.inner, form.quick)
        self.ls2 = Scale(c) if form.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """One token a patch."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, form.width, form.patch, form.patch, bias=form.patch_bias)

    def forward(self, x: Tensor) -> Tensor:
        side = self.proj.kernel_size[0]
        if x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"images of {x.shape[2]}x{x.shape[3]} cannot be cut into patches of {side}")
        return self.proj(x)


class Projection(nn.Module):
    """A linear map without bias, kept as [in out]."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inside, outside))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TokenTransformer(nn.Module):
    """Images [n 3 h w] of any whole number of patches to `head` of the feature [n width]."""

    def __init__(self, form: Form, classes: int) -> None:
        super().__init__()
        c = form.width
        self.form = form
        self.patch_embed = Patches(form)
        self.cls_token = nn.Parameter(torch.zeros(c) if form.flat else torch.zeros(1, 1, c))
        table = (form.positions, c)
        self.pos_embed = nn.Parameter(torch.zeros(*table) if form.flat else torch.zeros(1, *table))
        if form.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, form.registers, c))
        self.norm_pre = nn.LayerNorm(c, eps=form.epsilon) if form.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList([Block(form) for _ in range(form.depth)])
        self.last_norm = "fc_norm" if form.averaged else "norm"
        setattr(self, self.last_norm, nn.LayerNorm(c, eps=form.epsilon))
        out = form.projected or c
        self.proj: nn.Module = nn.Identity()
        if form.projected:
            self.proj = nn.Linear(c, out, bias=False) if form.rows else Projection(c, out)
        self.head = nn.Linear(out, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        table, first = self.places(grid[0], grid[1])
        token = self.cls_token.reshape(1, 1, -1) + first
        tokens = [token.expand(len(x), -1, -1), x + table]
        if self.form.registers:
            tokens.insert(1, self.register_tokens.expand(len(x), -1, -1))
        x = self.norm_pre(torch.cat(tokens, 1))
        for block in self.blocks:
            x = block(x)
        norm: nn.Module = getattr(self, self.last_norm)
        pooled = norm(x[:, 1 + self.form.registers :].mean(1)) if self.form.averaged else norm(x)[:, 0]
        return self.head(self.proj(pooled))

    def places(self, height: int, width: int) -> tuple[Tensor, Tensor | float]:
        """The positions of the patches [1 h*w c], stretched where they are not as many as in training; the token's."""
        table = self.pos_embed.reshape(1, self.form.positions, -1)
        first: Tensor | float = 0.0
        if self.form.class_position:
            first, table = table[:, :1], table[:, 1:]
        side = self.form.side
        if (height, width) == (side, side):
            return table, first
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = [(n + OFFSET) / side for n in (height, width)]
        stretched = F.interpolate(square.float(), scale_factor=factors, mode="bicubic").to(table.dtype)
        return stretched.flatten(2).transpose(1, 2), first


def rename(name: str) -> str:
    """timm's name for a tensor."""
    for pattern, to in RENAMED:
        name = pattern.sub(to, name)
    return name


def form_of(shapes: Shapes) -> Form | None:
    """The numbers that these shapes show, with the usual number of heads; None where a part is missing or odd."""
    stem = shapes.get("patch_embed.proj.weight", ())
    token, positions = shapes.get("cls_token", ()), shapes.get("pos_embed", ())
    gated = "blocks.0.mlp.w12.weight" in shapes
    inner = shapes.get("blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc1.weight", ())
    depth = numbered(shapes, r"blocks\.(\d{1,4})\.")
    if len(stem) != 4 or stem[1] != 3 or stem[2] != stem[3] or not token or len(inner) != 2 or not depth:
        return None
    if len(positions) not in (2, 3) or (len(token) == 1) != (len(positions) == 2):
        return None
    width, rows = stem[0], positions[-2]
    side = math.isqrt(rows)
    if width < 1 or rows < 2 or (side * side != rows and math.isqrt(rows - 1) ** 2 != rows - 1):
        return None
    projection = shapes.get("proj.weight", ())
    head = shapes.get("head.weight", ())
    if projection and (len(projection) != 2 or len(head) != 2):
        return None
    registers = shapes.get("register_tokens", ())
    pre_norm = "norm_pre.weight" in shapes
    # A square projection shows no direction: that of OpenAI's flat tables is [in out].
    by_rows = bool(projection) and (
        projection[1] == width and not (projection[0] == width and len(token) == 1)
    )
    counts = head_counts(width) or [1]
    return Form(
        width=width,
        depth=depth,
        heads=HEADS.get(width, counts[0]),
        patch=stem[2],
        inner=inner[1] if gated else inner[0],
        positions=rows,
        registers=registers[1] if len(registers) == 3 else 0,
        layer_scale="blocks.0.ls1.gamma" in shapes,
        gated=gated,
        pre_norm=pre_norm,
        patch_bias="patch_embed.proj.bias" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        projected=(projection[0] if by_rows else projection[1]) if projection else 0,
        rows=by_rows,
        flat=len(token) == 1,
        averaged="fc_norm.weight" in shapes and "norm.weight" not in shapes,
        epsilon=CLIP_EPSILON if pre_norm else EPSILON,
    )


def propose(shapes: Shapes) -> Iterator[Proposal]:
    """The transformer that these shapes suggest; CLIP's with either activation, any with another number of heads."""
    form, head = form_of(shapes), shapes.get("head.weight", ())
    if form is None or len(head) != 2:
        return
    others = []
    for count in (form.heads, *(c for c in head_counts(form.width) if c != form.heads)):
        for quick in (False, True) if form.pre_norm else (False,):
            reasons = ["OpenAI's QuickGELU instead of GELU"] if quick else []
            if count != form.heads:
                reasons.append(f"{count} attention heads instead of {form.heads}")
            other = proposal(replace(form, heads=count, quick=quick), head[0])
            if reasons:
                others.append((replace(other, unusual=count != form.heads), " and ".join(reasons)))
    yield replace(proposal(form, head[0]), others=tuple(others))


def proposal(form: Form, classes: int) -> Proposal:
    """The transformer of this form."""
    size = form.side * form.patch
    return Proposal(name_of(form), partial(TokenTransformer, form, classes), (3, size, size))


def name_of(form: Form) -> str:
    """`vit_b_16`, `dinov2-vit_s_14-reg4`, `clip-vit_b_32-quickgelu`; `vit-2x48-h3-p7` where the size has no name."""
    letter = SIZES.get((form.width, form.depth))
    usual = HEADS.get(form.width, form.width // USUAL_HEAD)
    name = (
        f"vit_{letter}_{form.patch}"
        if letter
        else f"vit-{form.depth}x{form.width}-h{form.heads}-p{form.patch}"
    )
    if letter and form.heads != usual:
        name += f"-h{form.heads}"
    if form.pre_norm:
        name = f"clip-{name}"
    elif form.layer_scale:
        name = f"dinov2-{name}"
    return name + f"-reg{form.registers}" * bool(form.registers) + "-quickgelu" * form.quick


def named_proposals(classes: int) -> Iterator[Proposal]:
    """None: these are encoders, and the table of known networks is one of classifiers."""
    yield from ()
