"""Decoding and batches."""

import contextlib
import io
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from jaxft.data import Dataset, Inputs, decode, loader, order

SIZE = (16, 24)


def picture(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture, different for each i."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 3 + i * 7) % 256, (y * 4 + i * 13) % 256, np.full_like(x, i * 5 % 256)], -1).astype(np.uint8)


def encoded(array: np.ndarray, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, kind)
    return buffer.getvalue()


class Counting:
    """Images that count how often each was asked for."""

    def __init__(self, images):
        self.images, self.counts, self.lock = images, [0] * len(images), threading.Lock()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index, /):
        with self.lock:
            self.counts[index] += 1
        return self.images[index]


def dataset(count: int = 20, images=None) -> Dataset:
    images = [encoded(picture(i)) for i in range(count)] if images is None else images
    count = len(images)
    names = tuple(f"img_{i}.jpg" for i in range(count))
    return Dataset("test", images, np.arange(count, dtype=np.int32) % 10, ("d",) * count, names, tuple("0123456789"))


@pytest.fixture(scope="module")
def small() -> Dataset:
    return dataset()


def inputs(data, indices=range(20), batch_size=6, **options) -> Inputs:
    return Inputs(data, np.asarray(indices, int), options.pop("image_size", SIZE), batch_size, **options)


def train(data, indices=range(20), batch_size=6, images=None, **options):
    options = {"seed": 3, "workers": 2} | options
    images = data.images if images is None else images
    return list(loader.train_batches(inputs(data, indices, batch_size), images, **options))


def evaluate(data, indices, batch_size, **options):
    return loader.eval_batches(inputs(data, indices, batch_size), data.images, **options)


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], strict=True)


def test_batches_have_the_promised_shapes_and_contents(small):
    """Fails when image, label and index of a row come from different examples, or dtypes drift."""
    (batch,) = train(small, num_steps=1)
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.uint8, (6, 16, 24, 3)),
        "label": (np.int32, (6,)),
        "index": (np.int32, (6,)),
        "known": (np.bool_, (6,)),
        "weight": (np.float32, (6,)),
    }
    assert batch["known"].all() and (batch["weight"] == 1).all()
    for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
        assert label == index % 10
        np.testing.assert_array_equal(image, decode.pixels(small.images[index], SIZE, ""))


@pytest.mark.parametrize("start", [1, 3, 4, 10])
def test_starting_at_a_step_gives_the_tail(small, start):
    """Fails when a batch depends on those before it: a resumed run would see different images."""
    assert_equal(train(small, num_steps=11)[start:], train(small, start_step=start, num_steps=11 - start))


def test_worker_count_changes_nothing(small):
    """Fails when batches come in the order in which threads finish."""
    assert_equal(train(small, num_steps=9, workers=1), train(small, num_steps=9, workers=5))


def test_an_epoch_is_a_permutation_without_its_remainder(small):
    """Fails when an example is drawn twice in an epoch, or batches straddle epochs."""
    indices = [1, 2, 3, 5, 8, 13, 17, 19]
    batches = train(small, indices, batch_size=3, num_steps=60)
    left_out = set()
    for epoch in range(30):
        seen = np.concatenate([b["index"] for b in batches[2 * epoch : 2 * epoch + 2]]).tolist()
        assert len(set(seen)) == 6 and set(seen) <= set(indices)
        left_out |= set(indices) - set(seen)
    assert left_out == set(indices)  # the remainder is another in each epoch


def test_epochs_and_seeds_differ(small):
    """Fails when the order is not reshuffled, or the seed is ignored."""

    def orders(seed):
        return [tuple(b["index"]) for b in train(small, batch_size=20, num_steps=5, seed=seed)]

    assert len(set(orders(0) + orders(1))) == 10


def test_the_order_is_pinned(small):
    """Fails when a new version draws another order: a run begun with the old one would not resume."""
    (batch,) = train(small, batch_size=20, num_steps=1, seed=0)
    assert batch["index"].tolist() == [11, 3, 13, 2, 15, 1, 18, 19, 17, 8, 6, 0, 7, 14, 4, 10, 12, 16, 5, 9]


