import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import cache, kept_programs, no_pictures  # noqa: F401

from jaxft import devices, feed, optim, task, train_state
from jaxft.data import Inputs, mix
from jaxft.phase import Phase
from jaxft.runs import Run

pytestmark = pytest.mark.usefixtures("kept_programs", "no_pictures")

HEAD_ALONE = [Phase(3, optim.Constant(0.05), frozen="all-but-head")]


@pytest.mark.parametrize("target", ["class", "labels", "values"])
def test_several_steps_in_one_dispatch_are_steps_one_by_one(tmp_path, monkeypatch, target):
    """Bug: labels [B, C] are taken for B steps of one dispatch, because the number of steps is read off their rank."""
    data = tiny.dataset(target=target)
    seen = []

    def watched(batches, count, several=feed.several):
        batch = several(batches, count)
        seen.append(batch["label"].shape)
        return batch

    monkeypatch.setattr(feed, "several", watched)
    tiny.run(tmp_path / "off", HEAD_ALONE, data=data, batch_size=4, cache_features="off")
    assert not seen
    tiny.run(tmp_path / "on", HEAD_ALONE, data=data, batch_size=4, cache_features="on")
    assert seen == [(5, 4) if target == "class" else (5, 4, 3)] * 3
    tiny.assert_same(tiny.saved(tmp_path / "on"), tiny.saved(tmp_path / "off"))
    assert tiny.history(tmp_path / "on") == tiny.history(tmp_path / "off")


def inputs(**options):
    data = tiny.dataset(16)
    settings = {"image_size": (8, 8), "batch_size": 4, **options}
    return Inputs(data, np.arange(12), **settings), Inputs(data, np.arange(12, 16), (8, 8), 4)


def fed(net, phase, train, held_out, run):
    state = train_state.create(net, tiny.variables(net), phase)
    mesh = devices.mesh()
    sides = feed.decode(train, held_out)
    made = feed.make(net, "torch", task.classification(), state, sides, run, range(phase.epochs), mesh)
    return made, state


def test_dispatches_are_a_function_of_seed_and_step(tmp_path):
    """Bug: a resumed run gets other batches than the whole one, or a batch of another length at the end."""
    train, held_out = inputs(augment=tiny.Noise())
    made, _ = fed(tiny.Tiny(), Phase(2, optim.Constant(0.1)), train, held_out, Run(tmp_path, seed=3))
    whole = [dispatch.batch for dispatch in made.dispatches(0, 6)]
    rest = [dispatch.batch for dispatch in made.dispatches(4, 6)]
    assert len(whole) == 6 and made.cache is None
    for found, expected in zip(rest, whole[4:], strict=True):
        tiny.assert_same(tiny.leaves(found), tiny.leaves(expected))
    for epoch in (whole[:3], whole[3:]):
        indices = np.concatenate([batch["index"] for batch in epoch])
        assert sorted(indices) == list(range(12))


def test_augmentation_goes_before_mixing_and_both_before_preprocessing():
    """Bug: mixing blends normalised images, or what is augmented later is drawn by the same key as the mixing."""
    calls = []

    def change(name):
        def called(key, images, labels):
            calls.append((name, images.dtype, float(images.max()), tuple(jax.random.key_data(key).tolist())))
            return images + 1, labels

        return called

    train, _ = inputs(augment=change("augment"), mix=change("mix"))
    images = jnp.full((4, 8, 8, 3), 200, jnp.uint8)
    made, labels = feed.prepare(train, "torch")(jax.random.key(0), images, {"known": jnp.ones(4)})
    assert [call[:3] for call in calls] == [("augment", jnp.float32, 200.0), ("mix", jnp.float32, 201.0)]
    assert calls[0][3] != calls[1][3]
    plain, _ = feed.prepare(inputs()[0], "torch")(jax.random.key(0), images + 2, {})
    np.testing.assert_allclose(made, plain, rtol=1e-6)
    assert "known" in labels


@pytest.mark.parametrize("option", [{"mix": mix.Mixup(0.2)}, {"augment": tiny.Noise()}])
def test_inputs_that_do_not_repeat_are_never_cached(tmp_path, option):
    """Bug: every epoch sees the augmentation or the mixture of the first; or "on" is ignored without a word."""
    net = tiny.Tiny(frozen=frozenset({"conv1", "bn1"}))
    phase = Phase(2, optim.Constant(0.1), frozen="conv1|bn1")
    train, held_out = inputs(**option)
    made, _ = fed(net, phase, train, held_out, Run(tmp_path))
    assert made.cache is None
    with pytest.raises(ValueError, match="cache_features=on needs .* inputs that repeat"):
        fed(net, phase, train, held_out, Run(tmp_path, cache_features="on"))


def test_sides_of_two_datasets(tmp_path):
    """Bug: images of one dataset are looked up in the file of the other, where both begin at index 0."""
    train, _ = inputs()
    other = tiny.dataset(9)
    images = [255 - image for image in other.images]
    held_out = Inputs(dataclasses.replace(other, name="other", images=images), np.arange(9), (8, 8), 4)
    phase = Phase(1, optim.Constant(0.1), frozen="conv1|bn1")
    net = tiny.Tiny(frozen=frozenset({"conv1", "bn1"}))
    results = []
    for mode in ("on", "off"):
        made, state = fed(net, phase, train, held_out, Run(tmp_path, cache_features=mode))
        found = made.evaluate(state.variables())
        assert found.index.tolist() == list(range(9)) and found.label.tolist() == other.labels.tolist()
        results.append(found.outputs)
        assert (made.cache is not None) == (mode == "on")
    np.testing.assert_array_equal(*results)
    turned = dataclasses.replace(held_out, dataset=dataclasses.replace(other, images=[255 - x for x in images]))
    made, state = fed(net, phase, train, turned, Run(tmp_path, cache_features="on"))
    assert np.abs(made.evaluate(state.variables()).outputs - results[0]).max() > 1e-3


def test_a_side_of_another_batch_size_has_its_own_features(tmp_path):
    """Bug: held-out features that another batch size gave, with other rounding, are those of the run's own program."""
    train, held_out = inputs()
    held_out = dataclasses.replace(held_out, batch_size=3)
    net = tiny.Tiny(frozen=frozenset({"conv1", "bn1"}))
    phase = Phase(1, optim.Constant(0.1), frozen="conv1|bn1")
    made, _ = fed(net, phase, train, held_out, Run(tmp_path, cache_features="on"))
    assert made.cache["train"].file != made.cache["held out"].file
    made, _ = fed(net, phase, train, dataclasses.replace(held_out, batch_size=4), Run(tmp_path, cache_features="on"))
    assert made.cache["train"] is made.cache["held out"]
