"""From encoded images (png, jpg, webp) to pixels of the configured size, upright and on white.

A transform is called as (decoded image, place in the training stream).

JPEGs are decoded by libjpeg-turbo with its warnings treated as errors (`simplejpeg`): other decoders fill missing parts
with grey. It cannot detect damage that happens to be valid code of the right length. Of 562 JPEGs of
9 to 256 KB, encoded in all ways, it found each one that was cut, lacked a piece, or had its end or half of it zeroed;
with a page (4096 bytes) zeroed in the middle 99 %, with a sector (512 bytes) 94 %, with one bit changed 37 %.
"""

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from mvsplit.data.faults import reason_of
from mvsplit.utils.rng import Stream, uniform_at

MAX_SCALED = 1 << 26
"""Most pixels that an image may be scaled to before it is cropped: a thin one of few bytes could fill the memory."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten."""
MAX_SCANNED = 1 << 31
"""Most scans × pixels: each scan visits all pixels, even if it is only a few bytes long."""
DAMAGE = ("Corrupt JPEG data", "Premature end")
"""Start of libjpeg's warnings about compressed data; its others are about metadata and unusual headers."""
MARKER = re.compile(rb"\xff+([\x02-\xcf\xd8-\xfe])")
SOS, EOI = b"\xda", b"\xd9"
EIGHTH = {"min_height": 1, "min_width": 1, "min_factor": 8, "fastdct": True, "fastupsample": True}
"""All data is decoded, but few pixels are computed."""


@dataclass(frozen=True)
class CentreCrop:
    """ADM's preprocessing of ImageNet, on which published FID values are based; exactly that for square sizes.

    Halve with a box filter while both sides stay large enough, scale the shorter side to fit with a bicubic filter, and
    crop the centre.

    Args:
        image_size: [height, width].
        flip: mirror half of the images, chosen by (seed, place in the stream).
        seed: of the flips.
    """

    image_size: list[int]
    flip: bool = False
    seed: int = 0

    def __call__(self, image: Image.Image, position: int) -> Tensor:
        """A grey or RGB image of any size → (C, height, width) uint8."""
        pixels = torch.from_numpy(np.stack([np.asarray(plane) for plane in self.crop(image).split()]))
        if self.flip and uniform_at(self.seed, Stream.AUGMENT, position) < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    def crop(self, image: Image.Image) -> Image.Image:
        height, width = self.image_size
        while image.height >= 2 * height and image.width >= 2 * width:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(height / image.height, width / image.width)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        if size[0] * size[1] > MAX_SCALED:
            raise ValueError(f"{image.width} × {image.height} pixels would have to be scaled to {size[0]} × {size[1]}")
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def decode_picture(data: bytes, mode: Literal["L", "RGB"], max_pixels: int) -> Image.Image:
    """Decode an image: the first of a camera's file, rotated as its EXIF data say, transparency on white.

    By Pillow: torchvision's own decoder crashes the process on a damaged PNG, and ADM's crop is defined by
    Pillow's filters.

    Raises:
        ValueError, OSError, SyntaxError and others: if it is damaged, too large or an animation.
    """
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} × {image.height} pixels; at most {max_pixels} are allowed")
        picture: Image.Image = image
        if isinstance(image, JpegImageFile):
            check_scans(data, image)
            if image.mode == "CMYK":  # Pillow knows how cameras and printers store inks
                _strict(data, image, "GRAY", EIGHTH)
            elif (pixels := _strict(data, image, "GRAY" if image.mode == "L" else "RGB")) is not None:
                picture = Image.fromarray(pixels.squeeze(-1) if image.mode == "L" else pixels)
        elif getattr(image, "n_frames", 1) > 1:
            raise ValueError("animation")
        elif image.mode.startswith("I"):  # 16-bit grey; of 16-bit colour Pillow itself takes the upper 8
            picture = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return _upright(picture.convert(mode), image)


def jpeg_damage(data: bytes, max_pixels: int) -> str | None:
    """Damage in a JPEG; None if there is none, if it is not a JPEG, or if it is too large to be decoded."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.width * image.height > max_pixels:
                return None
            check_scans(data, image)
            if _strict(data, image, "GRAY", EIGHTH) is None:
                image.load()
    except Exception as error:  # decoders fail in many ways
        return reason_of(error)
    return None


def in_colour(data: bytes) -> bool:
    """Whether an image is stored in colour; False if it cannot be read."""
    with suppress(Exception), Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
        return image.mode not in ("1", "L", "LA", "I", "I;16")
    return False


def check_scans(data: bytes, image: Image.Image) -> None:
    """Reject a small JPEG that would take minutes to decode.

    Raises:
        ValueError: if it has too many scans for its size.
    """
    allowed = min(MAX_SCANS, MAX_SCANNED // (image.width * image.height))
    if data.count(b"\xff" + SOS) <= allowed:
        return
    place, scans = 2, 0  # what looks like a scan may be in metadata or a thumbnail, or after the end
    while (marker := MARKER.search(data, place)) is not None and marker[1] != EOI:
        scans += marker[1] == SOS
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    if scans > allowed:
        raise ValueError(f"{scans} scans of {image.width} × {image.height} pixels; at most {allowed} are allowed")


def _strict(data: bytes, image: Image.Image, colours: str, scale: dict[str, int] | None = None) -> NDArray | None:
    """A JPEG's pixels (height, width, channels) uint8; None if only Pillow can read it, or reject it.

    Raises `ValueError` if its compressed data are damaged.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
        if (width, height) == image.size:  # else it is not the size that was checked
            return simplejpeg.decode_jpeg(data, colours, **scale or {})
    except (ValueError, KeyError) as error:
        if str(error).startswith(DAMAGE) and "ICC" not in str(error):
            raise ValueError(str(error)) from None
    if (bare := _without_notes(data)) != data:  # only the first warning is reported, and it was about metadata
        _strict(bare, image, "GRAY", EIGHTH)
    return None


def _without_notes(data: bytes) -> bytes:
    """A JPEG without the APPn and COM segments before its first scan; its colours may change."""
    kept, place = data[:2], 2
    while (marker := MARKER.match(data, place)) is not None and marker[1] != SOS:
        end = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
        kept += b"" if b"\xe0" <= marker[1] <= b"\xef" or marker[1] == b"\xfe" else data[place:end]
        place = end
    return kept + data[place:]


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """The image, rotated as the EXIF data of its source say, if they can be read."""
    turn = None
    with suppress(Exception):
        turn = source.getexif().get(ExifTags.Base.Orientation)
    if turn not in range(2, 9):
        return picture
    picture.info = {}  # `exif_transpose` would write broken EXIF data again, and fail
    picture.getexif()[ExifTags.Base.Orientation] = turn
    return ImageOps.exif_transpose(picture)
