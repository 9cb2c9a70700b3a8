"""Normalisations by name and SPEC, claims in files, and the choice at the first normalisation layer."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import nn

from bdclean.data.augment import crop
from bdclean.errors import Refused, UsageError
from bdclean.networks.ambiguity import normalisation, statistics
from bdclean.networks.ambiguity.choosing import choose
from bdclean.networks.ambiguity.normalisation import ANSWERS, LABELS, LAYER, MOST, decide
from bdclean.networks.ambiguity.statistics import clearly_more, distance, first_statistics
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.checkpoint.claims import claim
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import NAMED, RGB_CANDIDATES, Preprocess, parse_preprocess

NAMES = "none half imagenet cifar10 cifar100 gtsrb clip raw255".split()


def pictures(count, seed, side=16):
    """Colour gradients with a few shapes: unlike noise, neighbouring pixels agree and channels differ."""
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 3, 4, 4, generator=g) * torch.tensor([1.0, 0.8, 0.6]).view(1, 3, 1, 1)
    smooth = nn.functional.interpolate(corners, (side, side), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


class TestSpecs:
    @pytest.mark.parametrize("name", [n + b for n in NAMES for b in ("", "-bgr")])
    def test_every_name_is_known_and_read_back(self, name):
        found = parse_preprocess(name)
        assert found.name == name and parse_preprocess(found.spec()) == found
        sized = parse_preprocess(f"{name},size=48/64")
        assert sized.size == (48, 64)
        again = parse_preprocess(sized.spec())
        assert (again.affine(), again.bgr, again.size) == (sized.affine(), sized.bgr, sized.size)

    def test_bgr_keeps_each_colours_statistics(self):
        x = torch.rand(2, 3, 4, 4)
        assert torch.equal(NAMED["imagenet-bgr"].normalise(x), NAMED["imagenet"].normalise(x).flip(1))
        assert NAMED["imagenet"].swapped() == NAMED["imagenet-bgr"]
        assert all(c.swapped().swapped() == c for c in RGB_CANDIDATES)

    @pytest.mark.parametrize(
        "text",
        ["mean=0.1/0.2/0.3,std=1/2/3", "mean=100/110/120,std=57/58/59,scale=255,order=bgr,size=224/224"],
    )
    def test_specs_are_read_back(self, text):
        found = parse_preprocess(text)
        assert parse_preprocess(found.spec()) == found
        assert found.swapped().swapped() == found

    @pytest.mark.parametrize(
        "text",
        ["", "imagnet", "auto", "mean=1/2", "mean=a/b/c", "std=0/1/1", "std=1/1/-1", "mean=nan/0/0", "mean=inf/0/0",
         "size=0/0", "size=32/32/32", "size=9999/9", "mean=0/0/0,mean=0/0/0", "half,std=1/1/1", "gamma=2", "half,",
         "scale=2", "order=gbr", "size=\u00b2/8"],
    )  # fmt: skip
    def test_senseless_specs(self, text):
        with pytest.raises(UsageError, match="--preprocess"):
            parse_preprocess(text)


class TestClassifier:
    @pytest.mark.parametrize("name", ["none", "half", "imagenet", "cifar10-bgr", "raw255", "raw255-bgr"])
    def test_it_normalises_as_its_preprocess_says(self, name):
        model = Classifier(nn.Identity(), NAMED[name])
        images = pictures(4, 0)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (NAMED[name].mean, NAMED[name].std))
        pixels = images.float() if "raw255" in name else images.float() / 255
        wanted = [((p.flip(0) if "bgr" in name else p) - mean) / std for p in pixels]
        assert torch.allclose(model(images), torch.stack(wanted), atol=1e-4)
        assert torch.allclose(model(images), model(images.float() / 255), atol=1e-4)
        assert torch.allclose(model(images), NAMED[name].normalise(images), atol=1e-5)

    def test_it_is_differentiable_and_gives_fp32(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5)).to(torch.bfloat16)

        class Half(nn.Module):
            def forward(self, x):
                return network(x.to(torch.bfloat16))

        x = torch.rand(2, 3, 4, 4, requires_grad=True)
        logits = Classifier(Half(), NAMED["half"])(x)
        logits.sum().backward()
        assert logits.dtype == torch.float32 and bool(x.grad.abs().sum() > 0)

    def test_its_state_is_the_networks_own(self):
        network = nn.Linear(2, 2)
        assert [k.removeprefix("network.") for k in Classifier(network, NAMED["half"]).state_dict()] == [
            "weight",
            "bias",
        ]


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TIMM = {"architecture": "resnet18", "mean": MEAN, "std": STD, "input_size": [3, 160, 160]}
HUGGING_FACE = {"image_mean": MEAN, "image_std": STD}
CENTRE = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}


class TestClaims:
    @pytest.mark.parametrize(
        "config, preprocessor, name, size",
        [
            (TIMM, None, "imagenet", (160, 160)),
            ({"architecture": "x", "pretrained_cfg": TIMM}, None, "imagenet", (160, 160)),
            ({"model_type": "resnet"}, HUGGING_FACE | {"size": {"height": 224, "width": 192}}, "imagenet", (224, 192)),
            ({}, {"image_mean": [0.5], "image_std": [0.5], "size": 48}, "half", (48, 48)),
            (None, HUGGING_FACE | CENTRE, "imagenet", (224, 224)),
            (None, {"image_mean": MEAN, "image_std": STD, "do_normalize": False}, "none", None),
            (None, {"do_normalize": False, "do_rescale": False}, "raw255", None),
            ({"mean": MEAN, "std": STD, "input_size": [3, 1 << 40, 9]}, None, "imagenet", None),
        ],
    )  # fmt: skip
    def test_timm_and_hugging_face_forms(self, config, preprocessor, name, size):
        found = claim({}, config, preprocessor)
        assert found is not None
        assert (found[0].name, found[0].size, found[1]) == (name, size, "config.json")

    @pytest.mark.parametrize(
        "config",
        [None, [], "x", {"mean": MEAN}, {"mean": MEAN, "std": [0, 1, 1]}, {"mean": MEAN, "std": "0.2"},
         {"mean": [1, 2], "std": [1, 2]}, {"mean": [math.nan] * 3, "std": STD}, {"mean": [True] * 3, "std": STD},
         {"pretrained_cfg": 3}],
    )  # fmt: skip
    def test_what_is_no_claim(self, config):
        assert claim({}, config, None) is None

    def test_metadata_comes_first_and_a_broken_one_is_none(self):
        config = {"mean": MEAN, "std": STD}
        assert claim({"bdclean.preprocess": "half"}, config, None) == (NAMED["half"], "metadata")
        assert claim({"bdclean.preprocess": "\x00"}, config, None) is None

    def test_other_values_are_named_by_their_spec(self):
        found = claim({}, {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}, None)
        assert found is not None and parse_preprocess(found[0].name) == found[0]


def trained(preprocess, images, augment=False, seed=0):
    """A network whose first norm layer has the statistics of `images` under `preprocess`."""
    torch.manual_seed(seed)
    network = ResidualNetwork((1, 1, 1), (8, 8, 8), 8, 10).eval().requires_grad_(False)
    if augment:
        images = crop(images, torch.Generator().manual_seed(seed + 1))
    found = first_statistics(network, preprocess.normalise(images))
    network.bn1.running_mean.copy_(found[0])
    network.bn1.running_var.copy_(found[1])
    return network


class TestDistance:
    def test_against_a_slow_transcription(self):
        network = trained(NAMED["half"], pictures(64, 0))
        x = NAMED["cifar10"].normalise(pictures(16, 1))
        y = network.conv1(x)  # the first norm layer follows
        total = 0.0
        for c in range(8):
            mean, var = y[:, c].mean(), y[:, c].var(unbiased=False) + 1e-5
            m, v = network.bn1.running_mean[c], network.bn1.running_var[c] + 1e-5
            total += float(0.5 * (var / v + (mean - m) ** 2 / v - 1 - torch.log(var / v)))
        found = distance(network, x)
        assert found == pytest.approx(total / 8, rel=1e-4) and found == distance(network, x)

    def test_it_is_nothing_on_its_own_images_and_grows_with_the_error(self):
        images = pictures(128, 0)
        network = trained(NAMED["half"], images)
        scores = [
            distance(network, NAMED[n].normalise(images)) for n in ("half", "cifar10", "none", "raw255")
        ]
        assert scores[0] == pytest.approx(0, abs=1e-3)
        assert scores[0] < scores[1] < scores[2] < scores[3]

    def test_a_network_without_running_statistics_has_none(self):
        assert (
            first_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), torch.rand(2, 3, 8, 8))
            is None
        )
        assert first_statistics(nn.BatchNorm2d(3, track_running_stats=False), torch.rand(2, 3, 8, 8)) is None

    def test_no_hook_stays(self):
        network = trained(NAMED["half"], pictures(16, 0))
        decide(network, pictures(16, 1), None)
        assert not any(m._forward_pre_hooks for m in network.modules())


class TestChoice:
    @pytest.mark.parametrize("augment", [False, True])
    @pytest.mark.parametrize("name", ["none", "half", "imagenet", "cifar10", "raw255"])
    def test_the_right_one_is_found(self, name, augment):
        network = trained(NAMED[name], pictures(1000, 0), augment)
        kept, margin, layer = decide(network, pictures(400, 1), None)
        assert kept[0] == NAMED[name] and layer
        assert len(kept) == 1 or margin <= 1
        assert decide(network, pictures(400, 1), None) == (kept, margin, layer)

    def test_a_true_claim_stands_alone(self):
        network = trained(NAMED["half"], pictures(1000, 0))
        kept, margin, _ = decide(network, pictures(400, 1), NAMED["half"])
        assert kept == [NAMED["half"]] and margin > 1

    def test_a_true_claim_of_its_own_values_comes_first(self):
        own = parse_preprocess("mean=0.3/0.3/0.3,std=0.4/0.4/0.4")
        network = trained(own, pictures(1000, 0))
        assert decide(network, pictures(400, 1), own)[0] == [own]

    @pytest.mark.parametrize("lie", ["none", "imagenet", "raw255"])
    def test_a_lie_is_contradicted_and_still_listed(self, lie):
        network = trained(NAMED["half"], pictures(1000, 0))
        kept, _, _ = decide(network, pictures(400, 1), NAMED[lie])
        assert kept == [NAMED["half"], NAMED[lie]]

    @pytest.mark.parametrize("name", ["half", "half-bgr"])
    @pytest.mark.parametrize("said", [None, "half", "half-bgr"])
    @pytest.mark.parametrize("sees_colour", [True, False])
    def test_the_order_of_channels(self, name, said, sees_colour):
        """Pictures are reddish: the first layer sees that, or only the rest, which is sure of reddish things only."""
        first = 2 if name.endswith("bgr") else 0

        class Red(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(3 if sees_colour else 1)

            def forward(self, x):
                self.norm(x if sees_colour else x.mean(1, keepdim=True))
                x = x.mean((2, 3))
                return torch.stack([20 * (x[:, first] - x[:, 2 - first]).relu(), torch.zeros(len(x))], 1)

        network = Red().eval()
        images = pictures(300, 0)
        found = first_statistics(network, NAMED[name].normalise(images))
        network.norm.running_mean.copy_(found[0])
        network.norm.running_var.copy_(found[1])
        kept, _, _ = decide(network, images, NAMED.get(said))
        assert kept[0] == NAMED[name]
        assert kept[1:] == [] if said in (None, name) else kept[-1] == NAMED[said]

    def test_unlike_images_make_it_unclear(self):
        network = trained(NAMED["cifar10"], pictures(1000, 0))
        strange = (pictures(300, 1).float() * 0.4 + 120).to(torch.uint8)
        kept, margin, _ = decide(network, strange, None)
        assert margin < 3 and len(kept) <= MOST


class Levels(nn.Module):
    """Its class is the level of red that the picture has on average, in equal steps over `name`'s range."""

    def __init__(self, name, classes=10):
        super().__init__()
        black, white = (
            NAMED[name].normalise(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)) for v in (0, 255)
        )
        low, high = black[0, 0, 0, 0], white[0, 0, 0, 0]
        self.centres = low + (torch.arange(classes) + 0.5) / classes * (high - low)
        self.sharpness = (3 * classes / (high - low)) ** 2

    def forward(self, x):
        red = x[:, 0].mean((1, 2))
        return -self.sharpness * (red[:, None] - self.centres) ** 2


