"""Decode the bytes of an image file, in any supported format, to RGB pixels.

An intact JPEG is decoded by libjpeg-turbo (simplejpeg): it yields the same pixels as Pillow in less time and can
return the image 2, 4 or 8 times smaller and only its upper rows. Every other file is decoded by Pillow, and an image
that Pillow rejects counts as damaged. Damage that still decodes is not detected: a flipped bit, or a JPEG that was cut
short and properly closed.

A damaged image is replaced in views.py; [`BadImages`] lists it, and stops a run with too many.

Sources: ITU-T T.81, table B.1 (markers of a JPEG); EXIF 2.32, tag 0x0112 (orientation).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError, printable
from ..files import read_file


logger = logging.getLogger(__name__)

BAD_IMAGES_FILE = (
    "_bad_images.txt"  # the file holds local paths; Trainer does not upload names with a leading underscore
)
_HEADER = "index\tpath\treason\n"

# A subset of Pillow's formats: its EPS reader makes Ghostscript run the file as a program, and some other readers pass
# the file to external programs or decoders. A JPEG with several pictures (MPO) counts as a JPEG. HEIF is read by
# pillow-heif, where the user has installed it.
Image.init()
if importlib.util.find_spec("pillow_heif") is not None:
    importlib.import_module("pillow_heif").register_heif_opener()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM", "HEIF")
    if name in Image.OPEN  # Pillow may be built without AVIF
)


# Limits of one image. A photo of 100 megapixels stored as plain 16-bit RGB has 600 MB.
MAX_BYTES = 1 << 30
# Pixels times scans of a progressive JPEG, which bound the time; cameras write some 10 scans.
MAX_SCANNED_PIXELS = 4_000_000_000
_STRIP = 4_000_000  # pixels that are converted at once, so that an image is not several times in memory


class DamagedImage(UserError):
    """An image is missing or cannot be decoded; the message is a short reason."""


class Part(NamedTuple):
    """The part of an image that the views need.

    Attributes:
        reduction: factor by which both sides are reduced: 1, 2, 4 or 8.
        rows: number of rows of the reduced image, from the top; None for all.
    """

    reduction: int = 1
    rows: int | None = None


def decode_image(encoded: Mapping | None, choose_part: Callable[[int, int], Part] | None = None) -> np.ndarray:
    """Decode one image to RGB.

    Args:
        encoded: `{"bytes": bytes or None, "path": str or None}`, one of [`FORMATS`] whatever the file is called, in
            any mode whose range is known: grey, palette, CMYK, YCbCr, LAB, alpha (dropped), the first frame of
            several. Of 16 bits the upper 8 are kept (v >> 8), and of 12 bits (v >> 4). A path that is not UTF-8 is
            given as [`storable_path`] writes it. Only a regular file of at most `MAX_BYTES` is opened.
        choose_part: called once with the height and width in pixels; it returns the [`Part`] that is needed.

    Returns:
        `(height, width, 3)` uint8, turned upright according to its EXIF data, as in Transformers' pipelines. Each side
        is divided by the reduction and rounded up. There may be more rows than `choose_part` requested.

    Raises:
        DamagedImage: the file is missing, is not an image, is damaged, has pixels without a known range (floating
            point or 32 bits), has more pixels than Pillow's limit of twice `PIL.Image.MAX_IMAGE_PIXELS`, or is a JPEG
            of so many scans that it would take minutes.
    """
    data = read_encoded(encoded or {})
    jpeg = _read_jpeg_header(data)
    turn = _turn_of_jpeg(data) if jpeg is not None and jpeg.may_be_turned else _UPRIGHT
    if jpeg is not None and turn == _UPRIGHT:
        part = choose_part(jpeg.height, jpeg.width) if choose_part is not None else Part()
        pixels = _decode_jpeg(data, jpeg, part)
        return pixels if pixels is not None else _reduce(_decode_with_pillow(data), part.reduction)
    pixels = _decode_jpeg(data, jpeg, Part()) if jpeg is not None else None
    pixels = _upright(pixels, turn) if pixels is not None else _decode_with_pillow(data)
    return pixels if choose_part is None else _reduce(pixels, choose_part(*pixels.shape[:2]).reduction)


def storable_path(path: str) -> str:
    """Return a path that can be stored as UTF-8: itself, or a file URI if the name of the file is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(os.path.abspath(path)).as_uri()  # the bytes of the name, percent-encoded
    return path


def path_of(path: str) -> str:
    """Undo [`storable_path`]; no file name that needs no URI begins like one, because stored paths are absolute."""
    return os.fsdecode(unquote_to_bytes(path[len("file://") :])) if path.startswith("file:///") else path


def check_paths(paths: Iterable[str], folders: Sequence[str | os.PathLike], where: str) -> None:
    """Refuse file names from inside a dataset's files that lead out of its folder, absolute or with "..".

    A link inside the folder may lead elsewhere: whoever made the folder put it there.

    Args:
        paths: as they would be opened, absolute or relative to the working directory.
        folders: directories that they may be in, at any depth; the dataset's.
        where: of the paths, for the message.

    Raises:
        UserError: a path leads out.
    """
    inside = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    for path in paths:
        if not os.path.abspath(path_of(path)).startswith(inside):
            raise UserError(
                f"{where} names the image file {printable(path)!r}, which is not inside {str(folders[0])!r} and "
                "is not opened: store the bytes of the images, or paths inside that folder"
            )


