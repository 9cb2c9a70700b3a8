"""Networks without weights, and the shapes of their tensors."""

import torch


def shapes_of(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def on_meta(build):
    with torch.device("meta"):
        return build()
