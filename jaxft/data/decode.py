"""Encoded images to uint8 RGB of one size."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 64 * 2**20
"""Larger images are refused before they are decoded: a few kilobytes can claim gigabytes."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_TURBO_SPACES = ("YCbCr", "RGB", "Gray")  # what libjpeg-turbo turns into RGB
_PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # at most 8 bits a channel


def rgb(image: bytes | np.ndarray, size: tuple[int, int], name: str, *, scaled: bool = False) -> np.ndarray:
    """Decode and resize, antialiased, squashing the aspect as Keras's image loading does.

    Args:
        image: a JPEG or PNG file's bytes, or decoded uint8 [H, W, 3]. Grey becomes three equal channels, alpha is
            dropped, EXIF orientation is not applied.
        size: (height, width) wanted.
        name: by which an error calls the image.
        scaled: let libjpeg decode at a fraction of the size, never below the one wanted. Faster, with
            slightly different pixels: it averages blocks of coefficients where the resize averages pixels.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        ValueError: corrupt, truncated, of an unknown format, 16 bits a channel, or more than `MAX_PIXELS`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"image {name}: expected uint8 [H, W, 3], found {image.dtype} {list(image.shape)}{_remedy(image)}"
            )
        return image if image.shape[:2] == size else _resize(Image.fromarray(image), size)
    if not image.startswith(_JPEG_MAGIC) or _jpeg_header(image, name)[2] not in _TURBO_SPACES:
        with _open(image, name) as opened:
            return _resize(opened.convert("RGB"), size)
    try:
        least: Any = {"min_height": size[0], "min_width": size[1]} if scaled else {}
        pixels = simplejpeg.decode_jpeg(image, "RGB", **least)
    except ValueError as err:
        raise ValueError(f"image {name} is a corrupt JPEG ({err}); replace or remove it") from err
    return _resize(Image.fromarray(pixels), size)


def thumbnail(image: bytes | np.ndarray, side: int, name: str) -> np.ndarray:
    """The image in its own proportions, its longer side at most `side` pixels: uint8 [H, W, 3].

    Raises:
        ValueError: as `rgb`.
    """
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
    else:
        with _open(image, name) as opened:
            height, width = opened.height, opened.width
    scale = min(1.0, side / max(height, width))
    return rgb(image, (max(1, round(height * scale)), max(1, round(width * scale))), name)


def jpeg_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of a JPEG by its header alone, in microseconds.

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
    return "; give image.astype(np.uint8), with values of 0 to 255" if image.dtype != np.uint8 else ""


def _jpeg_header(data: bytes, name: str) -> tuple[int, int, str]:
    try:
        rows, columns, space, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(rows), int(columns)
    except ValueError:  # corrupt, or a rare subsampling that libjpeg-turbo does not name: Pillow decides
        with _open(data, name) as opened:
            height, width, space = opened.height, opened.width, "for Pillow"
    _check_pixels(height, width, name)
    return height, width, space


@contextmanager
def _open(data: bytes, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            _check_pixels(opened.height, opened.width, name)
            if opened.mode not in _PILLOW_MODES:
                raise ValueError(f"image {name} has Pillow's mode {opened.mode}; at most 8 bits a channel are read")
            yield opened
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ValueError(f"image {name} claims too many pixels ({err})") from err
    except (OSError, SyntaxError, EOFError) as err:  # what Pillow raises for a broken file
        raise ValueError(f"image {name} cannot be decoded ({err}); replace or remove it") from err


def _check_pixels(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"image {name} claims {height}×{width} pixels; at most {MAX_PIXELS:,} are decoded")


def _resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if (image.height, image.width) == size:
        return np.asarray(image)
    # Pillow's bilinear filter widens with the reduction, so that nothing aliases.
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
