"""Image folders: what is read, in which order, with which labels, and what is refused in one sentence."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.data.decode import AVIF
from bdclean.data.duplicates import repeated, shows_same, without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.data.labels.folders import imagenet_folders, labels_plausible
from bdclean.data.labels.labelling import claimed_names
from bdclean.data.loading import load_images, rise
from bdclean.data.scratch import allocate
from bdclean.data.splitting import split
from bdclean.errors import Refused

SIZE = (16, 16)


def scene(seed: int, size: int = 16) -> np.ndarray:
    """A smooth random picture, uint8 [h w 3]."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC))


def write(path: Path, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(seed)).save(path, **options)
    return path


def folders(root: Path, names: list[str], each: int = 3) -> Path:
    for k, name in enumerate(names):
        for i in range(each):
            write(root / name / f"{i}.png", seed=100 * k + i)
    return root


def as_set(images: np.ndarray | torch.Tensor) -> ImageSet:
    return ImageSet(torch.as_tensor(images))


# --- reading ------------------------------------------------------------------------------------------------


def test_pixels_arrive_unchanged_in_the_order_of_paths(tmp_path: Path) -> None:
    for name, seed in [("b.png", 1), ("a.png", 2), ("z/deep/er/c.png", 3)]:
        write(tmp_path / name, seed)
    found = load_images(tmp_path, SIZE)
    assert found.paths == ("a.png", "b.png", "z/deep/er/c.png")
    assert found.labels is None and found.skipped == ()
    for image, seed in zip(found.images, (2, 1, 3), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), scene(seed))
    assert found.images.is_contiguous() and found.images.dtype == torch.uint8


def test_threads_do_not_change_the_result(tmp_path: Path) -> None:
    for i in range(70):
        write(tmp_path / f"{i}.jpg", i)
    (tmp_path / "33.jpg").write_bytes(b"not a picture")
    one, many = (load_images(tmp_path, (12, 20), limit=50, seed=3, threads=threads) for threads in (1, 7))
    assert one.digest == many.digest
    assert one.paths == many.paths and one.skipped == many.skipped
    assert len(one) == 50


def test_the_draw_follows_the_seed_and_replaces_what_cannot_be_read(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i:02}.png", i)
    first = load_images(tmp_path, SIZE, limit=5, seed=0)
    assert first.paths == load_images(tmp_path, SIZE, limit=5, seed=0).paths
    assert first.paths != load_images(tmp_path, SIZE, limit=5, seed=1).paths
    assert list(first.paths) == sorted(first.paths)
    lost = first.paths[2]
    (tmp_path / lost).write_bytes(b"")
    again = load_images(tmp_path, SIZE, limit=5, seed=0)
    assert len(again) == 5
    assert again.skipped == ((lost, "empty file"),)
    assert set(first.paths) - {lost} < set(again.paths)
    with pytest.raises(Refused, match=rf"{lost} .* \(empty file\) and --strict"):
        load_images(tmp_path, SIZE, limit=5, seed=0, strict=True)


