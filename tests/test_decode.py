"""Files of every kind to pixels, against what is known of them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxft.data import decode
from jaxft.data.decode import Decode, pixels

SIZE = (12, 16)
RED, BLUE = (200, 40, 40), (40, 40, 200)
EVERY_FORMAT = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}, "JPEG": {"quality": 100, "subsampling": 0}}


def drawn(mode="RGB"):
    """Left half red, right half blue, 24×32."""
    image = Image.new("RGB", (32, 24), RED)
    image.paste(BLUE, (16, 0, 32, 24))
    return image.convert(mode)


def written(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **LOSSLESS.get(kind, {}), **options)
    return file.getvalue()


def assert_halves(found, left, right, tolerance=3):
    for part, colour in ((found[:, :6], left), (found[:, -6:], right)):
        assert np.abs(part.astype(int) - np.asarray(colour)).max() <= tolerance, part[0, 0]


@pytest.mark.parametrize("kind", EVERY_FORMAT)
def test_every_format(kind):
    """Bug: a format that users have is refused, or its colours are exchanged."""
    assert_halves(pixels(written(drawn(), kind), SIZE, ""), RED, BLUE, 6)


@pytest.mark.parametrize("kind", EVERY_FORMAT)
def test_grey(kind):
    """Bug: a grey file comes out in one channel, or black."""
    image = Image.new("L", (32, 24), 90)
    assert np.abs(pixels(written(image, kind), SIZE, "").astype(int) - 90).max() <= 3


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGBA"), ("TIFF", "RGBA"), ("WEBP", "RGBA"), ("AVIF", "RGBA"), ("PNG", "LA"), ("TIFF", "LA")],
)
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
def test_what_is_transparent_shows_the_background(kind, mode, background):
    """Bug: the colour beneath full transparency, which nobody ever saw, is what the net learns."""
    image = drawn().convert(mode)
    image.putalpha(Image.fromarray(np.repeat(np.asarray([[0, 128]], np.uint8), 16, 1).repeat(24, 0)))
    found = pixels(written(image, kind), SIZE, "", Decode(background=background))
    under = np.asarray(drawn().convert("L").convert("RGB") if mode == "LA" else drawn())[0, -1]
    half = (under.astype(float) * 128 + np.asarray(background) * 127) / 255
    assert_halves(found, background, half, 4)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour(mode):
    """Bug: PNG's one transparent colour (tRNS) is shown, or the file is refused."""
    adaptive = {"palette": Image.Palette.ADAPTIVE, "colors": 2} if mode == "P" else {}
    image = drawn().convert(mode, **adaptive) if mode != "1" else Image.fromarray(np.asarray(drawn())[..., 0] < 100)
    clear = {"RGB": RED}.get(mode, image.getpixel((0, 0)))
    found = pixels(written(image, "PNG", transparency=clear), SIZE, "", Decode(background=(0, 255, 0)))
    assert_halves(found[:, :6].repeat(2, 1), (0, 255, 0), (0, 255, 0))
    assert (found[:, -1] != (0, 255, 0)).any()


def test_a_palette_with_opacities():
    """Bug: a palette whose colours have opacities of their own loses them."""
    image = drawn().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    first = image.getpixel((0, 0))
    opacities = bytes([0, 255] if first == 0 else [255, 0])
    found = pixels(written(image, "PNG", transparency=opacities), SIZE, "", Decode(background=(0, 255, 0)))
    assert_halves(found, (0, 255, 0), BLUE)


