"""ImageSet: the pixels that every measure and recipe shares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bdclean.data.scratch import allocate


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images at the network's input size, uint8 [n c h w] on the CPU, with labels where they are known.

    c is what the network takes: 3 (RGB) or 1 (grey).

    `labels_source` says how labels were found: 'names', 'integers', 'count' (folder count equals the head's:
    to be dropped unless the network agrees), 'forced', the name of an order that the network's
    answers spoke for, 'suspect' (they are its answers), or None. `classes` may name classes without any image.
    `on_disk`: the images lie in a scratch file that the system pages in and out, and so do selections of them.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    paths: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    labels_source: str | None = None
    on_disk: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """sha256 over shape, pixels and labels: the same images in the same order give the same digest."""
        labels = "none" if self.labels is None else "int64"
        hashed = hashlib.sha256(f"bdclean images {tuple(self.images.shape)} labels {labels}\n".encode())
        for block in self.images.split(4096):
            hashed.update(block.contiguous().numpy().data)
        if self.labels is not None:
            hashed.update(self.labels.to(torch.int64).contiguous().numpy().astype("<i8").data)
        return hashed.hexdigest()

    @property
    def sure(self) -> bool:
        """Whether the labels are the user's word or matched known class names: nothing has to confirm them."""
        return self.labels is not None and self.labels_source in ("names", "forced")

    def select(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (or where a boolean mask is true), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if self.on_disk:
            images, _ = allocate((len(indices), *self.images.shape[1:]), memory=0)
            for rows, some in zip(images.split(128), indices.split(128), strict=True):
                rows.copy_(self.images[some])
        else:
            images = self.images[indices]
        return replace(
            self,
            images=images,
            labels=None if self.labels is None else self.labels[indices],
            paths=tuple(self.paths[i] for i in indices.tolist()) if self.paths else (),
        )

    def in_order(self, name: str, places: Tensor, classes: int) -> ImageSet:
        """The same images, label k being class `places[k]` of `classes`: an order called `name`."""
        assert self.labels is not None
        names = [str(k) for k in range(classes)]
        if self.classes is not None:
            for label, place in enumerate(places.tolist()):
                if 0 <= place < classes:
                    names[place] = self.classes[label]
        return replace(self, labels=places[self.labels], classes=tuple(names), labels_source=name)

    def unlabeled(self, *warnings: str) -> ImageSet:
        """The same images without labels, with further warnings."""
        return replace(
            self, labels=None, classes=None, labels_source=None, warnings=(*self.warnings, *warnings)
        )
