"""What `jaxft finetune` chooses: who judges, what is frozen, at which rates."""

import numpy as np
import pytest
import thin

from jaxft import masking, nets, optim, recipe
from jaxft.data import Dataset
from jaxft.data.decode import Decode
from jaxft.data.source import Source
from jaxft.model import Model
from jaxft.recipe import Batches, Course, Split, Start


def source(labels, groups=None, split=(), target="class", classes=("a", "b")):
    names = tuple(f"{i}.png" for i in range(len(labels)))
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(len(labels))]
    dataset = Dataset("drawn", images, np.asarray(labels), groups or names, names, classes, target)
    return Source(dataset, tuple(split))


def test_each_class_gives_its_share():
    """Bug: a rare class is wholly in training, so that nothing judges it."""
    found = recipe.divide(source([0] * 40 + [1] * 10), Split(val=0.2), seed=0)
    labels = np.asarray([0] * 40 + [1] * 10)
    assert (labels[found.held_out] == 1).sum() == 2 and len(found.held_out) == 10
    assert not set(found.train) & set(found.held_out) and not len(found.test)
    assert "each class" in found.how


def test_groups_stay_whole():
    """Bug: two photographs of one driver are on both sides, and the score is that of memory."""
    groups = tuple(f"driver{i // 5}" for i in range(50))
    found = recipe.divide(source([0, 1] * 25, groups), Split(val=0.2), seed=0)
    assert not {groups[i] for i in found.train} & {groups[i] for i in found.held_out}
    assert len(found.held_out) == 10


def test_a_stated_split_is_kept():
    """Bug: the test part of the data chooses the best epoch, or is trained on."""
    parts = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    found = recipe.divide(source([0, 1] * 5, split=parts), Split(), seed=0)
    assert [list(part) for part in (found.train, found.held_out, found.test)] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]


def test_without_a_validation_part_one_is_taken_from_training():
    """Bug: with train and test alone, the best epoch is chosen by the test images."""
    parts = ["train"] * 16 + ["test"] * 4
    found = recipe.divide(source([0, 1] * 10, split=parts), Split(val=0.25), seed=0)
    assert set(found.test) == {16, 17, 18, 19} and len(found.held_out) == 4
    assert not set(found.test) & (set(found.train) | set(found.held_out))


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_cover_every_image_once(folds):
    """Bug: an image is in no fold, or in two, and the mean over folds is of other data."""
    images = source([0] * 37 + [1] * 13)
    held_out = [recipe.divide(images, Split(fold=fold, folds=folds), seed=3).held_out for fold in range(folds)]
    assert sorted(np.concatenate(held_out).tolist()) == list(range(50))
    assert max(map(len, held_out)) - min(map(len, held_out)) <= 1


def test_unknown_labels_neither_train_nor_judge():
    """Bug: an image without a label is counted among those that judge."""
    found = recipe.divide(source([0, 1] * 10 + [-1] * 5), Split(), seed=0)
    assert set(found.train) | set(found.held_out) == set(range(20))


def test_values_are_divided_by_tenths():
    """Bug: all large values are on one side."""
    values = np.arange(100, dtype=np.float32)[:, None]
    found = recipe.divide(source(values, target="values", classes=("age",)), Split(val=0.2), seed=0)
    assert len(found.held_out) == 20
    assert np.bincount(found.held_out // 10, minlength=10).tolist() == [2] * 10


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (lambda: Split(val=1.0), "--val"),
        (lambda: Split(fold=5), "--fold 5"),
        (lambda: Course(epochs=0, head_epochs=0), "--epochs 0"),
        (lambda: Course(lr=-1.0), "--lr"),
        (lambda: Batches(image_size=0), "--image-size"),
        (lambda: Batches(mixup=0.2, cutmix=1.0), "--mixup"),
    ],
)
def test_a_bad_setting_names_its_flag(settings, flag):
    """Bug: the error names a field that the user of the command never saw."""
    with pytest.raises(ValueError, match=flag):
        settings()


