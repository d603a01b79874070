"""Encoded bytes to RGB pixels, whatever the file is."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import ExifTags, Image, ImageOps


def decode_image(encoded: Mapping) -> np.ndarray:
    """One image as RGB.

    Args:
        encoded: `{"bytes": bytes or None, "path": str or None}`, any format and mode Pillow reads: grey, palette,
            CMYK, alpha (dropped), 16 bits (scaled down, not clipped).

    Returns:
        `(height, width, 3)` uint8, turned upright where the EXIF data says so, as Transformers' pipelines do.
    """
    source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"]
    with Image.open(source) as image:
        try:
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies upright images too
                image = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF says nothing about the pixels (one such image is in ImageNet-1k)
            pass
        if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
