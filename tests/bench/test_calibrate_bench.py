"""The numbers of clean networks that a bench ships."""

import json
from pathlib import Path

from bdclean.bench.calibrate import Known, Score, shipped
from bdclean.detectors import calibration


def test_numbers_of_detectors_that_were_not_asked_stay():
    before = calibration.table()[0]
    asked, left = "warps", next(name for name in before.scores if name != "warps")
    known = [Known(name, Path(), Path(), before.family, None) for name in (before.network, "new")]
    score = Score(10, 32, 0.12345, False, "", 1.0)
    *others, first, new = json.loads(shipped(known, {each.name: {asked: score} for each in known}))
    assert [row["network"] for row in others] == [clean.network for clean in calibration.table()[1:]]
    assert first["scores"] == dict(before.scores) | {asked: 0.1235} and left in first["scores"]
    assert new["scores"] == {asked: 0.1235} and (new["classes"], new["side"]) == (10, 32)
