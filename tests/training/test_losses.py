import math

import pytest
import torch

from bdclean.training.losses import distillation_kl, divergence


def logits(n=7, classes=5, seed=0):
    return torch.randn((n, classes), generator=torch.Generator().manual_seed(seed)) * 3


def slow_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_written_out_sum(temperature):
    student, teacher = logits(seed=1), logits(seed=2)
    found = distillation_kl(student, teacher, temperature)
    assert found.item() == pytest.approx(slow_kl(student, teacher, temperature), rel=1e-5)


def test_distillation_is_zero_only_where_answers_agree():
    teacher = logits()
    shifted = teacher + torch.randn(7, 1)  # softmax does not see a shift
    assert abs(distillation_kl(shifted, teacher, 2.0).item()) < 1e-6
    assert distillation_kl(logits(seed=5), teacher).item() > 0.1


def test_distillation_survives_extreme_logits_and_half_precision():
    sure, opposite = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    assert distillation_kl(sure, opposite).item() == pytest.approx(400.0)
    assert torch.isfinite(distillation_kl(sure.bfloat16(), opposite.bfloat16()))
    assert distillation_kl(sure.bfloat16(), opposite.bfloat16()).dtype == torch.float32


def test_gradients_shrink_with_the_square_of_the_temperature():
    teacher, norms = logits(seed=3) * 0.01, []
    for temperature in (4.0, 8.0):
        student = (logits(seed=4) * 0.01).requires_grad_(True)
        distillation_kl(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] / norms[1] == pytest.approx(4.0, rel=0.02)


def test_divergence_of_rows_is_the_written_out_sum():
    student, teacher = logits(seed=1), logits(seed=2)
    rows = divergence(student, teacher.softmax(1))
    assert rows.shape == (7,) and bool((rows >= 0).all())
    assert rows.mean().item() == pytest.approx(slow_kl(student, teacher, 1.0), rel=1e-5)
    certain = divergence(torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert certain.item() == pytest.approx(math.log(4))  # 0 log 0 counts as 0
