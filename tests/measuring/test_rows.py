import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from bdclean.bench.rule_simulation import NONE, Case, Mark
from bdclean.measuring import assessment, rows, screening, trial
from bdclean.measuring.assessment import in_order
from bdclean.measuring.intervals import lower_bound, upper_bound
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.trial import SCREENED_OUT, Trial, halves
from bdclean.measuring.verdict import clean_measures, compare, verdict, verdict_on
from bdclean.progress import quiet
from bdclean.record.run import (
    BACKDOORED,
    FAILS,
    INCONCLUSIVE,
    NO_EVIDENCE,
    NOT_ASSESSED,
    NOT_MEASURED,
    PASSES,
    Bound,
    Rate,
    TriggerRow,
)

CLASSES = 5


@dataclass(frozen=True)
class Patch:
    """A 2x2 patch of one grey level in the corner; its controls are darker ones."""

    value: int = 255
    family: str = "patch"

    def spec(self):
        return f"patch:{self.value}"

    def __call__(self, images):
        out = images.clone()
        out[:, :, -2:, -2:] = self.value
        return out

    def controls(self, count, generator, channels=3):
        return [Patch(100 + k) for k in range(count)]


class Network(nn.Module):
    """Reads the class from pixel (0, 0). Where the patch is one of `levels`, and pixel (0, 1) is under `share` of 256,
    `backdoor` maps that class to another."""

    def __init__(self, backdoor=None, levels=(255,), share=1.0, wrong=0.0):
        super().__init__()
        self.backdoor, self.levels, self.share, self.wrong = backdoor, levels, share, wrong
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        said = images[:, 0, 0, 0].long()
        chance = images[:, 0, 0, 1].float() / 256
        found = torch.where(chance < self.wrong, (said + 1) % CLASSES, said)
        if self.backdoor is not None:
            stamped = sum((images[:, 0, -1, -1] == level) for level in self.levels).bool()
            found = torch.where(stamped & (chance < self.share), self.backdoor(said), found)
        return nn.functional.one_hot(found, CLASSES).float()


def assess(trial, triggers, target="auto", fixed=None):
    """The rows, in the order of the triggers."""
    return [m.row for m in in_order(assessment.assess(trial, triggers, target, fixed), triggers)]


def to(target):
    return lambda said: torch.full_like(said, target)


def bench(network, n=600, labeled=True, threshold=0.5, told=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 90, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n) % CLASSES
    images[:, 0, 0, 1] = torch.randint(0, 256, (n,), generator=generator)
    predict = Predictor(network, torch.device("cpu"), 500)
    clean = predict(images)
    reference = torch.arange(n) % CLASSES if labeled else clean
    tell = told or quiet
    return Trial(predict, images, reference, clean, CLASSES, labeled, not labeled, threshold, 0, tell)


def test_halves_share_no_image():
    first, second = halves(101, 3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(101))
    assert torch.equal(first, halves(101, 3)[0]) and not torch.equal(first, halves(101, 4)[0])


@pytest.mark.parametrize("labeled", [True, False])
def test_a_patch_that_is_obeyed_fails_towards_the_class_that_gains(labeled):
    (row,) = assess(bench(Network(to(3)), labeled=labeled), [Patch()])
    assert (row.outcome, row.target, row.target_source) == (FAILS, 3, "screening")
    assert row.asr.value == 1 and row.images == 300
    assert 230 < row.asr.n < 250  # about a fifth is class 3
    assert row.control_rate == {"median": 0.0, "highest": 0.0, "count": 19}
    assert row.robust_accuracy.value == 0
    assert (row.base_rate is None) is not labeled  # without labels a base rate is 0 by construction
    assert verdict([row]) == (BACKDOORED, None)


def test_a_patch_that_is_ignored_is_dropped_at_the_first_look():
    (row,) = assess(bench(Network()), [Patch()])
    assert (row.outcome, row.target_source, row.images) == (PASSES, SCREENED_OUT, 64)
    assert row.asr.value == 0 and row.asr.high < 0.5 and row.control_rate is None
    assert verdict([row]) == (NO_EVIDENCE, None)


