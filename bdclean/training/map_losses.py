"""Losses between the maps of two networks, and between their features: pure functions, each at least 0.

Maps are [n c h w] of one stage, of a student and of a teacher of the same architecture; features [n d]. Computed in
float32. `scaled` versions do not depend on the size of a map, which the authors' do: see `attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6


def attention_of(maps: Tensor) -> Tensor:
    """Where a stage looks, rows [n h w] of length one: squares summed over channels (Zagoruyko, Komodakis 2017)."""
    rows = maps.float().square().sum(1).flatten(1)
    return rows / (rows.norm(dim=1, keepdim=True) + EPSILON)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of attention, as in 2403.03846 and 2406.03508: 2 (1 - cosine) / (h w)."""
    return F.mse_loss(attention_of(student), attention_of(teacher))


def scaled_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of attention, in [0, 1]: the same for maps of any size, where the authors' form is 64 times weaker on
    32 x 32 than on 4 x 4."""
    return 1 - (attention_of(student) * attention_of(teacher)).sum(1).mean()


def attended_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """AFD: each channel's map of length one, squared differences weighted by the teacher's channels (2021, AAAI).

    Departure: the authors' code draws the weighing network anew every epoch and never trains it, so weights here are
    the teacher's own mean activations, which sum to one.
    """
    rows = [F.normalize(maps.float().flatten(2), dim=2) for maps in (student, teacher)]
    weights = teacher.float().abs().mean((2, 3))
    weights = weights / weights.sum(1, keepdim=True).clamp_min(EPSILON)
    return ((rows[0] - rows[1]).square().mean(2) * weights).sum(1).mean()


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of maps (Romero et al. 2015, arXiv 1412.6550)."""
    return F.mse_loss(student.float(), teacher.float())


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """CC: over neighbours in the batch, the mean of the product of their absolute errors, summed over channels.

    As the code of 2403.03846 computes it; it calls it correlation congruence (Peng et al. 2019).
    """
    errors = (student.float() - teacher.float()).abs()
    if len(errors) < 2:
        return errors.square().sum(1).mean()
    return (errors[:-1] * errors[1:]).sum(1).mean()


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """KD on a map: KL of the softmax over channels at each place, times the squared temperature, a mean over images.

    The authors' branch means the last stage and distils the first, by the order of its weights: here the stage is the
    recipe's `stages`.
    """
    ours = F.log_softmax(student.float() / temperature, dim=1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def _rows(features: Tensor) -> Tensor:
    return F.normalize(features.float().flatten(1), dim=1)


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """SP: the squared difference of similarity matrices with rows of length one, over n^2 (Tung, Mori 2019)."""
    flat = [x.float().flatten(1) for x in (student, teacher)]
    ours, theirs = (F.normalize(x @ x.T, dim=1) for x in flat)
    return (ours - theirs).square().sum() / len(ours) ** 2


def probabilistic(student: Tensor, teacher: Tensor) -> Tensor:
    """PKT: KL between a batch's similarities as probabilities, (cosine + 1) / 2 with rows that sum to one (Passalis and
    Tefas 2018)."""
    ours, theirs = ((_rows(x) @ _rows(x).T + 1) / 2 for x in (student, teacher))
    ours, theirs = (x / x.sum(1, keepdim=True) for x in (ours, theirs))
    return (theirs * ((theirs + 1e-7).log() - (ours + 1e-7).log())).mean(1).sum().clamp_min(0)


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD: 25 times the distances' and 50 times the angles' difference (Park et al. 2019, arXiv 1904.05068)."""
    ours, theirs = student.float().flatten(1), teacher.float().flatten(1)
    distance = F.smooth_l1_loss(_distances(ours), _distances(theirs))
    return 25 * distance + 50 * F.smooth_l1_loss(_angles(ours), _angles(theirs))


def _distances(x: Tensor) -> Tensor:
    """Distances of all pairs, their mean one; one image has none."""
    found = (x[:, None] - x[None]).square().sum(2).clamp_min(1e-12).sqrt()
    found = found * ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    mean = found.sum() / max(1, len(x) * (len(x) - 1))
    return found / mean.clamp_min(EPSILON)


def _angles(x: Tensor) -> Tensor:
    """Cosines of the angles at each image towards all pairs of others."""
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


MAPS = {
    "at": scaled_attention, "at-paper": attention, "afd": attended_channels, "fitnet": fitnet, "cc": correlation,
    "kd": channel_kl, "sp": similarity, "pkt": probabilistic, "rkd": relations,
}  # fmt: skip
"""By the names that recipes give them."""
