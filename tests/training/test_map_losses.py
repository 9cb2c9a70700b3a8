"""Losses between maps: against sums written out, nothing for equal maps, ranges, and what they must not depend on."""

import math

import pytest
import torch

from bdclean.training.map_losses import MAPS, attention, attention_of, scaled_attention

N, C, H, W = 4, 3, 2, 3


def maps(seed=0, shape=(N, C, H, W)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(values, least=1e-12):
    length = max(math.sqrt(sum(v * v for v in values)), least)
    return [v / length for v in values]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def squares(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def flat(image):
    return [v for channel in image for row in channel for v in row]


def looks(image):
    return unit([sum(image[c][i][j] ** 2 for c in range(C)) for i in range(H) for j in range(W)])


def slow_at(student, teacher):
    return sum(1 - dot(looks(s), looks(t)) for s, t in zip(student, teacher, strict=True)) / N


def slow_at_paper(student, teacher):
    return sum(squares(looks(s), looks(t)) for s, t in zip(student, teacher, strict=True)) / (N * H * W)


def slow_afd(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        rows = [([v for row in s[c] for v in row], [v for row in t[c] for v in row]) for c in range(C)]
        active = [sum(map(abs, theirs)) / (H * W) for _, theirs in rows]
        for (ours, theirs), weight in zip(rows, active, strict=True):
            total += weight / sum(active) * squares(unit(ours), unit(theirs)) / (H * W)
    return total / N


def slow_fitnet(student, teacher):
    return sum(squares(flat(s), flat(t)) for s, t in zip(student, teacher, strict=True)) / (N * C * H * W)


def slow_cc(student, teacher):
    errors = [
        [abs(a - b) for a, b in zip(flat(s), flat(t), strict=True)]
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(dot(errors[k], errors[k + 1]) for k in range(N - 1)) / ((N - 1) * H * W)


def slow_kd(student, teacher, temperature=0.5):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for i in range(H):
            for j in range(W):
                q, p = ([math.exp(image[c][i][j] / temperature) for c in range(C)] for image in (s, t))
                q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total * temperature**2 / N


def slow_sp(student, teacher):
    total = 0.0
    for i in range(N):
        ours, theirs = (unit([dot(flat(x[i]), flat(x[j])) for j in range(N)]) for x in (student, teacher))
        total += squares(ours, theirs)
    return total / N**2


def slow_pkt(student, teacher):
    total = 0.0
    for i in range(N):
        q, p = (
            [(dot(unit(flat(x[i])), unit(flat(x[j]))) + 1) / 2 for j in range(N)] for x in (student, teacher)
        )
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / N


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def slow_rkd(student, teacher):
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]

    def distances(x):
        found = {(i, j): math.sqrt(squares(flat(x[i]), flat(x[j]))) for i, j in pairs}
        mean = sum(found.values()) / len(found)
        return {pair: value / mean for pair, value in found.items()}

    def angles(x):
        def direction(i, j):
            return unit([a - b for a, b in zip(flat(x[j]), flat(x[i]), strict=True)])

        return [dot(direction(i, j), direction(i, k)) for i in range(N) for j in range(N) for k in range(N)]

    ours, theirs = distances(student), distances(teacher)
    distance = sum(huber(ours[pair] - theirs[pair]) for pair in pairs) / N**2
    angle = sum(huber(a - b) for a, b in zip(angles(student), angles(teacher), strict=True)) / N**3
    return 25 * distance + 50 * angle


SLOW = {
    "at": slow_at, "at-paper": slow_at_paper, "afd": slow_afd, "fitnet": slow_fitnet, "cc": slow_cc, "kd": slow_kd,
    "sp": slow_sp, "pkt": slow_pkt, "rkd": slow_rkd,
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_a_loss_is_the_written_out_sum(name):
    student, teacher = maps(1), maps(2)
    expected = SLOW[name](student.double().tolist(), teacher.double().tolist())
    assert expected > 1e-3
    assert float(MAPS[name](student, teacher)) == pytest.approx(expected, rel=2e-5)


def test_channel_kl_at_another_temperature():
    student, teacher = maps(1), maps(2)
    expected = slow_kd(student.tolist(), teacher.tolist(), 4.0)
    assert float(MAPS["kd"](student, teacher, 4.0)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", MAPS)
def test_equal_maps_cost_nothing_and_others_something(name):
    loss = MAPS[name]
    assert abs(float(loss(maps(3), maps(3)))) < 1e-5
    for seed in range(8):
        for scale in (1e-2, 1.0, 1e2):
            found = float(loss(scale * maps(seed), maps(seed + 100)))
            assert math.isfinite(found) and found > 0


@pytest.mark.parametrize("name", MAPS)
def test_a_loss_repeats_in_all_bits_takes_half_precision_and_leaves_its_arguments(name):
    student, teacher = maps(1), maps(2)
    found = MAPS[name](student, teacher)
    assert torch.equal(found, MAPS[name](student, teacher)) and found.shape == ()
    assert torch.equal(student, maps(1)) and torch.equal(teacher, maps(2))
    half = MAPS[name](student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(found), rel=0.1)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_finite_also_where_maps_are_equal_or_dead(name):
    for student, teacher in (
        (maps(1), maps(2)), (maps(1), maps(1)), (torch.zeros(N, C, H, W), maps(1)),
        (maps(1), torch.zeros(N, C, H, W)), (torch.zeros(N, C, H, W), torch.zeros(N, C, H, W)),
    ):  # fmt: skip
        student = student.clone().requires_grad_(True)
        loss = MAPS[name](student, teacher)
        loss.backward()
        assert math.isfinite(loss.item()) and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", MAPS)
def test_steps_against_the_gradient_bring_the_maps_together(name):
    teacher = maps(2).abs() if name == "cc" else maps(2)
    student = maps(1).requires_grad_(True)
    optimiser = torch.optim.Adam([student], 0.02)
    losses = []
    for _ in range(300):
        loss = MAPS[name](student, teacher)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("name", ["sp", "pkt", "rkd", "fitnet"])
def test_features_without_places_count_as_maps(name):
    student, teacher = maps(1, (5, 6)), maps(2, (5, 6))
    found = MAPS[name](student, teacher)
    assert float(found) == pytest.approx(
        float(MAPS[name](student[..., None, None], teacher[..., None, None]))
    )


@pytest.mark.parametrize("name", ["at", "at-paper", "afd", "sp", "pkt", "rkd"])
def test_the_scale_of_the_student_does_not_count(name):
    found = float(MAPS[name](maps(1), maps(2)))
    assert float(MAPS[name](7 * maps(1), maps(2))) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("name", MAPS)
def test_the_order_of_the_batch_counts_for_neighbours_alone(name):
    order = torch.tensor([2, 0, 3, 1])
    found, other = MAPS[name](maps(1), maps(2)), MAPS[name](maps(1)[order], maps(2)[order])
    assert (float(found) == pytest.approx(float(other), rel=1e-5)) == (name != "cc")


def test_attention_has_length_one_and_both_extremes():
    rows = attention_of(maps(1))
    assert rows.shape == (N, H * W) and bool((rows >= 0).all())
    assert torch.allclose(rows.norm(dim=1), torch.ones(N), atol=1e-5)
    left, right = torch.zeros(2, N, C, 4, 4)
    left[..., :2], right[..., 2:] = 1, 1
    assert float(scaled_attention(left, right)) == 1  # they look at nothing in common
    assert float(scaled_attention(left, -3 * left)) == pytest.approx(0, abs=1e-6)
    assert all(0 < float(scaled_attention(maps(k), maps(k + 9))) < 1 for k in range(9))


@pytest.mark.parametrize("times", [2, 8])
def test_scaled_attention_does_not_see_the_size_of_a_map_and_the_authors_does(times):
    student, teacher = maps(1), maps(2)
    enlarged = [x.repeat_interleave(times, 2).repeat_interleave(times, 3) for x in (student, teacher)]
    found = float(scaled_attention(student, teacher))
    assert float(scaled_attention(*enlarged)) == pytest.approx(found, rel=1e-5)
    assert float(attention(student, teacher)) == pytest.approx(2 * found / (H * W), rel=1e-5)
    assert float(attention(*enlarged)) == pytest.approx(2 * found / (H * W * times**2), rel=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_a_batch_of_one_image_has_a_loss(name):
    assert math.isfinite(float(MAPS[name](maps(1)[:1], maps(2)[:1])))


def test_every_loss_is_written_out_here():
    assert set(SLOW) == set(MAPS)