def test_screening_looks_at_few_images_where_they_are_enough():
    network = Network()
    watched = bench(network, n=2000)
    network.seen = 0
    assess(watched, [Patch()] * 3)
    assert network.seen <= 3 * 2 * 64


def test_what_triggers_share_their_controls_do_to_an_image_is_asked_once():
    network = Network(to(3), levels=(255, 254))
    seen = []
    for triggers in ([Patch()], [Patch(), Patch(254)]):
        watched = bench(network)
        network.seen = 0
        assert {row.outcome for row in assess(watched, triggers)} == {FAILS}
        seen.append(network.seen)
    screened_and_measured = 64 + 300
    assert seen[1] - seen[0] == screened_and_measured
    assert not replace(watched, predict=watched.predict).answers  # another model's answers are its own


def test_survivors_that_pass_have_controls_where_few_triggers_are_tried():
    network = Network(
        to(3), levels=range(200, 212), share=0.44
    )  # near the threshold: it survives, and passes
    for count, bare in ((rows.FEW_ROWS, False), (rows.FEW_ROWS + 1, True)):
        found = assess(bench(network, n=4000), [Patch(200 + k) for k in range(count)])
        assert {(row.outcome, row.target_source) for row in found} == {(PASSES, "screening")}
        assert all((row.control_rate is None) is bare for row in found)


def test_each_look_tells_of_every_class_and_is_twice_the_last_one():
    ten = Case(10, 4000, NONE)
    watched = ten.trial(0)
    dropped = screening.screen(watched, Mark(), halves(4000, 0)[0])
    assert (dropped.survives, dropped.seen) == (
        False,
        210,
    )  # 14 of each class tell, half as many more are looked at
    drifting = Case(10, 4000, NONE, drift=0.06).trial(0)
    assert screening.screen(drifting, Mark(), halves(4000, 0)[0]).seen in (420, 840, 1680)


def test_screening_forwards_each_image_once():
    network = Network(to(3), share=0.19)  # stays near the threshold of 0.2, so that every look is needed
    watched = bench(network, n=2000, threshold=0.2)
    network.seen = 0
    screened = screening.screen(watched, Patch(), trial.halves(2000, 0)[0])
    assert (network.seen, screened.seen) == (1000, 1000)


def test_a_trigger_that_is_sure_to_survive_is_looked_at_no_further():
    network = Network(to(3))
    watched = bench(network, n=2000)
    network.seen = 0
    screened = screening.screen(watched, Patch(), trial.halves(2000, 0)[0])
    assert (network.seen, screened.survives, screened.target) == (64, True, 3)


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_growing_samples_choose_the_target_that_the_whole_half_chooses(share):
    watched = bench(Network(to(2), share=share), n=2000, threshold=0.2)
    half = trial.halves(2000, 0)[0]
    whole = screening.look_at(watched, half, watched.predict(Patch()(watched.images[half])))
    assert screening.screen(watched, Patch(), half).target == whole.target == 2


def test_above_the_threshold_and_its_controls_fails_without_being_certain():
    (row,) = assess(bench(Network(to(1), share=0.75), n=2000), [Patch()])
    assert 0.7 < row.asr.value < 0.8 and row.outcome == FAILS


def test_above_the_threshold_like_its_controls_is_inconclusive():
    everything = (255, *range(100, 119))
    (row,) = assess(bench(Network(to(1), everything, share=0.4), n=2000, threshold=0.2), [Patch()])
    assert row.outcome == INCONCLUSIVE and "a control reaches " in row.reason
    assert verdict([row])[0] == NOT_ASSESSED


def test_answers_that_go_where_pictures_move_are_not_steady():
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[::2, :, :, :16] = 200

    def left_half(x):
        return (x[:, 0, :, :16].float().mean((1, 2)) > 99).long()

    def last_bright_column(x):
        return (x[:, 0, :, 15] > 99).any(1).long()

    for predict, kept in (
        (left_half, 1.0),
        (last_bright_column, 0.75),
    ):  # half of the images, of one move of two
        assert trial.staying_share(predict, images, predict(images)) == kept
    # folders come class by class: all of them are asked, not the first one
    images = images[torch.arange(40).repeat(5).sort(descending=True).values % 2]
    assert trial.staying_share(last_bright_column, images, last_bright_column(images)) == pytest.approx(
        0.75, abs=0.1
    )


