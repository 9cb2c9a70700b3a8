"""Losses between a teacher and a student, and between views of an image: pure functions of tensors."""

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


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709, equation 1): each view must find its partner among all 2n - 1 others.

    `first` and `second` [n d] are projections of two views of the same images, of any length. The mean over all 2n
    views of -log(exp(s_partner) / sum over the others of exp(s)), s = cosine / temperature; >= 0, and log(2n - 1) where
    all views are alike. Computed in float32.
    """
    n = len(first)
    views = F.normalize(torch.cat([first, second]).float(), dim=1)
    similarities = views @ views.T / temperature
    itself = torch.eye(2 * n, dtype=torch.bool, device=views.device)
    similarities = similarities.masked_fill(itself, float("-inf"))
    partners = torch.arange(2 * n, device=views.device).roll(n)
    return F.cross_entropy(similarities, partners)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Mean over the batch of the cosine of two features [n d], in [-1, 1]. Computed in float32."""
    return F.cosine_similarity(first.float(), second.float(), dim=1).mean()