def test_processes_share_out_the_global_batch(small):
    """Fails when processes overlap, or the rows depend on how many there are."""
    whole = train(small, num_steps=4)
    parts = [train(small, num_steps=4, process=(i, 3)) for i in range(3)]
    joined = [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_equal(whole, joined)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 20, 32])
def test_evaluation_covers_each_example_once(small, batch_size):
    """Fails when the last partial batch is dropped, repeated, or not of the full size."""
    indices = [19, *range(0, 18, 2), 5, 3]
    batches = list(evaluate(small, indices, batch_size, workers=2))
    assert all(b["image"].shape == (batch_size, *SIZE, 3) for b in batches)
    real = np.concatenate([b["real"] for b in batches])
    index = np.concatenate([b["index"] for b in batches])
    label = np.concatenate([b["label"] for b in batches])
    known = np.concatenate([b["known"] for b in batches])
    assert real.dtype == bool and known[real].all() and not known[~real].any()
    assert index[real].tolist() == indices
    assert label[real].tolist() == [i % 10 for i in indices]
    assert index[~real].tolist() == [-1] * (-len(indices) % batch_size)
    assert not np.concatenate([b["image"] for b in batches])[~real].any()


def test_evaluation_by_processes_covers_each_example_once(small):
    """Fails when padding is decided by the process's own rows: processes would take different numbers of steps."""
    parts = [list(evaluate(small, range(9), 8, workers=1, process=(i, 4))) for i in range(4)]
    assert [len(p) for p in parts] == [2] * 4
    rows = [np.concatenate([p[step][k] for p in parts]) for step in range(2) for k in ("index",)]
    assert np.concatenate(rows).tolist() == [*range(9)] + [-1] * 7


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        (range(5), {}, "batch_size 6: a set of 5 examples gives batches of 1 to 5"),
        (range(20), {"process": (0, 4)}, "batch_size 6 does not divide among 4 processes: choose a multiple of 4"),
        (range(20), {"process": (2, 2)}, r"process \(2, 2\): expected .* index of 0 to 1"),
        (range(20), {"start_step": -1}, "start_step -1"),
        (range(20), {"seed": -1}, "seed -1"),
        (range(20), {"workers": 0}, "workers 0"),
    ],
)
def test_impossible_training_is_refused_at_once(small, indices, options, message):
    """Fails when the error waits for the first batch, or comes as an index error from a thread."""
    with pytest.raises(ValueError, match=message):
        loader.train_batches(inputs(small, indices), small.images, **{"seed": 3} | options)


def test_unknown_labels_are_said_to_be_unknown():
    """Bug: -1 or NaN reaches a loss as a class or a number."""
    data = dataset(4)
    unknown = replace(data, labels=np.array([3, -1, 0, -1]))
    both = [next(evaluate(unknown, range(4), 4)), train(unknown, range(4), 4, num_steps=1)[0]]
    for batch in both:
        by_index = np.argsort(batch["index"])
        assert batch["label"][by_index].tolist() == [3, 0, 0, 0] and batch["label"].dtype == np.int32
        assert batch["known"][by_index].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        ("labels", np.array([[1, 0], [-1, 1], [0, -1], [1, 1]])),
        ("values", [[1.5, -2.0], [np.nan, 1.0], [0, 0], [3, 1]]),
    ],
)
def test_several_labels_and_values_are_batched(target, labels):
    """Bug: labels [N, C] are cut to one, turned to integers, or padded with another rank."""
    labels = np.asarray(labels)
    data = replace(dataset(4), labels=labels, classes=("a", "b"), target=target)
    batch = next(evaluate(data, range(4), 6))
    assert batch["label"].dtype == np.float32 and batch["label"].shape == batch["known"].shape == (6, 2)
    assert batch["known"].tolist() == data.known.tolist() + [[False] * 2] * 2
    np.testing.assert_array_equal(batch["label"][:4][data.known], labels[data.known])
    assert not batch["label"][~batch["known"]].any()
    assert batch["real"].tolist() == [True] * 4 + [False] * 2