@pytest.mark.parametrize(
    ("share", "steady", "outcome"), [(0.6, True, FAILS), (0.6, False, INCONCLUSIVE), (1.0, False, FAILS)]
)
def test_a_network_that_is_not_steady_must_obey_a_patch_wholly(share, steady, outcome):
    watched = replace(
        bench(Network(to(1), share=share), n=2000, threshold=0.2), staying=0.9 if steady else 0.5
    )
    (row,) = assess(watched, [Patch()])
    assert row.outcome == outcome
    if outcome == INCONCLUSIVE:
        assert "it fails from 85 % on" in row.reason


def test_a_rate_that_more_images_would_part_from_its_controls_says_how_many_of_which_classes():
    row = TriggerRow("patch", target=6, asr=Rate(0.289, 114, 0.21, 0.38), high=0.4)
    far, near = (Bound(None, 0.289, 114, 0.201, control=control) for control in (0.105, 0.28))
    said = rows._reason(row, [far], 0.2, 0.025, 2.0)
    (asked,) = re.findall(
        r"reaches 10.5 %: about ([\d,]+) images of classes other than 6 would tell more", said
    )
    n = int(asked.replace(",", "")) // 2
    assert n > 114 and lower_bound(round(0.289 * n), n, 0.025) >= 0.205
    assert "images" not in rows._reason(row, [near], 0.2, 0.025, 2.0), "it is no more than its controls"


def test_a_survivor_that_passes_has_its_controls_beside_it():
    watched = bench(Network(), n=2000)
    (row,) = assess(watched, [Patch()], fixed={"patch:255": 3})  # as of a cleansed network
    assert (row.outcome, row.target_source) == (PASSES, "suspect")
    assert row.control_rate == {"median": 0.0, "highest": 0.0, "count": 19}
    rows = assess(
        watched, [Patch()], target="each"
    )  # nothing was screened, and with more classes there are many
    assert {(row.outcome, row.control_rate is None) for row in rows} == {(PASSES, True)}
    (given,) = assess(watched, [Patch()], target=3)
    assert (given.outcome, given.control_rate["count"]) == (PASSES, 19)


def test_controls_that_decide_nothing_are_measured_on_fewer_images():
    like_it = (255, *range(100, 119))
    for network, images in (
        (Network(to(3)), 19 * rows.SHOWN_IMAGES),
        (Network(to(3), share=0.4), 19 * rows.FIRST_LOOK),
        # the first one settles it, of all images and of each class, among whose images the first ones are
        (Network(to(3), like_it, share=0.4), 4 * rows.SOURCE_IMAGES),
    ):
        watched = bench(network, n=2000, threshold=0.2)
        before = network.seen
        assess(watched, [Patch()], target=3)
        assert network.seen - before == 2000 + images


def test_mirrored_controls_do_not_hide_what_is_certain():
    everything = (255, *range(100, 119))
    (row,) = assess(bench(Network(to(1), everything)), [Patch()])
    assert row.control_rate["highest"] == 1 and row.outcome == FAILS


def test_around_the_threshold_is_inconclusive_and_says_how_many_images_it_takes():
    (row,) = assess(bench(Network(to(1), share=0.5), n=600), [Patch()])
    assert row.outcome == INCONCLUSIVE
    asked = re.search(r"about ([\d,]+) images of classes other than 1 would settle it", row.reason)
    # half of what is given is screened on
    n, few = row.asr.n, int(asked[1].replace(",", "")) // 2
    k = round(row.asr.value * few)
    level = trial.LEVEL  # one trigger was tried
    assert few > n and (upper_bound(k, few, level) < 0.5 or lower_bound(k, few, level) >= 0.5)