@pytest.mark.parametrize("name", thin.ZOO)
def test_every_net_has_upper_stages_to_open(name):
    """Bug: for one family the second phase freezes all, or nothing, or a rate goes to frozen layers."""
    net = nets.create(name, 3, **nets.any_size(name))
    params = {layer: None for layers in net.layers().values() for layer in layers}
    spec = recipe.lower_stages(net, params)
    frozen = masking.frozen_layers(net, spec, params)
    assert frozen and not frozen & set(net.head_layers())
    groups = recipe.halves(Model(net, {"params": params}, nets.spec(name).preprocessing), spec)
    assert list(groups) == (["upper"] if name.startswith("nasnet") else ["upper", "lower"])  # its cells are one stage
    grouped = masking.grouped(net, groups, params)
    assert set(grouped) | frozen | set(net.head_layers()) == set(params)
    assert not set(grouped) & frozen
    stages = [stage for stage, layers in net.layers().items() if set(layers) & set(grouped)]
    order = [grouped[next(layer for layer in net.layers()[stage] if layer in grouped)] for stage in stages]
    assert order == sorted(order)  # lower before upper


def test_lower_stages_learn_more_slowly():
    """Bug: the rates fall the wrong way, or the new layers are slowed down as well."""
    net = nets.create("vgg16", 3, fc=False)
    params = {layer: None for layers in net.layers().values() for layer in layers if "pool" not in layer}
    model = Model(net, {"params": params}, "caffe")
    head, second = recipe.phases_of(model, Course(lr=1e-2, lr_factor=0.1, patience=0), steps_per_epoch=10)
    assert head.frozen == "all-but-head" and second.frozen == "through:block3" and second.patience is None
    assert second.rates(0) == pytest.approx({"trainable": 1e-2, "upper": 1e-3, "lower": 1e-4})
    assert second.rates(150)["trainable"] == pytest.approx(0)


def test_the_head_alone():
    """Bug: --epochs 0 still opens the stages."""
    net = nets.create("vgg16", 3, fc=False)
    phases = recipe.phases_of(Model(net, {"params": {}}, "caffe"), Course(epochs=0), steps_per_epoch=10)
    assert [phase.frozen for phase in phases] == ["all-but-head"]


def test_values_may_lie_a_little_outside():
    """Bug: an output can reach the largest value only at an infinite logit."""
    values = np.asarray([[0.0], [10.0]], np.float32)
    task = recipe.task_of(source(values, target="values", classes=("age",)).dataset, Course())
    assert task.options["range"] == pytest.approx([-1, 11])


def test_augmentations_that_change_nothing_are_left_out():
    """Bug: an identity keeps features from being cached."""
    from jaxft.data.augment import ColorJitter, Warp

    images = source([0, 1] * 10)
    division = recipe.divide(images, Split(), 0)
    train, held_out = recipe.inputs_of(images, division, Batches(), Decode(), (Warp(), ColorJitter()), (8, 4))
    assert train.augment is None and held_out.augment is None
    train, _ = recipe.inputs_of(images, division, Batches(), Decode(), (Warp(rotation=5.0), ColorJitter()), (8, 4))
    assert train.augment == Warp(rotation=5.0)


def test_start_refuses_an_unknown_head():
    """Bug: a head that the net does not have is silently another one."""
    with pytest.raises(ValueError, match="head='fc'"):
        recipe.model_of(Start("resnet50", "none", head="fc"), 3, 3, 0)


def test_schedules_count_from_their_phase():
    """Bug: the cosine of the second phase begins where the first one ended."""
    assert isinstance(recipe.OPTIMIZERS["nesterov"], optim.NesterovSGD)
    net = nets.create("vgg16", 3, fc=False)
    params = {layer: None for layers in net.layers().values() for layer in layers if "pool" not in layer}
    _, second = recipe.phases_of(Model(net, {"params": params}, "caffe"), Course(), 10)
    assert second.rates(0)["trainable"] == pytest.approx(Course().lr)