def flat(count=600, classes=10):
    """Pictures of one colour each, and the level of their red."""
    colours = torch.randint(0, 256, (count, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = colours[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    return images, (colours[:, 0].float() / 255 * classes).long().clamp_max(classes - 1)


class TestBetweenThoseThatTheLayerLeaves:
    """The layer is made to leave everything that is named: labels tell."""

    class Fits(Levels):
        def __init__(self, name):
            super().__init__(name)
            self.norm = nn.BatchNorm2d(3)
            seen = NAMED[name].normalise(flat()[0])
            self.norm.running_var, self.norm.running_mean = torch.var_mean(seen, (0, 2, 3))

        def forward(self, x):
            self.norm(x)
            return super().forward(x)

    @pytest.mark.parametrize("said", [None, "half", "imagenet"])
    def test_labels_tell(self, said, monkeypatch):
        monkeypatch.setattr(normalisation, "limit", lambda *_: math.inf)
        images, labels = flat()
        network = self.Fits("half").eval()
        without = decide(network, images, NAMED.get(said))
        assert len(without[0]) > 1 and without[2] == LAYER
        kept, _, by = decide(network, images, NAMED.get(said), labels)
        assert kept[0] == NAMED["half"] and len(kept) < len(without[0]) and by == LABELS
        assert kept[1:] == ([NAMED["imagenet"]] if said == "imagenet" else [])

    def test_labels_that_say_nothing_leave_them(self, monkeypatch):
        monkeypatch.setattr(normalisation, "limit", lambda *_: math.inf)
        images, labels = flat()
        network, nonsense = self.Fits("half").eval(), labels[torch.randperm(len(labels))]
        assert decide(network, images, None, nonsense) == decide(network, images, None)


class TestWithoutANormalisationLayer:
    @pytest.mark.parametrize("name", ["none", "half", "clip", "raw255"])
    def test_labels_decide(self, name):
        images, labels = flat()
        kept, margin, by = decide(Levels(name).eval(), images, None, labels)
        assert kept == [NAMED[name]] and math.isnan(margin) and by == LABELS

    @pytest.mark.parametrize("name", ["none", "half", "gtsrb", "raw255"])
    def test_without_labels_answers_are_spread_over_the_most_classes(self, name):
        images, _ = flat()
        kept, margin, by = decide(Levels(name).eval(), images, None)
        assert NAMED[name] in kept and len(kept) <= MOST and math.isnan(margin) and by == ANSWERS

    def test_a_claim_is_taken_unless_labels_speak_against_it(self):
        images, labels = flat()
        network = Levels("half").eval()
        for said in (NAMED["clip"], NAMED["half"]):
            assert decide(network, images, said)[0] == [said]
        assert decide(network, images, NAMED["half"], labels) == (
            [NAMED["half"]],
            pytest.approx(math.nan, nan_ok=True),
            LABELS,
        )
        assert decide(network, images, NAMED["clip"], labels)[0] == [NAMED["half"], NAMED["clip"]]
        own = Preprocess("", (0.51, 0.5, 0.5), (0.5, 0.5, 0.5))  # near enough to the best
        assert decide(network, images, own, labels)[0] == [own]

    def test_labels_that_say_nothing_are_passed_over(self):
        images, labels = flat()
        shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
        network = Levels("half").eval()
        assert decide(network, images, NAMED["clip"], shuffled)[0] == [NAMED["clip"]]
        kept, _, by = decide(network, images, None, shuffled)
        assert NAMED["half"] in kept and by == ANSWERS

    def test_labels_that_few_images_do_not_confirm_are_tried_on_more(self):
        """Two classes, a fifth of the images in one: 128 often do not show that the network is better than chance."""
        images, _ = flat(2000)
        labels = (images[:, 0, 0, 0].float() / 255 > 0.8).long()
        wrong = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < 0.1
        labels = torch.where(wrong, 1 - labels, labels)

        class Bright(nn.Module):
            def forward(self, x):
                red = x[:, 0].mean((1, 2))
                return torch.stack([0 * red, 40 * (red - 0.6)], 1)  # 0.8 of the range of `half`

        large = images[:, :, :1, :1].expand(-1, -1, 65, 65)
        for some in (images, large[:200]):
            kept, _, by = decide(Bright().eval(), some, NAMED["clip"], labels[: len(some)])
            assert (kept[0], kept[-1], by) == (NAMED["half"], NAMED["clip"], LABELS)

    def test_a_claim_that_few_images_do_not_contradict_is_held_against_more(self, monkeypatch):
        """Right on 90 % under `half` and on 80 % under the claim: 128 images seldom tell, 2,000 do."""
        images, labels = flat(2000)
        chance = torch.rand(len(labels), generator=torch.Generator().manual_seed(2))
        wrong = (labels + 5) % 10

        class Two(nn.Module):
            """Answers by the picture's number; another tenth of the answers is wrong where black is not -1."""

            def forward(self, x):
                numbers = (images.float() / 255 - 0.5).mul(2)
                half = len(x) and bool((x[0] - numbers[self.at]).abs().max() < 1e-4)
                part = slice(self.at, self.at + len(x))
                self.at = (self.at + len(x)) % self.count
                said = torch.where(chance[part] < (0.9 if half else 0.8), labels[part], wrong[part])
                return 9.0 * nn.functional.one_hot(said, 10)

        network = Two().eval()
        found, real = [], statistics.answers

        def counted(network, some, preprocess):
            network.at, network.count = 0, len(some)
            found.append(len(some))
            return real(network, some, preprocess)

        monkeypatch.setattr("bdclean.networks.ambiguity.normalisation.answers", counted)
        kept, _, by = decide(network, images, NAMED["imagenet"], labels)
        assert (kept[0], kept[-1], by) == (NAMED["half"], NAMED["imagenet"], LABELS)
        assert set(found) == {128, 2000}

    @pytest.mark.parametrize("classes", [2, 3, 12, 43, 100])
    def test_a_network_with_one_answer_is_not_called_broken(self, classes):
        class One(nn.Module):
            def forward(self, x):
                return torch.linspace(0, 1, classes).repeat(len(x), 1)

        assert decide(One().eval(), flat()[0], None)[0]

    def test_a_network_whose_answers_are_no_numbers_is_refused(self):
        network = Levels("half").eval()
        network.centres = torch.full((10,), math.nan)
        with pytest.raises(Refused, match="not finite"):
            decide(network, flat()[0], None)

    def test_mcnemars_test_is_the_binomial_tail(self):
        for gained in range(0, 25, 3):
            for lost in range(0, 12, 2):
                one = torch.tensor([True] * gained + [False] * lost + [True] * 5)
                two = torch.tensor([False] * gained + [True] * lost + [True] * 5)
                wanted = gained > lost and binomtest(lost, gained + lost, alternative="less").pvalue < 0.001
                assert clearly_more(one, two) == wanted


@pytest.fixture
def model(tmp_path):
    network = trained(NAMED["half"], pictures(1000, 0))
    save_file(network.state_dict(), tmp_path / "m.safetensors", {"bdclean.preprocess": "half"})
    return tmp_path / "m.safetensors"


def test_choose_says_who_decided(model, tmp_path):
    images = pictures(300, 1)
    checkpoint = Checkpoint.read(model)
    assert [(c.preprocess.name, c.source) for c in choose(checkpoint, images)] == [("half", "metadata")]
    given = choose(checkpoint, images, "clip,size=48/48")
    assert [(c.preprocess.name, c.preprocess.size, c.source) for c in given] == [("clip", (48, 48), "given")]
    network = checkpoint.build()
    save_file(network.state_dict(), model)
    (tmp_path / "config.json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    found = choose(Checkpoint.read(model), images)
    assert [(c.preprocess.name, c.source) for c in found] == [
        ("half", "first normalisation layer"),
        ("imagenet", "config.json"),
    ]
    assert all(isinstance(c.preprocess, Preprocess) for c in found)


def test_the_order_of_a_folder_does_not_matter(model):
    images = pictures(300, 1)
    dark_first = images[images.float().mean((1, 2, 3)).argsort()]
    kinds = [[c.preprocess.name for c in choose(Checkpoint.read(model), x)] for x in (images, dark_first)]
    assert kinds[0] == kinds[1] == ["half"]


@pytest.mark.parametrize("depth", [20, 56])
def test_third_party_networks_on_their_own_kind_of_images(cifar10: Path, depth):
    """Both were trained with ImageNet's statistics on CIFAR-10: no claim says so, the first layer does."""
    path = Path(os.environ.get("BDCLEAN_CHECKPOINTS", ".")) / f"akamaster-resnet{depth}.safetensors"
    if not path.is_file():
        pytest.skip("BDCLEAN_CHECKPOINTS names no folder with third-party checkpoints")
    from bdclean.data.loading import load_images

    images = load_images(cifar10, (32, 32), limit=512).images
    (choice,) = choose(Checkpoint.read(path), images)
    assert choice.preprocess.name == "imagenet" and choice.margin > 1.5


def test_an_absurd_claim_does_not_make_a_sound_network_broken(tmp_path, model):
    said = {"bdclean.preprocess": "mean=0.5/0.5/0.5,std=1e-22/1e-22/1e-22"}
    save_file(dict(Checkpoint.read(model).build().state_dict()), tmp_path / "m.safetensors", said)
    found = choose(Checkpoint.read(tmp_path / "m.safetensors"), pictures(128, 1))
    assert [c.preprocess.name for c in found] == ["half"]