def test_unreadable_files_are_named_and_skipped(tmp_path: Path) -> None:
    write(tmp_path / "good.png")
    whole = write(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "noise\x1b[31m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 99)
    found = load_images(tmp_path, SIZE)
    assert found.paths == ("good.png",)
    reasons = dict(found.skipped)
    assert reasons["pipe.png"] == "not a regular file"
    assert reasons["gone.png"] == "dangling link or file gone"
    assert reasons["text.png"] == reasons["script.png"] == "not an image in a known format"
    assert reasons["cut.jpg"].startswith("damaged")
    assert len(reasons) == 6
    assert not any("\x1b" in name for name in reasons)


def test_a_decompression_bomb_is_skipped_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for name, side in [("large.png", 9000), ("huge.png", 60000)]:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    write(tmp_path / "good.png")
    found = load_images(tmp_path, SIZE)
    assert len(found) == 1
    assert [name for name, reason in found.skipped if "pixels allowed" in reason] == ["huge.png", "large.png"]


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = Image.fromarray(scene(0))
    grey = colour.convert("L")
    colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=255).save(
        tmp_path / "palette.png", transparency=0
    )
    alpha = colour.copy()
    alpha.putalpha(77)
    alpha.save(tmp_path / "alpha.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    colour.save(tmp_path / "plain.bmp")
    found = load_images(tmp_path, SIZE)
    assert found.skipped == ()
    pixels = {
        Path(path).stem: image.permute(1, 2, 0).numpy()
        for path, image in zip(found.paths, found.images, strict=True)
    }
    assert np.array_equal(pixels["alpha"], scene(0))
    assert np.array_equal(pixels["plain"], scene(0))
    assert np.array_equal(pixels["grey16"], pixels["grey"])
    assert abs(pixels["palette"].astype(int) - scene(0)).mean() < 8
    assert abs(pixels["cmyk"].astype(int) - scene(0)).mean() < 12


def test_grey_is_pillows_l_of_the_rgb_pixels_whatever_the_mode(tmp_path: Path) -> None:
    colour = Image.fromarray(scene(0))
    wanted = np.asarray(colour.convert("L"))
    colour.save(tmp_path / "a-colour.png")
    colour.convert("L").save(tmp_path / "b-grey.png")
    colour.convert("L").convert("LA").save(tmp_path / "c-alpha.png")
    Image.fromarray(wanted.astype(np.uint16) * 257).save(tmp_path / "d-grey16.png")
    found = load_images(tmp_path, SIZE, channels=1)
    assert found.images.shape == (4, 1, *SIZE) and found.images.is_contiguous()
    assert all(np.array_equal(image[0].numpy(), wanted) for image in found.images)
    np.savez(tmp_path / "x.npz", images=wanted[None], labels=[0])
    assert np.array_equal(load_images(tmp_path / "x.npz", SIZE, channels=1).images[0, 0].numpy(), wanted)
    assert found.digest != load_images(tmp_path, SIZE).digest
    copies = torch.cat([found.images, 255 - found.images[:1]])
    assert repeated(copies).tolist() == [False, True, True, True, False]


def test_exif_rotation_is_applied_and_damaged_exif_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    write(tmp_path / "turned.png", exif=exif)
    write(tmp_path / "broken.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    found = load_images(tmp_path, SIZE)
    assert np.array_equal(found.images[0].permute(1, 2, 0).numpy(), scene(0))
    assert np.array_equal(found.images[1].permute(1, 2, 0).numpy(), np.rot90(scene(0), -1))


def test_another_size_is_stretched(tmp_path: Path) -> None:
    Image.fromarray(scene(0, 64)).save(tmp_path / "a.png")
    Image.fromarray(scene(0, 640)).save(tmp_path / "b.jpg", quality=98)
    found = load_images(tmp_path, (8, 24))
    expected = Image.fromarray(scene(0, 64)).resize((24, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(found.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert abs(found.images[1].int() - found.images[0].int()).float().mean() < 4


def test_odd_pictures_of_cameras_and_programs_are_read(tmp_path: Path) -> None:
    colour = Image.fromarray(scene(0))
    grey = np.asarray(colour.convert("L"))
    other = Image.fromarray(scene(1))
    for ending in ("gif", "webp", "png"):
        colour.save(tmp_path / f"moving.{ending}", save_all=True, append_images=[other], lossless=True)
    colour.convert("LA").save(tmp_path / "grey-alpha.png")
    colour.convert("1").save(tmp_path / "bilevel.png")
    colour.convert("P").save(tmp_path / "palette-alpha.png", transparency=bytes(range(200)))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.tiff")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.pgm")
    colour.save(tmp_path / "progressive.jpg", progressive=True, quality=99)
    colour.convert("YCbCr").save(tmp_path / "ycbcr.jpg", quality=99)
    colour.convert("LAB").save(tmp_path / "lab.tiff")
    colour.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[other], quality=99)
    colour.save(tmp_path / "wrong-ending.png", "JPEG", quality=99)
    Image.fromarray(np.full((1, 1, 3), 7, np.uint8)).save(tmp_path / "tiny.png")
    Image.fromarray(np.full((1, 20_000, 3), 7, np.uint8)).save(tmp_path / "long.png")
    found = load_images(tmp_path, SIZE)
    assert found.skipped == () and len(found) == 15
    pixels = dict(zip(found.paths, found.images.permute(0, 2, 3, 1).numpy(), strict=True))
    assert np.array_equal(pixels["moving.png"], scene(0)) and np.array_equal(pixels["moving.webp"], scene(0))
    assert (pixels["tiny.png"] == 7).all() and (pixels["long.png"] == 7).all()
    for name in ("grey16.tiff", "grey16.pgm", "grey-alpha.png"):
        assert np.array_equal(pixels[name], np.repeat(grey[:, :, None], 3, axis=2)), name
    for name in ("phone.jpg", "wrong-ending.png", "progressive.jpg"):
        assert abs(pixels[name].astype(int) - scene(0)).mean() < 12, name


def test_sixteen_bits_a_channel_are_read_as_eight(tmp_path: Path) -> None:
    colour = scene(0)
    deep = colour.astype(">u2") * 257

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = colour.shape
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "deep.png").write_bytes(png)
    # width, height, bits, no compression, RGB, where the pixels are, samples, rows, bytes, one plane
    bits_at = 8 + 2 + 10 * 12 + 4
    pixels = deep.tobytes()
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits_at), (259, 3, 1, 1 << 16), (262, 3, 1, 2 << 16),
        (273, 4, 1, bits_at + 6), (277, 3, 1, 3 << 16), (278, 4, 1, height), (279, 4, 1, len(pixels)),
        (284, 3, 1, 1 << 16),
    ]  # fmt: skip
    table = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", *tag) for tag in tags)
    tiff = b"MM\0*" + struct.pack(">I", 8) + table + bytes(4) + struct.pack(">HHH", 16, 16, 16) + pixels
    (tmp_path / "deep.tiff").write_bytes(tiff)
    found = load_images(tmp_path, SIZE)
    assert found.skipped == () and found.paths == ("deep.png", "deep.tiff")
    for pixels_found in found.images.permute(0, 2, 3, 1).numpy():
        assert np.array_equal(pixels_found, colour)


