"""Rows of an encoder by its probes: where they see the same stamped images as different classes."""

from dataclasses import dataclass, replace

import pytest
import torch

from bdclean.measuring.assessment import assess
from bdclean.measuring.encoders import judged_as_encoder
from bdclean.measuring.probe import Encoded, Probing
from bdclean.measuring.trial import Trial
from bdclean.measuring.verdict import compare, damage
from bdclean.progress import quiet
from bdclean.record.rule import fails_at, moved
from bdclean.record.run import FAILS, INCONCLUSIVE, PASSES
from bdclean.report.rows import evidence, success

CLASSES, WHITE = 5, 255


@dataclass(frozen=True)
class Corner:
    """Grey in the last pixel; its controls are other greys there."""

    level: int = WHITE
    family: str = "patch"

    def spec(self):
        return f"corner:{self.level}"

    def __call__(self, images):
        out = images.clone()
        out[:, :, -1, -1] = self.level
        return out

    def controls(self, count, generator, channels=3):
        return [Corner(100 + k) for k in range(count)]


def seen(levels, target):
    """A head: the class that the first pixel says, but `target` where the last one is one of `levels`."""

    def head(features):
        stamped = torch.isin(features[:, 1].long(), torch.tensor(levels))
        return torch.where(stamped, torch.full_like(features[:, 0], target), features[:, 0]).long()

    return head


class Pixels:
    """Features: the first pixel, which says the class, and the last one."""

    def __call__(self, images):
        return torch.stack([images[:, 0, 0, 0], images[:, 0, -1, -1]], 1).float()

    fresh = __call__


def trial_of(first, **others):
    labels = torch.arange(400) % CLASSES
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    images[:, :, 0, 0] = labels[:, None].to(torch.uint8)

    encoded = Encoded(Pixels(), Probing(images, labels, CLASSES, True), first, others)
    predict = encoded.predict
    return Trial(
        predict, images, labels, predict(images), CLASSES, True, False, 0.2, 0, quiet, encoded=encoded
    )


def rows_of(trial, target=2, fixed=None):
    found = [measured.row for measured in assess(trial, [Corner()], target, fixed)]
    return judged_as_encoder(trial, found, [Corner()])[0]


def test_what_another_probe_sees_fails_a_row_that_the_linear_one_passes():
    (row,) = rows_of(trial_of(seen([WHITE], 1), knn=seen([WHITE], 2)))
    assert (row.outcome, row.decisive_probe) == (FAILS, "knn")
    assert row.asr.value == 0 and moved(row).value == 1
    assert row.bounds[0].low > 0.9 and row.control_rate["highest"] == 0
    assert evidence(row).startswith("corner:255 sends 100.0")
    assert "by the probe knn, to class 2, the highest of 19 controls 0.0 %." in evidence(row)
    assert success(row) == "100.0 (98.8-100.0, n 320), by knn"


def test_the_linear_probe_decides_where_it_fails_a_row():
    (row,) = rows_of(trial_of(seen([WHITE], 2), knn=seen([WHITE], 2)))
    assert (row.outcome, row.decisive_probe) == (FAILS, None) and moved(row) == row.asr


@pytest.mark.parametrize("levels", [[], [WHITE, *range(100, 120)]])
def test_a_probe_that_the_controls_move_as_well_fails_nothing(levels):
    (row,) = rows_of(trial_of(seen([], 2), knn=seen(levels, 2)))
    assert (row.outcome, row.decisive_probe) == (PASSES, None)


def test_what_moves_too_little_of_another_probe_to_fail_leaves_the_row_open():
    some = seen([WHITE], 2)

    def head(features):
        return torch.where(torch.arange(len(features)) % 2 == 0, some(features), features[:, 0].long())

    (row,) = rows_of(trial_of(seen([], 2), knn=head))
    assert row.outcome == INCONCLUSIVE and row.reason.startswith("by the probe knn 48.4 % go")


