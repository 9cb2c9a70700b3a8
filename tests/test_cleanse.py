"""The use case behind `cleanse`, on a shipped model."""

from pathlib import Path

from bdclean.cleanse import cleanse
from bdclean.inputs import Inputs
from bdclean.training import quiet

SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"


def test_a_destroyed_network_is_never_handed_over_without_a_word(tmp_path):
    """All weights re-drawn and next to no training: no trigger works on it any more, and nothing else either."""
    record = cleanse(
        SAMPLES / "signs-badnets.safetensors",
        Inputs(data=SAMPLES / "images" / "unlabeled", limit=300, precision="fp32", device="cpu"),
        recipe="bcu",
        settings={"ratios": "1", "head_ratio": "1", "epochs": "0.1"},
        triggers=("badnets:size=3",),
        out=tmp_path / "out.safetensors",
        tell=quiet,
    )
    agreement = [m for m in record.measures if m.name == "agreement"]
    assert len(agreement) == 1 and agreement[0].value < 0.5
    assert any("damaged" in warning for warning in record.warnings)
    state = tmp_path / "out.safetensors.resume.safetensors"
    assert state.exists()  # whoever writes the record deletes it: until then it can be made again
