import errno
import json
import os

import jax
import numpy as np
import pytest
import tiny
from tiny import cache as cache_folder  # noqa: F401
from tiny import kept_programs, no_pictures  # noqa: F401

from jaxft import features, feed, fetch, nets, optim, preprocess, train
from jaxft.data import Inputs, augment
from jaxft.data import rows as rows_module
from jaxft.data.rows import Rows
from jaxft.phase import Phase
from jaxft.preprocess import PREPROCESSING

pytestmark = pytest.mark.usefixtures("kept_programs", "no_pictures")

STEM = "conv1|bn1"


def frozen_run(folder, *, frozen=STEM, epochs=4, dropout=0.0, **options):
    phases = [Phase(epochs, optim.InverseTime(0.1, 1e-6), frozen=frozen)]
    return tiny.run(folder, phases, start=tiny.model(tiny.Tiny(dropout=dropout)), **options)


VIEWS = {"augment": augment.Warp(rotation=5.0), "views": 2}


def assert_same_runs(folder, other):
    tiny.assert_same(tiny.saved(folder), tiny.saved(other))
    assert tiny.history(folder) == tiny.history(other)
    assert (folder / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


@pytest.mark.parametrize(
    "options",
    [{}, {"inputs": VIEWS}, {"inputs": {**VIEWS, "views": 1}, "seed": 3}],
    ids=["plain", "two views", "one view"],
)
def test_losses_with_and_without_the_cache_are_the_same_bits(tmp_path, options):
    """Bug: the cache holds other views, other rows or other arithmetic than the step computes."""
    for mode in ("off", "on"):
        frozen_run(tmp_path / mode, cache_features=mode, **options)
    assert_same_runs(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("stops", [None, 5, 6], ids=["whole", "stopped in phase 1", "stopped in phase 2"])
def test_features_of_a_second_phase_are_of_what_the_first_has_trained(tmp_path, monkeypatch, stops):
    """Bug: the cache of a phase holds features of the weights that the run started from."""
    phases = [
        Phase(3, optim.Constant(0.1)),
        Phase(2, optim.Constant(0.05), frozen=f"{STEM}|conv2", momentum="carry"),
    ]
    tiny.run(tmp_path / "off", phases, cache_features="off")
    if stops:
        with monkeypatch.context() as patched, pytest.raises(train.Stopped):
            tiny.at_step(patched, stops - (stops == 5), tiny.stop)
            tiny.run(tmp_path / "auto", phases)
    monkeypatch.setattr(features, "pays", lambda *args: (True, "it must"))
    tiny.run(tmp_path / "auto", phases)
    assert len(list((fetch.cache_folder() / "features").iterdir())) >= 1
    assert_same_runs(tmp_path / "auto", tmp_path / "off")


@pytest.mark.parametrize(
    "at_once, options, expected",
    [
        (16, {}, [11] * 4),
        (16, {"save_every": 4}, [4, 4, 3, 1, 4, 4, 2, 2, 4, 4, 1, 3, 4, 4]),
        (4, {"inputs": VIEWS}, [4, 4, 3] * 4),
    ],
    ids=["an epoch", "up to a save", "some of a view"],
)
def test_several_steps_in_one_dispatch_end_as_steps_one_by_one(tmp_path, monkeypatch, at_once, options, expected):
    """Bug: a batch is left out where an epoch or a save ends, or has another order, view or random number; a run that
    is stopped between two dispatches goes on elsewhere."""
    taken, take = [], Rows.take
    stop_at = None

    def watched(self, index):
        if self.kind == "features" and np.ndim(index) == 2:
            taken.append(len(index))
            if len(taken) == stop_at:
                tiny.stop()
        return take(self, index)

    def frozen_body(mode, folder):
        frozen_run(folder, frozen=f"{STEM}|conv2", dropout=0.5, batch_size=2, cache_features=mode, **options)

    monkeypatch.setattr(feed, "AT_ONCE", at_once)
    monkeypatch.setattr(Rows, "take", watched)
    frozen_body("off", tmp_path / "off")
    assert not taken
    frozen_body("on", tmp_path / "on")
    assert taken == expected
    taken, stop_at = [], 3
    with pytest.raises(train.Stopped):
        frozen_body("on", tmp_path / "stopped")
    stop_at = None
    frozen_body("on", tmp_path / "stopped")
    assert taken == expected
    assert_same_runs(tmp_path / "on", tmp_path / "off")
    assert_same_runs(tmp_path / "stopped", tmp_path / "off")


def test_views_differ_from_each_other_and_from_the_plain_image(tmp_path):
    """Bug: every view has the key of the first, or the held-out images are augmented."""
    frozen_run(tmp_path / "run", cache_features="on", inputs=VIEWS)
    held = {}
    for folder in (fetch.cache_folder() / "features").iterdir():
        view = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["identity"]["view"]
        held[view] = np.fromfile(folder / "rows.bin", np.float32).reshape(-1, 4, 4, 4)
    assert {view: len(rows) for view, rows in held.items()} == {0: 23, 1: 23, None: 7}
    assert np.abs(held[0] - held[1]).max() > 1e-3
    net, images = tiny.Tiny(), np.stack(tiny.dataset().images)
    _, stages = net.apply(tiny.variables(net), PREPROCESSING["torch"](images))
    plain = stages["stem"]
    np.testing.assert_allclose(held[None], plain[-7:], atol=1e-5)
    assert np.abs(held[0] - plain[:-7]).max() > 1e-3


def test_views_that_no_epoch_takes_are_not_computed(tmp_path):
    """Bug: ten views of each image are computed and kept for a run of four epochs."""
    frozen_run(tmp_path / "run", cache_features="on", inputs={**VIEWS, "views": 10})
    assert len(list((fetch.cache_folder() / "features").iterdir())) == 4 + 1


def test_views_of_a_net_without_a_frozen_stage(tmp_path):
    """Bug: without a frozen stage views are drawn anew at every step."""
    images = {}
    for views in (None, 1):
        seen = images.setdefault(views, [])

        class Watched(tiny.Tiny):
            def __call__(self, images, seen=seen, **options):
                if options.get("train"):
                    jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
                return super().__call__(images, **options)

        phases = [Phase(3, optim.Constant(0.1))]
        inputs = {"augment": augment.Warp(rotation=5.0), "views": views}
        tiny.run(tmp_path / str(views), phases, start=tiny.model(Watched()), inputs=inputs, batch_size=23)
    per_epoch = {views: [np.sort(x.sum((1, 2, 3))) for x in seen if len(x) == 23] for views, seen in images.items()}
    assert [len(epochs) for epochs in per_epoch.values()] == [3, 3]
    np.testing.assert_array_equal(per_epoch[1][0], per_epoch[1][2])
    assert np.abs(per_epoch[None][0] - per_epoch[None][2]).max() > 1e-3


def test_features_of_another_arithmetic_are_not_read(tmp_path, monkeypatch, cache_folder):  # noqa: F811
    """Bug: after an update of jaxft, features that round as the former version did are taken for today's."""
    frozen_run(tmp_path / "before", cache_features="on")
    frozen_run(tmp_path / "again", cache_features="on")
    assert len(list((cache_folder / "features").iterdir())) == 1
    make_prefix = features.make_prefix

    def rounds_otherwise(*settings, **options):
        prefix = make_prefix(*settings, **options)
        return jax.jit(lambda *inputs: prefix(*inputs) / 3 * 3)

    monkeypatch.setattr(features, "make_prefix", rounds_otherwise)
    frozen_run(tmp_path / "after", cache_features="on")
    assert len(list((cache_folder / "features").iterdir())) == 2


def a_cache(n=40, width=1000):
    cache = Rows("features", "tiny-stem", {"view": None}, np.arange(n), (width,), np.float32)
    whole = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)

    def compute(indices):
        for i in range(0, len(indices), 4):
            yield whole[indices[i : i + 4]]

    return cache, whole, compute


def test_a_cache_that_was_killed_goes_on_after_its_last_whole_block(monkeypatch):
    """Bug: rows of a block that is not in the manifest are trusted, or finished ones are computed again."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 8 * 4000)
    cache, whole, compute = a_cache()

    def dies(indices):
        for number, batch in enumerate(compute(indices)):
            if number == 7:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        cache.fill(dies)
    again, _, _ = a_cache()
    assert again.missing() == 40 - 24
    asked = []
    again.fill(lambda indices: asked.append(indices) or compute(indices))
    assert asked[0].tolist() == list(range(24, 40))
    np.testing.assert_array_equal(again.take(np.array([39, 0, 24])), whole[[39, 0, 24]])


def test_a_damaged_block_is_computed_again(monkeypatch, capsys):
    """Bug: features are read without a look at their checksum."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 8 * 4000)
    cache, whole, compute = a_cache()
    cache.fill(compute)
    content = bytearray(cache.file.read_bytes())
    content[20 * 4000] ^= 1
    cache.file.write_bytes(content)
    again, _, _ = a_cache()
    again.fill(compute)
    assert "block 3 of 5 is damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(again.take(np.arange(40)), whole)


def test_a_cache_that_is_read_while_another_process_mends_it(monkeypatch):
    """Bug: the file is cut off in place, and the process that reads it dies of SIGBUS."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 8 * 4000)
    cache, whole, compute = a_cache()
    cache.fill(compute)
    with cache.file.open("rb+") as file:
        file.seek(20 * 4000)
        file.write(b"damage")
    again, _, _ = a_cache()
    asked = []
    again.fill(lambda indices: asked.append(indices) or compute(indices))
    assert asked[0].tolist() == list(range(16, 40))
    np.testing.assert_array_equal(cache.take(np.arange(24, 40)), whole[24:])  # of the file that was
    np.testing.assert_array_equal(again.take(np.arange(40)), whole)
    assert sorted(path.name for path in again.folder.iterdir()) == ["manifest.json", "rows.bin", "rows.bin.lock"]


def test_a_whole_cache_on_a_disk_that_takes_no_writes(monkeypatch):
    """Bug: nothing is to be written, and the run ends, or computes it all again, as there can be no lock."""
    cache, whole, compute = a_cache()
    cache.fill(compute)
    for path in cache.folder.glob("*.lock"):
        path.unlink()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(rows_module.fetch, "sole_writer", refuse)
    monkeypatch.setattr(rows_module.files, "write_whole", refuse)
    again, _, _ = a_cache()
    again.fill(never)
    np.testing.assert_array_equal(again.take(np.arange(40)), whole)


def never(indices):
    raise AssertionError(f"{len(indices)} rows are computed again")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Bug: the estimate is made, but the run begins to write all the same."""
    monkeypatch.setattr(rows_module, "SPARE_BYTES", 2**60)
    with pytest.raises(OSError, match=r"the features need .* make room or set JAXFT_CACHE"):
        frozen_run(tmp_path / "on", cache_features="on")
    assert not list((tmp_path / "cache").rglob("features/*/rows.bin"))
    frozen_run(tmp_path / "auto", cache_features="auto")  # goes without


def test_views_that_fit_one_by_one_but_not_together(tmp_path, monkeypatch):
    """Bug: room is asked for view by view, and the disk is full after hours of computing."""
    usage = rows_module.shutil.disk_usage(tmp_path)
    one_view = 23 * 4 * 4 * 4 * 4
    free = rows_module.SPARE_BYTES + 2 * one_view
    monkeypatch.setattr(rows_module.shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(OSError, match="the features need"):
        frozen_run(tmp_path / "on", cache_features="on", inputs={**VIEWS, "views": 3})
    assert not list((tmp_path / "cache").rglob("features/*/rows.bin"))


def test_a_disk_that_fails_ends_no_run_that_only_wished_for_a_cache(tmp_path, monkeypatch, capsys):
    """Bug: with auto a full or read-only disk ends the run."""

    fsync = os.fsync

    def fails(number):
        if "features" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError("no space left on device")
        fsync(number)

    monkeypatch.setattr(features, "write_rate", lambda folder: 1e9)
    monkeypatch.setattr(rows_module.os, "fsync", fails)
    monkeypatch.setattr(features, "seconds", lambda compute: 100.0)
    frozen_run(tmp_path / "auto")
    assert "feature cache off: no space left on device" in capsys.readouterr().out
    with pytest.raises(OSError, match="no space left"):
        frozen_run(tmp_path / "on", cache_features="on")


def test_other_weights_have_another_cache_and_other_classes_the_same():
    """Bug: features of other weights are read, or the width of the new head makes them useless."""
    net = tiny.Tiny()
    variables = tiny.variables(net)
    same = features.identity(tiny.Tiny(num_classes=5), variables, "stem")
    assert features.identity(net, variables, "stem") == same
    after = jax.tree.map(np.array, variables)
    after["params"]["conv2"]["kernel"] += 1
    assert features.identity(net, after, "stem") == same
    after["batch_stats"]["bn1"]["mean"] += 1
    assert features.identity(net, after, "stem") != same
    assert features.identity(net, variables, "stem", size=(8, 8)) != same


@pytest.mark.parametrize(
    "name, options, freeze, expected",
    [
        ("vgg16", {}, lambda layer: layer != "predictions", "fc1"),  # dropout sits in front of fc2
        ("vgg16", {"dropout": 0.0}, lambda layer: layer != "predictions", "fc2"),
        ("vgg16", {"fc": False}, lambda layer: layer != "predictions", "avg_pool"),
        ("vgg16", {"fc": False}, lambda layer: layer.startswith(("block1", "block2_conv1")), "block1"),
        ("vgg16", {"fc": False}, lambda layer: layer.startswith("block2"), None),
        ("googlenet", {}, lambda layer: layer.startswith("conv1"), None),  # its auxiliary heads read inner stages
    ],
)
def test_the_cut_is_the_end_of_what_is_frozen_and_deterministic(name, options, freeze, expected):
    """Bug: dropout or a trained layer is frozen into the cache."""
    net = nets.create(name, 10, **options)
    weighted = [
        layer for layers in net.layers().values() for layer in layers if "conv" in layer or layer in ("fc1", "fc2")
    ]
    frozen = frozenset(filter(freeze, weighted))
    assert features.cut(net.clone(frozen=frozen), [*weighted, "predictions"]) == expected


def test_the_cache_asked_for_where_inputs_do_not_repeat(tmp_path):
    """Bug: --cache-features on is ignored where it cannot be."""
    with pytest.raises(ValueError, match="inputs that repeat"):
        frozen_run(tmp_path, cache_features="on", inputs={"augment": tiny.Noise()})
    with pytest.raises(ValueError, match="wholly frozen"):
        tiny.run(tmp_path / "thawed", cache_features="on")


def test_auto_says_what_it_chose(tmp_path, capsys, monkeypatch):
    """Bug: the cost model decides silently, or not at all."""
    monkeypatch.setattr(features, "seconds", lambda compute: 100.0)
    frozen_run(tmp_path / "slow prefix")
    assert "feature cache on: features of 'stem'" in capsys.readouterr().out
    monkeypatch.setattr(features, "seconds", lambda compute: 0.0)
    frozen_run(tmp_path / "free prefix", seed=1, batch_size=7)
    assert "feature cache off: features of 'stem'" in capsys.readouterr().out


class Failing:
    """Images that cannot be read from the given read on: a network disk that goes away."""

    def __init__(self, images, last):
        self.images, self.left = images, last

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise OSError("the network disk has gone away")
        return self.images[index]


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("place", ["pixels", "features", "no cache"])
def test_a_disk_that_fails_under_the_dataset_ends_the_run(tmp_path, monkeypatch, mode, place):
    """Bug: an error of the dataset's own disk is taken for one of the cache, and the run goes on without, or anew."""
    data = tiny.dataset()
    reads = {"pixels": 30 + 12, "features": 30 + 12, "no cache": 30 + 40}[place]
    data = tiny.dataset(images=Failing(data.images, reads))
    monkeypatch.setattr(features, "pays", lambda *args: (True, "it must"))
    if place != "pixels":
        monkeypatch.setattr("jaxft.data.loader.decode_once", lambda inputs: None)
    inputs = {"augment": tiny.Noise()} if place == "no cache" else {}
    if place == "no cache" and mode == "on":
        inputs |= {"views": 2}
    with pytest.raises(OSError, match="the network disk has gone away"):
        frozen_run(tmp_path / "run", data=data, cache_features=mode, inputs=inputs)
    assert not (tmp_path / "run" / "predictions.csv").exists()


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_cache_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys, mode):
    """Bug: with auto a read-only disk ends the run, or with "on" it is passed over in silence."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file" / "cache"))  # root may write anywhere but into a file
    monkeypatch.setattr(features, "seconds", lambda compute: 100.0)
    monkeypatch.setattr("jaxft.finetune.keep_programs", lambda: None)
    if mode == "on":
        with pytest.raises(OSError, match="Not a directory"):
            frozen_run(tmp_path / "run", cache_features="on")
        return
    frozen_run(tmp_path / "run")
    said = capsys.readouterr().out
    assert "images are decoded anew in every epoch" in said and "feature cache off: " in said
    assert (tmp_path / "run" / "summary.json").exists()


def test_features_in_one_call():
    """Bug: features of images in another order, of another size, or augmented; a map that is not pooled."""
    made = tiny.model()
    data = tiny.dataset(10)
    normalise = preprocess.get(made.preprocessing)
    _, outputs = made.net.apply(made.variables, normalise(np.stack([data.images[i] for i in (7, 2, 5)])))
    inputs = Inputs(data, np.asarray([7, 2, 5]), (8, 8), 2)
    whole = features.of(made, "body", inputs, pool=False)
    np.testing.assert_allclose(whole, outputs["body"], atol=1e-5)
    np.testing.assert_allclose(features.of(made, "body", inputs), np.asarray(outputs["body"]).mean((1, 2)), atol=1e-5)
    listed = features.of(made, "mean", [data.images[i] for i in (7, 2, 5)], image_size=(8, 8))
    np.testing.assert_allclose(listed, outputs["mean"], atol=1e-5)
    with pytest.raises(ValueError, match="'boddy' is not a stage of this net; its stages are stem, body"):
        features.of(made, "boddy", inputs)
    with pytest.raises(ValueError, match="say image_size"):
        features.of(made, "body", data)


def test_a_doubled_set_is_the_images_and_their_copies(tmp_path, cache_folder):  # noqa: F811
    """Bug: the first view of a doubled set is augmented, or its cached features are not what steps compute."""
    inputs = {"augment": augment.Warp(rotation=90.0), "views": 2, "plain_view": True}
    frozen_run(tmp_path / "cached", inputs=inputs, cache_features="on")
    frozen_run(tmp_path / "computed", inputs=inputs, cache_features="off")
    assert_same_runs(tmp_path / "cached", tmp_path / "computed")
    frozen_run(tmp_path / "views", inputs=inputs | {"plain_view": False}, cache_features="off")
    frozen_run(tmp_path / "plain", inputs={}, cache_features="off")
    first = [float(tiny.history(tmp_path / name)[0]["train_loss"]) for name in ("computed", "views", "plain")]
    assert first[0] == pytest.approx(first[2], rel=1e-5) and first[0] != pytest.approx(first[1], rel=1e-4)
    with pytest.raises(ValueError, match="without views"):
        frozen_run(tmp_path / "none", inputs={"plain_view": True})


def test_predictions_from_cached_features_and_of_augmented_views(tmp_path, cache_folder):  # noqa: F811
    """Bug: another fold's features are computed again; views are all the same; the plain image is left out."""
    trained, _ = frozen_run(tmp_path / "run", cache_features="off")
    data = tiny.dataset()
    plain = trained.predict(data)
    cached = trained.predict(data, cache_features=True)
    np.testing.assert_allclose(cached.outputs, plain.outputs, rtol=1e-5)
    files = list((cache_folder / "features").iterdir())
    again = trained.predict(data, cache_features=True)
    np.testing.assert_array_equal(again.outputs, cached.outputs)
    assert list((cache_folder / "features").iterdir()) == files and len(files) == 1
    nothing = trained.predict(data, augment=augment.Warp(), views=2)
    np.testing.assert_allclose(nothing.outputs, plain.outputs, rtol=1e-6)
    change = augment.ColorJitter(brightness=1.0)
    viewed = [trained.predict(data, augment=change, views=3, seed=seed).outputs for seed in (0, 0, 1)]
    np.testing.assert_array_equal(viewed[0], viewed[1])
    assert np.abs(viewed[0] - viewed[2]).max() > 1e-4 and np.abs(viewed[0] - plain.outputs).max() > 1e-4
    with pytest.raises(ValueError, match="views"):
        trained.predict(data, augment=change, views=0)


def test_stages_side_by_side():
    """Bug: pools are of another axis; a stage without places is pooled."""
    start, data = tiny.model(), tiny.dataset()
    both = features.of_stages(start, ["body", "mean"], data, ("mean", "max"), image_size=(8, 8))
    body = features.of(start, "body", data, pool=False, image_size=(8, 8))
    expected = [body.mean((1, 2)), body.max((1, 2)), features.of(start, "mean", data, image_size=(8, 8))]
    np.testing.assert_allclose(both, np.concatenate(expected, 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected some of mean, max, std"):
        features.of_stages(start, ["body"], data, ("median",), image_size=(8, 8))
