"""What `patches` finds on encoders, one of which has a square that makes all images look alike."""

import pytest
import torch
from recipes.test_inoculate_encoder import PLACES, cornered, encoder

from bdclean.detectors.patches_encoder import WORTH, PatchesEncoder
from bdclean.errors import Refused, UsageError
from bdclean.training.run import Precision, Run


def looked(network, seed=0, images=PLACES, **settings):
    return PatchesEncoder(**settings)(network, None, images, Run(torch.device("cpu"), Precision(), seed))


@pytest.mark.parametrize("seed", range(2))
def test_a_white_square_that_makes_all_look_alike_is_found(seed):
    found = looked(cornered(), seed)
    (finding,), (picture,) = found.findings, found.pictures.values()
    assert finding["verdict"] == "outlier" and finding["score"] >= WORTH
    assert picture[:, -6:, -6:].mean() > 0.65  # of grey 0.5
    assert found.statistic is None and not found.outliers


def test_where_there_is_none_what_hides_much_is_held_against_its_kin():
    found = looked(encoder(), rounds=3)
    assert found.findings[0]["verdict"] == "no-outlier" and found.findings[0]["score"] < WORTH


def test_it_needs_images_and_a_round():
    with pytest.raises(Refused, match="99 images are too few: give 100 or more"):
        looked(encoder(), images=PLACES[:99])
    with pytest.raises(UsageError, match="rounds are positive"):
        PatchesEncoder(rounds=0)