def test_weights_and_orders_go_with_their_examples(small):
    """Bug: weights are taken by row instead of by example, or a given order is ignored."""
    weights = np.linspace(0, 2, 20)
    settings = inputs(small, weights=weights, order=lambda data, indices, seed, epoch: indices[::-1])
    batches = list(loader.train_batches(settings, None, seed=0, num_steps=2))
    assert [b["index"].tolist() for b in batches] == [[19, 18, 17, 16, 15, 14], [13, 12, 11, 10, 9, 8]]
    assert "image" not in batches[0] and batches[0]["weight"].dtype == np.float32
    np.testing.assert_allclose(batches[1]["weight"], weights[13:7:-1], rtol=1e-6)


def test_weights_that_are_all_zero_train_nothing(small):
    """Bug: a loss divided by weights of 0; or computing features of unweighted examples is refused as well."""
    settings = inputs(small, range(1, 7), weights=np.eye(20)[0])
    with pytest.raises(ValueError, match="weights are 0 for all examples of indices"):
        loader.train_batches(settings, None, seed=0)
    assert len(list(loader.eval_batches(settings, None))) == 1


def test_the_order_within_batches_is_that_of_inputs(small):
    """Bug: the loader shuffles by itself, beside `Inputs.order`."""
    settings = inputs(small, batch_size=10, order=order.balanced)
    found = np.concatenate([b["index"] for b in loader.train_batches(settings, None, seed=5, num_steps=4)])
    expected = [order.balanced(small, np.arange(20), 5, epoch) for epoch in range(2)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"found NoneType: return indices in another order"),
        (np.arange(20.0), "found float64: return indices"),
        (np.arange(20) > 4, "found bool: return indices"),
        (np.arange(18), r"expected an integer array \[20\] .*found the shape \[18\]: .*give fewer indices"),
        (np.arange(1, 21), "found 20, which is not in indices"),
    ],
)
def test_an_order_that_cannot_be_is_refused(small, found, message):
    """Bug: an IndexError from a thread, a short batch, or training on held-out examples."""
    settings = inputs(small, order=lambda *_: found)
    with pytest.raises(ValueError, match=message):
        next(loader.train_batches(settings, None, seed=0))


@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        (np.zeros((8, 3), np.uint8), r"found uint8 \[8, 3\]; for one image alone give \[image\], a list"),
        (np.zeros((8, 8, 3), np.float32), "0 to 255"),
    ],
)
def test_arrays_that_are_not_images_name_the_remedy(image, remedy):
    """Bug: one array given for a list of images ends in a message about its rows."""
    with pytest.raises(ValueError, match=remedy):
        decode.pixels(image, SIZE, "0")


def test_a_corrupt_image_is_named_by_the_batch_that_needs_it():
    """Fails when the thread's error loses the file's name, or a half-decoded image passes."""
    images = [encoded(picture(i)) for i in range(8)]
    images[5] = images[5][:-40]
    batches = evaluate(dataset(images=images), range(8), 2, workers=2)
    assert next(batches)["index"].tolist() == [0, 1]
    next(batches)
    with pytest.raises(ValueError) as caught:
        next(batches)
    assert str(caught.value) == ("image img_5.jpg is a corrupt JPEG (Premature end of JPEG file); replace or remove it")


