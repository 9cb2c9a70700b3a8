"""Encoders as authors save them: small networks of torchvision and timm under the names of their files."""

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet

from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.families.residual import ResidualNetwork


def drawn(network, seed=0):
    """`network` in evaluation mode with weights, norms and statistics that all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if "running_var" in name or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            scale = 0.05 if tensor.ndim < 2 else max(tensor[0].numel(), 1) ** -0.5
            tensor.normal_(0, scale, generator=generator)
    return network.eval()


def large():
    """torchvision's ResNet for ImageNet with one block a stage, without its head."""
    network = drawn(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]))
    network.fc = nn.Identity()
    return network


def small(seed=0):
    """A ResNet for CIFAR without its head."""
    network = drawn(ResidualNetwork((1, 1, 1, 1), (8, 16, 24, 32), 8, 10), seed)
    network.fc = nn.Identity()
    return network


def under(prefix, network, rename=None):
    """The network's tensors, copied, under a prefix."""
    return {prefix + (rename or str)(n): t.clone() for n, t in network.state_dict().items()}


def numbered(name, stem, first):
    """`conv1.` as 0, `bn1.` as 1, `layer1.` as `first` and so on: children of a network in a Sequential."""
    head, rest = name.split(".", 1)
    index = {"conv1": stem, "bn1": stem + 1} | {f"layer{k}": first + k - 1 for k in range(1, 5)}
    return f"{index[head]}.{rest}"


def ordinary(name):
    """Whether a tensor of the network is what a file holds of it."""
    return not name.endswith("num_batches_tracked")


def read(path, state, **options):
    """The file of these tensors, read."""
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    return Checkpoint.read(path, **options)


def held(checkpoint, network, folder, size, tolerance=1e-4):
    """The checkpoint gives `network`'s features, and writes back what it was read from."""
    assert checkpoint.arch.kind == "encoder" and checkpoint.arch.classes == 0
    assert checkpoint.arch.feature and checkpoint.arch.layout
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine, theirs = checkpoint.build()(x), network(x)
    assert mine.shape == theirs.shape == (2, checkpoint.arch.width)
    assert torch.allclose(mine, theirs, atol=tolerance, rtol=1e-4), float((mine - theirs).abs().max())
    assert theirs.std() > 1e-3
    out = folder / "out.safetensors"
    checkpoint.write(checkpoint.build(), out, {}, force=True)
    again = checkpoint.again(out)
    assert again.entries == checkpoint.entries
    for name, tensor in checkpoint.tensors.items():
        one, other = (
            t.contiguous().view(torch.uint8) if t.ndim else t for t in (again.tensors[name], tensor)
        )
        assert torch.equal(one, other), name
    assert set(checkpoint.names) | set(checkpoint.unread) | set(checkpoint.tied) == set(checkpoint.tensors)
