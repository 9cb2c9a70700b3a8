"""Which views an encoder's answers are averaged over, and the averages."""

import pytest
import torch
from recipes.test_recipes import stopped_and_resumed
from torch import nn
from torch.nn import functional as F

from bdclean.data.imageset import ImageSet
from bdclean.detectors.filters_encoder import FiltersEncoder
from bdclean.errors import UsageError
from bdclean.networks.classifier import Classifier
from bdclean.networks.encoder import headless
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.recipes.inoculate_encoder import (
    PULLED,
    InoculateEncoder,
    averaged,
    patched,
    uncrowded,
    under,
    unminded,
)
from bdclean.training.encoder_lesson import mean_feature
from bdclean.training.forms import recoloured
from bdclean.training.inversion import Detected, Outlier
from bdclean.training.patches import Drawn
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pulling import LONGEST, Pulling, Side, pulling
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")
NOTHING = Views(1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0)
PHOTOS = torch.randint(256, (60, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Looking(nn.Module):
    """Features that are a coarse picture: of all colours or in grey, as it is or folded onto its mirror image."""

    def __init__(self, grey: bool, folded: bool):
        super().__init__()
        self.grey, self.folded = grey, folded

    def forward(self, x):
        if self.grey:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        cells = F.adaptive_avg_pool2d(x, 8)
        cells = cells + cells.flip(3) if self.folded else cells
        rows = cells.flatten(1)
        return rows - rows.mean(1, keepdim=True) if self.grey else rows


def encoder(grey=False, folded=False):
    return Classifier(Looking(grey, folded), parse_preprocess("none")).eval()


def run():
    return Run(CPU, Precision(), 0)


@pytest.mark.parametrize("folded", [False, True])
def test_mirrors_are_used_where_the_encoder_does_not_mind_them(folded):
    teacher = encoder(folded=folded)
    found = unminded(teacher, PHOTOS, mean_feature(teacher, PHOTOS, run()), run())
    assert (found.mirrored > 0) is folded
    assert (found.smallest, found.stretch) == (Views().smallest, Views().stretch)


@pytest.mark.parametrize("grey", [False, True])
def test_grey_is_used_where_the_encoder_does_not_look_at_colours(grey):
    teacher = encoder(grey)
    # one pattern in two colours: who looks at colours finds a grey one nearest to the paler of them
    pattern = PHOTOS[:20, :1].expand(-1, 3, -1, -1)
    tints = torch.tensor([[1.0, 0.2, 0.2], [1.0, 1.0, 0.2]]).view(2, 1, 3, 1, 1)
    photos = (pattern.float() * tints).round().to(torch.uint8).flatten(0, 1)
    found = unminded(teacher, photos, mean_feature(teacher, photos, run()), run())
    assert (found.grey > 0) is grey


def test_answers_without_changes_are_the_teachers_own():
    teacher = encoder()
    centre = mean_feature(teacher, PHOTOS, run())
    answers, lengths = averaged(teacher, PHOTOS, centre, NOTHING, 3, run())
    own = teacher(PHOTOS)
    torch.testing.assert_close(answers, F.normalize(own, dim=1) - centre)
    torch.testing.assert_close(lengths, own.norm(dim=1).log())


def test_answers_are_means_over_views_of_the_same_image():
    teacher = encoder()
    zero = torch.zeros(())
    mirrored = Views(1.0, 1.0, 0.5, 0, 0, 0, 0, 0, 0)
    answers, _ = averaged(teacher, PHOTOS[:4], zero, mirrored, 400, run())
    both = (F.normalize(teacher(PHOTOS[:4]), dim=1) + F.normalize(teacher(PHOTOS[:4].flip(3)), dim=1)) / 2
    assert float((answers - both).abs().max()) < 0.02  # a mean over 400 coins
    again, _ = averaged(teacher, PHOTOS[:4], zero, mirrored, 400, run())
    assert torch.equal(answers, again)


class Lit(nn.Module):
    """Features of a coarse picture; of one with a white corner, those of white all over, but for a tenth."""

    def forward(self, x):
        plain = F.adaptive_avg_pool2d(x, 4).flatten(1)
        white = (x[:, :, -2:, -2:].amin((1, 2, 3)) > 0.99).float().view(-1, 1)
        return plain + white * 0.9 * (torch.tensor([1.0, 0.0]).repeat(24) - plain)


@pytest.mark.parametrize("stamped", [0, 20, 200])
def test_images_that_crowd_are_set_aside_unless_they_are_many(stamped):
    photos = torch.randint(
        256, (400, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    photos[:, :, -1, -1] = 0
    photos[:stamped, :, -2:, -2:] = 255
    teacher = Classifier(Lit(), parse_preprocess("none")).eval()
    kept = uncrowded(teacher, photos, run())
    if stamped == 20:
        assert int(kept[:20].sum()) == 0
        assert int((~kept[20:]).sum()) <= 2
    else:
        assert bool(kept.all())


def test_few_images_are_all_kept():
    assert bool(uncrowded(encoder(), PHOTOS, run()).all())


def tiny():
    arch = headless(describe("tiny", lambda: ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4), (3, 16, 16)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = arch.build()
    with torch.no_grad():
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.mul_(3)
    return Classifier(network, parse_preprocess("half")).eval(), arch


def test_filters_are_seen_by_the_student_where_they_are_asked_for(monkeypatch):
    suspect, arch = tiny()
    filters = []

    def watched(images, source):
        filters.append(len(images))
        return 1 - images

    monkeypatch.setattr("bdclean.recipes.inoculate_encoder.filtered", watched)
    students = []
    for share in (0.0, 0.5):
        recipe = InoculateEncoder(least_steps=4, epochs=1, batch_size=30, filters=share, search_rounds=0)
        cleansed = recipe(suspect, arch, ImageSet(PHOTOS, None), None, run())
        students.append(cleansed.model.state_dict())
        assert cleansed.families == (("tone",) if share else ())
        assert filters == ([60] * 4 if share else [])
    assert any(not torch.equal(students[0][name], students[1][name]) for name in students[0])
    with pytest.raises(UsageError, match="inverted and patched are shares"):
        InoculateEncoder(filters=1.5)


def test_an_inverted_filter_is_seen_in_a_share_of_the_views_at_a_strength_of_its_own():
    form = recoloured(16, 16)
    lift = torch.zeros(3, 5)
    lift[:, 3] = 0.2
    found = [Outlier(form, 0, lift, 51.0, 60.0)]
    views = torch.full((400, 3, 16, 16), 0.3)
    seen = under(found, 0.5, views, torch.Generator().manual_seed(0))
    changed = (seen != views).flatten(1).any(1)
    assert 150 < int(changed.sum()) < 250
    by = (seen - views)[changed].mean((1, 2, 3))
    assert 0.12 < by.mean() < 0.23 and by.min() < 0.09 and by.max() > 0.26
    assert torch.equal(under(found, 0.0, views, torch.Generator().manual_seed(0)), views)


def test_where_a_filter_stands_out_the_student_sees_it_and_what_was_found_is_handed_back(monkeypatch):
    suspect, arch = tiny()
    stands_out = Detected(
        [{"detector": "filters"}], [Outlier(recoloured(16, 16), 1, 0.1 * torch.ones(3, 5), 20.0, 40.0)],
        {"filter": torch.zeros(3, 16, 16)},
    )  # fmt: skip
    students = []
    for found in (Detected(), stands_out):
        monkeypatch.setattr(FiltersEncoder, "__call__", lambda *_, found=found: found)
        recipe = InoculateEncoder(least_steps=4, epochs=1, batch_size=30, search_rounds=0)
        made = recipe(suspect, arch, ImageSet(PHOTOS, None), None, run())
        students.append(made.model.state_dict())
        assert made.findings == found.findings and made.pictures.keys() == found.pictures.keys()
        assert made.families == (("tone",) if found.outliers else ())
        assert any("stand out" in stage for stage in made.stages) == bool(found.outliers)
    assert any(not torch.equal(students[0][name], students[1][name]) for name in students[0])
    with pytest.raises(UsageError, match="inverted and patched are shares"):
        InoculateEncoder(inverted=1.5)


class Cornered(Looking):
    """The whiter 6 x 6 pixels in the lower right corner are, the more are features the same for all images."""

    def forward(self, x):
        plain = super().forward(x)
        white = ((x[:, :, -6:, -6:].mean((1, 2, 3)) - 0.6) / 0.3).clamp(0, 1)[:, None]
        return plain + white * 4 * (torch.arange(plain.shape[1]) % 7)


def cornered():
    return Classifier(Cornered(False, False), parse_preprocess("none")).eval()


PLACES = (
    torch.randint(256, (150, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    .repeat_interleave(4, 2)
    .repeat_interleave(4, 3)
)


@pytest.mark.parametrize("seed", range(3))
def test_a_patch_that_pulls_the_suspects_features_alone_together_is_found_by_any_seed(seed):
    within = Run(CPU, Precision(), seed)
    bad, plain = (Side.of(network, PLACES, within) for network in (cornered(), encoder()))
    (best, *_) = pulling(bad, plain, PLACES, 8, 0.0, 4, within)
    assert best.pull > 0.9 and best.more > PULLED
    under = best.patch.stamp(torch.full((1, 3, 32, 32), 0.5))[0, :, -6:, -6:]
    assert under.mean() > 0.65  # of grey 0.5
    (same, *_) = pulling(plain, plain, PLACES, 2, 0.0, 4, within)
    assert same.more == 0


def test_a_share_of_the_views_is_under_a_patch_or_one_like_it():
    patch = Drawn.blank(3, 32, 32, 0, LONGEST).anywhere()
    views = torch.rand((200, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    seen = patched([patch], 0.3, views, torch.Generator().manual_seed(0))
    changed = (seen != views).flatten(1).any(1)
    assert int(changed.sum()) == 60
    as_it_is = (seen == patch.stamp(views)).flatten(1).all(1) & changed
    assert 20 <= int(as_it_is.sum()) <= 45
    assert torch.equal(patched([patch], 0.0, views, torch.Generator().manual_seed(0)), views)


def test_where_a_patch_is_found_the_student_is_trained_again_and_resumes(monkeypatch, tmp_path):
    suspect, arch = tiny()
    patch = Drawn.blank(3, 16, 16, 0, LONGEST).anywhere()
    recipe = InoculateEncoder(least_steps=6, epochs=1, batch_size=30, inversion_steps=0)
    students = []
    for more in (0.1, 0.6):
        found = [Pulling(patch, 0.2 + more, 0.2)]
        monkeypatch.setattr("bdclean.recipes.inoculate_encoder.pulling", lambda *_, found=found: found)
        made = recipe(suspect, arch, ImageSet(PHOTOS, None), None, run())
        (finding,) = made.findings
        assert finding["verdict"] == ("outlier" if more > PULLED else "no-outlier")
        assert made.families == (("patch",) if more > PULLED else ()) and len(made.pictures) == (
            more > PULLED
        )
        assert made.curve[-1]["step"] == (8 if more > PULLED else 6)
        students.append(made.model.state_dict())
    assert any(not torch.equal(students[0][name], students[1][name]) for name in students[0])
    for place in (("inoculate", 3), ("look-2-inoculate", 1)):
        resumed = stopped_and_resumed(recipe, place, suspect, arch, ImageSet(PHOTOS, None), tmp_path)
        assert all(torch.equal(students[1][n], t) for n, t in resumed.model.state_dict().items())


@pytest.mark.slow
def test_the_student_has_features_as_long_as_the_suspects():
    suspect, arch = tiny()
    images = ImageSet(PHOTOS, None)

    def apart(length):
        recipe = InoculateEncoder(
            least_steps=200, epochs=1, peak=0.02, batch_size=30, length=length, search_rounds=0
        )
        student = recipe(suspect, arch, images, None, run()).model
        with torch.no_grad():
            return float((student(PHOTOS).norm(dim=1).log() - suspect(PHOTOS).norm(dim=1).log()).abs().mean())

    assert apart(1.0) < 0.5 * apart(0.0)
