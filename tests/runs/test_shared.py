"""Several models of one command read their images once, and nobody can tell from their records."""

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bdclean.data.decode import Resize
from bdclean.data.loading import load_images
from bdclean.data.shared import Pixels, Shared
from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.progress import quiet
from bdclean.runs.options import Inputs
from bdclean.runs.scan import scan

SAMPLES = Path(__file__).parents[2] / "sample_models"
SIZE = (12, 12)


class Told:
    """Counts the images that were decoded, by what loading tells."""

    def __init__(self):
        self.images = 0

    def __call__(self, stage, done, total, **measures):
        if stage == "images" and done == total:
            self.images += total


def folders(root, names=("ant", "bee", "cat"), each=8):
    draw = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(each):
            Image.fromarray(draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(
                root / name / f"{name}{k}.png"
            )
    return root


def same(one, other):
    assert torch.equal(one.images, other.images) and one.digest == other.digest
    for field in ("classes", "paths", "skipped", "warnings", "labels_source"):
        assert getattr(one, field) == getattr(other, field), field
    assert (one.labels is None) == (other.labels is None)
    assert one.labels is None or torch.equal(one.labels, other.labels)


ASKED = [
    {},
    {"limit": 9},
    {"limit": 9, "seed": 1},
    {"channels": 1},
    {"resize": Resize(0.5, "bicubic")},
    {"head_classes": 3},
    {"head_classes": 4, "claimed": ("ant", "bee", "cat", "dog")},
    {"head_classes": 7},
    {"labeled": True},
    {"labeled": True, "classes": ("cat", "bee", "ant")},
]


@pytest.mark.parametrize("most", [0, 24 * 3 * 12 * 12, 10**9])
def test_what_is_shared_is_what_is_read_alone(tmp_path, most):
    root = folders(tmp_path / "images")
    (root / "bee" / "bee3.png").write_bytes(b"no picture")
    shared = Shared(most)
    for _ in range(2):
        for size in (SIZE, (9, 10)):
            for asked in ASKED:
                same(load_images(root, size, shared=shared, **asked), load_images(root, size, **asked))
                assert shared.held <= max(most, 24 * 3 * 12 * 12)


def test_one_size_is_decoded_once_whatever_the_heads_are(tmp_path):
    root, told, shared = folders(tmp_path / "images"), Told(), Shared(10**9)
    for head in (None, 3, 4, 7):
        for claimed in (None, ("ant", "bee", "cat")):
            load_images(root, SIZE, head_classes=head, claimed=claimed, tell=told, shared=shared)
    assert told.images == 24
    first, second = (load_images(root, SIZE, head_classes=k, shared=shared) for k in (3, 7))
    assert first.images.data_ptr() == second.images.data_ptr() and first.labels_source != second.labels_source
    load_images(root, (8, 8), tell=told, shared=shared)
    load_images(root, SIZE, seed=1, limit=5, tell=told, shared=shared)
    assert told.images == 24 + 24 + 5


def test_a_csv_that_leaves_images_out_draws_others(tmp_path):
    root, shared = folders(tmp_path / "images"), Shared(10**9)
    (tmp_path / "some.csv").write_text(
        "\n".join(["file,label", *(f"ant/ant{k}.png,{k % 2}" for k in range(8))])
    )
    asked = {"limit": 6, "classes": tmp_path / "some.csv", "head_classes": 2}
    everything = load_images(root, SIZE, limit=6, shared=shared)
    some = load_images(root, SIZE, shared=shared, **asked)
    same(some, load_images(root, SIZE, **asked))
    assert {path.split("/")[0] for path in some.paths} == {"ant"} and some.paths != everything.paths


def test_the_set_that_was_used_longest_ago_goes_first(tmp_path):
    root, told = folders(tmp_path / "images"), Told()
    each = 24 * 3 * 12 * 12
    shared = Shared(2 * each)
    for size in ((12, 12), (12, 11), (12, 12), (11, 12)):  # the last takes the place of the second
        load_images(root, size, tell=told, shared=shared)
        assert shared.held <= 2 * each
    assert told.images == 3 * 24
    load_images(root, (12, 12), tell=told, shared=shared)
    assert told.images == 3 * 24
    load_images(root, (12, 11), tell=told, shared=shared)
    assert told.images == 4 * 24


def test_images_of_many_models_do_not_pile_up(tmp_path):
    root, shared, seen = folders(tmp_path / "images"), Shared(100_000), []
    for k in range(40):
        images = load_images(root, (8, 8 + k), head_classes=k + 2, shared=shared).images
        seen.append((weakref.ref(images), images.numel()))
    del images
    gc.collect()
    alive = sum(size for found, size in seen if found() is not None)
    assert 0 < alive == shared.held <= 100_000


def test_room_is_made_before_a_set_is_decoded():
    shared, held = Shared(100), []

    def decode(size):
        held.append(shared.held)
        images = torch.zeros(size, 1, 1, 1, dtype=torch.uint8)
        return Pixels(images, np.arange(size), (), (), size, False)

    for size in (60, 30, 50, 400, 10):
        shared.pixels(size, size, lambda size=size: decode(size))
    assert held == [0, 60, 30, 0, 0] and shared.held == 10


def test_what_cannot_be_read_is_refused_to_each_and_kept_for_none(tmp_path):
    root, shared = folders(tmp_path / "images"), Shared(10**9)
    (root / "ant" / "ant0.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(Refused, match="--strict"):
            load_images(root, SIZE, strict=True, shared=shared)
        with pytest.raises(Refused, match="does not exist"):
            load_images(tmp_path / "nowhere", SIZE, shared=shared)
    assert shared.held == 0
    assert len(load_images(root, SIZE, shared=shared)) == 23


def told_of(record):
    """A record as JSON, without times."""
    found = dataclasses.asdict(dataclasses.replace(record, started=None, seconds=None))
    return json.dumps(found, sort_keys=True)


@pytest.mark.slow
def test_scans_that_share_images_end_in_the_same_records(tmp_path):
    """Networks of several sizes and normalisations; once the images are gone, too: then none of them was read again."""
    signs, white = SAMPLES / "signs-badnets.safetensors", tmp_path / "white.safetensors"
    checkpoint = Checkpoint.read(signs)
    metadata = {**checkpoint.metadata, "bdclean.preprocess": "half", "bdclean.input_size": "48"}
    save_file(load_file(signs), white, metadata)
    images = shutil.copytree(SAMPLES / "images" / "labeled", tmp_path / "images")
    inputs = Inputs(data=images, limit=128, device="cpu", pictures=True)
    cases = [
        (signs, inputs),
        (white, inputs),
        (signs, dataclasses.replace(inputs, preprocess="mean=0.5/0.5/0.5,std=0.5/0.5/0.5,size=24/24")),
    ]
    shared, told = Shared(), Told()

    def look(model, inputs, shared, tell):
        return told_of(scan(model, inputs, triggers=("badnets",), tell=tell, shared=shared))

    alone = [look(model, inputs, None, quiet) for model, inputs in cases]
    assert [look(model, inputs, shared, told) for model, inputs in cases] == alone
    assert told.images < len(cases) * 128
    shutil.rmtree(images)
    assert look(*cases[0], shared, quiet) == alone[0], "nothing is read again, and nothing was written to"
