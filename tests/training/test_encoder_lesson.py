"""What an encoder's student is asked: each term written out, copies of the teacher, and a teacher left in peace."""

import copy

import pytest
import torch
from torch.nn import functional as F

from bdclean.networks.classifier import Classifier
from bdclean.networks.encoder import headless
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.networks.stages import describe
from bdclean.networks.taps import seeing
from bdclean.training.encoder_lesson import EncoderLesson, Terms, mean_feature
from bdclean.training.loop import Batch
from bdclean.training.losses import nt_xent
from bdclean.training.map_losses import MAPS, fitnet
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.run import Precision, Run
from bdclean.training.students import set_batch_statistics, void

CPU = torch.device("cpu")
NOTHING = Views(1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0)
ARCH = headless(describe("tiny", lambda: ResidualNetwork((1, 1, 1), (4, 8, 8), 4, 4), (3, 16, 16)))
N = 12
PHOTOS = torch.randint(256, (N, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def run(seed=0):
    return Run(CPU, Precision(), seed)


def encoder(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(ARCH.build(), parse_preprocess("half"))
    set_batch_statistics(model, lambda: iter([PHOTOS]))
    return model.eval()


def batch(seed=5, images=PHOTOS):
    return Batch(images, None, 0, 0.0, torch.Generator().manual_seed(seed), torch.arange(len(images)))


def lesson(student, terms, views=NOTHING, teacher=None):
    """In evaluation mode, in which a copy of the teacher gives what the teacher gives."""
    made = EncoderLesson(teacher or encoder(), student, ARCH, PHOTOS, terms, views, run())
    made.model.eval()
    return made


def asked(student, terms, views=NOTHING):
    with lesson(student, terms, views) as made, torch.no_grad():
        loss, measures = made(batch())
    return loss.item(), float(measures["likeness"])


def views_of(views, count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [views(PHOTOS, generator) for _ in range(count)]


def directions(model, images):
    with torch.no_grad():
        rows = model(images).double()
    return [row / row.norm() for row in rows]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# --- what is asked ------------------------------------------------------------------------------------------

TERMS = {
    "clone": Terms(contrast=0),
    "centred": Terms(contrast=0, centred=True),
    **{f"maps {name}": Terms(contrast=0, maps=loss, map_weights=dict.fromkeys(ARCH.taps, 0.5))
       for name, loss in MAPS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_a_copy_of_the_teacher_costs_nothing_and_another_student_more(name):
    loss, likeness = asked(encoder(), TERMS[name])
    assert likeness == pytest.approx(1, abs=1e-5) and loss == pytest.approx(0, abs=2e-5)
    for seed in (1, 2, 3):
        other, less = asked(encoder(seed), TERMS[name])
        assert other > loss + 0.001 and -1 <= less < likeness - 0.001


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("contrast", [0.0, 0.5])
def test_likeness_is_with_the_teachers_answer_to_the_same_view(centred, contrast):
    student, teacher = encoder(1), encoder()
    found = asked(copy.deepcopy(student), Terms(1.0, centred, contrast), Views())[1]
    (view,) = views_of(Views(), 1)
    known = directions(teacher, PHOTOS)
    centre = sum(known) / N if centred else torch.zeros(ARCH.width)
    likeness = 0.0
    for mine, answer in zip(directions(student, view), directions(teacher, view), strict=True):
        mine, answer = mine - centre, answer - centre
        likeness += float(mine @ answer / (mine.norm() * answer.norm()))
    assert found == pytest.approx(likeness / N, abs=1e-5)


def test_contrast_is_simclrs_loss_on_the_student():
    student = encoder(1)
    made = lesson(student, Terms(clone=0, contrast=0.7, temperature=0.2), Views())
    seen = views_of(Views(), 2)
    with torch.no_grad():
        loss, _ = made(batch())
        first, second = (made.model.projector(student(view)) for view in seen)
    assert loss.item() == pytest.approx(0.7 * nt_xent(first, second, 0.2).item(), rel=1e-4)


@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_maps_are_compared_on_the_same_view_each_with_its_weight(contrast):
    """Also where the student sees more views than one: only the first is what both have seen."""
    student, teacher = encoder(1), encoder()
    weights = {tap: 0.5 + k for k, tap in enumerate(ARCH.taps)}
    plain = asked(copy.deepcopy(student), Terms(1.0, False, contrast), Views())[0]
    terms = Terms(1.0, False, contrast, maps=fitnet, map_weights=weights)
    found = asked(copy.deepcopy(student), terms, Views())[0]
    (view,) = views_of(Views(), 1)
    expected = 0.0
    with torch.no_grad(), seeing(student.network, ARCH) as ours, seeing(teacher.network, ARCH) as theirs:
        student(view), teacher(view)
        for tap, weight in weights.items():
            expected += weight * (ours.maps[tap] - theirs.maps[tap]).square().mean().item()
    assert len(weights) == 3 and found - plain == pytest.approx(expected, rel=1e-4)


# --- the teacher, and what stays ----------------------------------------------------------------------------

ALL = Terms(
    centred=True,
    contrast=0.5,
    maps=MAPS["at"],
    map_weights=dict.fromkeys(ARCH.taps, 1.0),
)


def hooks(*models):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for m in models for module in m.modules()
    )


def test_gradients_reach_the_student_and_never_the_teacher():
    suspect, student = encoder(), encoder(1)
    before = state(suspect)
    made = EncoderLesson(suspect, student, ARCH, PHOTOS, ALL, Views(), run())
    assert made.model.training and made.student is student
    optimiser = torch.optim.Adam(made.model.parameters(), 0.01)
    with made:
        for step in range(3):
            loss, measures = made(batch(step))
            loss.backward()
            optimiser.step()
    assert not any(each.requires_grad for each in measures.values())
    for model in (suspect, made.teacher):
        assert same(before, model.state_dict()) and not model.training
        assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in suspect.parameters()), "the suspect itself was frozen"
    assert not any(p.requires_grad for p in made.teacher.parameters())
    for name, p in made.model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name


def test_hooks_are_set_within_and_gone_after_also_when_a_step_fails():
    made = lesson(encoder(1), ALL)
    before = hooks(made.model, made.teacher)
    with made:
        assert hooks(made.model, made.teacher) == before + 2 * len(ARCH.taps)
    assert hooks(made.model, made.teacher) == before
    with pytest.raises(ZeroDivisionError), made:
        made(batch())
        raise ZeroDivisionError
    assert hooks(made.model, made.teacher) == before
    with lesson(encoder(1), Terms()) as plain:
        assert hooks(plain.model, plain.teacher) == 0


def learned(seed, steps, terms=ALL, views=None):
    made = EncoderLesson(encoder(), encoder(1), ARCH, PHOTOS, terms, views or Views(), run(seed))
    optimiser = torch.optim.Adam(made.model.parameters(), 0.01)
    likeness = []
    with made:
        for step in range(steps):
            loss, measures = made(batch(step))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            likeness.append(float(measures["likeness"]))
    return state(made.model), likeness


def test_steps_repeat_in_all_bits_and_the_projector_is_drawn_from_the_seed():
    first, likeness = learned(0, 3)
    torch.rand(3)
    again, same_likeness = learned(0, 3)
    assert same(first, again) and likeness == same_likeness
    assert not same(first, learned(1, 3)[0])


def test_a_student_becomes_like_its_teacher():
    _, likeness = learned(0, 120, Terms(centred=True, contrast=0), NOTHING)
    assert likeness[0] < 0.6 and likeness[-1] > 0.9


# --- void students, and the mean feature --------------------------------------------------------------------


def test_a_void_student_is_drawn_from_the_seed_alone():
    suspect = encoder()
    before, generator = state(suspect), torch.get_rng_state()
    first = void(suspect, ARCH, run())
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    assert same(state(first), state(void(encoder(4), ARCH, run()))), "something of the suspect is in it"
    assert first.preprocess == suspect.preprocess and same(before, state(suspect))
    others = (suspect, void(suspect, ARCH, run(1)))
    for other in others:
        for name, p in first.named_parameters():
            if p.ndim > 1:
                assert not torch.equal(p, other.get_parameter(name)), name


def test_the_mean_feature_is_the_written_out_mean():
    teacher = encoder()
    expected = sum(directions(teacher, PHOTOS)) / N
    found = mean_feature(teacher, PHOTOS, run())
    assert found.dtype == torch.float32 and not found.requires_grad and float(found.norm()) <= 1
    assert torch.allclose(found.double(), expected, atol=1e-6)
    for size in (1, 5, N):  # the last part is smaller: it counts by its images
        assert torch.allclose(mean_feature(teacher, PHOTOS, run(), size), found, atol=1e-6)
    one = F.normalize(teacher(PHOTOS[:1]), dim=1)[0]
    assert torch.allclose(mean_feature(teacher, PHOTOS[:1].expand(4, -1, -1, -1), run()), one, atol=1e-6)
