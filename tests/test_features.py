import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny
from test_finetune import dataset, run

from jaxft import features, feed, fetch, nets, train
from jaxft.data import cache as cache_module
from jaxft.data.cache import Cache
from jaxft.preprocess import PREPROCESSING


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


FROZEN = frozenset({"conv1", "bn1"})


def frozen_run(workdir, **changes):
    frozen = changes.pop("frozen", FROZEN)
    net = tiny.Tiny(frozen=frozen, dropout=changes.pop("dropout", 0.0))
    return run(workdir, net=net, frozen=frozen, epochs=4, **changes)


@pytest.mark.parametrize(
    "inputs", [{"augmentation": {}}, {"views": 2}, {"views": 1, "seed": 3}], ids=["plain", "two views", "one view"]
)
def test_losses_with_and_without_the_cache_are_the_same_bits(tmp_path, inputs):
    """Bug: the cache holds other views, other rows or other arithmetic than the step computes."""
    rows = {}
    for mode in ("off", "on"):
        state, summary = frozen_run(tmp_path / mode, cache_features=mode, **inputs)
        rows[mode] = (summary["log_loss"], jax.device_get(state.params), (tmp_path / mode / "history.csv").read_text())
    assert rows["off"][0] == rows["on"][0]
    jax.tree.map(np.testing.assert_array_equal, rows["off"][1], rows["on"][1])
    losses = [[line.split(",")[:-1] for line in text.splitlines()] for _, _, text in rows.values()]  # but for the rate
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "at_once, options, expected",
    [
        (16, {}, [11] * 4),
        (16, {"save_every": 4}, [4, 4, 3, 1, 4, 4, 2, 2, 4, 4, 1, 3, 4, 4]),
        (4, {"views": 2, "augmentation": {"rotation": 5.0}}, [4, 4, 3] * 4),
    ],
    ids=["an epoch", "up to a save", "some of a view"],
)
def test_several_steps_in_one_dispatch_end_as_steps_one_by_one(tmp_path, monkeypatch, at_once, options, expected):
    """Bug: a batch is left out where an epoch or a save ends, or has another order, view or random number; a run that
    is stopped between two dispatches goes on elsewhere."""
    taken, take = [], Cache.take
    stop_at = None

    def watched(self, index):
        if self.kind == "features" and np.ndim(index) == 2:
            taken.append(len(index))
            if len(taken) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return take(self, index)

    def frozen_body(mode, folder):
        options_of_all = {"augmentation": {}, "dropout": 0.5, "batch_size": 2, "frozen": FROZEN | {"conv2"}}
        state, _ = frozen_run(folder, cache_features=mode, **{**options_of_all, **options})
        history = [row.split(",")[:-1] for row in (folder / "history.csv").read_text().splitlines()]  # but for the rate
        return jax.device_get((state.params, state.opt_state)), history

    monkeypatch.setattr(feed, "AT_ONCE", at_once)
    monkeypatch.setattr(Cache, "take", watched)
    one_by_one, history = frozen_body("off", tmp_path / "off")
    assert not taken
    several, several_history = frozen_body("on", tmp_path / "on")
    assert taken == expected
    taken, stop_at = [], 3
    with pytest.raises(train.Stopped):
        frozen_body("on", tmp_path / "stopped")
    stop_at = None
    resumed, resumed_history = frozen_body("on", tmp_path / "stopped")
    assert taken == expected
    jax.tree.map(np.testing.assert_array_equal, one_by_one, several)
    jax.tree.map(np.testing.assert_array_equal, one_by_one, resumed)
    assert history == several_history == resumed_history


def test_views_differ_from_each_other_and_from_the_plain_image(tmp_path):
    """Bug: every view has the key of the first, or the held-out images are augmented."""
    frozen_run(tmp_path / "run", cache_features="on", views=2)
    held = {}
    for folder in (fetch.cache_folder() / "features").iterdir():
        view = json.loads((folder / "manifest.json").read_text())["identity"]["view"]
        held[view] = np.fromfile(folder / "rows.bin", np.float32).reshape(-1, 4, 4, 4)
    assert {view: len(rows) for view, rows in held.items()} == {0: 23, 1: 23, None: 7}
    assert np.abs(held[0] - held[1]).max() > 1e-3
    net, images = tiny.Tiny(frozen=FROZEN), np.stack(dataset().images)
    _, stages = net.apply(tiny.variables(net), PREPROCESSING["torch"](images))
    plain = stages["stem"]
    np.testing.assert_allclose(held[None], plain[-7:], atol=1e-5)
    assert np.abs(held[0] - plain[:-7]).max() > 1e-3


def test_views_that_no_epoch_takes_are_not_computed(tmp_path):
    """Bug: ten views of each image are computed and kept for a run of four epochs."""
    frozen_run(tmp_path / "run", cache_features="on", views=10)
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

        run(tmp_path / str(views), net=Watched(), views=views, epochs=3, batch_size=23)
    per_epoch = {views: [np.sort(x.sum((1, 2, 3))) for x in seen if len(x) == 23] for views, seen in images.items()}
    assert [len(epochs) for epochs in per_epoch.values()] == [3, 3]
    np.testing.assert_array_equal(per_epoch[1][0], per_epoch[1][2])
    assert np.abs(per_epoch[None][0] - per_epoch[None][2]).max() > 1e-3


