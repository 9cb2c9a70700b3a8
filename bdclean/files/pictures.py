"""What Pillow does to pictures that it should not."""

from __future__ import annotations

import numpy as np
from PIL import Image


def eight_bits(image: Image.Image) -> Image.Image | None:
    """`image`; one of 16 bits a pixel with the upper 8 of them. None where its pixels have no fixed range.

    Pillow's own conversion cuts 16 bits off at 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return None if image.mode in ("I", "F") else image