def test_float_pictures_have_no_range_and_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    assert dict(load_images(tmp_path, SIZE).skipped) == {"float.tiff": "F pixels have no fixed range"}


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = folders(tmp_path / "root", ["a", "b"], each=1)
    elsewhere = folders(tmp_path / "elsewhere", ["x"], each=2)
    (root / "linked").symlink_to(elsewhere / "x")
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "again").symlink_to(root / "a")
    found = load_images(root, SIZE)
    assert found.paths == ("a/0.png", "b/0.png", "linked/0.png", "linked/1.png")
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "itself").symlink_to(lonely)
    with pytest.raises(Refused, match="holds no images"):
        load_images(lonely, SIZE)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no images, it is empty"),
        (lambda p: write(p), "is a file, not a set of images: give a folder"),
        (lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")), r"holds no images \(but 1 .txt files\)"),
        (lambda p: (p.mkdir(), (p / "a.png").write_text("x")), "none of the 1 images .* a.png: not an image"),
        (lambda p: (p.mkdir(), (p / ".hidden.png").write_text("x")), "holds no images"),
    ],
)
def test_what_is_no_folder_of_images_is_refused(tmp_path: Path, make, sentence: str) -> None:
    path = tmp_path / "images.png"
    make(path)
    with pytest.raises(Refused, match=sentence) as caught:
        load_images(path, SIZE)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_more_than_memory_is_refused_before_decoding(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(Refused, match="lower --limit"):
        load_images(tmp_path, (4_000_000, 4_000_000))


def test_progress_is_told_up_to_the_whole(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / f"{i}.png", i)
    told: list[tuple] = []
    load_images(tmp_path, SIZE, tell=lambda *what, **measures: told.append(what))
    assert told[-1] == ("images", 5, 5)


def test_the_digest_covers_pixels_labels_and_order(tmp_path: Path) -> None:
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 2, 2)
    plain = ImageSet(images)
    assert plain.digest == ImageSet(images.clone(), paths=("a", "b")).digest
    others = [
        ImageSet(images.flip(0)),
        ImageSet(images.reshape(2, 3, 4, 1)),
        ImageSet(images, labels=torch.tensor([0, 1])),
        ImageSet(images, labels=torch.tensor([1, 0])),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == 5


# --- labels -------------------------------------------------------------------------------------------------


def labels_by_folder(found: ImageSet) -> dict[str, int]:
    assert found.labels is not None
    return {path.split("/")[0]: label for path, label in zip(found.paths, found.labels.tolist(), strict=True)}


def test_known_class_names_give_the_heads_order(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["Traffic_Light", "car", "bird"], each=1)
    names = tmp_path / "classes.txt"
    names.write_text("car\ntraffic light\ntruck\nbird\n")
    found = load_images(root, SIZE, classes=names, head_classes=4)
    assert labels_by_folder(found) == {"Traffic_Light": 1, "car": 0, "bird": 3}
    assert found.classes == ("car", "traffic light", "truck", "bird")
    assert found.labels_source == "names"
    (tmp_path / "classes.json").write_text('{"0": "car", "1": "bird", "2": "traffic-light"}')
    found = load_images(root, SIZE, classes=tmp_path / "classes.json", head_classes=3)
    assert labels_by_folder(found) == {"Traffic_Light": 2, "car": 0, "bird": 1}


def test_integers_are_sorted_as_numbers(tmp_path: Path) -> None:
    root = folders(tmp_path, [str(i) for i in range(1, 13)], each=1)
    found = load_images(root, SIZE, head_classes=12)
    assert found.labels_source == "integers"
    assert labels_by_folder(found) == {str(i): i - 1 for i in range(1, 13)}


def test_integers_with_classes_absent_are_the_class_itself(tmp_path: Path) -> None:
    root = folders(tmp_path, ["00002", "00010"], each=1)
    found = load_images(root, SIZE, head_classes=43)
    assert labels_by_folder(found) == {"00002": 2, "00010": 10}
    assert found.classes is not None and len(found.classes) == 43 and found.classes[10] == "00010"
    too_many = load_images(root, SIZE, head_classes=5)
    assert too_many.labels is None
    assert "the highest 00010" in too_many.warnings[0]


def test_a_folder_count_like_the_heads_is_only_a_guess(tmp_path: Path) -> None:
    root = folders(tmp_path, ["cat", "ant", "bee"], each=1)
    guessed = load_images(root, SIZE, head_classes=3)
    assert guessed.labels_source == "count"
    assert labels_by_folder(guessed) == {"ant": 0, "bee": 1, "cat": 2}
    assert guessed.unlabeled("why").warnings == ("why",)
    assert load_images(root, SIZE, head_classes=3, labeled=True).labels_source == "forced"
    other = load_images(root, SIZE, head_classes=10)
    assert other.labels is None and other.labels_source is None
    assert "there are 3 folders and the network has 10 classes" in other.warnings[0]
    with pytest.raises(Refused, match="cannot serve as labeled images: there are 3 folders"):
        load_images(root, SIZE, head_classes=10, labeled=True)


def test_an_empty_class_folder_keeps_its_place(tmp_path: Path) -> None:
    root = folders(tmp_path, ["ant", "cat"], each=1)
    (root / "bee").mkdir()
    assert labels_by_folder(load_images(root, SIZE, head_classes=3)) == {"ant": 0, "cat": 2}


def test_flat_folders_are_unlabeled_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    assert load_images(tmp_path, SIZE, head_classes=10).warnings == ()
    with pytest.raises(Refused, match="1 images lie outside any class folder"):
        load_images(tmp_path, SIZE, head_classes=10, labeled=True)


def test_one_class_only_is_said(tmp_path: Path) -> None:
    root = folders(tmp_path, ["cat"])
    found = load_images(root, SIZE, head_classes=10)
    assert found.labels is None
    assert "all images are in one folder, 'cat'" in found.warnings[0]
    with pytest.raises(Refused, match="labels need at least two classes"):
        load_images(root, SIZE, head_classes=10, labeled=True)


def test_a_wrapping_folder_is_looked_through(tmp_path: Path) -> None:
    folders(tmp_path / "outer" / "inner", ["0", "1"], each=1)
    found = load_images(tmp_path / "outer", SIZE, head_classes=2)
    assert labels_by_folder(found) == {"0": 0, "1": 1}


def test_class_names_that_do_not_fit_are_said(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["ant", "bee"], each=1)
    names = tmp_path / "classes.txt"
    names.write_text("ant\nbee\ncat\n")
    with pytest.raises(
        Refused, match="has 3 class names and the network has 4 classes: give a name for each"
    ):
        load_images(root, SIZE, classes=names, head_classes=4)
    # those of a checkpoint are only a claim
    assert load_images(root, SIZE, claimed=("ant", "bee", "cat"), head_classes=4).labels is None
    names.write_text("ant\ncow\ncat\n")
    with pytest.raises(Refused, match=r"folder 'bee' is not one of the 3 names in .*classes.txt: name each"):
        load_images(root, SIZE, classes=names, head_classes=3)
    for text in ("ant\n", ""):
        names.write_text(text)
        with pytest.raises(Refused, match="at least 2 are needed"):
            load_images(root, SIZE, classes=names)
    with pytest.raises(Refused, match="class names cannot be read"):
        load_images(root, SIZE, classes=tmp_path / "none.txt")
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="is not text"):
        load_images(root, SIZE, classes=names)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(Refused, match="is not a list of class names"):
        load_images(root, SIZE, classes=tmp_path / "bad.json")


