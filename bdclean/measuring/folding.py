"""Batch norm folded into the convolution before it, so that a network in evaluation mode answers sooner."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bdclean.measuring.predictor import without_tf32
from bdclean.networks.classifier import Classifier

TOLERANCE = 1e-4
"""The largest difference, as a share of the largest logit, that rounding is allowed to make."""


def folded(model: Classifier, images: Tensor) -> Classifier:
    """A copy of `model` for evaluation whose batch norms are part of the convolutions before them where possible.

    All other weights are shared with `model`, which is left as it is. A network that cannot be traced, or whose answers
    to `images` (uint8 [n c h w], on any device) differ by more than rounding, is returned itself: a stranger's code may
    do what a trace does not show.
    """
    if model.training or not any(type(module) is nn.BatchNorm2d for module in model.modules()):
        return model
    try:
        quick = Classifier(_fold(model.network), model.preprocess).eval()
        pixels = images.to(quick.mean.device)
        with torch.inference_mode(), without_tf32():
            exact, found = model(pixels), quick(pixels)
        close = bool((found - exact).abs().max() <= TOLERANCE * exact.abs().max())
    except Exception:
        # Whatever code that is not ours raises when it is traced: the network itself still runs.
        return model
    return quick if close else model


def _fold(network: nn.Module) -> fx.GraphModule:
    # Other modules with the same tensors: code that keeps something between calls would keep what a trace hands it.
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    network = copy.deepcopy(network, shared)
    graph = fx.Tracer().trace(network)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    fused: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        norm, conv = network.get_submodule(str(node.target)), network.get_submodule(str(before.target))
        alone = len(before.users) == 1 and calls[node.target] == calls[before.target] == 1
        if not alone or type(norm) is not nn.BatchNorm2d or type(conv) is not nn.Conv2d:
            continue
        if norm.running_mean is None:  # then it takes each batch's statistics, in evaluation mode, too
            continue
        fused[str(before.target)] = fuse_conv_bn_eval(conv, norm)
        node.replace_all_uses_with(before)
        graph.erase_node(node)
    # Its containers are new, so that replacing a module leaves the modules of `network` alone.
    traced = fx.GraphModule(network, graph)
    for name, module in fused.items():
        parent, _, own = name.rpartition(".")
        setattr(traced.get_submodule(parent), own, module.requires_grad_(False))
    return traced
