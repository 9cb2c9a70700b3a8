"""What scan and cleanse put into a record for the page: pictures, confusions, paired changes."""

import base64
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from bdclean.measuring import assessment, pictures, trial, verdict
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.trial import Trial
from bdclean.record.run import Rate, TriggerRow
from bdclean.report.page.embedded import png
from bdclean.triggers.badnets import BadNets
from bdclean.triggers.blend import Blend

CPU = torch.device("cpu")


class Corner(nn.Module):
    """Answers the class that the grey of the top left pixel says, or class 0 where the last pixel is white."""

    def __init__(self, fooled=True):
        super().__init__()
        self.fooled = fooled

    def forward(self, images):
        classes = (images[:, 0, 0, 0].long() // 50).clamp(max=4)
        if self.fooled:
            classes[images[:, 0, -1, -1] == 255] = 0
        return nn.functional.one_hot(classes, 5).float()


def bench(n=300, side=16, fooled=True, labeled=True):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 200, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 5
    images[:, :, 0, 0] = (labels * 50 + 5).byte()[:, None]
    predict = Predictor(Corner(fooled), CPU)
    clean = predict(images)
    return Trial(predict, images, labels, clean, 5, labeled, not labeled, 0.2, 0)


PATCH = BadNets(size=2, position="bottom-right", pattern="white")
NOISE = Blend(source="noise", alpha=0.2)


def rows(found):
    return [measured.row for measured in assessed(found)]


def assessed(found, **how):
    return assessment.in_order(assessment.assess(found, [PATCH, NOISE], **how), [PATCH, NOISE])


def decoded(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture.png_base64, validate=True)))


def test_strips_show_the_same_images_as_given_and_stamped_with_both_predictions():
    suspect = bench()
    cleansed = replace(suspect, predict=Predictor(Corner(False), CPU))
    found = pictures.strips(rows(suspect), [PATCH, NOISE], suspect, cleansed)
    given = {p.image: p for p in found if p.role == "given"}
    stamped = [p for p in found if p.role == "stamped" and p.trigger == PATCH.spec()]
    assert len(stamped) == pictures.SHOWN and len({p.image for p in stamped}) == pictures.SHOWN
    assert {p.label for p in stamped} == {1, 2, 3, 4}, "one of each other class while there are enough"
    for picture in stamped:
        original = torch.tensor(list(decoded(given[picture.image]).tobytes())).view(16, 16, 3)
        shown = torch.tensor(list(decoded(picture).tobytes())).view(16, 16, 3)
        assert torch.equal(original.permute(2, 0, 1), suspect.images[picture.image].long())
        assert bool((shown[-2:, -2:] == 255).all()) and torch.equal(shown[:-2], original[:-2])
        assert picture.label == picture.after == given[picture.image].before and picture.before == 0
    (difference,) = [p for p in found if p.role == "difference" and p.trigger == PATCH.spec()]
    assert difference.caption == "what it changed, on grey" and decoded(difference).size == (16, 16)
    assert all(png(p.png_base64) for p in found), "the page would leave it out"


def test_a_small_patch_is_enlarged_as_given_and_stamped():
    suspect, patch = bench(side=32), BadNets(size=3, position="corners", pattern="white")
    row = TriggerRow(patch.spec(), "patch", target=0, asr=Rate(1.0, 240), outcome="fails")
    found = pictures.strips([row], [patch], suspect)
    (enlarged,) = [p for p in found if p.role == "enlarged"]
    assert enlarged.caption == "enlarged, as given and stamped: rows 24 to 31, columns 24 to 31"
    shown = torch.tensor(list(decoded(enlarged).tobytes())).view(8, 17, 3).permute(2, 0, 1)
    original = suspect.images[enlarged.image].long()
    assert torch.equal(shown[:, :, :8], original[:, 24:, 24:])
    assert bool((shown[:, 5:, 14:] == 255).all()) and torch.equal(shown[:, :5, 9:], original[:, 24:29, 24:])
    assert not [p for p in pictures.strips([row], [patch], bench(side=12)) if p.role == "enlarged"], "is seen"
    row = TriggerRow(NOISE.spec(), "blend", target=0, asr=Rate(1.0, 240), outcome="fails")
    assert not [p for p in pictures.strips([row], [NOISE], suspect) if p.role == "enlarged"], "is everywhere"