@pytest.mark.parametrize("held", ["folders", "csv"])
def test_names_that_do_not_match_give_no_way_to_their_count(tmp_path: Path, held: str) -> None:
    """One folder of another name, and the user's order was left for that of the folders without a word."""
    root = folders(tmp_path / "images", ["ant", "bee", "cat"], each=1)
    given = ("cat", "bee", "aunt")
    if held == "folders":
        names = tmp_path / "typo.txt"
        names.write_text("\n".join(given))
        with pytest.raises(Refused, match=r"folder 'ant' is not one of the 3 names in .*typo.txt"):
            load_images(root, SIZE, classes=names, head_classes=3)
        # images that the names need not be about
        other = load_images(root, SIZE, classes=names, head_classes=3, csv_must=False)
        assert other.labels is None and "'ant' is not one of" in other.warnings[0]
        csv = None
    else:
        csv = tmp_path / "labels.csv"
        csv.write_text("".join(f"{path},{path.split('/')[0]}\n" for path in load_images(root, SIZE).paths))
    claimed = load_images(root, SIZE, classes=csv, claimed=given, head_classes=3)
    assert claimed.labels is not None and claimed.classes == ("ant", "bee", "cat")
    what = "folder" if held == "folders" else "label"
    said = f"{what} 'ant' is not one of the 3 class names of the checkpoint: classes are numbered in the order of"
    assert any(warning.startswith(said) for warning in claimed.warnings)


