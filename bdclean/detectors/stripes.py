"""Stripes: do sinusoids along an axis send most images to one class?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bdclean.networks.arch import Arch
from bdclean.networks.classifier import Classifier
from bdclean.training.forms import striped
from bdclean.training.inversion import GROWN, Detected, Outlier, sent_by, spread_out
from bdclean.training.run import Run

MOST_SENT = 0.85
"""The share of images above which stripes are a trigger's: over 0.95 where they were, about 0.5 at most in five other
networks, 0.77 in a stranger's, which has another backdoor."""


@dataclass(frozen=True)
class Stripes:
    """Tries 96 stripes (12 frequencies, 4 phases, both axes, 20 grey levels) and tells those that send most images.

    What it does: stripes act only as a whole, so that gradients do not find them, and there are few enough to try all.
    When to use it: beside `inversion`; it takes a second.
    What it needs: 24 images, without labels.
    Known limits: no finding decides a verdict by itself, only its rank among clean networks. Stripes at other angles
    are not tried.
    """

    name: ClassVar[str] = "stripes"
    source: ClassVar[str] = "bdclean's own"

    def __call__(self, suspect: Classifier, arch: Arch, images: Tensor, run: Run) -> Detected:
        """Findings on `images` uint8 [n c h w]: the outliers, else the stripes that send most images."""
        channels, height, width = images.shape[1:]
        form, changes, words = striped(height, width, channels)
        few = spread_out(images)
        sent = run.keep("sent-by-stripes", lambda: sent_by(form, changes, suspect, few, run))
        share, which = sent.max(0)
        found = Detected(statistic=float(share.max()))
        for k in (share > MOST_SENT).nonzero().squeeze(1).tolist() or [int(share.argmax())]:
            at = int(which[k])
            found.findings.append(_finding(words[at], float(share[k]), k, len(few)))
            if share[k] > MOST_SENT:
                size = float(form.sizes(changes[at : at + 1]))
                found.outliers.append(Outlier(form, k, changes[at], size, GROWN * size))
        return found


def _finding(words: str, share: float, target: int, n: int) -> dict[str, Any]:
    return {
        "detector": Stripes.name,
        "verdict": "outlier" if share > MOST_SENT else "no-outlier",
        "score": share,
        "threshold": MOST_SENT,
        "odd": "above",
        "reason": f"stripes of {words}, 20 grey levels, send {100 * share:.0f} % of {n} images to class {target}",
    }