def test_a_source_class_that_another_probe_sees_move_is_named():
    """A fifth of all images is over the threshold only by so many; of class 1 every image moves."""
    whole = seen([WHITE], 2)

    def head(features):
        return torch.where(features[:, 0] == 1, whole(features), features[:, 0].long())

    (row,) = rows_of(trial_of(seen([], 2), knn=head))
    assert (row.outcome, row.decisive_probe, row.decisive_source) == (FAILS, "knn", 1)
    assert "all 80 images of class 1, by the probe knn, to class 2" in evidence(row)


def test_what_the_linear_probe_spreads_over_the_classes_another_one_finds():
    def spread(features):
        anywhere = torch.arange(len(features)) % CLASSES
        return torch.where(features[:, 1] == WHITE, anywhere, features[:, 0].long())

    trial = trial_of(lambda features: features[:, 0].long(), knn=seen([WHITE], 3))
    (row,) = rows_of(trial, "auto")
    assert (row.outcome, row.target, row.decisive_probe) == (FAILS, 3, "knn")
    (row,) = rows_of(trial_of(spread, knn=seen([WHITE], 3)), "auto")
    assert (row.outcome, row.decisive_probe) == (FAILS, "knn")
    (row,) = rows_of(trial_of(lambda features: features[:, 0].long(), knn=seen([], 3)), "auto")
    assert (row.outcome, row.target_source) == (PASSES, "screened out")


def test_a_backdoor_that_moved_for_another_probe_has_a_row_beside_the_suspects():
    trial = trial_of(lambda features: features[:, 0].long(), knn=seen([WHITE], 3))
    rows = rows_of(trial, "auto", {Corner().spec(): 1})
    assert [(row.target, row.outcome, row.decisive_probe) for row in rows] == [
        (1, PASSES, None), (3, FAILS, "knn"),
    ]  # fmt: skip


def test_a_repair_is_rated_by_the_probe_that_decided_the_worst_row():
    """By nearest neighbours all stamped images went to the target and none does now; a linear probe never saw it."""
    before = trial_of(seen([], 2), knn=seen([WHITE], 2))
    after = trial_of(seen([], 2), knn=seen([], 2))
    old, new = rows_of(before), rows_of(after)
    found = {m.name: m.value for m in compare(before, after, old, new)}
    assert found["defence_effectiveness_rating"] == found["balanced_score"] == 1
    same = {m.name: m.value for m in compare(before, before, old, old)}
    assert (same["defence_effectiveness_rating"], same["balanced_score"]) == (0.5, 0)


def test_of_several_rows_after_a_repair_that_counts_which_the_probe_left_most_of():
    """The linear probe's class is not the one by which nearest neighbours failed the suspect."""

    def some(features):
        return torch.where(torch.arange(len(features)) % 7 == 0, all_of(features), features[:, 0].long())

    all_of = seen([WHITE], 3)
    before, after = trial_of(seen([WHITE], 1), knn=all_of), trial_of(seen([], 1), knn=some)
    old = rows_of(before, 3)
    new = [*rows_of(after, 1), *rows_of(after, 3)]
    score = {m.name: m.value for m in compare(before, after, old, new)}["balanced_score"]
    assert score == {m.name: m.value for m in compare(before, after, old, new[1:])}["balanced_score"]
    assert 0.8 < score < 0.95


def test_groups_that_a_repair_did_not_keep_are_damage():
    trial = replace(trial_of(seen([], 0)), labeled=False, own_reference=True)
    shuffled = trial.clean[torch.randperm(len(trial.clean), generator=torch.Generator().manual_seed(0))]
    assert damage([], trial, trial) == []
    (said,) = damage([], trial, replace(trial, clean=shuffled))
    assert said.startswith("the written encoder hardly groups clean images as the suspect does")


def test_a_row_that_only_clusters_show_fails_at_no_threshold():
    trial = trial_of(seen([WHITE], 2))
    unlabeled = replace(
        trial, encoded=replace(trial.encoded, probing=replace(trial.encoded.probing, labeled=False))
    )
    (row,) = rows_of(unlabeled)
    assert row.outcome == INCONCLUSIVE and not fails_at(row, 0.3, 0.2)