@pytest.mark.parametrize("between", [" ", "\t"])
def test_a_list_of_files_and_labels_is_no_list_of_class_names(tmp_path: Path, between: str) -> None:
    """The form of ImageNet's val.txt."""
    for k in range(3):
        write(tmp_path / "images" / f"a picture {k}.png", seed=k)
    listed = tmp_path / "val.txt"
    listed.write_text("".join(f"a picture {k}.png{between}{2 - k}\n" for k in range(3)))
    found = load_images(tmp_path / "images", SIZE, classes=listed, head_classes=3)
    assert found.labels is not None and found.labels.tolist() == [2, 1, 0]
    listed.write_text("a.png 1\nred light\nstop\n")  # one odd name makes no list
    root = folders(tmp_path / "two", ["stop", "go", "slow"], each=1)
    with pytest.raises(Refused, match="'go' is not one of the 3 names"):
        load_images(root, SIZE, classes=listed, head_classes=3)


def test_other_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("x")
    assert "1 files" in load_images(tmp_path, SIZE).warnings[0]


def test_labels_are_plausible_only_above_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (500,), generator=generator)
    assert labels_plausible(labels, labels, 10)
    shuffled = labels[torch.randperm(500, generator=generator)]
    assert not labels_plausible(shuffled, labels, 10)
    assert not labels_plausible((labels + 1) % 10, labels, 10)
    half = torch.where(torch.rand(500, generator=generator) < 0.3, labels, shuffled)
    assert labels_plausible(half, labels, 10)
    # A network that always answers the most frequent class knows nothing.
    lopsided = torch.where(torch.rand(500, generator=generator) < 0.8, 0, labels)
    assert not labels_plausible(torch.zeros(500, dtype=torch.int64), lopsided, 10)
    assert not labels_plausible(labels[:0], labels[:0], 10)


def test_false_alarms_of_the_label_rule_are_rare() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(10, (2, 2000, 200), generator=generator)
    alarms = sum(labels_plausible(a, b, 10) for a, b in zip(*draws, strict=True))
    assert alarms <= 6  # about one in a thousand


def test_the_folders_of_imagenet_are_in_the_heads_order(tmp_path: Path) -> None:
    root = folders(tmp_path, ["n01443537", "n15075141", "n02979186"], each=1)
    found = load_images(root, SIZE, head_classes=1000)
    assert found.labels_source == "names"
    assert labels_by_folder(found) == {"n01443537": 1, "n15075141": 999, "n02979186": 482}
    assert load_images(root, SIZE, head_classes=10).labels is None
    claimed = tuple("tench, Tinca tinca|goldfish, Carassius auratus|great white shark".split("|"))
    named = folders(tmp_path / "b", ["goldfish", "great_white_shark"], each=1)
    assert labels_by_folder(load_images(named, SIZE, head_classes=3, claimed=claimed)) == {
        "goldfish": 1,
        "great_white_shark": 2,
    }


def test_the_shipped_list_of_imagenets_folders_is_sorted_and_whole() -> None:
    names = imagenet_folders()
    assert len(set(names)) == 1000 and list(names) == sorted(names)
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names)


