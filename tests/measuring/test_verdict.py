"""When a written network counts as damaged."""

from dataclasses import replace

import pytest
import torch

from bdclean.measuring.trial import Trial
from bdclean.measuring.verdict import clean_measures, compare, damage, not_gone
from bdclean.record.run import FAILS, INCONCLUSIVE, PASSES, Finding, TriggerRow


def trial(reference, clean, labeled, own=False):
    images = torch.zeros(len(reference), 3, 4, 4, dtype=torch.uint8)
    return Trial(lambda x: clean[: len(x)], images, reference, clean, 10, labeled, own, 0.2, 0)


@pytest.mark.parametrize(
    ("labeled", "right_after", "damaged"),
    [
        (True, 57, False),  # other images are right, as many
        (True, 50, False),
        (True, 40, True),
        (False, 57, True),  # nothing tells that the answers that moved are as good
    ],
)
def test_answers_that_move_are_damage_unless_labels_say_that_they_are_as_good(labeled, right_after, damaged):
    labels = torch.zeros(100, dtype=torch.int64)
    suspect = (torch.arange(100) >= 57).long()  # right on the first 57
    written = (torch.arange(100).flip(0) >= right_after).long()  # right on the last so many
    reference = labels if labeled else suspect
    before = trial(reference, suspect, labeled, own=not labeled)
    after = trial(reference, written, labeled)
    measures = [*clean_measures(after), *compare(before, after, [], [])]
    said = damage(measures, before, after)
    assert bool(said) is damaged
    assert all(("labels" in sentence) is not labeled for sentence in said)


@pytest.mark.parametrize(("kept", "staying", "damaged"), [(79, 1.0, True), (79, 0.9, False), (71, 0.9, True)])
def test_answers_that_a_small_move_changes_need_not_be_kept(kept, staying, damaged):
    suspect = torch.zeros(100, dtype=torch.int64)
    before = replace(trial(suspect, suspect, False, own=True), staying=staying)
    after = trial(suspect, (torch.arange(100) >= kept).long(), False)
    measures = [*clean_measures(after), *compare(before, after, [], [])]
    assert bool(damage(measures, before, after)) is damaged


def test_a_trigger_that_clusters_accused_is_not_gone_either():
    old = [TriggerRow("badnets", target=1, outcome=INCONCLUSIVE)]
    new = [TriggerRow("badnets", target=1, outcome=INCONCLUSIVE, reason="images go to one cluster")]
    assert not_gone(old, new) is None
    left = not_gone(old, new, [Finding("pull", "suspicious", trigger="badnets")])
    assert left.startswith("badnets is suspicious on the suspect and is not known to be gone")


@pytest.mark.parametrize(
    ("before", "after", "target", "said"),
    [
        (FAILS, INCONCLUSIVE, 1, True),
        (FAILS, INCONCLUSIVE, 2, False),  # towards another class it never failed
        (INCONCLUSIVE, INCONCLUSIVE, 1, False),
        (FAILS, PASSES, 1, False),
    ],
)
def test_a_trigger_that_failed_before_is_not_gone_while_it_is_inconclusive(before, after, target, said):
    """One left 23 % of 98 beside controls up to 9 %, and the run ended in no-evidence."""
    old = [TriggerRow("blend", target=0, outcome=PASSES), TriggerRow("badnets", target=1, outcome=before)]
    new = [
        TriggerRow("blend", target=0, outcome=INCONCLUSIVE, reason="few images"),
        TriggerRow("badnets", target=target, outcome=after, reason="the interval reaches the threshold"),
    ]
    left = not_gone(old, new)
    assert (left is not None) is said
    assert left is None or left.startswith("badnets fails on the suspect") and left.endswith("threshold")