def test_what_was_changed_is_never_a_black_square():
    """Of an image on which nothing changed there is no picture; the others are drawn around grey."""
    black = BadNets(size=4, position="bottom-right", pattern="black")
    suspect = bench(side=32)
    dark = suspect.images.clone()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    dark[order[:250], :, -4:, -4:] = 0
    row = TriggerRow(black.spec(), "patch", target=0, asr=Rate(1.0, 240), outcome="fails")
    (difference,) = [p for p in pictures.strips([row], [black], suspect) if p.role == "difference"]
    pixels = decoded(difference)
    assert pixels.getpixel((0, 0)) == (128, 128, 128) and max(pixels.getpixel((30, 30))) < 128
    none = pictures.strips([row], [black], replace(suspect, images=dark))
    assert [p for p in none if p.role == "stamped"] and not [p for p in none if p.role == "difference"]


def test_the_draw_is_seeded_and_does_not_look_at_what_the_trigger_does():
    suspect = bench()
    first = pictures.strips(rows(suspect), [PATCH, NOISE], suspect)
    assert first == pictures.strips(rows(suspect), [PATCH, NOISE], suspect)
    innocent = bench(fooled=False)
    failing = [r for r in rows(suspect) if r.trigger == PATCH.spec()]
    second = pictures.strips(failing, [PATCH], innocent)
    images = [[p.image for p in found if p.trigger == PATCH.spec()] for found in (first, second)]
    assert images[0] == images[1]
    other = replace(suspect, seed=1)
    assert images[0] != [p.image for p in pictures.strips(failing, [PATCH], other) if p.trigger]


def test_a_trigger_that_moves_one_class_is_shown_on_that_class():
    row = TriggerRow(PATCH.spec(), "patch", target=0, asr=Rate(0.2, 240), decisive_source=3, outcome="fails")
    found = pictures.strips([row], [PATCH], bench())
    assert {p.label for p in found if p.role == "stamped"} == {3}
    assert any("class 3" in p.caption for p in found)


@pytest.mark.parametrize("side", [32, 224])
def test_pictures_stay_small_whatever_the_images_hold(side):
    suspect = bench(24, side)
    found = pictures.strips([r for r in rows(suspect) if r.target is not None], [PATCH, NOISE], suspect)
    assert found and 0 < sum(len(p.png_base64) for p in found) <= pictures.BUDGET
    for picture in found:
        assert max(decoded(picture).size) <= pictures.SIDES[0]


def test_masks_are_small_pngs_in_the_order_given():
    given = {f"class {k}": torch.full((3, 300, 200), k / 10) for k in range(9)}
    found = pictures.masks(given)
    assert [p.caption for p in found] == [f"class {k}" for k in range(pictures.SHOWN)]
    assert {p.role for p in found} == {"mask"} and decoded(found[3]).getpixel((0, 0)) == (76, 76, 76)
    assert decoded(found[0]).size == (85, 128) and pictures.masks({}) == []


def test_confusions_count_the_measuring_half_as_a_loop_does():
    suspect = bench()
    cleansed = replace(suspect, predict=Predictor(Corner(False), CPU))
    found = pictures.confusions(rows(suspect), [PATCH, NOISE], suspect, cleansed)
    assert [(c.model, c.trigger) for c in found] == [
        ("suspect", None),
        ("cleansed", None),
        ("suspect", PATCH.spec()),
        ("cleansed", PATCH.spec()),
    ]
    counted = [[0] * 5 for _ in range(5)]
    for index in trial.halves(300, 0)[1].tolist():
        stamped = suspect.predict(PATCH(suspect.images[index : index + 1]))
        counted[int(suspect.reference[index])][int(stamped)] += 1
    assert found[2].counts == counted and all(row[0] == sum(row) for row in counted)
    assert sum(map(sum, found[3].counts)) == 150


def test_many_classes_have_no_confusion_and_own_predictions_no_diagonal():
    many = replace(bench(), classes=pictures.MOST_CLASSES + 1)
    assert pictures.confusions([], [], many) is None
    assert pictures.confusions([], [], bench(labeled=False)) == []


def test_changes_are_paired_on_the_same_images():
    suspect = bench()
    cleansed = replace(suspect, predict=Predictor(Corner(False), CPU))
    before, after = assessed(suspect), assessed(cleansed, fixed={PATCH.spec(): 0})
    (found,) = [row for row in verdict.pair(before, after) if row.trigger == PATCH.spec()]
    (old,) = [measured.row for measured in before if measured.row.trigger == PATCH.spec()]
    assert found.change is not None and found.change.n == old.asr.n == found.asr.n
    assert found.change.value == pytest.approx(found.asr.value - old.asr.value)
    assert found.change.low < found.change.value + 1e-9 and found.change.high < -0.9
    fewer = [replace(m, hits=None if m.hits is None else m.hits[1:]) for m in after]
    assert all(row.change is None for row in verdict.pair(before, fewer)), "other images cannot be paired"
