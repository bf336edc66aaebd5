"""Image files to uint8 pixels of one size."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from jaxft.checks import is_int

MAX_PIXELS = 64 * 2**20
"""Larger images are refused before they are decoded: a few kilobytes can claim gigabytes."""

MAX_SIDE = 2**16 - 1
"""Of a side, as of a JPEG's: a line of 67 million pixels makes tables of gigabytes when it is resized."""

MAX_SCANS = 100
"""Of a progressive JPEG: each goes through all pixels. Encoders make about ten; 250 kB can hold a thousand."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
"""Pillow's readers that are tried; others (EPS, which starts Ghostscript) are never reached."""

_JPEG_MAGIC, _JPEG_SCAN = b"\xff\xd8\xff", b"\xff\xda"
# What Pillow and its decoders raise for broken files, beside ValueError.
_BROKEN = (
    *(OSError, SyntaxError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(MemoryError, struct.error, zlib.error),
)
_TURBO_SPACES = ("YCbCr", "RGB", "Gray")  # what libjpeg-turbo turns into RGB
_HARMLESS = "extraneous bytes before marker 0xd9"  # libjpeg's words for bytes between the last pixel and the end
_ORIENTATION = 0x0112
_EXIF_BYTES = 2**16 + 2**12  # of a JPEG's head in which its orientation stands
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel or less
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
# EXIF's orientation → how Pillow turns the stored pixels upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decode:
    """How an image file becomes pixels.

    Attributes:
        resize: to the size of the net: squash (both sides, as Keras does), crop (the shorter side, then the middle), or
            pad (the longer side, then bars of `background`).
        scaled: let libjpeg decode at a fraction of the size, never below the one wanted. Faster, with slightly
            different pixels: it averages blocks of coefficients where the resize averages pixels.
        orient: turn the image upright as its EXIF orientation says.
        background: red, green and blue under what is transparent, and of the bars, each 0 to 255.
        channels: 3 is RGB, 1 grey (ITU-R 601), 4 red, green, blue and opacity as the file has them. Any other number is
            for arrays with so many channels.

    Raises:
        ValueError: a setting that cannot be.
    """

    resize: Literal["squash", "crop", "pad"] = "squash"
    scaled: bool = False
    orient: bool = True
    background: tuple[int, int, int] = (255, 255, 255)
    channels: int = 3

    def __post_init__(self):
        if self.resize not in ("squash", "crop", "pad"):
            raise ValueError(f"resize {self.resize!r}: expected squash, crop or pad")
        for name in ("scaled", "orient"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r}: expected True or False")
        if not is_int(self.channels) or self.channels < 1:
            raise ValueError(
                f"channels {self.channels!r}: expected 3 (RGB), 1 (grey), 4 (with opacity) or another number"
            )
        colour = self.background
        if (
            not isinstance(colour, tuple | list)
            or len(colour) != 3
            or not all(is_int(c) and 0 <= c <= 255 for c in colour)
        ):
            raise ValueError(f"background {colour!r}: expected red, green and blue, each 0 to 255")
        object.__setattr__(self, "background", tuple(map(int, colour)))


RGB = Decode()


def pixels(image: bytes | np.ndarray, size: tuple[int, int], name: str, decode: Decode = RGB) -> np.ndarray:
    """Decode an image and bring it to one size, antialiased.

    Args:
        image: the bytes of a file of `FORMATS`, or decoded uint8 [H, W, channels]. Of an animation the first frame
            counts. Of 16 bits a channel the upper 8 count.
        size: (height, width) wanted.
        name: by which an error calls the image.
        decode: how.

    Returns:
        uint8 [height, width, channels].

    Raises:
        ValueError: corrupt, truncated, of an unknown format, of 32 bits a channel, of more than `MAX_PIXELS`,
            `MAX_SIDE` or `MAX_SCANS`, or without as many channels; the message names `name`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != decode.channels:
            raise ValueError(
                f"image {name}: expected uint8 [H, W, {decode.channels}], found {image.dtype} {list(image.shape)}"
                f"{_remedy(image)}"
            )
        return image if image.shape[:2] == size else _resized(image, size, decode)
    if decode.channels not in (1, 3, 4):
        raise ValueError(
            f"image {name} is a file, which has 1, 3 or 4 channels, not {decode.channels}; give uint8 arrays "
            f"[H, W, {decode.channels}]"
        )
    return _resized(_decoded(image, size, name, decode), size, decode)


def thumbnail(image: bytes | np.ndarray, side: int, name: str, decode: Decode = RGB) -> np.ndarray:
    """The image in its own proportions, its longer side at most `side` pixels: uint8 [H, W, 3], as `visible`.

    Raises:
        ValueError: as `pixels`.
    """
    if not isinstance(image, np.ndarray):
        image = _decoded(image, (side, side), name, decode)
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    return _squashed(visible(image), (max(1, round(height * scale)), max(1, round(width * scale))))


def visible(image: np.ndarray) -> np.ndarray:
    """An image to be looked at, [H, W, C] → [H, W, 3]: the first channel alone as grey, or the first three."""
    return np.repeat(image[..., :1], 3, -1) if image.shape[2] < 3 else np.ascontiguousarray(image[..., :3])


def jpeg_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of a JPEG by its header alone, in microseconds, as it is stored.

    Raises:
        ValueError: not a JPEG, a corrupt header, or more than `MAX_PIXELS`; the message names `name`.
    """
    if not data.startswith(_JPEG_MAGIC):
        found = f"it begins with {data[:4]!r}" if data else "it is empty"
        raise ValueError(f"image {name} is not a JPEG: {found}; replace or remove it")
    return _jpeg_header(data, name)[:2]


def _remedy(image: np.ndarray) -> str:
    """What to give for an array that is not an image."""
    if image.ndim == 2:
        return "; for one image alone give [image], a list, and for a grey image np.stack([image] * 3, -1)"
    if image.dtype != np.uint8:
        return "; give image.astype(np.uint8), with values of 0 to 255"
    return f"; say Decode(channels={image.shape[2]})" if image.ndim == 3 else ""


def _decoded(data: bytes, size: tuple[int, int], name: str, decode: Decode) -> np.ndarray:
    """The pixels of a file, upright, in the colours wanted: uint8 [H, W, 1, 3 or 4]."""
    if data.startswith(_JPEG_MAGIC) and _jpeg_header(data, name)[2] in _TURBO_SPACES:
        turn = _jpeg_orientation(data) if decode.orient else 1
        least: Any = {}
        if decode.scaled:
            height, width = size if turn < 5 else size[::-1]
            least = {"min_height": height, "min_width": width}
        try:
            found = simplejpeg.decode_jpeg(data, "GRAY" if decode.channels == 1 else "RGB", **least)
        except ValueError as err:
            if _HARMLESS not in str(err):
                raise ValueError(f"image {name} is a corrupt JPEG ({err}); replace or remove it") from err
        else:
            if turn in _UPRIGHT:
                turned = Image.fromarray(found.squeeze(-1) if decode.channels == 1 else found)
                found = _array(turned.transpose(_UPRIGHT[turn]))
            return found if decode.channels < 4 else np.dstack([found, np.full(found.shape[:2], 255, np.uint8)])
    with _open(data, name) as opened:
        turned = getattr(opened, "tag_v2", {}).get(_ORIENTATION, 1)  # Pillow turns a TIFF while it loads it
        image = _coloured(opened, decode)  # first: what reads metadata hides that the pixels are broken
        turn = _orientation(opened) if decode.orient else {6: 8, 8: 6}.get(turned, turned)
    return _array(image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image)


def _coloured(opened: Image.Image, decode: Decode) -> Image.Image:
    """The image in mode L, RGB or RGBA, by the number of channels; what is transparent shows the background."""
    image: Image.Image = opened
    if opened.mode in _DEEP:
        deep = np.asarray(opened)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
        if isinstance(clear := opened.info.get("transparency"), int):
            image.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if decode.channels < 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*decode.background, 255)), image)
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[decode.channels])