@pytest.mark.parametrize(
    ("metadata", "config", "names"),
    [
        ({"bdclean.classes": '["a", "b"]'}, None, ("a", "b")),
        ({"classes": "stop, go,yield"}, {"id2label": {"0": "x", "1": "y"}}, ("stop", "go", "yield")),
        ({}, {"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({}, {"label_names": ["a", "b", "c"]}, ("a", "b", "c")),
        ({}, {"pretrained_cfg": {"label_names": ["a", "b"]}}, ("a", "b")),
        ({"classes": "10"}, {"id2label": {"0": "a", "2": "b"}}, None),
        ({"classes": "[" * 100_000}, [1], None),
        ({}, None, None),
    ],
)
def test_class_names_that_a_checkpoint_claims(metadata: dict, config: object, names: tuple | None) -> None:
    assert claimed_names(metadata, config) == names


CSVS = [
    "file,label\na/0.png,bee\na/1.png,ant\n0/2.png,ant\n",
    "\ufefffilename;width;class_id\nimages/a/0.png;3;bee\nimages/a/1.png;3;ant\nimages/0/2.png;3;ant\n",
    "a/0.png,bee\na/1.png,ant\n0/2.png,ant\n",
    "id,target\n0,bee\n1,ant\n2,ant\n",
]


@pytest.mark.parametrize("text", CSVS)
def test_a_csv_says_which_image_is_of_which_class(tmp_path: Path, text: str) -> None:
    root = tmp_path / "images"
    for name in ("a/0.png", "a/1.png", "0/2.png", "3.png"):
        write(root / name)
    (tmp_path / "labels.csv").write_text(text)
    found = load_images(
        root, SIZE, classes=tmp_path / "labels.csv", claimed=("ant", "cow", "bee"), head_classes=3
    )
    assert found.labels is not None and found.labels_source == "names"
    assert dict(zip(found.paths, found.labels.tolist(), strict=True)) == {
        "a/0.png": 2,
        "a/1.png": 0,
        "0/2.png": 0,
    }
    assert "1 images that" in found.warnings[0] and "left out" in found.warnings[0]
    with pytest.raises(
        Refused, match="cannot serve as labeled images: there are 2 labels and the network has 7"
    ):
        load_images(root, SIZE, classes=tmp_path / "labels.csv", head_classes=7)


def test_numbers_in_a_csv_are_classes(tmp_path: Path) -> None:
    for k in range(4):
        write(tmp_path / "images" / f"{k}.png")
    (tmp_path / "labels.csv").write_text("Path,ClassId\n" + "".join(f"{k}.png,{9 - k}\n" for k in range(4)))
    found = load_images(tmp_path / "images", SIZE, classes=tmp_path / "labels.csv", head_classes=10)
    assert found.labels is not None and found.labels.tolist() == [9, 8, 7, 6]
    assert found.labels_source == "integers"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("labels.csv", ["file,label", "a.png,3.0", "b.png,1.0", "c.png,0.0"]),
        ("labels.csv", ["file,label", 'a.png,"""3"""', "b.png,'1'", "c.png,0"]),
        ("labels.jsonl", ['{"file_name": "a.png", "label": 3}', "", '{"file_name": "b.png", "label": 1.0}',
                          '{"file_name": "c.png", "label": "0"}']),
    ],
)  # fmt: skip
def test_numbers_are_the_same_label_however_they_are_written(
    tmp_path: Path, name: str, lines: list[str]
) -> None:
    for image in "abc":
        write(tmp_path / "images" / f"{image}.png")
    (tmp_path / name).write_text("\n".join(lines))
    found = load_images(tmp_path / "images", SIZE, classes=tmp_path / name, head_classes=5)
    assert found.labels is not None and found.labels.tolist() == [3, 1, 0]


def test_json_lines_without_a_label_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.png")
    for text, said in (('{"file": "a.png"}', "a line without"), ("", "is empty"), ("{", "a line without")):
        (tmp_path / "labels.jsonl").write_text(text)
        with pytest.raises(Refused, match=said):
            load_images(tmp_path / "images", SIZE, classes=tmp_path / "labels.jsonl")


@pytest.mark.parametrize(
    "said",
    [
        {"ant": 2, "bee": 0, "cow": 1},
        {"0": ["n01", "bee"], "1": ["n02", "cow"], "2": ["n03", "ant"]},
        {"2": "ant", "0": "bee", "1": "cow"},
    ],
)
def test_a_json_says_which_class_each_name_is(tmp_path: Path, said: dict[str, object]) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(said))
    root = folders(tmp_path / "images", ["ant", "bee", "cow"], each=1)
    found = load_images(root, SIZE, classes=tmp_path / "classes.json", head_classes=3)
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1] and found.labels_source == "names"
    numbered = folders(tmp_path / "numbers", ["n01", "n03"], each=1)
    if isinstance(said.get("0"), list):
        found = load_images(numbered, SIZE, classes=tmp_path / "classes.json", head_classes=3)
        assert found.labels is not None and found.labels.tolist() == [0, 2]


