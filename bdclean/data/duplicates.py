"""Images that show the same picture: exactly, or after re-encoding, resizing or a change of light."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bdclean.data.imageset import ImageSet

SIDE = 8  # the first look: grey, 8 x 8
LIKE = 0.95  # correlation of two such thumbnails worth a second look
SAME = 0.95  # correlation of the pictures themselves, at most FULL x FULL, in colour: see `shows_same`
CENTRE = 0.8  # the same for the middle half: signs of another number share their frame
# Both for grey pictures, which have less to differ in: two shirts on black are no copies. See `shows_same`.
GREY_SAME, GREY_CENTRE = 0.98, 0.95
FULL = 32
FLAT = 2.0  # grey levels of deviation under which a picture has no content to compare
AT_ONCE = 1024  # pairs that are compared in full together


def without_duplicates(images: ImageSet, of: ImageSet) -> tuple[ImageSet, int]:
    """(`images` without those that show the same picture as one of `of`, how many those were)."""
    same = shows_same(images.images, of.images)
    count = int(same.sum())
    return (images.select(~same), count) if count else (images, 0)


def exact_copies(images: Tensor, others: Tensor) -> Tensor:
    """For each image, bool [n]: whether one of `others` is equal to it in every pixel. Both uint8 [. c h w]."""
    return _exact(images, others, earlier=False)


def repeated(images: Tensor) -> Tensor:
    """For each image, bool [n]: whether an earlier one shows the same picture. uint8 [n c h w]."""
    return _search(images, images, 2048, earlier=True)


def shows_same(images: Tensor, others: Tensor, block: int = 2048) -> Tensor:
    """For each image, bool [n]: whether any of `others` shows the same picture. Both uint8 [. c h w].

    Thumbnails first (matrix products, `block` rows and columns at a time), then the pairs that are alike are compared
    in full, until each image has its answer. Brightness and contrast do not count: a correlation near one means the
    same content.

    Measured: among all pairs of the 10,000 test images of CIFAR-10 this finds 7, all true copies; between 45,000
    and 5,000 of its training images 35, of which 4 are other ships on a plain sea; none in 10,000 of Tiny-ImageNet;
    2,514 in GTSRB, whose signs come in series of frames, 7 of them with unlike labels. Copies saved as JPEG at
    quality 75 are found always, and 87 % of the time on dark road signs; shifted or mirrored copies hardly ever.

    Of grey pictures (3,000 against 2,000 of Fashion-MNIST and of MNIST) the thresholds of coloured ones would find 332
    and 84, theirs find 22 and 1, with 92 and 100 % of copies saved as JPEG at quality 75.
    """
    return _search(images, others, block, earlier=False)


def _search(images: Tensor, others: Tensor, block: int, earlier: bool) -> Tensor:
    if not len(images) or not len(others):
        return torch.zeros(len(images), dtype=torch.bool)
    same, centre = (GREY_SAME, GREY_CENTRE) if images.shape[1] == 1 else (SAME, CENTRE)
    found = _exact(images, others, earlier)
    thumbnails = _thumbnails(images)
    other_thumbnails = thumbnails if earlier else _thumbnails(others)
    for start in range(0, len(images), block):
        rows = thumbnails[start : start + block]
        for first in range(0, start + block if earlier else len(others), block):
            open_ = (~found[start : start + block]).nonzero().squeeze(1)
            if not len(open_):
                break
            pairs = (rows[open_] @ other_thumbnails[first : first + block].T > LIKE).nonzero()
            mine, theirs = open_[pairs[:, 0]] + start, pairs[:, 1] + first
            if earlier:
                before = theirs < mine
                mine, theirs = mine[before], theirs[before]
            for some in torch.arange(len(mine)).split(AT_ONCE):
                # an image that a pair has settled needs no other one: sets of copies have very many pairs
                some = some[~found[mine[some]]]
                kept = _keep(mine[some], theirs[some], images, others, same)
                kept = _keep(*kept, _middle(images), _middle(others), centre)
                found[kept[0]] = True
    return found


def _exact(images: Tensor, others: Tensor, earlier: bool) -> Tensor:
    """Whether an equal image is among `others`, or among those before it."""
    known: set[bytes] = set() if earlier else set(_fingerprints(others))
    found = []
    for fingerprint in _fingerprints(images):
        found.append(fingerprint in known)
        if earlier:
            known.add(fingerprint)
    return torch.tensor(found)


def _keep(
    mine: Tensor, theirs: Tensor, images: Tensor, others: Tensor, least: float
) -> tuple[Tensor, Tensor]:
    """Those of the pairs whose pictures correlate by more than `least`."""
    alike = (_normalised(images[mine]) * _normalised(others[theirs])).sum(1) > least
    return mine[alike], theirs[alike]


def _middle(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    return images[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4]


def _fingerprints(images: Tensor) -> list[bytes]:
    # a block at a time: to iterate over a tensor makes a tensor of each image at once
    return [
        hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        for block in images.split(256)
        for image in block.numpy()
    ]


def _thumbnails(images: Tensor) -> Tensor:
    """Grey SIDE x SIDE thumbnails, zero mean, unit length [n SIDE*SIDE]; nearly flat pictures are zero."""
    # Room for all of it first: small results kept between large temporaries would break up the heap until it grows
    # by a temporary at every block (measured: 330 MB for 10,000 images of 96 x 96).
    thumbnails = torch.empty(len(images), SIDE * SIDE)
    at_once = _at_once(images)
    for rows, block in zip(thumbnails.split(at_once), images.split(at_once), strict=True):
        rows.copy_(
            _unit(functional.adaptive_avg_pool2d(block.float().mean(1, keepdim=True), SIDE).flatten(1))
        )
    return thumbnails


def _normalised(images: Tensor) -> Tensor:
    """Colour pictures at most FULL x FULL, zero mean in each channel, unit length [n values]."""
    height, width = images.shape[-2:]
    size = (height, width) if max(height, width) <= FULL else (FULL, FULL)
    small = torch.empty(len(images), images.shape[1], *size)
    at_once = _at_once(images)
    for rows, block in zip(small.split(at_once), images.split(at_once), strict=True):
        pixels = block.float()
        rows.copy_(functional.adaptive_avg_pool2d(pixels, size) if pixels.shape[-2:] != size else pixels)
    return _unit((small - small.mean((2, 3), keepdim=True)).flatten(1))


def _at_once(images: Tensor) -> int:
    """So many images that they are about 4 MiB as floats: large ones must not make large temporaries."""
    return max(1, 2**20 // max(1, images.shape[1:].numel()))


def _unit(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    deviation = rows.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > FLAT, functional.normalize(rows, dim=1), torch.zeros_like(rows))
