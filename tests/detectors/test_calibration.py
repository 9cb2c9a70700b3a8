"""Clean networks' scores: which are held against a network, and what follows from its rank among them."""

import math

import pytest

from bdclean import registry
from bdclean.detectors import calibration
from bdclean.detectors.patches import WORTH
from bdclean.runs.detecting import LEVEL, LEVEL_UNASKED, rank


def test_the_p_value_is_the_rank_among_clean_networks_and_none_of_too_few():
    scores = [float(k) for k in range(19)]
    assert calibration.p_value(18.5, scores) == 1 / 20
    assert calibration.p_value(18.0, scores) == 2 / 20, "one that is as large counts"
    assert calibration.p_value(-1.0, scores) == 1.0
    assert calibration.p_value(1e9, scores[:18]) is None


def test_networks_of_few_classes_and_large_images_are_kinds_of_their_own():
    kinds = {calibration.kind(*each) for each in ((2, 32), (10, 32), (10, 224))}
    assert len(kinds) == 3
    assert calibration.kind(4, 32) == calibration.kind(2, 64)
    assert calibration.kind(5, 32) == calibration.kind(43, 28)
    assert "up to 4 classes" in calibration.kind_said(2, 32) and "beyond" in calibration.kind_said(2, 224)


def test_what_a_patch_does_is_held_against_networks_of_any_number_of_classes():
    assert calibration.kind(2, 32, "patches") == calibration.kind(43, 32, "patches")
    assert calibration.kind(2, 32, "patches") != calibration.kind(2, 224, "patches")
    assert calibration.kind_said(2, 32, "patches") == "any number of classes, images of 16 to 64 pixels"
    assert calibration.matching("patches", 2, 32) == calibration.matching("patches", 10, 32)
    assert len(calibration.matching("patches", 2, 32)) >= 40 > len(calibration.matching("stripes", 2, 32))
    assert max(calibration.matching("patches", 2, 32)) < WORTH / 2


def test_what_is_shipped_is_of_forty_clean_networks_and_more_with_finite_numbers():
    table = calibration.table()
    assert len(table) >= 40 and len({clean.network for clean in table}) == len(table)
    for clean in table:
        assert set(clean.scores) <= set(registry.DETECTORS)
        assert all(score is None or math.isfinite(score) for score in clean.scores.values())


@pytest.mark.parametrize("detector", ["mm-bd", "stripes", "inversion", "filters", "warps"])
def test_detectors_are_calibrated_for_ten_classes(detector):
    assert len(calibration.matching(detector, 10, 32)) >= calibration.LEAST_MATCHING


def test_a_network_that_is_left_out_is_not_held_against_itself():
    clean = next(each for each in calibration.table() if each.scores.get("stripes") is not None)
    kind = (clean.classes, clean.side)
    every = calibration.matching("stripes", *kind)
    others = calibration.matching("stripes", *kind, without=clean.network)
    assert sorted([*others, clean.scores["stripes"]]) == every == sorted(every)


def test_ranks_are_corrected_over_the_detectors_and_the_readings():
    (alone,) = rank({"stripes": 99.0}, (10, 32)).values()
    assert alone.p_value == alone.corrected == 1 / (1 + len(alone.scores))
    both = rank({"stripes": 99.0, "mm-bd": -1.0}, (10, 32))
    assert both["stripes"].corrected == 2 * alone.p_value and both["mm-bd"].corrected == 1.0
    assert rank({"stripes": 99.0}, (10, 32), readings=2)["stripes"].corrected == 2 * alone.p_value


def test_a_detector_without_clean_networks_of_this_kind_has_no_rank():
    assert rank({"stripes": 99.0, "mm-bd": None}, (10, 224)) == {}


def test_no_clean_network_is_suspicious_unasked():
    """The least p-value that so many can give is above the level: an unasked detector informs, and is quiet."""
    for clean in calibration.table():
        ranked = rank(
            {name: clean.scores[name] for name in ("mm-bd", "stripes")},
            (clean.classes, clean.side), without=clean.network,
        )  # fmt: skip
        assert all(each.corrected is None or each.corrected > LEVEL_UNASKED for each in ranked.values())
    assert LEVEL_UNASKED < LEVEL
