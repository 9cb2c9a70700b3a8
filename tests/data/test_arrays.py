"""Images in .npz and .parquet: every usual shape and type, labels beside them, nothing unpickled."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdclean.data.loading import load_images
from bdclean.errors import Refused

SIZE = (8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
EXPECTED = PIXELS.transpose(0, 3, 1, 2)


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


# --- npz ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        PIXELS,
        np.ascontiguousarray(EXPECTED),
        EXPECTED.reshape(30, -1),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float32),
        PIXELS.astype(np.float16),
        PIXELS / 255,
        (EXPECTED / 255).astype(np.float32).copy(),
        np.concatenate([PIXELS, PIXELS[..., :1]], axis=3),
        PIXELS.astype(">u2"),
    ],
    ids=[
        "nhwc",
        "nchw",
        "flat",
        "int64",
        "float255",
        "half255",
        "float1",
        "nchw-float1",
        "alpha",
        "big-endian",
    ],
)
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_every_usual_shape_and_type_gives_the_same_pixels(tmp_path: Path, images: np.ndarray, write) -> None:
    write(tmp_path / "a.npz", images=images, labels=np.arange(30) % 3)
    found = load_images(tmp_path / "a.npz", SIZE, head_classes=3)
    assert np.array_equal(found.images.numpy(), EXPECTED)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2] * 10
    some = load_images(tmp_path / "a.npz", SIZE, limit=7, seed=2)
    assert np.array_equal(some.images.numpy(), EXPECTED[[int(path) for path in some.paths]])


@pytest.mark.parametrize("images", [PIXELS[..., 0], PIXELS[..., :1], PIXELS[..., 0].reshape(30, -1)])
def test_grey_arrays_become_rgb(tmp_path: Path, images: np.ndarray) -> None:
    found = load_images(save(tmp_path / "a.npz", x=images), SIZE)
    assert np.array_equal(found.images.numpy(), np.repeat(EXPECTED[:, :1], 3, axis=1))


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (np.arange(30, dtype=np.uint8)[:, None] % 3, None),
        (np.eye(3)[np.arange(30) % 3], None),
        (np.array(["ant", "bee", "cat"] * 10), None),
        (np.array([b"ant", b"bee", b"cat"] * 10), None),
        (np.arange(30.0) % 3, None),
        (np.full(30, -1), "30 of 30 have no label"),
    ],
    ids=["column", "one-hot", "text", "bytes", "float", "absent"],
)
def test_labels_of_every_usual_form(tmp_path: Path, labels: np.ndarray, values: str | None) -> None:
    found = load_images(save(tmp_path / "a.npz", x=PIXELS, y=labels), SIZE, head_classes=3)
    if values is None:
        assert found.labels is not None and found.labels.tolist() == [0, 1, 2] * 10
    else:
        assert found.labels is None and values in found.warnings[0]


def test_parts_of_an_npz(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz", train_images=PIXELS[:20], train_labels=np.arange(20) % 2,
        test_images=PIXELS[20:], test_labels=np.arange(10) % 2,
    )  # fmt: skip
    found = load_images(path, SIZE, head_classes=2)
    assert np.array_equal(found.images.numpy(), EXPECTED) and found.labels is not None
    only = load_images(path / "test", SIZE, head_classes=2)
    assert np.array_equal(only.images.numpy(), EXPECTED[20:])
    with pytest.raises(Refused, match="has no part 'val'"):
        load_images(path / "val", SIZE)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": np.arange(30)}, "give images as"),
        ({"images": PIXELS.astype(object)}, "is pickled, which can run code"),
        ({"x": PIXELS, "y": np.array([0, "a", None] * 10, dtype=object)}, "is pickled"),
        ({"weights": PIXELS}, "has no array of images.*'weights'"),
        ({"images": PIXELS[0]}, r"is \[8, 8, 3\]: give images as"),
        ({"images": np.asfortranarray(PIXELS)}, "column by column"),
        ({"images": PIXELS / 64 - 2}, "values from -2 to .* before normalisation"),
        ({"images": PIXELS.astype(np.int64) * 100}, "values from 0 to 25500"),
        ({"images": PIXELS.astype(np.complex64)}, "holds complex64"),
        ({"images": PIXELS, "labels": np.arange(29)}, "for 30 images"),
        ({"images": PIXELS, "labels": np.full(30, 0.5)}, "no whole numbers"),
        ({"images": PIXELS[:0]}, "holds no images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, arrays: dict, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence) as caught:
        load_images(save(tmp_path / "a.npz", **arrays), SIZE, head_classes=3)
    assert "\n" not in str(caught.value)


def test_a_pickle_in_an_npz_never_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name in ("images", "labels"):
        arrays = {"images": PIXELS, name: np.array([Bomb()] * 30, dtype=object)}
        with pytest.raises(Refused):
            load_images(save(tmp_path / "a.npz", **arrays), SIZE)
    assert not (tmp_path / "ran").exists()


def test_values_that_leave_the_range_later_are_skipped(tmp_path: Path) -> None:
    images = np.full((300, 4, 4, 3), 0.5)
    images[290], images[291, 0, 0, 0] = 2.0, np.nan
    found = load_images(save(tmp_path / "a.npz", x=images), SIZE)
    assert dict(found.skipped) == {"0000290": "values outside 0 to 1", "0000291": "values outside 0 to 1"}


def test_a_damaged_npz_is_refused_or_its_images_named(tmp_path: Path) -> None:
    whole = bytearray(save(tmp_path / "a.npz", images=PIXELS).read_bytes())
    for length in (0, 40, 400, len(whole) - 5):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(Refused, match="is damaged"):
            load_images(tmp_path / "cut.npz", SIZE)
    lying = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        lying, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8, 3)}
    )
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as file:
        file.writestr("images.npy", lying.getvalue() + b"\0" * 192)
    with pytest.raises(Refused, match="is damaged: 'images' is"):
        load_images(tmp_path / "lying.npz", SIZE)
    whole[len(whole) // 2] ^= 0xFF  # a wrong checksum shows at the end of the array
    (tmp_path / "flipped.npz").write_bytes(whole)
    try:
        assert len(load_images(tmp_path / "flipped.npz", SIZE)) >= 28
    except Refused as error:
        assert "damaged" in str(error)


# --- parquet ------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def table(
    path: Path, rows: range, struct: bool = True, names: list[str] | None = None, labels: bool = True
) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    images: list = [png(PIXELS[i]) for i in rows]
    if struct:
        images = [{"bytes": image, "path": None} for image in images]
    columns: dict = {"id": [f"row {i}" for i in rows], "image": images}
    if labels:
        columns["label"] = [i % 3 for i in rows]
    made = pyarrow.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(made, path, row_group_size=7)
    return path


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_gives_the_images_and_their_labels(tmp_path: Path, struct: bool) -> None:
    path = table(tmp_path / "a.parquet", range(30), struct)
    found = load_images(path, SIZE, head_classes=3)
    assert np.array_equal(found.images.numpy(), EXPECTED)
    assert found.labels_source == "integers" and found.labels.tolist() == [0, 1, 2] * 10
    some = load_images(path, SIZE, limit=5, seed=1)
    assert np.array_equal(some.images.numpy(), EXPECTED[[int(name) for name in some.paths]])
    assert load_images(table(tmp_path / "b.parquet", range(30), labels=False), SIZE).labels is None


def test_a_folder_of_parquet_files_is_one_set(tmp_path: Path) -> None:
    for k in range(3):
        table(tmp_path / "data" / f"train-0000{k}-of-00003.parquet", range(10 * k, 10 * k + 10))
    (tmp_path / "data" / "README.md").write_text("x")
    found = load_images(tmp_path, SIZE, head_classes=3)
    assert np.array_equal(found.images.numpy(), EXPECTED) and found.labels is not None


def test_class_names_of_parquet_files_are_put_into_the_heads_order(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", range(30), names=["ant", "bee", "cat"])
    known = load_images(path, SIZE, head_classes=4, claimed=("cat", "dog", "Bee", "ant"))
    assert known.labels_source == "names" and known.labels.tolist() == [3, 2, 0] * 10
    guessed = load_images(path, SIZE, head_classes=3)
    assert guessed.labels_source == "count" and guessed.classes == ("ant", "bee", "cat")
    with pytest.raises(Refused, match="class 'bee' is not one of the 3 names in --classes"):
        load_images(path, SIZE, head_classes=3, classes=("cat", "be", "ant"))
    claimed = load_images(path, SIZE, head_classes=3, claimed=("cat", "be", "ant"))
    assert claimed.classes == ("ant", "bee", "cat") and claimed.labels_source == "count"
    assert "class 'bee' is not one of the 3 class names of the checkpoint" in claimed.warnings[0]
    other = load_images(path, SIZE, head_classes=5)
    assert other.labels is None and "3 class names and the network has 5" in other.warnings[0]


def test_parquet_without_images_or_damaged_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    parquet.write_table(pyarrow.table({"path": ["a.png"], "label": [1]}), tmp_path / "paths.parquet")
    with pytest.raises(Refused, match="has no column of encoded images .*'path', 'label'"):
        load_images(tmp_path / "paths.parquet", SIZE)
    parquet.write_table(pyarrow.table({"image": [b"", None, b"text"]}), tmp_path / "none.parquet")
    with pytest.raises(Refused, match="none of the 3 images"):
        load_images(tmp_path / "none.parquet", SIZE)
    whole = table(tmp_path / "a.parquet", range(30)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    with pytest.raises(Refused, match="cannot be read as parquet"):
        load_images(tmp_path / "cut.parquet", SIZE)
    broken = bytearray(whole)
    first = whole.index(b"IHDR")
    broken[first : first + 20] = bytes(20)
    (tmp_path / "broken.parquet").write_bytes(broken)
    found = load_images(tmp_path / "broken.parquet", SIZE)  # what lies in other row groups is read
    assert len(found) == 23 and len(found.skipped) == 7
    assert np.array_equal(found.images.numpy(), EXPECTED[7:])


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(Refused, match=r"pip install 'bdclean\[parquet\]'"):
        load_images(tmp_path / "a.parquet", SIZE)


def test_forced_labels_of_some_images_leave_the_others_out(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=np.array([0, -1, 1, 2, -1, 0, 1, 2]))
    found = load_images(tmp_path / "some.npz", (6, 6), labeled=True)
    assert len(found) == 6 and sorted(found.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert any("2 images" in note and "no label" in note for note in found.warnings)
    assert load_images(tmp_path / "some.npz", (6, 6)).labels is None


def test_odd_rows_of_an_array_are_left_out_and_named(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 8, 8, 3)).astype(np.float32)
    images[3, 0, 0, 0] = np.nan
    images[7] = 300.0
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(40) % 2)
    found = load_images(tmp_path / "a.npz", (8, 8), head_classes=2)
    assert len(found.images) == 38 and found.labels is not None and len(found.labels) == 38
    assert [name for name, _ in found.skipped] == ["0000003", "0000007"]
    assert int(found.images.max()) > 200  # the others are still read as 0 to 1
    images[:20] = np.nan
    np.savez(tmp_path / "a.npz", x=images)
    with pytest.raises(Refused, match="give pixels from 0 to 255 or 0 to 1"):
        load_images(tmp_path / "a.npz", (8, 8))