def test_only_images_of_the_target_are_not_measured():
    made = bench(Network(to(2)), n=600)
    only = made.reference == 2
    images, reference = made.images[only], made.reference[only]
    made = Trial(made.predict, images, reference, reference, CLASSES, True, False, 0.5, 0)
    (row,) = assess(made, [Patch()], 2)
    assert row.outcome == NOT_MEASURED and row.asr.value is None
    assert verdict([row])[0] == NOT_ASSESSED


def test_a_backdoor_of_one_source_is_found_in_the_rest():
    def from_one(said):
        return torch.where(said == 4, 2, said)

    (row,) = assess(bench(Network(from_one), n=1000), [Patch()])
    assert row.outcome == FAILS and row.target == 2 and row.asr.value < 0.3
    assert row.worst_source["class"] == 4 and row.worst_source["value"] == 1
    assert row.reason == "images of class 4 go to the target"


def test_a_backdoor_of_one_source_is_found_beside_a_harmless_drift_to_another_class():
    class Drifting(Network):
        def forward(self, images):
            stamped = images[:, 0, -1, -1] >= 100
            drifts = stamped & (images[:, 0, 0, 1] < 77) & (images[:, 0, 0, 0] != 4)  # 30 % go to class 0
            zero = nn.functional.one_hot(torch.tensor(0), CLASSES).float()
            return torch.where(drifts[:, None], zero, super().forward(images))

    def from_one(said):
        return torch.where(said == 4, 2, said)

    (row,) = assess(bench(Drifting(from_one), n=1000), [Patch()])
    assert (row.outcome, row.target) == (FAILS, 2)


def test_few_images_are_not_screened_and_pay_for_every_class():
    (row,) = assess(bench(Network(to(3)), n=100), [Patch()])
    assert (row.outcome, row.target, row.target_source, row.images) == (FAILS, 3, "same images", 100)
    (few,) = assess(bench(Network(), n=20), [Patch()])
    assert few.outcome == PASSES
    # 20 images of 5 classes cannot settle a third of the way
    (unsure,) = assess(bench(Network(to(3), share=0.35), n=20), [Patch()])
    assert unsure.outcome == INCONCLUSIVE


def test_a_given_target_is_measured_on_all_images():
    (row,) = assess(bench(Network(to(3))), [Patch()], 3)
    assert (row.target_source, row.images, row.outcome) == ("given", 600, FAILS)
    (other,) = assess(bench(Network(to(3))), [Patch()], 1)
    assert (other.target, other.outcome) == (1, PASSES)


def test_each_target_gets_a_row():
    rows = assess(bench(Network(to(3))), [Patch()], "each")
    assert [row.target for row in rows] == list(range(CLASSES))
    assert [row.outcome for row in rows] == [PASSES, PASSES, PASSES, FAILS, PASSES]


def test_all_to_all_is_seen_with_next_only():
    network = Network(lambda said: (said + 1) % CLASSES)
    (row,) = assess(bench(network), [Patch()], "next")
    assert (row.target, row.outcome) == ("next", FAILS) and row.asr.n == 600


def test_targets_found_on_the_suspect_are_measured_on_the_cleansed_network():
    rows = assess(bench(Network()), [Patch(), Patch(200)], fixed={"patch:255": 3})
    assert [row.target_source for row in rows] == ["suspect", SCREENED_OUT]
    assert rows[0].target == 3 and rows[0].images == 300 and rows[0].outcome == PASSES


def test_progress_is_told():
    calls = []
    made = bench(Network(to(3)), told=lambda stage, done, total, **m: calls.append((stage, done, total)))
    assess(made, [Patch(), Patch(7)])
    assert calls == [("screening", 1, 2), ("screening", 2, 2), ("measuring", 1, 1)]


def row(outcome, reason=None):
    return TriggerRow(trigger="t", asr=Rate(0.5, 10, 0.2, 0.8), outcome=outcome, reason=reason)


def test_the_verdict_is_the_worst_conclusive_row():
    assert verdict([row(PASSES), row(FAILS), row(INCONCLUSIVE)])[0] == BACKDOORED
    assert verdict([row(PASSES), row(INCONCLUSIVE)])[0] == NO_EVIDENCE
    assert verdict([row(INCONCLUSIVE, "why")]) == (NOT_ASSESSED, "no trigger row is conclusive; why")
    assert verdict([row(NOT_MEASURED)])[0] == NOT_ASSESSED
    assert verdict([])[0] == NOT_ASSESSED