def _reduce(pixels: np.ndarray, reduction: int) -> np.ndarray:
    return pixels if reduction == 1 else np.array(Image.fromarray(pixels).reduce(reduction))


def read_encoded(encoded: Mapping) -> bytes:
    """Return the bytes of an image file, as it is: those at hand, else those of its path.

    Args:
        encoded: as for [`decode_image`].

    Raises:
        DamagedImage: the file is missing, empty, no regular file or larger than `MAX_BYTES`.
    """
    data, path = encoded.get("bytes"), encoded.get("path")
    if data is None:
        if path is None:
            raise DamagedImage("has neither bytes nor a path")
        try:
            data = read_file(path_of(path), MAX_BYTES)
        except UserError as error:
            raise DamagedImage(str(error)) from error
        except (OSError, ValueError) as error:  # ValueError: the path holds a zero
            raise DamagedImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise DamagedImage(f"is larger than {MAX_BYTES:,} bytes ({len(data):,})")
    if not data:
        raise DamagedImage("empty: 0 bytes")
    return data


# --------------------------------------------------------------------------------------------------------------------
# JPEG

# A marker within the compressed pixels. There, a data byte of 255 is followed by 0, and neither padding nor a restart
# marker ends the scan.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_BASELINE, _SCAN, _APP1, _END_OF_IMAGE = 0xC0, 0xDA, 0xE1, 0xD9
_MARGIN = 16  # extra rows to decode: the last rows of a cut image lack the colour samples below them


