"""Run by each of two processes: what they compute together beside what this one computes alone, as JSON per rank.

Started with the environment that torchrun gives, and the file to write: `RANK` is appended to its name.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bdclean import ranks
from bdclean.errors import Refused
from bdclean.measuring.predictor import Predictor
from bdclean.training import parallel
from bdclean.training.loop import State, fit
from bdclean.training.losses import nt_xent
from bdclean.training.run import Precision, Run

CPU = torch.device("cpu")
ALONE, TOGETHER = (Run(CPU, Precision(), 0, together=together) for together in (False, True))


class Pixels(nn.Module):
    def forward(self, images):
        return images.float()


def network(dropped=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        Pixels(), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2),
        nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten(), nn.Dropout(dropped),
        nn.Linear(8 * 5 * 5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5),
    )  # fmt: skip


def apart(one, other):
    """The largest difference, in units of the largest value."""
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def one_step(run, loss, n=9, dropped=0.0):
    """Gradients of weights and images and the running statistics after a pass of `n` images through `loss`."""
    model, generator = network(dropped).train(), torch.Generator().manual_seed(1)
    images = torch.rand(n, 3, 14, 14, generator=generator, requires_grad=True)
    labels = torch.randint(5, (n,), generator=generator)
    outside = nn.Parameter(torch.ones(5))  # a weight that is used in no shared pass
    torch.manual_seed(2)
    loss(outside * run.forward(model, images), labels).backward()
    if run.together:
        parallel.average([*model.parameters(), outside])
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {name: b.float() for name, b in model.named_buffers()}
    return {**found, "outside": outside.grad, "images": images.grad}


def compared(loss, **given):
    alone, together = one_step(ALONE, loss, **given), one_step(TOGETHER, loss, **given)
    # what comes before a batch norm has no gradient on its bias: only rounding is left there
    kept = [name for name in alone if float(alone[name].abs().max()) > 1e-6]
    return max(apart(alone[name], together[name]) for name in kept)


def coupled(logits, labels):
    """A loss in which each image depends on all others, as contrastive ones."""
    return nt_xent(logits, logits.roll(1, 0).detach() + 0.1 * logits, 0.5) + logits.softmax(1).mean(0).max()


def trained(run):
    """A network's state after 12 steps, and the loss of the last."""
    model, generator = network().train(), torch.Generator().manual_seed(3)
    images = torch.randint(256, (50, 3, 14, 14), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (50,), generator=generator)

    def step(batch):
        noise = torch.rand(batch.images.shape, generator=batch.generator)
        return F.cross_entropy(run.forward(model, batch.images / 255 + 0.1 * noise), batch.labels), {}

    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    curve = fit(step, State("train", model, optimiser, images, labels, 16, 12), run)
    return torch.cat([t.float().flatten() for t in model.state_dict().values()]), curve[-1]["loss"]


def refusal():
    """What a pass says that only the last images of a set would make it refuse."""
    images = torch.zeros(10, 3, 14, 14, dtype=torch.uint8)
    images[9] = 255

    class Odd(nn.Module):
        def forward(self, x):
            return torch.where(x.amax((1, 2, 3)) > 0, torch.nan, 1.0)[:, None]

    try:
        Predictor(Odd(), CPU)(images)
    except Refused as error:
        return str(error)
    return "nothing"


def failure():
    """What the first process hears, while it waits, of the other, which cannot go on; nothing works after it."""
    if ranks.first():
        try:
            parallel.wait()
        except parallel.Lost as error:
            return [str(error), parallel.settle(1, "Lost")]
    ranks.GRACE = 0.5
    parallel.give_reason(Refused(""), "no room for a share.", 3)
    return ["", parallel.settle(1, "Refused")]


def main():
    parallel.join("cpu")
    whole = network().eval()
    images = torch.randint(
        256, (41, 3, 14, 14), generator=torch.Generator().manual_seed(4), dtype=torch.uint8
    )
    predictor = Predictor(copy.deepcopy(whole), CPU, 8)
    answers = predictor.outputs(images)
    with torch.no_grad():
        expected = whole(images.float())
    (one, loss), (two, other) = trained(ALONE), trained(TOGETHER)
    found = {
        "processes": parallel.processes(),
        "cross-entropy": compared(F.cross_entropy),
        "coupled": compared(coupled),
        "dropout": compared(F.cross_entropy, dropped=0.4),
        "three images": compared(coupled, n=3),
        "trained": apart(one, two),
        "losses": [loss, other],
        "weights": float(two.double().sum()),
        "answers": apart(expected, answers),
        "order": bool((answers.argmax(1) == expected.argmax(1)).all()),
        "seen": [predictor.seen, parallel.total(predictor.seen)],
        "refusal": refusal(),
        "first's": parallel.from_first(f"rank {ranks.own().number}"),
    }
    found["told"] = failure()
    Path(f"{sys.argv[1]}.{ranks.own().number}").write_text(json.dumps(found))


main()
