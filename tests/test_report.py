import csv
import dataclasses
import locale
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import report, task
from jaxft.data import Dataset
from jaxft.predict import Predictions

CLASSES = ("straße → left", "文字", "$x$ of $5", "a name that is far too long for any axis, however wide it is drawn")


def dataset(labels, target, classes=CLASSES):
    n = len(labels)
    images = [np.zeros((4, 4 + i % 3, 3), np.uint8) for i in range(n)]
    names = tuple(f"fold_{i % 2}/{i}.jpg" for i in range(n))
    return Dataset("cells", images, labels, names, names, classes, target)


def case(name, n=30):
    """(task, dataset, predictions) with every fifth label unknown."""
    rng = np.random.default_rng(0)
    made = task.TASKS[name]()
    if name == "classification":
        labels = rng.integers(0, 4, n)
        labels[::5] = -1
        outputs = rng.dirichlet(np.ones(4), n)
    elif name == "multilabel":
        labels = rng.integers(0, 2, (n, 4))
        labels[::5] = -1
        outputs = rng.random((n, 4))
    else:
        labels = rng.normal(size=(n, 4))
        labels[::5] = np.nan
        outputs = rng.normal(size=(n, 4))
    data = dataset(labels, made.target)
    known = data.known
    batch_labels = np.where(known, data.labels, 0)  # as batches have them
    return made, data, Predictions(np.arange(n), batch_labels, known, outputs.astype(np.float32))


def row(epoch, **more):
    return {
        "epoch": epoch,
        "lr": 0.1,
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "val_loss": 1.1,
        "val_accuracy": 0.4,
    } | more


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test draws, in place of files."""
    figures = []
    monkeypatch.setattr(report, "save", lambda path, figure: figures.append(figure))
    return figures


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_predictions_of_classes(tmp_path):
    """Bug: the label of an unknown image is printed as the last class, or as the first, as which a batch holds it."""
    _, data, predictions = case("classification")
    report.write_predictions(tmp_path / "p.csv", predictions, data)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["img", "label", *CLASSES]
    assert [row["img"] for row in rows] == list(data.names)
    assert [row["label"] for row in rows] == ["" if label < 0 else CLASSES[label] for label in data.labels]
    found = np.array([[float(row[name]) for name in CLASSES] for row in rows])
    np.testing.assert_allclose(found, predictions.outputs, rtol=1e-5)


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_predictions_of_several_outputs(tmp_path, name):
    """Bug: an unknown value is printed as 0, or truth and prediction share one column."""
    _, data, predictions = case(name)
    report.write_predictions(tmp_path / "p.csv", predictions, data)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["img", *(f"label_{name}" for name in CLASSES), *CLASSES]
    for i, found in enumerate(rows):
        for c, name_of_output in enumerate(CLASSES):
            told = found[f"label_{name_of_output}"]
            assert (told == "") == (i % 5 == 0)
            assert told == "" or float(told) == pytest.approx(data.labels[i, c], rel=1e-5)
            assert float(found[name_of_output]) == pytest.approx(predictions.outputs[i, c], rel=1e-5)


def test_predictions_in_another_locale(tmp_path, monkeypatch):
    """Bug: arrows in a class name are not Latin-1: after hours of training there are no predictions."""
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: "latin-1")
    monkeypatch.setattr(locale, "getencoding", lambda: "latin-1")
    _, data, predictions = case("classification")
    data = dataclasses.replace(data, names=("\udcff.jpg", *data.names[1:]))  # a file name that is not UTF-8
    report.write_predictions(tmp_path / "p.csv", predictions, data)
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    assert "→" in text and "文字" in text and "udcff.jpg" in text


@pytest.mark.parametrize("name", task.TASKS)
def test_every_picture_of_a_run(tmp_path, name):
    """Bug: a picture fails on unknown labels, long or foreign names, dollar signs, or images of different shapes."""
    made, data, predictions = case(name)
    history = [{"epoch": e, "lr": 0.1, "train_loss": 1 / e, "val_loss": None if e == 2 else 1 / e} for e in (1, 2, 3)]
    files = report.pictures(tmp_path, predictions, data, made, history, lambda index: data.images[index])
    own = {"classification": "confusion_matrix", "multilabel": "labels", "regression": "values"}[name]
    assert [file.name for file in files] == ["learning_curves.png", f"{own}.png", "worst_mistakes.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    nothing = dataclasses.replace(predictions, known=np.zeros_like(predictions.known))
    assert report.pictures(tmp_path, nothing, data, made, [], lambda index: data.images[index]) == []


@pytest.mark.parametrize("epochs", [1, 2, 3, 20, 100])
def test_ticks_are_epochs_of_the_run(drawn, epochs):
    """Bug: a run of 20 epochs shows ticks at epochs 0 and 21, and one of 1 epoch at 0.5."""
    report.learning_curves(None, [row(e) for e in range(1, epochs + 1)], task.classification())
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(1 <= tick <= epochs and tick == round(tick) for tick in ticks)


def test_end_values_are_read_in_the_legend(drawn):
    """Bug: the end values of two curves overlap, and training is called augmented without augmentation."""
    history = [row(1, val_loss=0.7), row(2, val_loss=1.5, average_loss=0.6)]
    report.learning_curves(None, history, task.classification())
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert legend == [
        "training (running mean): 1 at the end",
        "held out: 1.5 at the end, best 0.7 (epoch 1)",
        "averaged weights: 0.6 at the end, best 0.6 (epoch 2)",
    ]
    assert not any(axes.texts for axes in drawn[0].axes)


def test_phases_groups_and_gaps_in_a_history(drawn):
    """Bug: NaN, or the null that it becomes in a file, counts as best or ends the report; a phase's border is lost."""
    history = [
        row(1, phase=1, val_loss=math.nan, lr_head=0.1, lr_trainable=0.001),
        row(2, phase=1, val_loss=None, lr_head=0.1, lr_trainable=0.001),
        row(3, phase=2, val_loss=2.0, lr_head=0.1, lr_trainable=0.001),
    ]
    for one in history:
        del one["lr"]
    made = dataclasses.replace(task.classification(), monitor="macro_f1", best="highest")
    report.learning_curves(None, [one | {"val_macro_f1": 0.1 * one["epoch"]} for one in history], made)
    loss, _, monitored, rates = drawn[0].axes
    border = [line for line in loss.get_lines() if list(line.get_xdata()) == [2.5, 2.5]]
    assert len(border) == 1 and texts(rates) == ["phase 1", "phase 2"]
    assert "best 0.3 (epoch 3)" in monitored.get_legend().get_texts()[0].get_text()
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["head", "trainable"]
    assert rates.get_yscale() == "log"


