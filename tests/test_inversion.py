import pytest
import torch
from torch import nn

from bdclean.inversion import Inverted, Pursuit, chunks, going_on, invert, outliers
from bdclean.training import Precision, Run

CPU = torch.device("cpu")
SIDE, CLASSES, TARGET = 10, 6, 4
SIGNS = torch.randn((CLASSES, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).sign()


class Planted(nn.Module):
    """Knows each class by a pattern over the whole picture; a bright 3x3 patch in the corner means TARGET."""

    def __init__(self, backdoor=True):
        super().__init__()
        self.weight = nn.Parameter(0.1 * SIGNS)
        self.backdoor = backdoor

    def forward(self, x):
        if x.dtype == torch.uint8:
            x = x.float() / 255
        logits = torch.einsum("nchw,kchw->nk", x - 0.5, self.weight)
        if self.backdoor:
            bright = (x[:, :, -3:, -3:].mean((1, 2, 3)) - 0.5).relu()
            logits = logits + 40 * bright[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)
        return logits


def pictures(n=64):
    noise = torch.randn((n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    images = 0.5 + 0.25 * SIGNS[torch.arange(n) % CLASSES] + 0.05 * noise
    return (images * 255).clamp(0, 255).to(torch.uint8)


def run():
    return Run(CPU, Precision(), 0)


@pytest.fixture(scope="module")
def inverted():
    return invert(Planted(), pictures(), torch.arange(CLASSES), run(), steps=120, batch_size=32)


def test_the_planted_patch_is_the_outlier(inverted):
    small, index, limit = outliers(inverted)
    assert inverted.classes[small].tolist() == [TARGET]
    (at,) = small.nonzero().flatten().tolist()
    assert inverted.pixels[at] < limit and index.argmax() == at and index[at] > 2
    mask = inverted.masks[at, 0]
    assert mask[-3:, -3:].sum() > 0.5 * mask.sum()  # the mask is where the patch was
    assert inverted.success[at] > 0.9
    for tensor in (inverted.masks, inverted.patterns):
        assert 0 <= tensor.min() and tensor.max() <= 1


def test_a_network_without_a_backdoor_has_no_outlier():
    found = invert(Planted(False), pictures(), torch.arange(CLASSES), run(), steps=120, batch_size=32)
    assert not outliers(found)[0].any()


def test_it_is_repeatable_and_leaves_the_network_alone():
    model, calls = Planted().train(), []
    before = model.weight.clone()
    watched = Run(CPU, Precision(), 0, lambda stage, done, total, **m: calls.append((stage, done, total)))
    a, b = (invert(model, pictures(), torch.arange(3), watched, steps=4, batch_size=8) for _ in range(2))
    assert torch.equal(a.pack(), b.pack())
    assert torch.equal(before, model.weight) and model.weight.grad is None and not model.training
    assert calls[:4] == [("invert", k + 1, 4) for k in range(4)]


def test_classes_in_parts_are_as_good_as_together():
    """Batches of many classes are cut where they would take much memory: gradients must not mix or get lost."""
    few = pictures(16)
    together = invert(Planted(), few, torch.arange(CLASSES), run(), steps=3, batch_size=16)
    many = few.repeat(64, 1, 1, 1)  # 1,024 images a step: one class at a time
    alone = invert(Planted(), many, torch.arange(CLASSES), run(), steps=3, batch_size=1024)
    assert torch.allclose(together.masks, alone.masks, atol=1e-3)


def test_with_many_classes_only_the_smallest_masks_go_on():
    class Wide(nn.Module):
        def forward(self, x):
            return x.flatten(1).repeat(1, 3)[:, :30] * 5

    found = invert(Wide(), pictures(8), torch.arange(30), run(), steps=6, batch_size=4)
    assert len(found.classes) == 15 and bool(torch.isfinite(found.pack()).all())
    assert [going_on(k) for k in (2, 5, 8, 10, 43, 1000)] == [2, 5, 5, 5, 22, 24]


def test_pack_and_unpack_are_inverse(inverted):
    again = Inverted.unpack(inverted.pack(), SIDE, SIDE)
    for name in ("classes", "masks", "patterns", "success"):
        assert torch.equal(getattr(again, name), getattr(inverted, name)), name
    some = inverted.select(torch.tensor([1, 3]))
    assert torch.equal(some.classes, inverted.classes[[1, 3]])
    assert torch.equal(Inverted.unpack(some.pack(), SIDE, SIDE).masks, some.masks)


def made(sizes, success=None):
    k = len(sizes)
    masks = torch.tensor(sizes).view(k, 1, 1, 1) * torch.ones(1, 1, SIDE, SIDE) / SIDE**2
    reached = torch.tensor(success) if success else torch.ones(k)
    return Inverted(torch.arange(k), masks, torch.full((k, 3, SIDE, SIDE), 0.5), reached)


def test_outliers_are_under_half_the_median_of_those_that_work():
    small, index, limit = outliers(made([10.0, 20.0, 22.0, 24.0, 30.0]))
    assert small.tolist() == [True] + [False] * 4 and limit == pytest.approx(11.0)
    assert index[0] == pytest.approx((22 - 10) / (1.4826 * 2), rel=1e-4)
    assert not outliers(made([10.0, 20.0, 22.0, 24.0], [0.5, 1, 1, 1]))[0].any()  # it does not work
    assert outliers(made([1.0, 20.0, 20.0], [1, 1, 0.5]))[2] == 0.0  # too few to compare
    assert not outliers(made([20.0] * 5))[0].any()  # all alike


def test_a_pursuit_follows_the_student_and_retires_when_the_trigger_has_grown(inverted):
    small, _, limit = outliers(inverted)
    pursuit, model = Pursuit(inverted.select(small), limit, CPU), Planted()
    pixels = pictures(16).float() / 255
    kept = pixels.clone()
    stamped = pursuit.stamp(model, pixels, 0)
    assert torch.equal(pixels, kept) and 0 <= stamped.min() and stamped.max() <= 1
    assert not stamped.requires_grad and not pursuit.over
    assert (model(stamped).argmax(1) == TARGET).float().mean() > 0.8
    cleansed, turns = Planted(False), 0
    while not pursuit.over and turns < 60:
        pursuit.stamp(cleansed, pixels, turns)
        turns += 1
    assert pursuit.over and 1 < turns < 60


def test_a_pursuits_state_is_all_in_its_tensors(inverted):
    chosen, pixels, model = inverted.select(torch.tensor([2, 4])), pictures(8).float() / 255, Planted()
    whole, first = Pursuit(chosen, 100.0, CPU), Pursuit(chosen, 100.0, CPU)
    for turn in range(3):
        whole.stamp(model, pixels, turn)
        first.stamp(model, pixels, turn)
    resumed = Pursuit(chosen, 100.0, CPU)
    for name, tensor in resumed.tensors.items():
        tensor.copy_(first.tensors[name])
    assert torch.equal(resumed.stamp(model, pixels, 3), whole.stamp(model, pixels, 3))


def test_chunks():
    assert [c.tolist() for c in chunks(5, 2)] == [[0, 1], [2, 3], [4]] and list(chunks(0, 2)) == []
