"""Detectors of a scan: which are run, and that what one lacks does not end the scan."""

from pathlib import Path

import pytest

from bdclean import registry
from bdclean.errors import UsageError
from bdclean.progress import quiet
from bdclean.record.run import RunRecord
from bdclean.runs.detecting import choose_detectors
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
UNLABELED = SAMPLES / "images" / "unlabeled"


def scanned(name="signs-clean.safetensors", kind="encoder", limit=120, triggers=("badnets",), **more):
    inputs = Inputs(data=UNLABELED, kind=kind, device="cpu", precision="fp32", pictures=False, limit=limit)
    return scan(SAMPLES / name, inputs, triggers=triggers, tell=quiet, **more)


def test_the_quick_ones_are_run_unasked_and_the_others_are_listed():
    chosen, left = choose_detectors((), "classifier")
    assert list(chosen) == ["mm-bd", "stripes"]
    assert [(each.what, each.reason) for each in left] == [
        (f"detector {name}", f"not asked for: --detector {name} runs it")
        for name in ("all-to-all", "filters", "inversion", "neural-cleanse", "patches", "warps")
    ]
    chosen, left = choose_detectors((), "encoder")
    assert not chosen and [each.what for each in left] == [
        "detector decree",
        "detector filters",
        "detector inversion",
        "detector patches",
    ]


def test_those_that_are_asked_for_are_run_instead_once_each():
    chosen, left = choose_detectors(("inversion", "inversion"), "classifier")
    assert list(chosen) == ["inversion"] and [each.what for each in left] == [
        f"detector {name}"
        for name in ("all-to-all", "filters", "mm-bd", "neural-cleanse", "patches", "stripes", "warps")
    ]
    assert type(chosen["inversion"]) is registry.load(registry.DETECTORS, "inversion")


def test_a_detector_of_the_other_kind_is_wrong_usage_before_images_are_read():
    with pytest.raises(UsageError, match="decree does not work on classifiers"):
        scanned(kind="classifier", detectors=("decree",), limit=1)


def test_what_a_detector_lacks_is_listed_and_the_scan_goes_on():
    record = scanned(detectors=("inversion",))
    assert record.outcome == "ran" and record.triggers
    (said,) = (each.reason for each in record.skipped if each.what == "detector inversion")
    assert said == "120 images are too few for 16 clusters: give 160 or more."
    assert not {"inversion", "crowding"} & {finding.detector for finding in record.findings}
    (said,) = (each.reason for each in record.skipped if each.what == "whitened features")
    assert said.startswith("60 images in a half are too few")


@pytest.mark.slow
def test_findings_and_pictures_are_in_the_record_and_decide_nothing():
    quick = scanned(kind="classifier")
    assert [finding.detector for finding in quick.findings] == ["mm-bd", "stripes"]
    assert quick.precision == "fp32" and quick.verdict == "no-evidence"
    for finding, among in zip(quick.findings, quick.calibration, strict=True):
        assert finding.detector == among.detector and finding.p_value == among.p_value
        assert (
            finding.score == pytest.approx(among.score) and f"Of {len(among.scores)} clean" in finding.reason
        )
    record = scanned(limit=400, detectors=("decree",), triggers=("badnets:size=3",))
    (finding,) = (each for each in record.findings if each.detector == "decree")
    assert finding.threshold == 0.1 and finding.verdict == "undecided" and record.verdict == "no-evidence"
    shown = [picture for picture in record.pictures if picture.role == "mask"]
    assert len(shown) == (finding.score is not None) and all(picture.png_base64 for picture in shown)
    assert record.calibration is None and "Not calibrated" in finding.reason
    for each in (record, quick):
        assert RunRecord.from_json(each.to_json()) == each


@pytest.mark.slow
def test_a_scan_without_labels_tells_of_whitened_features():
    record = scanned(limit=400, triggers=("badnets:size=3", "blend:source=noise,alpha=0.2"))
    found = {finding.detector: finding for finding in record.findings}
    assert found["crowding"].verdict == "no-outlier" and found["crowding"].score == 0
    asked = [f for f in record.findings if f.detector == "pull"]
    assert len([f for f in record.findings if f.detector == "whitened-distance"]) == len(asked)
    assert all(0 <= f.score <= 1 for f in record.findings if f.detector == "whitened-distance")
