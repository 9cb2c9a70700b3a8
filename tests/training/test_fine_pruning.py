"""Fine-pruning: which part of a layer is silenced, whose channels are quietest, and how many accuracy allows."""

import copy

import pytest
import torch
from torch import nn

from bdclean.data.imageset import ImageSet
from bdclean.errors import Refused
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.preact import PreActNetwork
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.training.fine_pruning import FinePruning, activity, last_part, main_path
from bdclean.training.pruning import accuracy, prune_while_accurate, pruned_channels
from bdclean.training.run import Precision, Run
from bdclean.training.students import set_batch_statistics

N = 24
LAYERS = ["layer3.0.conv1", "layer3.0.conv2"]


def run():
    return Run(torch.device("cpu"), Precision(), 0)


def labeled():
    pixels = torch.randint(256, (N, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(N) % 4, tuple("abcd"))


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Classifier(ResidualNetwork((1, 1, 1), (4, 4, 8), 4, 4), parse_preprocess("half"))
    set_batch_statistics(made, lambda: iter([labeled().images]))
    return made.eval()


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_a_norm_that_follows_belongs_to_the_layer():
    made = model()
    assert last_part(made, LAYERS, labeled().images) is made.network.get_submodule("layer3.0.bn2")
    plain = Classifier(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)), parse_preprocess("half")
    )
    plain(labeled().images)
    assert last_part(plain, ["0"], labeled().images) is plain.network[0]
    assert last_part(plain, ["0", "3"], labeled().images) is plain.network[3]
    assert last_part(plain, ["0", "1"], labeled().images) is plain.network[0]
    with pytest.raises(Refused, match="needs a convolution or a linear layer"):
        last_part(plain, ["1"], labeled().images)


@pytest.mark.parametrize("preact", [False, True])
def test_a_shortcut_is_not_the_last_layer(preact):
    """Torchvision's blocks run theirs last, pre-activation ones first; both take the block's input."""
    made, images = model(), labeled().images[:2]
    if preact:
        made = Classifier(PreActNetwork((1, 1, 1), (4, 4, 8), 4, 4), parse_preprocess("half"))
    arch = describe("tiny", lambda: made.network, (3, 16, 16))
    layers = [name for stage in arch.stages[:-1] for name in stage.modules]
    assert layers[-1] == "layer3.0.downsample.0"
    found = main_path(made, layers, images)
    assert found[-1] == "layer3.0.conv2" and found[0] == "conv1" and len(found) == len(layers) - 2


def test_of_a_stage_of_one_block_the_shortcut_keeps_all_channels():
    """The last stage alone is what a teacher of `distill` is pruned in; it ends with the shortcut's layer."""
    made, images = model(), labeled()
    stage = [name for name in LAYERS if name.startswith("layer3")]
    assert main_path(made, stage, images.images[:2])[-1] == "layer3.0.conv2"
    was = copy.deepcopy(made)
    FinePruning(0.5, epochs=0.5, batch_size=8)(made, [*stage, "layer3.0.downsample.0"], images, run())
    assert made.network.get_submodule("layer3.0.bn2").weight.eq(0).sum() == 4
    assert pruned_channels(was, made) == 4


@pytest.mark.parametrize("size", [5, 256])
def test_activity_is_the_mean_of_what_an_activation_lets_through(size):
    made, images = model(), labeled().images
    found = activity(made, made.network.get_submodule("layer3.0.bn2"), images, run(), size)
    seen = []
    made.network.layer3[0].bn2.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        made(images)
    expected = [float(sum(seen[0][n, c].clamp_min(0).mean() for n in range(N)) / N) for c in range(8)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tokens", [False, True])
def test_activity_of_a_linear_layer_is_that_of_its_last_axis(tokens):
    first = nn.Flatten(2) if tokens else nn.Flatten()
    made = Classifier(nn.Sequential(first, nn.Linear(256 if tokens else 768, 6)), parse_preprocess("half"))
    images = labeled().images
    found = activity(made, made.network[1], images, run())
    with torch.no_grad():
        assert torch.allclose(found, made(images).abs().reshape(-1, 6).mean(0), rtol=1e-4)


def test_a_linear_layer_before_an_activation_counts_what_that_lets_through():
    made = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.ReLU()), parse_preprocess("half"))
    images = labeled().images
    with torch.no_grad():
        assert torch.allclose(activity(made, made.network[1], images, run()), made(images).mean(0), rtol=1e-4)


def test_a_channel_that_is_silent_on_clean_images_goes_first():
    """Its output lies far below zero, where the activation behind it lets nothing through."""
    made, images = model(), labeled()
    part = made.network.get_submodule("layer3.0.bn2")
    with torch.no_grad():
        part.bias[5] = -50
    FinePruning(1 / 8, epochs=0.5, batch_size=8)(made, LAYERS, images, run())
    assert (part.weight == 0).nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_quietest_share_is_silent_and_stays_so(share):
    made, images = model(), labeled()
    part = made.network.get_submodule("layer3.0.bn2")
    quiet = activity(made, part, images.images, run()).argsort()[: round(8 * share)]
    before, was = state(made), copy.deepcopy(made)
    FinePruning(share, epochs=0.5, batch_size=8)(made, LAYERS, images, run())
    after = state(made)
    assert after.keys() == before.keys() and not made.training
    assert (part.weight == 0).nonzero()[:, 0].tolist() == sorted(quiet.tolist())
    assert not part.bias[quiet].any()
    assert pruned_channels(was, made) == len(quiet)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "network.conv1.weight" in changed and "network.fc.weight" in changed


def test_as_many_channels_go_as_accuracy_allows():
    made, images = model(), labeled()
    images = ImageSet(images.images, made(images.images).argmax(1), images.classes)  # it is right on all
    FinePruning(tolerance=0.0, epochs=1e-3, batch_size=4, rate=1e-9)(made, LAYERS, images, run())
    loose = model()
    FinePruning(tolerance=1.0, epochs=1e-3, batch_size=4, rate=1e-9)(loose, LAYERS, images, run())
    few, most = (pruned_channels(model(), network) for network in (made, loose))
    assert few < most == 7  # 19 twentieths of 8


def test_pruning_again_gives_the_same_bits():
    found = []
    for _ in range(2):
        made = model()
        FinePruning(0.5, epochs=0.5, batch_size=8)(made, LAYERS, labeled(), run())
        found.append(state(made))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("tolerance", "expected"), [(0.0, 1), (0.1, 2), (0.5, 3), (1.0, 4)])
def test_the_last_amount_before_accuracy_falls(tolerance, expected):
    accuracies, now = {0: 0.8, 1: 0.8, 2: 0.75, 3: 0.5, 4: 0.1}, []
    found = prune_while_accurate(range(5), now.append, lambda: accuracies[now[-1]], tolerance)
    assert found == expected == now[-1]


def test_accuracy_is_a_share_whatever_the_batches():
    made, images = model(), labeled()
    right = [int(made(images.images[k : k + 1]).argmax()) == int(images.labels[k]) for k in range(N)]
    assert accuracy(made, images, run(), 5) == accuracy(made, images, run()) == pytest.approx(sum(right) / N)