def test_unknown_labels_are_not_counted(drawn):
    """Bug: a label of -1 is counted in the confusion matrix as the last class."""
    _, data, predictions = case("classification")
    junk = dataclasses.replace(predictions, label=np.where(predictions.known, predictions.label, -1))
    for one in (predictions, junk):
        report.confusion_matrix(None, one, CLASSES)
        axes = drawn[-1].axes[0]
        assert sum(int(text) for text in texts(axes)) == predictions.known.sum() == 24
        assert axes.get_title().endswith("n = 24")


@pytest.mark.parametrize("name", task.TASKS)
def test_unknown_labels_are_no_mistakes(drawn, name):
    """Bug: an unlabelled image leads the worst mistakes, with the loss of a label that it does not have."""
    made, data, predictions = case(name)
    seen = []
    report.worst_mistakes(None, predictions, data, made, lambda index: seen.append(index) or data.images[index])
    assert seen and not any(index % 5 == 0 for index in seen)


def test_the_worst_comes_first(drawn):
    """Bug: mistakes are sorted by the confidence of the guess, or right predictions are shown among them."""
    label, known = np.array([0, 0, 1, 1]), np.ones(4, bool)
    outputs = np.array([[0.4, 0.6], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2]], np.float32)
    data, seen = dataset(label, "class", ("a", "b")), []
    predictions = Predictions(np.arange(4), label, known, outputs)
    report.worst_mistakes(None, predictions, data, task.classification(), lambda i: seen.append(i) or data.images[i])
    assert seen == [1, 3, 0]
    assert drawn[0].axes[0].get_title() == "a\n→ b 90%\nfold_1/1.jpg"
    assert drawn[0].get_suptitle() == "mistakes, label → prediction (3 wrong of 4 images)"