def test_gif_and_webp_give_their_first_frame():
    """Bug: an animation gives its last frame, or is refused."""
    frames = [drawn(), Image.new("RGB", (32, 24), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = written(frames[0], kind, save_all=True, append_images=frames[1:])
        assert_halves(pixels(data, SIZE, ""), RED, BLUE, 6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey(kind):
    """Bug: sixteen bits are clipped at 255, so that a photograph is white."""
    image = Image.fromarray(np.full((24, 32), 90 * 257, np.uint16))
    assert (pixels(written(image, kind), SIZE, "") == 90).all()


def test_sixteen_bits_of_colour():
    """Bug: red, green and blue of sixteen bits are read as other colours."""
    import zlib

    def chunk(name, body):
        return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)

    row = b"\0" + b"".join(value.to_bytes(2) for value in (200 * 257, 40 * 257, 90 * 257)) * 8
    header = (8).to_bytes(4) + (6).to_bytes(4) + bytes([16, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 6)) + chunk(b"IEND", b"")
    assert (pixels(data, (6, 8), "") == (200, 40, 90)).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_more_than_sixteen_bits_are_refused(mode):
    """Bug: numbers of unknown range become pixels."""
    data = written(Image.new(mode, (4, 4)), "TIFF")
    with pytest.raises(ValueError, match=rf"image deep\.tif has Pillow's mode {mode}.*convert it"):
        pixels(data, SIZE, "deep.tif")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    """Bug: a print's colours come out inverted."""
    assert_halves(pixels(written(drawn("CMYK"), kind), SIZE, ""), RED, BLUE, 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(kind, orientation):
    """Bug: a photograph of a telephone lies on its side, as its EXIF orientation is passed over."""
    image = Image.new("RGB", (32, 24), RED)
    image.paste(BLUE, (16, 0, 32, 24))
    image.paste((40, 200, 40), (0, 0, 16, 12))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = written(image, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    for scaled in (False, True):
        found = pixels(data, upright.size[::-1], "", Decode(scaled=scaled))
        assert np.abs(found.astype(int) - np.asarray(upright)).max() <= 12, scaled
    assert decode.thumbnail(data, 32, "").shape[:2] == upright.size[::-1]
    as_stored = pixels(data, (24, 32), "", Decode(orient=False)).astype(int)
    assert np.abs(as_stored - np.asarray(image)).mean() <= 6  # AVIF halves the colours


def test_damaged_metadata_is_passed_over():
    """Bug: a photograph with a broken EXIF block cannot be read."""
    data = written(drawn(), "JPEG", exif=b"Exif\0\0no more than this")
    assert_halves(pixels(data, SIZE, ""), RED, BLUE, 6)


@pytest.mark.parametrize("tail", [b"\0", b"abc", bytes(1000), b"xx\xff\xd9"])
def test_bytes_after_the_end_of_a_jpeg(tail):
    """Bug: what a camera or a transfer appended makes the photograph unreadable."""
    data = written(drawn(), "JPEG")
    np.testing.assert_array_equal(pixels(data + tail, SIZE, ""), pixels(data, SIZE, ""))
    assert_halves(pixels(data[:-2] + tail + data[-2:], SIZE, ""), RED, BLUE, 6)


def test_other_formats_are_not_tried():
    """Bug: a file of untrusted bytes starts Ghostscript (EPS) or another exotic reader."""
    file = io.BytesIO()
    drawn().save(file, "EPS")
    with pytest.raises(ValueError, match=r"image a\.jpg cannot be decoded"):
        pixels(file.getvalue(), SIZE, "a.jpg")


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (3, 1), (1, 1), (1, 50)])
def test_crop_and_pad_keep_proportions(shape):
    """Bug: a wide image is squashed all the same, is cut off-centre, or the bars hide the image."""
    height, width = shape
    image = np.zeros((*shape, 3), np.uint8)
    image[...] = np.linspace(0, 250, width, dtype=np.uint8)[:, None]
    side = (20, 20)
    cropped = pixels(image, side, "", Decode("crop"))
    reference = np.asarray(ImageOps.fit(Image.fromarray(image), side, Image.Resampling.BILINEAR))
    assert np.abs(cropped.astype(int) - reference).max() <= 1
    padded = pixels(image, side, "", Decode("pad", background=(9, 8, 7)))
    inner = max(1, round(20 * min(1, height / width))), max(1, round(20 * min(1, width / height)))
    is_bar = (padded == (9, 8, 7)).all(-1)
    assert (~is_bar).sum() == inner[0] * inner[1]
    rows = np.flatnonzero(~is_bar.all(1))
    assert abs(rows[0] - (19 - rows[-1])) <= 1


def test_squash_is_what_it_was():
    """Bug: the way of Keras's image loading changes with the others."""
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    reference = np.asarray(Image.fromarray(image).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels(image, SIZE, ""), reference)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_channel(kind):
    """Bug: grey is another weighting of red, green and blue for one format."""
    found = pixels(written(drawn(), kind), SIZE, "", Decode(channels=1))
    assert found.shape == (*SIZE, 1)
    grey = np.asarray(drawn("L"))
    assert_halves(found, grey[0, 0], grey[0, -1])


def test_four_channels_keep_opacity():
    """Bug: opacity as a channel is composited away, or weighs the colours."""
    image = drawn("RGBA")
    image.putalpha(60)
    found = pixels(written(image, "PNG"), SIZE, "", Decode(channels=4))
    assert_halves(found, (*RED, 60), (*BLUE, 60))
    assert (pixels(written(drawn(), "JPEG"), SIZE, "", Decode(channels=4))[..., 3] == 255).all()


def test_more_channels_are_arrays():
    """Bug: an array of five channels is refused, or is resized as one image of another shape."""
    array = np.arange(5, dtype=np.uint8) * np.ones((30, 40, 1), np.uint8)
    for resize in ("squash", "crop", "pad"):
        found = pixels(array, SIZE, "", Decode(resize, channels=5))
        assert found.shape == (*SIZE, 5) and (found[6, 8] == np.arange(5)).all()
    assert decode.thumbnail(array, 10, "", Decode(channels=5)).shape[2] == 3
    with pytest.raises(ValueError, match=r"image a\.png is a file.*give uint8 arrays \[H, W, 5\]"):
        pixels(written(drawn(), "PNG"), SIZE, "a.png", Decode(channels=5))
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\].*say Decode\(channels=5\)"):
        pixels(array, SIZE, "a")


@pytest.mark.parametrize(
    "settings",
    [{"resize": "stretch"}, {"orient": 1}, {"background": (1, 2)}, {"background": (0, 0, 256)}, {"channels": 0}],
)
def test_a_setting_that_cannot_be(settings):
    """Bug: a word nobody knows squashes silently."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Decode(**settings)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about tags of TIFF
@pytest.mark.parametrize("kind", EVERY_FORMAT)
def test_every_damage_is_a_value_error_with_the_name(kind):
    """Bug: a decoder's own exception (AVIF: RuntimeError) ends a run without the name of the image."""
    whole, rng, failed = written(drawn(), kind), np.random.default_rng(0), 0
    for turn in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 1 + turn % 8):
            damaged[place] = rng.integers(256)
        data = bytes(damaged[: rng.integers(1, len(whole))] if turn % 3 == 0 else damaged)
        try:
            assert pixels(data, SIZE, "odd name").shape == (*SIZE, 3)
        except ValueError as error:
            assert "odd name" in str(error), (turn, error)
            failed += 1
    assert failed > 15


def test_a_jpeg_of_a_thousand_scans():
    """Bug: a legal file of some kilobytes keeps a core busy for minutes."""
    held = io.BytesIO()
    drawn().save(held, "JPEG", progressive=True)
    whole = held.getvalue()
    assert pixels(whole, SIZE, "a").shape == (*SIZE, 3)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match=r"image a is a JPEG of 10\d\d scans; at most 100 are decoded"):
        pixels(whole[:-2] + whole[last:-2] * 1000 + whole[-2:], SIZE, "a")


def test_a_side_that_is_too_long():
    """Bug: a PNG of a few kilobytes takes gigabytes when it is resized."""
    with pytest.raises(ValueError, match="image a claims 1×70000 pixels; a side may have 65,535 at most"):
        pixels(written(Image.new("L", (70_000, 1)), "PNG"), SIZE, "a")