class _JpegHeader(NamedTuple):
    """The header of a JPEG: everything before its pixels.

    Attributes:
        height, width: as stored, in pixels.
        may_be_turned: True if there is EXIF or XMP data, or if the header could not be parsed.
        baseline_at: offset of the frame of a baseline JPEG, after its marker; None for any other JPEG.
        scan_at: offset of the first scan.
    """

    height: int
    width: int
    may_be_turned: bool
    baseline_at: int | None
    scan_at: int


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """Read the header; None if `data` is not a JPEG in grey or three colours, or has too many pixels."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_scans(data, height * width)
    if colorspace == "CMYK" or (Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS):
        return None
    position, may_be_turned, baseline_at = 2, False, None
    while data[position : position + 1] == b"\xff":
        marker, position = data[position + 1], position + 2
        if marker == _SCAN:
            return _JpegHeader(height, width, may_be_turned, baseline_at, position)
        if marker == _BASELINE:
            baseline_at = position
        may_be_turned |= marker == _APP1
        position += int.from_bytes(data[position : position + 2], "big")
    return _JpegHeader(height, width, True, None, position)


def _check_scans(data: bytes, num_pixels: int) -> None:
    """Refuse a JPEG whose scans each pass over all pixels and are far more than a picture needs."""
    if data.find(b"\xff\xc0", 0, 1 << 16) >= 0 or data.find(b"\xff\xc1", 0, 1 << 16) >= 0:
        return  # sequential: each pixel is decoded once
    num_scans = data.count(b"\xff\xda")  # among compressed pixels 255 is followed by 0
    if num_scans > 16 and num_scans * num_pixels > MAX_SCANNED_PIXELS:
        raise DamagedImage(f"a JPEG of {num_pixels:,} pixels in {num_scans:,} scans, which would take minutes")


def _decode_jpeg(data: bytes, jpeg: _JpegHeader, part: Part) -> np.ndarray | None:
    """Decode a JPEG; None if libjpeg reports an error or a warning, so that Pillow decides and gives the reason."""
    height, k = jpeg.height, part.reduction
    cut = part.rows is not None and jpeg.baseline_at is not None and _is_whole_scan(data, jpeg.scan_at)
    if cut:
        # We patch the header to a smaller height so that the decoder stops early. It then warns about the unread data,
        # so warnings cannot signal damage; we scan for JPEG markers instead.
        height = min(height, part.rows * k + _MARGIN)
        at = jpeg.baseline_at + 3
        data = b"".join((data[:at], height.to_bytes(2, "big"), data[at + 2 :]))
    try:
        # simplejpeg chooses the smallest scale with at least these sides
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // k), min_width=-(-jpeg.width // k), strict=not cut
        )
    except ValueError:
        return None


def _is_whole_scan(data: bytes, start: int) -> bool:
    """Return whether one scan holds all pixels and is followed by the end of the image."""
    marker = _MARKER.search(data, start + int.from_bytes(data[start : start + 2], "big"))
    return marker is not None and data[marker.end() - 1] == _END_OF_IMAGE


# --------------------------------------------------------------------------------------------------------------------
# Orientation


class _Turn(NamedTuple):
    """How to turn a stored image upright: transpose it first, then flip it (`flip` is the code of `cv2.flip`)."""

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
    except Exception:  # damaged EXIF data does not mean damaged pixels (ImageNet-1k has one such image)
        return _UPRIGHT


def _turn_of_jpeg(data: bytes) -> _Turn:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _turn(Image.open(io.BytesIO(data), formats=("JPEG",)))
        except Exception:  # the decoder decides whether the image is damaged
            return _UPRIGHT


def _upright(pixels: np.ndarray, turn: _Turn) -> np.ndarray:
    if turn.transposed:
        pixels = cv2.transpose(pixels)
    return pixels if turn.flip is None else cv2.flip(pixels, turn.flip)


# --------------------------------------------------------------------------------------------------------------------
# Everything else


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow would warn of large images and damaged EXIF data, once per image
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
                return _upright(_rgb(image), _turn(image))
        except (MemoryError, DamagedImage):
            raise
        except UnidentifiedImageError as error:
            if re.match(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", data, re.DOTALL) and "HEIF" not in FORMATS:
                raise DamagedImage(
                    "is a HEIC or HEIF image; install pillow-heif (pip install hf_deit[heif]), or convert it"
                ) from error
            raise DamagedImage("holds no image that Pillow can identify") from error
        except Exception as error:  # damage makes Pillow's readers raise exceptions of any type
            raise DamagedImage(f"{type(error).__name__}: {printable(str(error))}") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS_AS_I):
        raise DamagedImage(f"mode {image.mode} has no known range; convert to 8 or 16 bit")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image
        if rows < image.height:
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _rgb_of_strip(strip, tags)
    return pixels


def _rgb_of_strip(image: Image.Image, tags: Mapping) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
        return (_sixteen_bits(image, tags) >> 8).clip(0, 255).astype(np.uint8)[..., None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


# Formats whose pixels of more than 8 bits have the mode I in some versions of Pillow, scaled to 0 ... 65535.
_SIXTEEN_BITS_AS_I = ("PNG", "PPM")


def _sixteen_bits(image: Image.Image, tags: Mapping) -> np.ndarray:
    """Return a grey image of 12 or 16 bits as values from 0 (black) to 65535 (white)."""
    values = np.asarray(image).astype(np.uint32)
    if tags.get(_BITS_PER_SAMPLE) == (12,):  # Pillow neither scales 12 bits nor inverts
        values = values << 4
    return 65535 - values if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else values


_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class BadImages:
    """Lists each damaged image once in `_bad_images.txt`, one line `index, path, reason` separated by tabs.

    All ranks of a run append to this file, and a resumed run continues it. `len()` is the number of images listed.

    Args:
        output_dir: directory of the file, which is created with the first damaged image.
        num_images: number of training images.
        max_bad_images: fraction of the training images that may be damaged, in [0, 1].
    """

    def __init__(self, output_dir: str | Path, num_images: int, max_bad_images: float = 0.001):
        self.path = Path(output_dir, BAD_IMAGES_FILE)
        self.num_images = num_images
        self.max_bad_images = max_bad_images
        self._listed: set[int] = set()  # may lack images that other ranks have listed

    def __len__(self) -> int:
        self._read()
        return len(self._listed)

    def record(self, bad_images: Sequence[tuple[int, str | None, str]]) -> None:
        """List the damaged images of a batch, given as `(index, path, reason)`.

        Raises:
            ValueError: more training images are damaged than `max_bad_images` allows.
        """
        if self._listed.issuperset(index for index, _, _ in bad_images):
            return
        self._read()
        new = {index: (path, reason) for index, path, reason in bad_images if index not in self._listed}
        if new and not self._listed:
            index, (path, reason) = next(iter(new.items()))
            logger.warning(
                "training image number %d (path %s) is damaged: %s. The next intact image replaces it; all damaged "
                "images are listed in %s",
                *(index, _in_one_field(path or "none"), _in_one_field(reason), self.path),
            )
        self._append(new)
        if len(self._listed) / self.num_images > self.max_bad_images:
            raise UserError(
                f"{len(self._listed)} of {self.num_images} training images are damaged so far, more than the "
                f"fraction max_bad_images = {self.max_bad_images:g}; they are listed in {str(self.path)!r}. Repair "
                "the dataset, or raise max_bad_images"
            )

    def forget(self) -> None:
        """Delete the list that an earlier run left in the output directory."""
        self.path.unlink(missing_ok=True)
        self._listed.clear()

    def _read(self) -> None:
        if self.path.exists():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                numbers = [line.partition("\t")[0] for line in file]
            self._listed |= {int(number) for number in numbers if number.isdigit()}

    def _append(self, new: dict[int, tuple[str | None, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(_HEADER)
        except FileExistsError:  # written by an earlier run or by another rank
            pass
        with self.path.open("a", encoding="utf-8") as file:
            for index, (path, reason) in new.items():
                file.write(f"{index}\t{_in_one_field(path or '')}\t{_in_one_field(reason)}\n")
        self._listed |= new.keys()


def _in_one_field(text: str) -> str:
    """Make the path or fault of a damaged image one field of a line: no tabs, no line ends, valid UTF-8."""
    return printable(text)
