"""Images in tars: read as a folder of the same names would be, never extracted, and refused where they are damaged."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.data.loading import load_images
from bdclean.data.sources.opening import open_images
from bdclean.errors import Refused

SIZE = (8, 8)


def picture(seed: int, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, form)
    return out.getvalue()


def pack(path: Path, files: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def classes(*names: str, each: int = 3) -> dict[str, bytes]:
    return {f"{name}/{i}.png": picture(100 * k + i) for k, name in enumerate(names) for i in range(each)}


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("wrapping", ["", "./", "set/", "/"])
def test_an_archive_is_read_as_the_folder_is(tmp_path: Path, ending: str, wrapping: str) -> None:
    files = classes("ant", "bee", "cat", each=9)
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    shuffled = dict(sorted(files.items(), key=lambda item: zlib.crc32(item[1])))
    archive = pack(tmp_path / f"images.{ending}", {wrapping + name: data for name, data in shuffled.items()})
    options = {"limit": 10, "seed": 4, "head_classes": 3}
    found, expected = load_images(archive, SIZE, **options), load_images(tmp_path / "folder", SIZE, **options)
    assert found.digest == expected.digest and found.paths == expected.paths
    assert found.labels_source == "count" and found.classes == ("ant", "bee", "cat")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_dialect_are_read_whole(tmp_path: Path, form: int) -> None:
    long = "/".join(["d" * 60] * 3) + "/x.png" if form == tarfile.USTAR_FORMAT else "d" * 300 + "/é.png"
    archive = pack(tmp_path / "a.tar", {long: picture(0), "b.png": picture(1)}, format=form)
    assert set(open_images(archive).names) == {long, "b.png"}
    assert len(load_images(archive, SIZE)) == 2


def test_links_devices_and_names_that_climb_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(info)
        for name in ("../up.png", "a/../../up.png", "good.png", ".hidden.png", "__MACOSX/x.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(0))
            archive.addfile(info, io.BytesIO(picture(0)))
    found = load_images(path, SIZE)
    assert found.paths == ("good.png",)
    assert "6 files" in found.warnings[0] and "2 names with '..'" in found.warnings[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "secret.png"]


def test_a_sparse_member_does_not_derail_what_follows(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("holes.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = b"S", 1
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    whole = pack(tmp_path / "a.tar", {"b.png": picture(1)}).read_bytes()
    (tmp_path / "b.tar").write_bytes(bytes(header) + b"\0" * 512 + whole)
    assert load_images(tmp_path / "b.tar", SIZE).paths == ("b.png",)


def test_the_last_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for seed in (1, 2):
            info = tarfile.TarInfo("a.png")
            info.size = len(picture(seed))
            archive.addfile(info, io.BytesIO(picture(seed)))
    found = load_images(path, SIZE)
    only = load_images(pack(tmp_path / "b.tar", {"a.png": picture(2)}), SIZE)
    assert len(found) == 1 and found.digest == only.digest


def test_a_part_of_an_archive_is_named_like_a_path(tmp_path: Path) -> None:
    parts = {f"{part}/{name}": data for part in ("train", "test") for name, data in classes("0", "1").items()}
    archive = pack(tmp_path / "set.tar.gz", parts)
    everything = load_images(archive, SIZE, head_classes=2)
    assert len(everything) == 12 and everything.labels is not None
    assert everything.labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert "has the parts test, train: all are used" in everything.warnings[0]
    only = load_images(archive / "test", SIZE, head_classes=2)
    assert only.paths == tuple(sorted(classes("0", "1"))) and only.warnings == ()
    with pytest.raises(Refused, match="no images below 'val'"):
        load_images(archive / "val", SIZE)
    # a folder of parts is the same
    for name, data in parts.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    assert load_images(tmp_path / "set", SIZE, head_classes=2).digest == everything.digest


def test_parts_without_classes_are_no_classes(tmp_path: Path) -> None:
    archive = pack(tmp_path / "set.tar", classes("train", "test"))
    found = load_images(archive, SIZE, head_classes=2)
    assert found.labels is None and len(found.warnings) == 1
    lone = load_images(pack(tmp_path / "b.tar", classes("unlabeled")), SIZE, head_classes=2)
    assert lone.labels is None and lone.warnings == ()


# --- webdataset ---------------------------------------------------------------------------------------------


def samples(first: int, count: int, **ending: str) -> dict[str, bytes]:
    files = {}
    for i in range(first, first + count):
        files[f"{i:06}.jpg"] = picture(i, "JPEG")
        for suffix, text in ending.items():
            files[f"{i:06}.{suffix}"] = text.format(i % 3).encode()
    return files


@pytest.mark.parametrize(
    "ending",
    [
        {"cls": "{}\n"},
        {"json": '{{"label": {}, "text": "x"}}'},
        {"json": '{{"class_name": "{}"}}', "txt": "a bee"},
    ],
)
def test_the_labels_of_webdataset_samples_stand_beside_the_images(
    tmp_path: Path, ending: dict[str, str]
) -> None:
    archive = pack(tmp_path / "a.tar", samples(0, 9, **ending))
    found = load_images(archive, SIZE, head_classes=3)
    assert found.labels_source == "integers"
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2] * 3


def test_shards_are_one_set(tmp_path: Path) -> None:
    whole = load_images(pack(tmp_path / "whole.tar", samples(0, 30, cls="{}")), SIZE, head_classes=3)
    shards = tmp_path / "shards"
    shards.mkdir()
    for k in range(3):
        pack(shards / f"set-{k:02}.tar", samples(10 * k, 10, cls="{}"))
    for path in (shards, shards / "set-{00..02}.tar"):
        found = load_images(path, SIZE, head_classes=3)
        assert torch.equal(found.images, whole.images) and torch.equal(found.labels, whole.labels)
        assert found.paths[10] == "set-01/000010.jpg"
    with pytest.raises(Refused, match="there is no .*set-03.tar"):
        load_images(shards / "set-{00..03}.tar", SIZE)
    with pytest.raises(Refused, match="names no shards"):
        load_images(shards / "set-{2..1}.tar", SIZE)


def test_shards_without_labels_do_not_become_classes(tmp_path: Path) -> None:
    for k in range(3):
        pack(tmp_path / f"{k}.tar", samples(10 * k, 5))
    found = load_images(tmp_path, SIZE, head_classes=3)
    assert found.labels is None and found.warnings == () and len(found) == 15


def test_one_tar_a_class_is_labeled_by_known_names(tmp_path: Path) -> None:
    for k, name in enumerate(("ant", "bee")):
        pack(tmp_path / f"{name}.tar", samples(10 * k, 2))
    found = load_images(tmp_path, SIZE, head_classes=2, claimed=("bee", "ant"))
    assert found.labels_source == "names" and found.labels is not None
    assert found.labels.tolist() == [1, 1, 0, 0]


def test_samples_of_which_some_have_no_label_are_unlabeled(tmp_path: Path) -> None:
    files = samples(0, 6, cls="{}")
    del files["000004.cls"]
    found = load_images(pack(tmp_path / "a.tar", files), SIZE, head_classes=3)
    assert found.labels is None and "1 of 6 have no label" in found.warnings[0]


# --- damage and bombs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, ending: str, share: float) -> None:
    noise = {f"{i}.bmp": picture(i, "BMP") for i in range(40)}
    whole = pack(tmp_path / f"whole.{ending}", noise).read_bytes()
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole[: int(share * len(whole.rstrip(b"\0"))) - 1])
    with pytest.raises(Refused, match=r"cut short|damaged") as caught:
        load_images(cut, SIZE)
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_of_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = pack(tmp_path / "whole.tar", {"a.png": picture(0), "b.png": picture(1)}).read_bytes()
    second = 512 + 512 * -(-len(picture(0)) // 512)
    for position in [*range(0, 512, 7), *range(second, second + 512, 7)]:
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        (tmp_path / "broken.tar").write_bytes(broken)
        with pytest.raises(Refused, match=r"is not a tar|is damaged"):
            load_images(tmp_path / "broken.tar", SIZE)


def _header(**fields: bytes) -> bytes:
    """A ustar header of a.png with other bytes in some fields and a right checksum."""
    places = {"size": (124, 136), "kind": (156, 157)}
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT)[:512])
    for name, value in fields.items():
        header[slice(*places[name])] = value
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (_header(size=b"77777777777\0"), "cut short"),  # 8 GiB that are not there
        (_header(size=b"\x80" + b"\xff" * 11), "size is no number"),
        (
            _header(size=b"\xff" * 12),
            "size is no number",
        ),  # negative: a reader that goes back would never end
        (_header(size=b"-0000000001\0"), "size is no number"),
        (_header(size=b"77777777777\0", kind=b"x"), "a header of 8,589,934,591 bytes"),
        (_header(size=b"77777777777\0", kind=b"L"), "a header of 8,589,934,591 bytes"),
    ],
)
def test_sizes_that_lie_are_refused(tmp_path: Path, header: bytes, sentence: str) -> None:
    (tmp_path / "a.tar").write_bytes(header + b"\0" * 2048)
    with pytest.raises(Refused, match=sentence):
        load_images(tmp_path / "a.tar", SIZE)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdclean.data.sources.tar.FREE_EXPANSION", 2**20)
    content = pack(tmp_path / "a.tar", {"a.png": picture(0), "zeros.bin": b"\0" * 40_000_000}).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content, 9))
    os.remove(tmp_path / "a.tar")
    with pytest.raises(Refused, match="more than 200 times its size"):
        load_images(tmp_path / "a.tar.gz", SIZE)


def test_unreadable_members_are_named_and_replaced(tmp_path: Path) -> None:
    files = {f"{i:02}.png": picture(i) for i in range(20)}
    files["03.png"], files["07.png"] = b"", b"text"
    for ending in ("tar", "tar.gz"):
        found = load_images(pack(tmp_path / f"a.{ending}", files), SIZE)
        assert dict(found.skipped) == {"03.png": "empty file", "07.png": "not an image in a known format"}
        assert list(found.paths) == sorted(files.keys() - {"03.png", "07.png"})
        for path, image in zip(found.paths, found.images, strict=True):
            expected = np.asarray(Image.open(io.BytesIO(files[path])))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"PK\x03\x04" + b"\0" * 600])
def test_what_is_no_tar_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(Refused, match="is not a tar"):
        load_images(tmp_path / "a.tar", SIZE)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(Refused, match="unpack it"):
        load_images(tmp_path / "a.zip", SIZE)


def test_links_to_images_of_the_archive_are_those_images(tmp_path: Path) -> None:
    files = {"ant/0.png": picture(1), "bee/0.png": picture(2)}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"set/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, kind, target in [
            ("ant/1.png", tarfile.LNKTYPE, "set/bee/0.png"),
            ("bee/1.png", tarfile.SYMTYPE, "../ant/0.png"),
            ("bee/2.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("bee/3.png", tarfile.SYMTYPE, "../../outside.png"),
        ]:
            info = tarfile.TarInfo(f"set/{name}")
            info.type, info.linkname = kind, target
            archive.addfile(info)
    listing = open_images(path)
    assert list(listing.names) == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]
    assert listing.others == {"links": 2}
    images = load_images(path, SIZE).images
    assert torch.equal(images[1], images[2]) and torch.equal(images[3], images[0])
    assert list(open_images(path / "set" / "bee").names) == ["0.png"]  # what is linked to lies outside


def test_masks_of_a_webdataset_are_not_measured(tmp_path: Path) -> None:
    files = {
        "0.jpg": picture(1, "JPEG"), "0.seg.png": picture(2), "0.cls": b"1",
        "1.png": picture(3), "1.mask.png": picture(4), "1.cls": b"0",
        "2.seg.png": picture(5), "2.cls": b"0",
    }  # fmt: skip
    listing = open_images(pack(tmp_path / "a.tar", files))
    assert list(listing.names) == ["0.jpg", "1.png", "2.seg.png"]  # the last one is all that there is of it
    assert listing.others == {"masks": 2}


def test_the_official_archives_of_cifar_are_refused_with_what_to_do(tmp_path: Path) -> None:
    batch = b"\x80\x02}q\x01."  # how one begins; it is not read further
    names = ["data_batch_1", "data_batch_2", "test_batch"]
    archive = pack(
        tmp_path / "cifar-10-python.tar.gz", {f"cifar-10-batches-py/{name}": batch for name in names}
    )
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(batch)
    (folder / "readme.html").write_text("<html>")
    for path in (archive, folder):
        with pytest.raises(Refused, match=r"no images but 3 pickles, .* numpy.savez\('images.npz', x=IMAGES"):
            open_images(path)


@pytest.mark.parametrize("packed", [False, True])
def test_what_lies_beside_class_folders_does_not_take_their_labels(tmp_path: Path, packed: bool) -> None:
    files = classes("ant", "bee", each=4) | {
        "README": b"Images of ants and bees", "LICENSE": b"MIT", "preview.png": picture(7),
        "@eaDir/thumb.png": picture(8), "ant/@eaDir/0.png": picture(9), ".DS_Store": b"\0\0\0\1Bud1",
        "ant/no-ending": picture(10),
    }  # fmt: skip
    path = tmp_path / "set"
    if packed:
        path = pack(tmp_path / "set.tar", files)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    found = load_images(path, SIZE, head_classes=2)
    assert found.labels is not None and found.labels.tolist() == [0] * 5 + [1] * 4
    assert any("2 files without an ending" in warning for warning in found.warnings)
    assert any("1 images" in warning and "left out" in warning for warning in found.warnings)