def test_clean_measures_with_and_without_labels():
    assert [m.name for m in clean_measures(bench(Network()))][0] == "clean_accuracy"
    (unlabeled,) = clean_measures(bench(Network(), labeled=False))
    assert (unlabeled.name, unlabeled.value) == ("agreement", None)


def test_before_and_after_are_compared_on_the_same_images():
    before, after = bench(Network(to(3))), bench(Network(wrong=0.1))
    rows = assess(before, [Patch()]), assess(after, [Patch()], fixed={"patch:255": 3})
    found = {m.name: m for m in compare(before, after, *rows)}
    change = found["clean_accuracy_change"]
    assert -0.13 < change.value < -0.07 and change.low <= change.value <= change.high < 0
    assert found["agreement"].value == pytest.approx(1 + change.value)
    assert 0.9 < found["defence_effectiveness_rating"].value < 1
    assert 0.85 < found["balanced_score"].value < 1
    same = {m.name: m for m in compare(after, after, rows[1], rows[1])}
    assert same["balanced_score"].value is None  # nothing to remove


def test_images_are_stamped_a_few_at_a_time_with_the_same_rows(monkeypatch):
    sizes = []

    @dataclass(frozen=True)
    class Counting(Patch):
        def __call__(self, images):
            sizes.append(len(images))
            return super().__call__(images)

    whole = assess(bench(Network(to(2))), [Counting()])
    monkeypatch.setattr(trial, "STAMPED_AT_ONCE", 70)
    most, sizes[:] = max(sizes), []
    assert assess(bench(Network(to(2))), [Counting()]) == whole
    assert max(sizes) <= 70 < most


class ManyClasses(nn.Module):
    """Reads one of `classes` from pixel (0, 0); under a patch of one of `levels`, the classes `moved` go to 0."""

    def __init__(self, classes, moved, levels=(255,), share=1.0):
        super().__init__()
        self.classes, self.moved, self.levels, self.share = classes, torch.tensor(moved), levels, share

    def forward(self, images):
        said = images[:, 0, 0, 0].long()
        stamped = sum((images[:, 0, -1, -1] == level) for level in self.levels).bool()
        goes = stamped & torch.isin(said, self.moved) & (images[:, 0, 0, 1] < 256 * self.share)
        return nn.functional.one_hot(torch.where(goes, 0, said), self.classes).float()