def _array(image: Image.Image) -> np.ndarray:
    found = np.asarray(image)
    return found[..., None] if found.ndim == 2 else found


def _jpeg_header(data: bytes, name: str) -> tuple[int, int, str]:
    try:
        rows, columns, space, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(rows), int(columns)
    except ValueError:  # corrupt, or a rare subsampling that libjpeg-turbo does not name: Pillow decides
        with _open(data, name) as opened:
            height, width, space = opened.height, opened.width, "for Pillow"
    _check_pixels(height, width, name)
    if (scans := data.count(_JPEG_SCAN)) > MAX_SCANS:
        raise ValueError(f"image {name} is a JPEG of {scans} scans; at most {MAX_SCANS} are decoded: save it anew")
    return height, width, space


def _jpeg_orientation(data: bytes) -> int:
    """The orientation of a JPEG; 1 without opening it again where its head names none."""
    head = data[:_EXIF_BYTES]
    if b"Exif\0" not in head and b"tiff:Orientation" not in head:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as opened:
            return _orientation(opened)
    except (OSError, SyntaxError):  # libjpeg-turbo reads the pixels all the same
        return 1


def _orientation(opened: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or one that cannot be read."""
    try:
        found = opened.getexif().get(_ORIENTATION, 1)
    except (ValueError, TypeError, KeyError, IndexError, OSError, SyntaxError, struct.error):  # damaged metadata
        return 1
    return found if found in _UPRIGHT else 1


@contextmanager
def _open(data: bytes, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_pixels(opened.height, opened.width, name)
            if opened.mode not in (*_MODES, *_DEEP):
                raise ValueError(
                    f"image {name} has Pillow's mode {opened.mode}; expected grey, RGB, CMYK or a palette of at "
                    f"most 16 bits a channel: convert it"
                )
            yield opened
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ValueError(f"image {name} claims too many pixels ({err})") from err
    except ValueError as err:
        if name in str(err):
            raise
        raise ValueError(f"image {name} cannot be decoded ({err}); replace or remove it") from err
    except _BROKEN as err:
        raise ValueError(f"image {name} cannot be decoded ({err}); replace or remove it") from err


def _check_pixels(height: int, width: int, name: str) -> None:
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"image {name} claims {height}×{width} pixels; a side may have {MAX_SIDE:,} at most")
    if height * width > MAX_PIXELS:
        raise ValueError(f"image {name} claims {height}×{width} pixels; at most {MAX_PIXELS:,} are decoded")


def _resized(image: np.ndarray, size: tuple[int, int], decode: Decode) -> np.ndarray:
    """uint8 [H, W, C] brought to `size` by the way that `decode` names."""
    height, width = image.shape[:2]
    if decode.resize == "squash" or (height, width) == size:
        return _squashed(image, size)
    scales = size[0] / height, size[1] / width
    scale = max(scales) if decode.resize == "crop" else min(scales)
    if decode.resize == "crop":  # the middle first, so that no more is resized than is kept
        tall, wide = size[0] / scale, size[1] / scale
        top, left = (height - tall) / 2, (width - wide) / 2
        return _squashed(image, size, (left, top, left + wide, top + tall))
    inner = max(1, min(size[0], round(height * scale))), max(1, min(size[1], round(width * scale)))
    fill = _bars(image.shape[2], decode.background)
    canvas = np.empty((*size, image.shape[2]), np.uint8)
    canvas[:] = fill
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = _squashed(image, inner)
    return canvas


def _bars(channels: int, background: tuple[int, int, int]) -> np.ndarray:
    """The background's colour in so many channels: grey, RGB, opaque, or its grey everywhere."""
    colour = Image.new("RGB", (1, 1), background)
    if channels in (3, 4):
        return np.asarray(colour.convert("RGB" if channels == 3 else "RGBA"))[0, 0]
    return np.full(channels, np.asarray(colour.convert("L"))[0, 0], np.uint8)


def _squashed(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    height, width, channels = image.shape
    if (height, width) == size:
        return image
    if channels == 3:
        parts = [Image.fromarray(image)]
    else:  # one by one: opacity must not weigh colours, and Pillow has no modes of more channels
        parts = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(channels)]
    # Pillow's bilinear filter widens with the reduction, so that nothing aliases.
    done = [_array(part.resize((size[1], size[0]), Image.Resampling.BILINEAR, box)) for part in parts]
    return done[0] if len(done) == 1 else np.concatenate(done, -1)
