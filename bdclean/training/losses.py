"""Losses between a teacher and a student: pure functions of tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of KL(softmax(teacher / T) || softmax(student / T)).

    Both are logits [n classes]; the result is a scalar >= 0, and 0 only where the two distributions agree. There is no
    T^2 factor, as in the code of BCU (arXiv 2211.12044), so gradients shrink as about 1 / T^2. Computed in float32.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def divergence(student: Tensor, probabilities: Tensor) -> Tensor:
    """KL(probabilities || softmax(student)) of each row.

    `student` are logits [n classes], `probabilities` [n classes] with rows that sum to 1; returns [n], each >= 0.
    """
    log_student = F.log_softmax(student.float(), dim=1)
    return (torch.xlogy(probabilities, probabilities) - probabilities * log_student).sum(dim=1)