def test_names_with_accents_are_the_same_in_either_form(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", [unicodedata.normalize("NFD", "chêne"), "érable"], each=1)
    (tmp_path / "classes.txt").write_text(unicodedata.normalize("NFC", "érable\nchêne\n"))
    found = load_images(root, SIZE, classes=tmp_path / "classes.txt", head_classes=2)
    assert found.labels_source == "names"
    assert [found.classes[k] for k in found.labels.tolist()] == ["chêne", "érable"]
    (tmp_path / "labels.csv").write_text(
        unicodedata.normalize("NFC", "file,label\nchêne/0.png,1\nérable/0.png,0")
    )
    found = load_images(root, SIZE, classes=tmp_path / "labels.csv", head_classes=2)
    assert found.labels.tolist() == [1, 0]


def test_numbers_from_one_with_some_absent_are_to_be_confirmed(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["1", "3", "4"], each=1)
    found = load_images(root, SIZE, head_classes=4)
    assert found.labels.tolist() == [0, 2, 3] and found.labels_source == "count"
    assert found.classes == ("1", "2", "3", "4")


def test_a_csv_of_other_images_or_of_names_only(tmp_path: Path) -> None:
    root = folders(tmp_path / "images", ["ant", "bee"], each=1)
    (tmp_path / "other.csv").write_text("file,label\nx.png,1\ny.png,2\n")
    with pytest.raises(Refused, match="names no image of .* its first is 'x.png'"):
        load_images(root, SIZE, classes=tmp_path / "other.csv", head_classes=2)
    for text in ("bee\nant\n", "index,name\n0,bee\n1,ant\n", "0;bee\n1;ant"):
        (tmp_path / "names.csv").write_text(text)
        found = load_images(root, SIZE, classes=tmp_path / "names.csv", head_classes=2)
        assert labels_by_folder(found) == {"ant": 1, "bee": 0}
    (tmp_path / "bad.csv").write_text("width,height,depth\n1,2,3\n")
    with pytest.raises(Refused, match="name one 'file' and one 'label'"):
        load_images(root, SIZE, classes=tmp_path / "bad.csv", head_classes=2)


# --- large sets ---------------------------------------------------------------------------------------------


def test_a_set_on_disk_is_the_same_set(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"{i:02}.png", i)
    (tmp_path / "05.png").write_bytes(b"x")
    (tmp_path / "31.png").write_bytes(b"x")
    memory, disk = (load_images(tmp_path, SIZE, limit=36, memory=most) for most in (2**30, 1000))
    assert not memory.on_disk and disk.on_disk
    assert memory.digest == disk.digest and memory.paths == disk.paths == tuple(sorted(disk.paths))
    for some in (torch.arange(36) % 3 == 0, torch.tensor([5, 2, 9])):
        assert disk.select(some).on_disk
        assert disk.select(some).digest == memory.select(some).digest
    assert [part.digest for part in split(disk, 0)[:2]] == [part.digest for part in split(memory, 0)[:2]]


def test_the_scratch_file_has_no_name_and_a_small_disk_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    images, on_disk = allocate((10, 3, 4, 4), memory=0)
    assert on_disk and list(tmp_path.iterdir()) == []
    images[:] = 7
    assert int(images.sum()) == 10 * 48 * 7
    with pytest.raises(Refused, match="GiB free for them: lower --limit, or set TMPDIR"):
        allocate((10**9, 3, 1000, 1000), memory=0)


@pytest.mark.parametrize("missing", [[], [0], [3, 4], [9], [0, 1, 2, 8, 9]])
def test_rows_rise_in_place_whatever_is_missing(missing: list[int]) -> None:
    generator = np.random.default_rng(len(missing))
    owner = generator.permutation(np.arange(100, 110))
    owner[missing] = -1
    pixels = np.repeat(owner[:, None, None, None], 3, axis=1)
    expected = sorted(owner[owner >= 0].tolist())
    assert rise(owner, pixels).tolist() == expected
    assert pixels[: len(expected), 0, 0, 0].tolist() == expected


# --- split and duplicates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "held"), [(3, 1), (90, 30), (600, 200), (1500, 400), (3001, 400), (4001, 401)])
def test_the_held_out_share(n: int, held: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = ImageSet(torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator))
    training, held_out, duplicates = split(images, seed=0)
    assert (len(training), len(held_out), duplicates) == (n - held, held, 0)


def test_the_split_is_seeded_and_disjoint() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images = ImageSet(pixels, labels=torch.arange(60), paths=tuple(map(str, range(60))))
    training, held_out, _ = split(images, seed=0)
    assert training.labels is not None and held_out.labels is not None
    assert sorted(training.labels.tolist() + held_out.labels.tolist()) == list(range(60))
    assert training.paths == tuple(map(str, training.labels.tolist()))
    assert split(images, seed=0)[1].digest == held_out.digest
    assert split(images, seed=1)[1].digest != held_out.digest


def test_copies_never_stand_on_both_sides() -> None:
    different = np.stack([scene(i, 32).transpose(2, 0, 1) for i in range(40)])
    images = as_set(np.concatenate([different, different, different]))
    training, held_out, duplicates = split(images, seed=0)
    assert len(held_out) == 40
    assert len(training) + duplicates == 80 and duplicates > 0
    assert not shows_same(training.images, held_out.images).any()
    with pytest.raises(Refused, match="holds copies"):
        split(as_set(np.repeat(different[:1], 30, axis=0)), seed=0)
    with pytest.raises(Refused, match="2 images cannot be split"):
        split(as_set(different[:2]), seed=0)


def test_near_copies_are_found_and_other_pictures_are_not() -> None:
    pictures = np.stack([scene(i, 32) for i in range(60)])

    def altered(change) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([change(picture) for picture in pictures]).transpose(0, 3, 1, 2).copy()
        )

    originals = altered(lambda picture: picture)
    lighter = altered(lambda picture: np.clip(picture * 0.8 + 40, 0, 255).astype(np.uint8))
    smaller = altered(lambda picture: np.asarray(Image.fromarray(picture).resize((24, 24)).resize((32, 32))))
    assert shows_same(lighter, originals).all()
    assert shows_same(smaller, originals).all()
    assert not shows_same(originals[:30], originals[30:]).any()
    assert not shows_same(altered(lambda picture: picture[:, ::-1]), originals).any()