def test_features_of_another_arithmetic_are_not_read(tmp_path, monkeypatch, cache):
    """Bug: after an update of jaxft, features that round as the former version did are taken for today's."""
    frozen_run(tmp_path / "before", augmentation={}, cache_features="on")
    frozen_run(tmp_path / "again", augmentation={}, cache_features="on")
    assert len(list((cache / "features").iterdir())) == 1
    make_prefix = features.make_prefix

    def rounds_otherwise(*settings):
        prefix = make_prefix(*settings)
        return jax.jit(lambda *inputs: prefix(*inputs) / 3 * 3)

    monkeypatch.setattr(features, "make_prefix", rounds_otherwise)
    frozen_run(tmp_path / "after", augmentation={}, cache_features="on")
    assert len(list((cache / "features").iterdir())) == 2


def a_cache(n=40, width=1000):
    cache = Cache("features", "tiny-stem", {"view": None}, np.arange(n), (width,), np.float32)
    whole = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)

    def compute(indices):
        for i in range(0, len(indices), 4):
            yield whole[indices[i : i + 4]]

    return cache, whole, compute


def test_a_cache_that_was_killed_goes_on_behind_its_last_whole_block(monkeypatch):
    """Bug: rows of a block that is not in the manifest are trusted, or finished ones are computed again."""
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 8 * 4000)
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
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 8 * 4000)
    cache, whole, compute = a_cache()
    cache.fill(compute)
    content = bytearray(cache.file.read_bytes())
    content[20 * 4000] ^= 1
    cache.file.write_bytes(content)
    again, _, _ = a_cache()
    again.fill(compute)
    assert "block 3 of 5 is damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(again.take(np.arange(40)), whole)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Bug: the estimate is made, but the run begins to write all the same."""
    monkeypatch.setattr(cache_module, "SPARE_BYTES", 2**60)
    with pytest.raises(OSError, match=r"the features need .* make room or set JAXFT_CACHE"):
        frozen_run(tmp_path / "on", cache_features="on", augmentation={})
    assert not list((tmp_path / "cache").rglob("features/*/rows.bin"))
    frozen_run(tmp_path / "auto", cache_features="auto", augmentation={})  # goes without


def test_views_that_fit_one_by_one_but_not_together(tmp_path, monkeypatch):
    """Bug: room is asked for view by view, and the disk is full after hours of computing."""
    usage = cache_module.shutil.disk_usage(tmp_path)
    one_view = 23 * 4 * 4 * 4 * 4
    free = cache_module.SPARE_BYTES + 2 * one_view
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(OSError, match="the features need"):
        frozen_run(tmp_path / "on", cache_features="on", views=3)
    assert not list((tmp_path / "cache").rglob("features/*/rows.bin"))


def test_a_disk_that_fails_ends_no_run_that_only_wished_for_a_cache(tmp_path, monkeypatch, capsys):
    """Bug: with auto a full or read-only disk ends the run."""

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(features, "seconds", lambda compute: 100.0)
    monkeypatch.setattr(Cache, "_write", fails)
    frozen_run(tmp_path / "auto", augmentation={})
    assert "feature cache off: no space left on device" in capsys.readouterr().out
    with pytest.raises(OSError, match="no space left"):
        frozen_run(tmp_path / "on", augmentation={}, cache_features="on")


def test_other_weights_have_another_cache_and_other_classes_the_same():
    """Bug: features of other weights are read, or the width of the new head makes them useless."""
    net = tiny.Tiny()
    variables = tiny.variables(net)
    same = features.identity(tiny.Tiny(num_classes=5), variables, "stem")
    assert features.identity(net, variables, "stem") == same
    behind = jax.tree.map(np.array, variables)
    behind["params"]["conv2"]["kernel"] += 1
    assert features.identity(net, behind, "stem") == same
    behind["batch_stats"]["bn1"]["mean"] += 1
    assert features.identity(net, behind, "stem") != same
    assert features.identity(net, variables, "stem", size=(8, 8)) != same


@pytest.mark.parametrize(
    "name, options, freeze, expected",
    [
        ("vgg16", {}, lambda layer: layer != "predictions", "fc1"),  # dropout sits in front of fc2
        ("vgg16", {"dropout": 0.0}, lambda layer: layer != "predictions", "fc2"),
        ("vgg16", {"head": ()}, lambda layer: layer != "predictions", "avg_pool"),
        ("vgg16", {"head": ()}, lambda layer: layer.startswith(("block1", "block2_conv1")), "block1"),
        ("vgg16", {"head": ()}, lambda layer: layer.startswith("block2"), None),
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
    assert features.cut(net, frozen, [*weighted, "predictions"]) == expected


def test_the_cache_asked_for_where_inputs_do_not_repeat(tmp_path):
    """Bug: --cache-features on is ignored where it cannot be."""
    with pytest.raises(ValueError, match="inputs that repeat"):
        frozen_run(tmp_path, cache_features="on")
    with pytest.raises(ValueError, match="wholly frozen"):
        run(tmp_path / "thawed", cache_features="on", augmentation={})


def test_auto_says_what_it_chose(tmp_path, capsys, monkeypatch):
    """Bug: the cost model decides silently, or not at all."""
    monkeypatch.setattr(features, "seconds", lambda compute: 100.0)
    frozen_run(tmp_path / "slow prefix", augmentation={})
    assert "feature cache on: features of 'stem'" in capsys.readouterr().out
    monkeypatch.setattr(features, "seconds", lambda compute: 0.0)
    frozen_run(tmp_path / "free prefix", augmentation={}, seed=1, batch_size=7)
    assert "feature cache off: features of 'stem'" in capsys.readouterr().out