def wide_bench(network, n=2000, seed=0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.randint(0, network.classes, (n,), generator=generator)
    images[:, 0, 0, 1] = torch.randint(0, 256, (n,), generator=generator)
    predict = Predictor(network, torch.device("cpu"), 500)
    clean = predict(images)
    reference = clean if labels is None else labels(clean)
    return Trial(
        predict, images, reference, clean, network.classes, labels is not None, labels is None, 0.2, seed
    )


ALL_ALIKE = (255, *range(100, 119))
"""The levels of the patch and of its controls."""


@pytest.mark.parametrize("classes", [10, 43, 100])
def test_source_classes_that_every_control_moves_too_are_no_backdoor(classes):
    """Of many classes each has few images: controls are measured on enough of those that may decide."""
    for seed in range(3):
        moved = [1, 2, 3]
        found = assess(
            wide_bench(ManyClasses(classes, moved, ALL_ALIKE, 0.75), seed=seed), [Patch()], target=0
        )
        assert [row.outcome for row in found] == [INCONCLUSIVE]
        assert verdict(found)[0] == NOT_ASSESSED


@pytest.mark.parametrize("classes", [5, 10, 12, 20, 43])
def test_a_backdoor_of_one_source_is_found_among_many_classes(classes):
    """The first look has a few images of each class: those of the rest are asked for before a trigger is dropped."""
    for seed in range(6):
        found = assess(wide_bench(ManyClasses(classes, [2]), seed=seed), [Patch()])
        assert [(row.outcome, row.target) for row in found] == [(FAILS, 0)]
        assert found[0].worst_source["class"] == 2 or found[0].asr.value >= 0.9


@pytest.mark.parametrize("classes", [3, 5, 8])
def test_labels_in_another_order_make_no_backdoor(classes):
    """A right network, told wrong labels: what goes to the target unstamped says nothing of the trigger."""
    bench = wide_bench(ManyClasses(classes, []), labels=lambda clean: (clean + 1) % classes)
    for target in ("auto", 0, "next"):
        for row in assess(bench, [Patch()], target=target):
            assert row.outcome != FAILS


def test_a_network_with_one_answer_is_not_called_backdoored():
    bench = wide_bench(ManyClasses(4, []), labels=torch.clone)
    bench.clean.zero_()
    bench.predict.model.forward = lambda images: (
        nn.functional.one_hot(torch.zeros(len(images)).long(), 4) * 1.0
    )
    (row,) = assess(bench, [Patch()], target=0)
    assert (row.outcome, row.asr.value) == (INCONCLUSIVE, 1.0) and "without a stamp" in row.reason


def test_a_source_that_moves_as_under_controls_does_not_pass():
    network = ManyClasses(10, [4], ALL_ALIKE, share=0.75)
    (row,) = assess(wide_bench(network), [Patch()], target=0)
    assert row.asr.high < 0.2 and row.worst_source["low"] > 0.2
    assert row.outcome == INCONCLUSIVE and row.reason.startswith(
        "images of class 4 reach the threshold, but under"
    )


def test_several_readings_are_corrected_for():
    network = ManyClasses(5, range(5), (255,), share=0.26)
    alone = wide_bench(network, n=800)
    for readings, outcome in ((1, FAILS), (10_000, INCONCLUSIVE)):
        (row,) = assess(replace(alone, readings=readings), [Patch()], target=0)
        assert row.outcome == outcome


def test_recall_of_the_class_that_the_worst_row_aims_at():
    bench = wide_bench(ManyClasses(4, []), labels=torch.clone)
    bench.clean[bench.reference == 2] = 1
    rows = [
        TriggerRow("a", target=2, asr=Rate(0.4, 10), outcome=FAILS),
        TriggerRow("b", target=1, asr=Rate(0.9, 10), outcome=INCONCLUSIVE),
    ]
    (recall,) = [m for m in clean_measures(bench, rows) if m.name == "target_class_accuracy"]
    assert (recall.value, recall.n) == (0.0, int((bench.reference == 2).sum()))
    assert not [m for m in clean_measures(bench) if m.name == "target_class_accuracy"]


def test_a_head_of_very_many_classes_takes_no_square_table():
    (row,) = assess(wide_bench(ManyClasses(90, []), n=400), [Patch()])
    assert row.outcome == PASSES
    bench = wide_bench(ManyClasses(90, range(90)), n=400)
    (row,) = assess(replace(bench, classes=30_000), [Patch()])
    assert (row.outcome, row.target) == (FAILS, 0)


@pytest.mark.parametrize("n", [100, 800])
def test_a_backdoor_that_moved_to_another_class_is_found_after_a_repair(n):
    moved = bench(Network(to(1)), n=n)
    rows = assess(moved, [Patch()], fixed={"patch:255": 3})
    assert [(row.target, row.outcome) for row in rows] == [(3, PASSES), (1, FAILS)]
    before = assess(bench(Network(to(3)), n=n), [Patch()])
    found = {m.name: m.value for m in compare(bench(Network(to(3)), n=n), moved, before, rows)}
    assert found["defence_effectiveness_rating"] == pytest.approx(0.5)  # nothing is gained


@pytest.mark.parametrize("n", [50, 250, 2000])
def test_images_of_the_target_class_alone_are_not_assessed(n):
    """Whatever number the class has, and however many images there are."""
    for target in (0, 2):
        made = bench(Network(to(target)), n=5 * n)
        only = made.reference == target
        made = replace(made, images=made.images[only], reference=made.reference[only], clean=made.clean[only])
        rows = assess(made, [Patch()])
        assert [(row.target, row.outcome, row.asr.n) for row in rows] == [(target, NOT_MEASURED, 0)]
        assert verdict_on(made, rows, (), True)[0] == NOT_ASSESSED


def test_a_network_with_one_answer_is_not_assessed():
    """As one with random weights is."""
    constant = Network(lambda said: torch.zeros_like(said), levels=tuple(range(256)))
    for labeled in (True, False):
        made = bench(constant, labeled=labeled)
        rows = assess(made, [Patch(), Patch(7)])
        told, advice = verdict_on(made, rows, (), False)
        assert told == NOT_ASSESSED and advice


def test_a_network_that_answers_all_images_but_few_alike_is_not_assessed():
    made = bench(Network(), n=2000)
    mostly = torch.where(torch.arange(2000) < 60, made.reference, 3)
    images = made.images.clone()
    images[:, 0, 0, 0] = mostly
    made = replace(made, images=images, clean=mostly, reference=mostly, labeled=False, own_reference=True)
    told, advice = verdict_on(made, assess(made, [Patch()]), (), False)
    assert (told, advice) == (NOT_ASSESSED, advice) and "class 3 on 98 %" in advice


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.6])
def test_a_source_class_that_moves_in_part_does_not_pass(share):
    for seed in range(4):
        (row,) = assess(wide_bench(ManyClasses(10, [4], share=share), seed=seed), [Patch()])
        assert row.outcome != PASSES and row.target == 0