def test_images_keep_their_proportions(drawn):
    """Bug: square images are drawn 4:3."""
    made, data, predictions = case("classification")
    data = dataclasses.replace(data, classes=tuple("abcd"))  # which every font has
    shapes = [(30, 30, 3), (20, 80, 3), (90, 20, 3)]
    report.worst_mistakes(None, predictions, data, made, lambda i: np.zeros(shapes[i % 3], np.uint8))
    drawn[0].draw_without_rendering()
    for axes in drawn[0].axes:
        if axes.images:
            height, width, _ = axes.images[0].get_array().shape
            box = axes.get_window_extent()
            assert box.height / box.width == pytest.approx(height / width, rel=0.02)


def test_every_shown_result_of_an_augmentation_differs(drawn):
    """Bug: with flips alone, six images are shown that happen not to be flipped."""

    def flip(key, images):
        return jnp.where(jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1)), images[:, :, ::-1], images)

    originals = np.random.default_rng(0).integers(0, 255, (8, 5, 5, 3), dtype=np.uint8)
    report.augmentations(None, originals, flip)
    shown = [np.asarray(axes.images[0].get_array()) for axes in drawn[0].axes if axes.images]
    assert len(shown) == 12
    for original, flipped in zip(shown[:6], shown[6:], strict=True):
        np.testing.assert_array_equal(flipped, original[:, ::-1])
    report.augmentations(None, originals, lambda key, images: images * jax.random.uniform(key))
    shown = [np.asarray(axes.images[0].get_array()) for axes in drawn[1].axes if axes.images]
    assert len(shown) == len({image.tobytes() for image in shown}) == 24


@pytest.mark.parametrize(("transform", "says"), [(None, "no augmentation"), (lambda key, images: images, "nothing")])
def test_without_augmentation_there_is_one_row(drawn, transform, says):
    """Bug: without augmentation, two equal rows are drawn, one of them called augmented."""
    report.augmentations(None, np.zeros((3, 5, 5, 3), np.uint8), transform)
    assert sum(bool(axes.images) for axes in drawn[0].axes) == 3 and says in drawn[0].get_suptitle()


def test_a_range_test_that_diverges(drawn):
    """Bug: the last losses, a thousand times the first, flatten the part that matters."""
    rates = np.geomspace(1e-6, 1, 50)
    losses = np.where(rates < 1e-2, 2 - 0.1 * np.arange(50) / 50, 1e4 * rates)
    losses[-1] = math.inf
    report.lr_curve(None, rates, losses, 1e-3)
    assert drawn[0].axes[0].get_ylim()[1] < 3
    report.lr_curve(None, rates, np.full(50, math.nan), None)


def test_names_that_are_cut_stay_distinct():
    """Bug: two classes have one name on the axis."""
    names = [f"a class with a very long name, number {i} of those that end alike" for i in range(3)]
    short = report._distinct(names, 20)
    assert len(set(short)) == 3 and max(map(len, short)) < 30
    assert report._distinct(["a", "b"], 20) == ["a", "b"]


@pytest.mark.parametrize("classes", [1, 2, 70, 300])
def test_few_and_many_classes(drawn, classes):
    """Bug: the picture of 300 classes is too large to open, or its ticks do not match their names."""
    rng = np.random.default_rng(0)
    names, label = tuple(f"class {c}" for c in range(classes)), rng.integers(0, classes, 50)
    outputs = rng.random((50, classes)).astype(np.float32)
    report.confusion_matrix(None, Predictions(np.arange(50), label, np.ones(50, bool), outputs), names)
    labels = rng.integers(0, 2, (50, classes))
    report.labels(None, Predictions(np.arange(50), labels, labels >= 0, outputs), names, task.multilabel())
    assert max(max(figure.get_size_inches()) for figure in drawn) < 21
    axes = drawn[0].axes[0]
    shown = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert all(names[int(tick)] == text.get_text() for tick, text in shown)


def test_a_table(capsys):
    """Bug: values that are not strings fail, or a long one is cut."""
    report.table("a run", {"accuracy": 0.5, "file": "x" * 200})
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "0.5" in shown and shown.count("x") == 200
