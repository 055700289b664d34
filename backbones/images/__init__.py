"""Images of strangers: found in folders and archives, opened in one way, checked."""

from backbones.images.channels import fit_channels, image_mode
from backbones.images.files import ImageFiles, list_images, read_names, read_text, some
from backbones.images.opening import convert_image, find_bad_images, open_image

__all__ = [
    "ImageFiles",
    "convert_image",
    "find_bad_images",
    "fit_channels",
    "image_mode",
    "list_images",
    "open_image",
    "read_names",
    "read_text",
    "some",
]