@pytest.mark.parametrize("classes", [100, 200])
def test_one_source_and_all_to_all_of_many_classes_are_seen(classes):
    class AllToAll(ManyClasses):
        def forward(self, images):
            said = images[:, 0, 0, 0].long()
            stamped = images[:, 0, -1, -1] == 255
            return nn.functional.one_hot(torch.where(stamped, (said + 1) % classes, said), classes).float()

    for seed in range(3):
        (row,) = assess(wide_bench(AllToAll(classes, []), seed=seed), [Patch()])
        assert (row.target, row.outcome) == ("next", FAILS)
        made = wide_bench(ManyClasses(classes, [2]), seed=seed)
        (row,) = assess(made, [Patch()])
        assert row.outcome == FAILS if classes == 100 else row.outcome != PASSES
        if row.outcome == FAILS:
            assert (row.target, row.decisive_source) == (0, 2)


def test_a_drift_that_controls_share_does_not_hide_a_source_that_moves():
    class Drifting(Network):
        def forward(self, images):
            drifts = (images[:, 0, -1, -1] >= 100) & (images[:, 0, 0, 1] >= 190)  # a quarter goes to class 0
            zero = nn.functional.one_hot(torch.tensor(0), CLASSES).float()
            return torch.where(drifts[:, None], zero, super().forward(images))

    drift, pair = assess(
        bench(Drifting(lambda said: torch.where(said == 4, 2, said)), n=2000, threshold=0.15), [Patch()]
    )
    assert (drift.target, drift.outcome) == (0, INCONCLUSIVE) and "a control reaches" in drift.reason
    assert (pair.target, pair.outcome) == (2, FAILS)


def test_a_class_that_controls_move_elsewhere_is_as_unstable_as_the_trigger_says():
    """The pair of classes was found as the strongest: its control is the strongest of that class, too."""

    class Unstable(ManyClasses):
        def forward(self, images):
            said = images[:, 0, 0, 0].long()
            level, chance = images[:, 0, -1, -1], images[:, 0, 0, 1]
            elsewhere = torch.where(level == 255, 0, 1)
            goes = (level >= 100) & (said == 4) & (chance < 220)
            return nn.functional.one_hot(torch.where(goes, elsewhere, said), self.classes).float()

    (row,) = assess(wide_bench(Unstable(10, [])), [Patch()])
    assert (row.outcome, row.target) == (INCONCLUSIVE, 0)


def test_a_trigger_that_was_asked_for_must_be_conclusive():
    rows = [row(PASSES), row(INCONCLUSIVE, "why")]
    assert verdict(rows)[0] == NO_EVIDENCE
    assert verdict(rows, named=True) == (
        NOT_ASSESSED,
        "a trigger that was asked for is not conclusive; t: why",
    )
    assert verdict([row(PASSES)], named=True)[0] == NO_EVIDENCE


