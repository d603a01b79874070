"""Encoded bytes to RGB pixels, whatever the file is.

A flawless JPEG goes through libjpeg-turbo (simplejpeg): Pillow's pixels, in less time and, where asked for, 2, 4 or 8
times smaller. Everything else goes through Pillow, and what Pillow refuses is damaged. What decodes all the same goes
unnoticed: a flipped bit, a JPEG cut short and properly closed.

Not here: what becomes of damaged images (views.py, bad_images.py).

Sources: ITU-T T.81, table B.1 (markers of a JPEG); EXIF 2.32, tag 0x0112 (orientation).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError


class DamagedImage(ValueError):
    """An image that is not there or cannot be decoded; the message is a short reason."""


def decode_image(encoded: Mapping | None, choose_reduction: Callable[[int, int], int] | None = None) -> np.ndarray:
    """One image as RGB.

    Args:
        encoded: `{"bytes": bytes or None, "path": str or None}`, any format and mode Pillow reads: grey, palette,
            CMYK, alpha (dropped), 16 bits (scaled down, not clipped), the first frame of several.
        choose_reduction: of the stored height and width, in pixels; how many times smaller, 1, 2, 4 or 8, a JPEG is
            wanted. Other formats have one size.

    Returns:
        `(height, width, 3)` uint8, turned upright where the EXIF data says so, as Transformers' pipelines do. Reduced
        sides are rounded up.

    Raises:
        DamagedImage: no file, no image, more pixels than Pillow's limit of twice `PIL.Image.MAX_IMAGE_PIXELS`, or
            damaged in any way.
    """
    data = _read(encoded or {})
    size = _jpeg_size(data)
    if size is None:
        return _decode_with_pillow(data)
    reduction = choose_reduction(*size) if choose_reduction is not None else 1
    try:
        # the smallest scale that has these sides
        least = {"min_height": -(-size[0] // reduction), "min_width": -(-size[1] // reduction)}
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:  # libjpeg is not content; Pillow judges, and gives the reason
        return _decode_with_pillow(data)
    return _upright(pixels, _turn_of_jpeg(data))


def _read(encoded: Mapping) -> bytes:
    data, path = encoded.get("bytes"), encoded.get("path")
    if data is None:
        if path is None:
            raise DamagedImage("neither bytes nor a path")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DamagedImage(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise DamagedImage("empty: 0 bytes")
    return data


# --------------------------------------------------------------------------------------------------------------------
# JPEG

_SCAN, _APP1 = 0xDA, 0xE1  # pixels follow; EXIF or XMP


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) as stored; None for what is no JPEG in grey or three colours, or too large."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    too_large = Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS
    return None if too_large or colorspace == "CMYK" else (height, width)


def _may_be_turned(data: bytes) -> bool:
    """Whether there is an APP1 segment before the pixels, or a header too odd to tell."""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1]
        if marker in (_SCAN, _APP1):
            return marker == _APP1
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True


# --------------------------------------------------------------------------------------------------------------------
# Orientation


class _Turn(NamedTuple):
    """How a stored image becomes upright: transposed first, then flipped (by `cv2.flip`'s code)."""

    transposed: bool
    flip: int | None


_UPRIGHT = _Turn(False, None)
_TURNS = {
    2: _Turn(False, 1),
    3: _Turn(False, -1),
    4: _Turn(False, 0),
    5: _Turn(True, None),
    6: _Turn(True, 1),
    7: _Turn(True, -1),
    8: _Turn(True, 0),
}


def _turn(image: Image.Image) -> _Turn:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation), _UPRIGHT)
    except Exception:  # damaged EXIF says nothing about the pixels (one such image is in ImageNet-1k)
        return _UPRIGHT


def _turn_of_jpeg(data: bytes) -> _Turn:
    if not _may_be_turned(data):  # Pillow takes its time to say so
        return _UPRIGHT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _turn(Image.open(io.BytesIO(data)))
        except Exception:  # its pixels are for the decoder to judge
            return _UPRIGHT


def _upright(pixels: np.ndarray, turn: _Turn) -> np.ndarray:
    if turn.transposed:
        pixels = cv2.transpose(pixels)
    return pixels if turn.flip is None else cv2.flip(pixels, turn.flip)


# --------------------------------------------------------------------------------------------------------------------
# Everything else


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a large image, of damaged EXIF: not once per image
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _upright(_rgb(image), _turn(image))
        except MemoryError:
            raise
        except UnidentifiedImageError as error:
            raise DamagedImage("no image that Pillow can identify") from error
        except Exception as error:  # Pillow's readers raise whatever the damage leads them to
            raise DamagedImage(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))  # a copy: what Pillow lends is read-only