def test_copies_within_a_set_count_all_but_the_first() -> None:
    pictures = torch.from_numpy(np.stack([scene(i, 32).transpose(2, 0, 1) for i in range(30)]))
    darker = (pictures[:5].float() * 0.8).to(torch.uint8)
    found = repeated(torch.cat([pictures, pictures[:10], darker]))
    assert found.tolist() == [False] * 30 + [True] * 15
    # one picture alone, thousands of times: every pair is alike, and only as many are looked at as are needed
    assert repeated(darker[:1].expand(6000, -1, -1, -1)).sum() == 5999


def test_flat_pictures_are_copies_only_if_equal() -> None:
    flat = as_set(torch.full((1, 3, 32, 32), 90, dtype=torch.uint8))
    other = as_set(torch.full((1, 3, 32, 32), 91, dtype=torch.uint8))
    assert without_duplicates(flat, flat)[1] == 1
    assert without_duplicates(flat, other)[1] == 0


def test_blocks_do_not_change_what_is_found() -> None:
    pictures = torch.from_numpy(np.stack([scene(i % 25, 32).transpose(2, 0, 1) for i in range(50)]))
    whole = shows_same(pictures, pictures[:10])
    assert torch.equal(whole, shows_same(pictures, pictures[:10], block=7))
    assert whole.nonzero().flatten().tolist() == [*range(10), *range(25, 35)]


def test_cifar10_has_few_copies_and_no_false_ones(cifar10: Path) -> None:
    images = load_images(cifar10, (32, 32), head_classes=10)
    assert len(images) == 10_000 and images.skipped == ()
    half = torch.arange(len(images)) % 2 == 0
    assert shows_same(images.images[half], images.images[~half]).sum() <= 7


@pytest.mark.slow
def test_a_set_larger_than_the_memory_that_is_allowed_is_read_and_split(tmp_path: Path) -> None:
    """2,000 images of 224 x 224 (287 MiB), and 150 MiB of memory beside the imports: read, split, predicted."""
    pictures = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pictures)
    program = """
import resource, torch
from bdclean.data.loading import load_images
from bdclean.data.splitting import split
from bdclean.measuring.predictor import Predictor
torch.set_num_threads(1)
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + 150 * 2**20,) * 2)
found = load_images("a.npz", (224, 224), memory=50 * 2**20, threads=1)
training, held_out, _ = split(found, 0)
assert found.on_disk and training.on_disk and len(held_out) == 400
class Mean(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))
answers = Predictor(Mean(), torch.device("cpu"), 100)(training.images)
print(found.digest, len(answers))
try:
    torch.zeros(300 * 2**20, dtype=torch.uint8)
except RuntimeError:
    print("limited")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    digest, count, limited = done.stdout.split()
    assert digest == load_images(tmp_path / "a.npz", (224, 224)).digest and int(count) == 1600
    assert limited == "limited"  # else the test says nothing on this system


@pytest.mark.skipif(not AVIF, reason="Pillow was built without AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.avif")
    (tmp_path / "b").write_bytes((tmp_path / "a.avif").read_bytes())
    found = load_images(tmp_path, SIZE)
    assert found.paths == ("a.avif", "b") and torch.equal(found.images[0], found.images[1])


def test_a_class_file_that_lies_beside_the_images_is_named(tmp_path: Path) -> None:
    folders(tmp_path, ["a", "b"])
    beside = tmp_path / "class_to_idx.json"
    beside.write_text(json.dumps({"b": 0, "a": 1}))
    hint = f"{beside} was not read: --classes {beside} uses it."
    assert hint in load_images(tmp_path, (16, 16), head_classes=2).warnings
    given = load_images(tmp_path, (16, 16), head_classes=2, classes=beside)
    assert hint not in given.warnings and given.classes == ("b", "a")