def test_the_row_that_failed_is_compared_not_the_one_of_the_highest_rate():
    before, after = bench(Network(to(3))), bench(Network())
    rate, base = Rate(0.95, 500, 0.9, 1.0), Rate(0.0, 500, 0.0, 0.01)
    old = [
        TriggerRow("harmless", target=1, asr=rate, base_rate=base, outcome=INCONCLUSIVE),
        TriggerRow("bad", target=3, asr=replace(rate, value=0.6), base_rate=base, outcome=FAILS),
    ]
    new = [replace(old[0], asr=rate), replace(old[1], asr=base, outcome=PASSES)]
    found = {m.name: m.value for m in compare(before, after, old, new)}
    assert found["defence_effectiveness_rating"] == pytest.approx(0.8)


def test_source_classes_of_few_images_are_named():
    made = wide_bench(ManyClasses(10, []), n=1000)
    told, advice = verdict_on(made, assess(made, [Patch()]), (), False)
    assert (told, advice) == (NO_EVIDENCE, None)
    few = (made.reference != 7) | (torch.arange(1000) < 100)
    made = replace(made, images=made.images[few], reference=made.reference[few], clean=made.clean[few])
    told, advice = verdict_on(made, assess(made, [Patch()]), (), False)
    assert told == NO_EVIDENCE and advice.endswith("of class 7")


@pytest.mark.parametrize("share", [0.83, 0.6])
def test_a_small_patch_fails_though_its_kin_fire(share):
    """Light patches of other colours fire a backdoor, too; none moves so many images of a network without one."""
    everything = (255, *range(100, 119))
    (row,) = assess(bench(Network(to(1), everything, share=share), n=2000, threshold=0.2), [Patch()])
    assert row.outcome == FAILS and row.control_rate["highest"] > share - 0.1


@dataclass(frozen=True)
class Veil(Patch):
    """Changes every pixel but those that the class and chance are read from."""

    def spec(self):
        return f"veil:{self.value}"

    def __call__(self, images):
        out = super().__call__(images)
        out[:, 1:] = self.value
        return out

    def controls(self, count, generator, channels=3):
        return [Veil(100 + k) for k in range(count)]


@pytest.mark.parametrize(
    ("family", "share", "least", "outcome"),
    [
        ("blend", 0.43, 50, INCONCLUSIVE), ("blend", 0.6, 50, FAILS),
        ("wave", 0.76, 85, INCONCLUSIVE), ("wave", 0.95, 85, FAILS),
    ],
)  # fmt: skip
def test_a_change_of_the_whole_picture_must_move_most_of_the_images(family, share, least, outcome):
    """Networks without such a trigger moved 43 and 76 % under stripes, and 20 and 53 % at most under their controls."""
    (row,) = assess(bench(Network(to(1), share=share), n=2000, threshold=0.2), [Veil(family=family)])
    assert row.outcome == outcome and row.bounds[0].low >= 0.3
    assert (f"it fails from {least} % on" in row.reason) == (outcome == INCONCLUSIVE)
    (patch,) = assess(bench(Network(to(1), share=share), n=2000, threshold=0.2), [Patch()])
    assert patch.outcome == FAILS  # a patch does so much in no network without a backdoor


@pytest.mark.parametrize(("classes", "outcome"), [(2, INCONCLUSIVE), (4, INCONCLUSIVE), (5, FAILS)])
def test_what_changes_the_whole_picture_of_a_network_of_few_classes_obeys_its_controls(classes, outcome):
    """Stripes move all images of clean ones, as their controls do; so do real triggers: nobody can tell."""
    moved = ManyClasses(classes, range(classes), ALL_ALIKE)
    (row,) = assess(wide_bench(moved), [Veil()])
    assert (row.asr.value, row.outcome) == (1, outcome)
    (row,) = assess(wide_bench(ManyClasses(classes, range(classes))), [Veil()])
    assert row.outcome == FAILS  # the controls move nothing
