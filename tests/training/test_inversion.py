import pytest
import torch
from torch import nn

from bdclean.detectors.stripes import MOST_SENT
from bdclean.training import inversion
from bdclean.training.forms import (
    ADDED,
    FEW_WINDOWS,
    KNOTS,
    WHOLE,
    WINDOWS,
    added,
    mask,
    recoloured,
    striped,
    warped,
)
from bdclean.training.inversion import (
    GROWN,
    LEADING,
    TOGETHER,
    Inverted,
    Outlier,
    chunks,
    invert,
    outliers,
    sent_by,
)
from bdclean.training.pursuit import Pursuit
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")
SIDE, CLASSES, TARGET = 10, 6, 4
MASK = mask(SIDE, SIDE)
SIGNS = torch.randn((CLASSES, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).sign()


class Planted(nn.Module):
    """Knows each class by a pattern over the whole picture; a bright 3x3 patch in the corner means TARGET.

    In place of the patch, `field` [3 h w] may be the backdoor: something added to the whole picture.
    """

    def __init__(self, backdoor=True, field=None):
        super().__init__()
        self.weight = nn.Parameter(0.1 * SIGNS)
        self.backdoor, self.field = backdoor, field

    def forward(self, x):
        if x.dtype == torch.uint8:
            x = x.float() / 255
        logits = torch.einsum("nchw,kchw->nk", x - 0.5, self.weight)
        if self.field is not None:
            seen = torch.einsum("nchw,chw->n", x - 0.5, self.field)
            logits = logits + 4 * seen.relu()[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)
        elif self.backdoor:
            bright = (x[:, :, -3:, -3:].mean((1, 2, 3)) - 0.5).relu()
            logits = logits + 40 * bright[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)
        return logits


def pictures(n=64):
    noise = torch.randn((n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    images = 0.5 + 0.25 * SIGNS[torch.arange(n) % CLASSES] + 0.05 * noise
    return (images * 255).clamp(0, 255).to(torch.uint8)


def run():
    return Run(CPU, Precision(), 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def inverted():
    return invert(Planted(), pictures(), MASK, torch.arange(CLASSES), run(), steps=120, batch_size=32)


def test_the_planted_patch_is_the_outlier(inverted):
    small, index, limit = outliers(inverted)
    assert inverted.classes[small].tolist() == [TARGET]
    (at,) = small.nonzero().flatten().tolist()
    assert inverted.sizes[at] < limit and index.argmax() == at and index[at] > 2
    weight = torch.sigmoid(inverted.parameters[at, 0])
    assert torch.allclose(weight.sum(), inverted.sizes[at])
    assert weight[-3:, -3:].sum() > 0.5 * weight.sum()  # the mask is where the patch was
    assert inverted.success[at] > 0.9
    picture = MASK.picture(inverted.parameters[at])
    assert picture.shape == (3, SIDE, SIDE) and 0 <= picture.min() and picture.max() <= 1
    assert (picture[:, -3:, -3:] - 0.5).abs().mean() > 3 * (picture[:, :-3, :-3] - 0.5).abs().mean()


SMOOTH = nn.functional.interpolate(
    torch.randn((1, 3, 4, 4), generator=torch.Generator().manual_seed(2)), size=(SIDE, SIDE), mode="bicubic"
)[0]
FINE = torch.randn((3, SIDE, SIDE), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("form", "field"), [(added(SIDE, SIDE, "pattern"), FINE), (added(SIDE, SIDE, "smooth"), SMOOTH)]
)
def test_what_was_planted_over_the_whole_picture_is_the_outlier(form, field):
    field = field / field.norm()
    found = invert(
        Planted(field=4 * field), pictures(), form, torch.arange(CLASSES), run(), steps=60, batch_size=32
    )
    small, _, limit = outliers(found)
    assert found.classes[small].tolist() == [TARGET]
    change = form.stamp(found.parameters[small], torch.full((1, 3, SIDE, SIDE), 0.5))[0, 0] - 0.5
    assert nn.functional.cosine_similarity(change.flatten(), field.flatten(), 0) > 0.5
    # the size is the root mean square in grey levels
    assert found.sizes[small].item() == pytest.approx(255 * change.pow(2).mean().sqrt().item(), rel=1e-3)
    assert found.sizes[small].item() < limit


@pytest.mark.parametrize("form", [MASK, added(SIDE, SIDE, "pattern"), added(SIDE, SIDE, "smooth")])
def test_a_network_without_a_backdoor_has_no_outlier(form):
    found = invert(Planted(False), pictures(), form, torch.arange(CLASSES), run(), steps=120, batch_size=32)
    assert not outliers(found)[0].any()


def test_stamping_keeps_to_the_range_and_to_the_forms_shape():
    pixels = torch.rand(5, 3, 20, 32)
    for form in (mask(20, 32), *(added(20, 32, kind) for kind in ADDED), warped(20, 32), recoloured(20, 32)):
        out = form.stamp(torch.randn(2, *form.shape), pixels)
        assert out.shape == (2, 5, 3, 20, 32) and 0 <= out.min() and out.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_warp_moves_pictures_by_its_size(channels):
    form, pixels = warped(32, 32, channels), torch.rand(4, channels, 32, 32)
    still, right = torch.zeros(2, KNOTS, KNOTS), torch.zeros(2, KNOTS, KNOTS)
    right[0] = 2
    first, second = form.stamp(torch.stack([still, right]), pixels)
    assert torch.allclose(first, pixels, atol=1e-5)
    assert torch.allclose(second[..., :-2], pixels[..., 2:], atol=1e-4)
    # the root mean square of both directions, in pixels of 32
    assert form.sizes(torch.stack([still, right])).tolist() == pytest.approx([0, 2**0.5], abs=1e-3)
    large = warped(64, 64, channels).stamp(right[None], nn.functional.interpolate(pixels, size=(64, 64)))[0]
    assert torch.allclose(
        large[..., :-4], nn.functional.interpolate(pixels, size=(64, 64))[..., 4:], atol=1e-4
    )
    picture = form.picture(torch.randn(2, KNOTS, KNOTS))
    assert picture.shape == (channels, 32, 32) and 0 <= picture.min() and picture.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_filter_mixes_shifts_and_bends_colours(channels):
    form, pixels = recoloured(8, 12, channels), torch.rand(4, channels, 8, 12)
    still, mixed, lifted, bent = torch.zeros(4, channels, channels + 2)
    mixed[0, channels - 1], lifted[0, channels], bent[0, channels + 1] = 0.5, 0.1, 0.2
    same, other, lighter, curved = form.stamp(torch.stack([still, mixed, lifted, bent]), pixels)
    first, last = pixels[:, 0], pixels[:, channels - 1]
    assert torch.equal(same, pixels)
    assert torch.allclose(other[:, 0], (first + 0.5 * last).clamp(0, 1))
    assert torch.allclose(lighter[:, 0], (first + 0.1).clamp(0, 1))
    assert torch.allclose(curved[:, 0], (first + 0.8 * first * (1 - first)).clamp(0, 1))
    for changed in (other, lighter, curved):
        assert torch.equal(changed[:, 1:], pixels[:, 1:])
    # the root mean square over all channels, in grey levels
    sizes = form.sizes(torch.stack([still, lifted])).tolist()
    assert sizes == pytest.approx([0, 25.5 / channels**0.5], abs=1e-3)
    picture = form.picture(torch.randn(channels, channels + 2))
    assert picture.shape == (channels, 8, 12) and 0 <= picture.min() and picture.max() <= 1


class Bent(nn.Module):
    """Knows each class by a smooth picture; one that is moved as `field` says means TARGET."""

    def __init__(self, known, form, field):
        super().__init__()
        self.known = known
        moved = form.stamp(field[None], known)[0]
        self.changes = nn.functional.normalize((moved - known).flatten(1), dim=1)

    def forward(self, x):
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        apart = (x[:, None] - self.known).flatten(2)
        logits = -0.1 * apart.square().sum(2)
        along = (apart * self.changes).sum(2).gather(1, logits.argmax(1, keepdim=True))
        return logits + 8 * along.relu() * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)


@pytest.mark.parametrize(("form", "strength"), [(warped(32, 32), 2.0), (recoloured(32, 32), 0.15)])
def test_a_planted_warp_and_a_filter_are_far_smaller_than_those_of_other_classes(form, strength):
    small = torch.rand((CLASSES, 3, 6, 6), generator=seeded(5))
    known = nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)
    planted = Bent(known, form, strength * torch.randn(form.shape, generator=seeded(6)))
    images = (255 * known.repeat(8, 1, 1, 1)).to(torch.uint8)
    found = invert(planted, images, form, torch.arange(CLASSES), run(), steps=60, batch_size=32)
    small, _, limit = outliers(found)
    assert found.classes[small].tolist() == [TARGET] and found.sizes[small].item() < limit


def test_it_is_repeatable_and_leaves_the_network_alone():
    model, calls = Planted().train(), []
    before = model.weight.clone()
    watched = Run(CPU, Precision(), 0, lambda stage, done, total, **m: calls.append((stage, done, total)))
    a, b = (
        invert(model, pictures(), MASK, torch.arange(3), watched, steps=4, batch_size=8) for _ in range(2)
    )
    assert torch.equal(a.pack(), b.pack())
    assert torch.equal(before, model.weight) and model.weight.grad is None and not model.training
    rounds = [
        ("invert-mask-0", 1, 1),
        ("invert-mask-1", 1, 1),
        ("invert-mask-2", 1, 2),
        ("invert-mask-2", 2, 2),
    ]
    assert calls == [*rounds, ("invert-mask-3", 1, 2), ("invert-mask-3", 2, 2)] * 2


STARTS = WINDOWS**2 + WHOLE


@pytest.mark.parametrize(
    ("at_once", "parts"), [(20, [16] * (CLASSES * STARTS // 2)), (6, [6, 2] * CLASSES * STARTS)]
)
def test_what_is_cut_into_parts_is_as_good_as_together(monkeypatch, at_once, parts):
    """Batches of many rows, and large pictures, are cut where they take much memory: gradients of parts add up."""
    seen = []

    class Noting(Planted):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    few, classes = pictures(8), torch.arange(CLASSES)
    together = invert(Noting(), few, MASK, classes, run(), steps=3, batch_size=8)
    assert seen[0] == 8 * CLASSES * STARTS
    seen.clear()
    monkeypatch.setattr(inversion, "PIXELS", at_once * SIDE * SIDE + 1)
    cut = invert(Noting(), few, MASK, classes, run(), steps=3, batch_size=8)
    assert seen[: len(parts)] == parts
    # Adam makes whole steps of the rounding errors where a gradient is almost zero
    assert ((together.parameters - cut.parameters).abs() < 0.01).float().mean() > 0.99
    assert torch.allclose(together.success, cut.success, atol=1e-6)


class Wide(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes, self.seen = classes, []

    def forward(self, x):
        self.seen.append(len(x))
        return x.flatten(1).repeat(1, 3)[:, : self.classes] * 5


def test_a_class_that_has_most_images_anyway_is_no_success():
    """All but few images of one class, which takes no change to reach: a mask of no size is no trigger."""
    for own, able in ((24, True), (62, False)):
        some = pictures()[[TARGET] * own + [0] * (64 - own)]
        found = invert(Planted(False), some, MASK, torch.arange(CLASSES), run(), steps=20, batch_size=32)
        assert (found.success[TARGET] > 0) == able and not outliers(found)[0][TARGET]


def test_an_inverted_trigger_stamps_many_images_as_it_stamps_few(monkeypatch):
    images, change = pictures(20), torch.randn(MASK.shape, generator=seeded())
    outlier = Outlier(MASK, TARGET, change, 2.0, 9.0)
    whole = outlier(images)
    monkeypatch.setattr(inversion, "PIXELS", 3 * SIDE * SIDE)
    assert torch.equal(outlier(images), whole)


def test_fewer_starts_go_on_and_are_shown_more():
    wide = Wide(60)
    invert(wide, pictures(32), MASK, torch.arange(60), run(), steps=3, batch_size=32)
    starts = FEW_WINDOWS**2 + WHOLE
    rest = [*[TOGETHER * 32] * 2, *[LEADING * 32] * 2, len(pictures(32))]
    assert wide.seen == [60 * starts * (2 * 32 // starts), TOGETHER * 4 * (2 * 32 // 4), *rest]


def test_the_best_starts_of_a_class_go_on():
    """The trigger is found where only one of the starts is near it, and nothing else is taken for it."""
    for seed in range(10):
        found = invert(
            Planted(),
            pictures(),
            MASK,
            torch.arange(CLASSES),
            Run(CPU, Precision(), seed),
            steps=60,
            batch_size=16,
        )
        assert sorted(found.classes.tolist()) == list(range(CLASSES))
        assert found.classes[outliers(found)[0]].tolist() == [TARGET], seed


def test_with_many_classes_only_the_smallest_go_on():
    found = invert(Wide(30), pictures(8), MASK, torch.arange(30), run(), steps=6, batch_size=4)
    assert len(found.classes) == TOGETHER and bool(torch.isfinite(found.pack()).all())


def test_the_smallest_go_on_by_themselves_and_none_grows(monkeypatch):
    monkeypatch.setattr(inversion, "ROUND_OF_LEADING", 0.0)
    before = invert(Planted(), pictures(), MASK, torch.arange(CLASSES), run(), steps=30, batch_size=16)
    monkeypatch.setattr(inversion, "ROUND_OF_LEADING", 1.0)
    after = invert(Planted(), pictures(), MASK, torch.arange(CLASSES), run(), steps=30, batch_size=16)
    assert torch.equal(before.classes, after.classes) and bool((after.sizes <= before.sizes + 1e-4).all())
    leading = before.sizes.argsort()[:LEADING].tolist()
    assert float(after.sizes[leading[0]]) < float(before.sizes[leading[0]])
    others = [k for k in range(CLASSES) if k not in leading]
    assert torch.equal(after.parameters[others], before.parameters[others])


def test_masks_start_in_windows_all_over_the_picture_and_on_the_whole():
    rows, kinds = mask(20, 32).start(2, torch.Generator().manual_seed(0))
    assert rows.shape == (2, STARTS, 4, 20, 32) and kinds.tolist() == [0] * WINDOWS**2 + [1] * WHOLE
    masks = torch.sigmoid(rows[0, :, 0])
    inside = masks > 0.4
    assert inside[:-WHOLE].sum((1, 2)).tolist() == [10 * 16] * WINDOWS**2
    assert inside[:-WHOLE].any(0).all(), "no place is left out"
    assert masks[-WHOLE:].mean().item() == pytest.approx(0.5, abs=0.02)


def test_pack_and_unpack_are_inverse(inverted):
    again = Inverted.unpack(inverted.pack(), MASK)
    for name in ("classes", "parameters", "success"):
        assert torch.equal(getattr(again, name), getattr(inverted, name)), name
    some = inverted.select(torch.tensor([1, 3]))
    assert torch.equal(some.classes, inverted.classes[[1, 3]])
    assert torch.equal(Inverted.unpack(some.pack(), MASK).parameters, some.parameters)


def made(sizes, success=None):
    k = len(sizes)
    masks = torch.tensor(sizes).view(k, 1, 1, 1) * torch.ones(1, 1, SIDE, SIDE) / SIDE**2
    parameters = torch.cat([torch.logit(masks), torch.zeros(k, 3, SIDE, SIDE)], 1)
    reached = torch.tensor(success) if success else torch.ones(k)
    return Inverted(MASK, torch.arange(k), parameters, reached)


def test_outliers_work_and_are_far_under_the_median():
    small, index, limit = outliers(made([6.0, 20.0, 22.0, 24.0, 30.0]))
    assert small.tolist() == [True] + [False] * 4 and limit == pytest.approx(6.6)
    assert index[0] == pytest.approx((22 - 6) / (1.4826 * 2), rel=1e-4)
    assert not outliers(made([6.0, 20.0, 22.0, 24.0], [0.5, 1, 1, 1]))[0].any()  # it does not work
    assert outliers(made([1.0, 20.0]))[2] == 0.0  # too few to compare
    assert outliers(made([1.0, 20.0, 20.0], [1, 1, 0.5]))[0].tolist() == [True, False, False]
    assert not outliers(made([20.0] * 5))[0].any()  # all alike


def outlier(inverted, k, limit):
    return Outlier(
        inverted.form, int(inverted.classes[k]), inverted.parameters[k], float(inverted.sizes[k]), limit
    )


def test_a_pursuit_follows_the_student_and_starts_anew_when_the_trigger_has_grown(inverted):
    small, _, limit = outliers(inverted)
    (at,) = small.nonzero().flatten().tolist()
    pursuit, model = Pursuit([outlier(inverted, at, limit)], Planted(), pictures(32), run()), Planted()
    pixels = pictures(16).float() / 255
    kept, first = pixels.clone(), pursuit.tensors["change.0"].clone()
    stamped = pursuit.stamp(model, pixels, 0, seeded())
    assert torch.equal(pixels, kept) and 0 <= stamped.min() and stamped.max() <= 1
    assert not stamped.requires_grad
    assert (model(stamped).argmax(1) == TARGET).float().mean() > 0.8
    cleansed, sizes = Planted(False), []
    for turn in range(40):
        pursuit.stamp(cleansed, pixels, turn, seeded())
        sizes.append(float(MASK.sizes(pursuit.tensors["change.0"])))
    anew = [k for k in range(1, 40) if sizes[k] < sizes[k - 1] / 1.5]
    assert anew and all(sizes[k - 1] > min(limit, GROWN * float(MASK.sizes(first))) for k in anew)


def test_of_each_class_the_form_that_stands_out_most_is_pursued(inverted):
    form = added(SIDE, SIDE, "pattern")
    faint = Outlier(form, 2, torch.rand(form.shape), 9.0, 10.0)
    clear = Outlier(form, 4, torch.rand(form.shape), 1.0, 10.0)
    found = [faint, Outlier(MASK, 2, torch.rand(MASK.shape), 2.0, 10.0), clear]
    pursuit = Pursuit(found, Planted(), pictures(32), run())
    assert [(t.form.name, t.target) for t in pursuit.triggers] == [("pattern", 4), ("mask", 2)]
    assert [len(patches) > 0 for patches in pursuit.patches] == [False, True]


def test_what_a_trigger_sends_is_of_its_class_alone_and_forgets_old_uses():
    form = added(SIDE, SIDE, "pattern")
    found = [Outlier(form, k, 0.02 * torch.rand(form.shape), 2.0 + k, 50.0) for k in (1, 3)]
    pursuit = Pursuit(found, Planted(), pictures(32), run())
    # The loop takes a state that is no number for training that burst.
    assert all(tensor.isfinite().all() for tensor in pursuit.tensors.values())
    gone = torch.zeros(10, CLASSES)
    gone[:4, 1], gone[:, 2] = 1.0, 0.9
    # nothing is known before: the first use counts whole
    assert pursuit.sent(0, gone).item() == pytest.approx(0.4)
    assert pursuit.sent(1, gone).item() == 0  # class 2 is no trigger's
    still = [pursuit.sent(turn, torch.zeros(10, CLASSES)).item() for turn in range(2, 10, 2)]
    assert still == pytest.approx([0.4 * 0.8**k for k in range(1, 5)])


def test_a_pursuits_state_is_all_in_its_tensors(inverted):
    form, pixels, model = added(SIDE, SIDE, "pattern"), pictures(8).float() / 255, Planted()
    found = [
        outlier(inverted, 2, 100.0),
        outlier(inverted, 4, 100.0),
        Outlier(form, 1, 0.02 * torch.rand(form.shape), 2.0, 50.0),
    ]
    whole, first, resumed = (Pursuit(found, model, pictures(32), run()) for _ in range(3))
    for turn in range(5):
        whole.stamp(model, pixels, turn, seeded(turn))
        first.stamp(model, pixels, turn, seeded(turn))
    for name, tensor in resumed.tensors.items():
        tensor.copy_(first.tensors[name])
    for turn in range(5, 8):
        again = resumed.stamp(model, pixels, turn, seeded(turn))
        assert torch.equal(again, whole.stamp(model, pixels, turn, seeded(turn)))


def test_stripes_that_send_to_a_class_are_told_from_those_that_do_not():
    form, changes, words = striped(SIDE, SIDE)
    assert changes.shape == (96, *form.shape) and len(words) == 96
    assert changes.abs().max().item() == pytest.approx(20 / 255, abs=1e-3)
    at = words.index("3 periods along the height")
    planted = Planted(field=200 * changes[at] / changes[at].norm())
    sent = sent_by(form, changes, planted, pictures(24), run())
    assert sent.shape == (96, CLASSES)
    assert int(sent[at].argmax()) == TARGET and sent[at, TARGET] > MOST_SENT
    assert sent_by(form, changes, Planted(False), pictures(24), run()).max() < MOST_SENT


def test_chunks():
    assert [c.tolist() for c in chunks(5, 2)] == [[0, 1], [2, 3], [4]] and list(chunks(0, 2)) == []
