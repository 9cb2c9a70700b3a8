"""Images: a folder or archive -> ImageSet (uint8 at the network's input size), its split, its batched augmentation."""

from bdclean.data.augment import crop, mirror
from bdclean.data.decode import Resize
from bdclean.data.duplicates import repeated, without_duplicates
from bdclean.data.imageset import ImageSet
from bdclean.data.labelling import claimed_names
from bdclean.data.labels import labels_plausible
from bdclean.data.loading import load_images
from bdclean.data.splitting import split

__all__ = [
    "ImageSet", "Resize", "claimed_names", "crop", "labels_plausible", "load_images", "mirror", "repeated",
    "split", "without_duplicates",
]  # fmt: skip