def test_closing_stops_the_workers(small):
    """Fails when threads of an unfinished iterator live on."""

    def workers():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    before = set(workers())
    batches = loader.train_batches(inputs(small), small.images, seed=0, workers=3)
    with contextlib.closing(batches):
        next(batches)
        assert set(workers()) - before
    deadline = time.monotonic() + 5
    while set(workers()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(workers()) - before


def test_closing_drops_batches_not_begun():
    """Fails when a closed iterator goes on decoding what nobody will ask for."""

    class Slow(Counting):
        def __getitem__(self, index, /):
            image = super().__getitem__(index)
            time.sleep(0.1)
            return image

    images = Slow([picture(i) for i in range(20)])
    data = dataset(images=images)
    batches = evaluate(data, range(20), 1, workers=1)
    next(batches)
    batches.close()
    begun = sum(images.counts)
    time.sleep(0.5)
    assert sum(images.counts) <= begun + 1


def test_an_unfinished_iterator_does_not_hold_up_the_exit():
    """Fails when the interpreter hangs or complains at exit with batches still being made."""
    program = """
import numpy as np
from jaxft.data import Dataset, Inputs, loader
images = [np.full((8, 8, 3), i, np.uint8) for i in range(4)]
data = Dataset("t", images, np.zeros(4, np.int32), ("d",) * 4, tuple("abcd"), ("x",))
batches = loader.train_batches(Inputs(data, np.arange(4), (8, 8), batch_size=2), images, seed=0)
next(batches)
print("done")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "done", "")


def test_decode_once_gives_the_same_batches_and_decodes_once(tmp_path, monkeypatch):
    """Fails when the file holds wrong images, epochs or runs decode anew, or images not asked for are decoded."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    images = Counting([encoded(picture(i)) for i in range(14)])
    data = dataset(images=images)
    plain = train(data, range(12), num_steps=6)
    assert data.digests  # reads each image once
    images.counts = [0] * 14
    for _ in range(2):  # a run, and the next one
        rows = loader.decode_once([inputs(data, range(7)), inputs(data, range(5, 12))])
        decoded = loader.Decoded(rows, 14)
        assert_equal(plain, train(data, range(12), images=decoded, num_steps=6))
    assert images.counts == [1] * 12 + [0] * 2
    one = inputs(data, [3], 1)
    next(loader.eval_batches(one, decoded, workers=1))["image"][:] = 0  # must not change the file
    assert next(loader.eval_batches(one, decoded, workers=1))["image"].any()


def test_decode_once_keeps_other_data_sizes_and_decoding_apart(tmp_path, monkeypatch):
    """Fails when images decoded at another size, in another way, or of other data are read."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    data, indices = dataset(4), np.arange(4)
    other = replace(data, images=[encoded(picture(i + 1)) for i in range(4)])
    kept = [
        loader.decode_once([inputs(data, indices)]),
        loader.decode_once([inputs(data, indices[:3])]),
        loader.decode_once([inputs(other, indices)]),
        loader.decode_once([inputs(data, indices, decode=decode.Decode(scaled=True))]),
        loader.decode_once([inputs(data, indices, image_size=(8, 8))]),
    ]
    assert len({rows.folder for rows in kept}) == 5
    assert kept[-1].take(np.array([2, 0])).shape == (2, 8, 8, 3)
    again = loader.decode_once([inputs(replace(data, labels=data.labels[::-1]), indices)])
    assert again.folder == kept[0].folder, "pixels do not depend on labels"
    for wrong in (inputs(other, indices), inputs(data, indices, image_size=(8, 8))):
        with pytest.raises(ValueError, match="one dataset, size and way of decoding.*call it for each"):
            loader.decode_once([inputs(data, indices), wrong])


def test_decode_once_declines_what_does_not_fit(tmp_path, monkeypatch, small, capsys):
    """Fails when a full disk ends the run, or fills up all the same."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.setattr("jaxft.data.rows.SPARE_BYTES", 2**60)
    assert loader.decode_once([inputs(small)]) is None
    assert "decoded anew in every epoch: the pixels need" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_decode_once_passes_errors_of_the_images_on(tmp_path, monkeypatch):
    """Bug: an image that cannot be read is taken for a full disk, and the run goes on to fail later."""

    class Unreadable(Counting):
        def __getitem__(self, index, /):
            if index == 2:
                raise OSError("the data's own disk")
            return super().__getitem__(index)

    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    images = Unreadable([picture(i) for i in range(4)])
    data = dataset(images=images)
    data.__dict__["digests"] = (b"",) * 4  # read while the disk was still there
    with pytest.raises(OSError, match="the data's own disk"):
        loader.decode_once([inputs(data, range(4))])


def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, small, capsys):
    """Bug: a read-only cache, or one whose lock cannot be made, ends the run."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    rows = loader.decode_once([inputs(small, range(6))])
    rows.file.unlink()
    lock = rows.file.with_name(f"{rows.file.name}.lock")
    lock.unlink()
    lock.mkdir()
    assert loader.decode_once([inputs(small, range(6))]) is None
    assert "decoded anew in every epoch" in capsys.readouterr().out


# Decoding.


def reference(array: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize(SIZE[::-1], Image.Resampling.BOX)).astype(int)


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 6), ("PNG", 4)])
def test_colours_come_out_as_rgb(kind, tolerance):
    """Fails when red and blue, or height and width, are exchanged."""
    array = np.zeros((48, 64, 3), np.uint8)
    array[:24, :, 0], array[24:, :, 2] = 200, 120
    found = decode.pixels(encoded(array, kind), SIZE, "").astype(int)
    assert found.shape == (16, 24, 3)
    assert np.abs(found[[0, 15]] - [[[200, 0, 0]], [[0, 0, 120]]]).max() <= tolerance


def test_reduction_is_antialiased():
    """Fails when resizing takes single pixels: a fine chequerboard must become its mean, not black or white."""
    array = ((np.indices((480, 640)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, -1)
    for data in (array, encoded(array, "PNG"), simplejpeg.encode_jpeg(array, quality=95)):
        found = decode.pixels(data, (37, 53), "")
        assert 120 < found.min() and found.max() < 136


def test_scaled_decoding_stays_near_exact_decoding():
    """Fails when the scaled decode goes below the size wanted (blur), shifts the picture, or is on by default."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    array = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(array), quality=90)
    exact = Image.fromarray(simplejpeg.decode_jpeg(data)).resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode.pixels(data, (224, 224), ""), np.asarray(exact))
    difference = np.abs(decode.pixels(data, (224, 224), "", decode.Decode(scaled=True)).astype(int) - np.asarray(exact))
    assert difference.any()
    assert difference.mean() < 1.5 and difference.max() < 12


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")],
)
def test_other_modes_become_rgb(kind, mode):
    """Fails when grey, palette, alpha or CMYK files do not come out with three channels, or inverted."""
    array = np.full((48, 64, 3), 255, np.uint8)
    array[:, :32] = 0
    found = decode.pixels(encoded(array, kind, mode), SIZE, "")
    assert found.shape == (16, 24, 3) and found.dtype == np.uint8
    assert found[:, :8].max() < 12 and found[:, 16:].min() > 243


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    header = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(0)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [jpeg_claiming(65_000, 65_000), png_header(8_300, 8_300), png_header(10_000, 10_000), png_header(60_000, 60_000)],
    ids=["jpeg", "png above our limit", "png that Pillow warns of", "png that Pillow refuses"],
)
def test_decompression_bombs_are_refused(data):
    """Fails when a small file that claims gigabytes is decoded."""
    with pytest.raises(ValueError, match=r"image bomb\.jpg claims .*pixels"):
        decode.pixels(data, SIZE, "bomb.jpg")


JPEG, PNG = encoded(picture(0)), encoded(picture(0), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a, or so",
        JPEG[:3],
        JPEG[:100],
        JPEG[:-200],
        JPEG[:-2],
        PNG[:20],
        PNG[: len(PNG) // 2],
        PNG[:60] + bytes(20) + PNG[80:],
    ],
)
def test_broken_files_are_errors_that_name_them(data):
    """Fails when Pillow's or libjpeg's own exception escapes, nameless, or grey filler passes for a picture."""
    with pytest.raises(ValueError, match=r"image broken\.jpg"):
        decode.pixels(data, SIZE, "broken.jpg")


@pytest.mark.parametrize("data", [b"", PNG, JPEG[:50], jpeg_claiming(65_000, 65_000)])
def test_the_header_check_refuses_what_is_not_a_jpeg(data):
    """Fails when building accepts a PNG, an empty file or a bomb under a JPEG's name."""
    with pytest.raises(ValueError, match=r"image a\.jpg"):
        decode.jpeg_size(data, "a.jpg")
    assert decode.jpeg_size(JPEG, "a.jpg") == (48, 64)
