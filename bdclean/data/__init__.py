"""Images: a folder -> ImageSet (uint8 at the network's input size), its split, its batched augmentation."""

from bdclean.data.augment import crop, mirror
from bdclean.data.duplicates import without_duplicates
from bdclean.data.folder import load_images
from bdclean.data.imageset import ImageSet
from bdclean.data.labels import labels_plausible
from bdclean.data.splitting import split

__all__ = ["ImageSet", "crop", "labels_plausible", "load_images", "mirror", "split", "without_duplicates"]
