"""Probes: features of a net's stages with a classifier of few parameters, where images are too few to fine-tune."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from jaxft import features
from jaxft.data import Dataset, Inputs
from jaxft.ensemble import Probabilities

Classifier = Literal["logistic", "svm", "rbf"]
FOLDS = 5  # of the training images, to choose a penalty and to calibrate scores; fewer where a class has fewer images


def probe(
    model: Any,
    dataset: Dataset,
    train: np.ndarray,
    test: np.ndarray,
    *,
    stages: str | Sequence[str],
    classifier: Classifier = "logistic",
    pools: Sequence[features.Pool] = ("mean",),
    penalty: float | Sequence[float] = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Probabilities:
    """Fits a classifier on the features of some images and predicts others.

    Args:
        model: a `Model`; nothing of it is trained.
        dataset, train, test, classifier, penalty: as in `on_features`.
        stages: one stage of the net or several, whose features stand side by side.
        pools: over places, of stages that have them; several stand side by side.
        image_size: (height, width) in pixels; by default that of the model.

    Raises:
        ValueError: an unknown pool or stage; or as `on_features`.
    """
    _check(classifier, dataset, train)
    size = image_size or model.image_size
    if size is None:
        raise ValueError("the size of the images is not known: say image_size=(224, 224)")
    both = np.concatenate([train, test])
    names = [stages] if isinstance(stages, str) else list(stages)
    found = features.of_stages(model, names, Inputs(dataset, both, size, decode=model.decode), pools)
    rows = np.empty((len(dataset), found.shape[1]), found.dtype)
    rows[both] = found
    return on_features(rows, dataset, train, test, classifier=classifier, penalty=penalty)


def on_features(
    rows: np.ndarray,
    dataset: Dataset,
    train: np.ndarray,
    test: np.ndarray,
    *,
    classifier: Classifier = "logistic",
    penalty: float | Sequence[float] = 1.0,
) -> Probabilities:
    """Fits a classifier on features that are there already, such as those of `features.of_stages`.

    Features are scaled to mean 0 and deviation 1 on the training images.

    Args:
        rows: float [N, F], the features of each example of the dataset; those of other examples are not looked at.
        dataset: of one class an image.
        train, test: indices of it, int; the labels of `test` are not looked at.
        classifier: logistic regression; or a support vector machine, linear ("svm") or with a radial kernel of width
            √F ("rbf"), whose scores are made probabilities by Platt's method, on folds of the training images.
        penalty: C of scikit-learn times the number of training images: larger fits closer. Of several, that which is
            most often right in folds of the training images.

    Raises:
        ValueError: an unknown classifier; a label of `train` is not known; a class of one training image, where folds
            are needed; no row for each example.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC, LinearSVC

    _check(classifier, dataset, train)
    if rows.ndim != 2 or len(rows) != len(dataset):
        raise ValueError(f"rows have shape {list(rows.shape)}; expected [{len(dataset)}, F], a row for each example")
    labels = dataset.labels[train]
    penalties = np.atleast_1d(np.asarray(penalty, float)).tolist()
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if fewest < 2 and (len(penalties) > 1 or classifier != "logistic"):
        raise ValueError(f"{dataset.name!r} has a class of one training image, and folds need two; give more of it")
    folds = StratifiedKFold(min(FOLDS, max(2, fewest)), shuffle=True, random_state=0)

    def machine(penalty: float) -> Any:
        c = penalty / len(train)
        if classifier == "logistic":
            return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        if classifier == "svm":
            return make_pipeline(StandardScaler(), LinearSVC(C=c, dual="auto", max_iter=20_000, random_state=0))
        # As a function: libsvm's own radial kernel is a loop, this one a product of matrices.
        kernel: Any = partial(rbf_kernel, gamma=1 / rows.shape[1])
        return make_pipeline(StandardScaler(), SVC(C=c, kernel=kernel))

    if len(penalties) > 1:
        right = [cross_val_score(machine(each), rows[train], labels, cv=folds).mean() for each in penalties]
        penalties = [penalties[int(np.argmax(right))]]
    fitted = machine(penalties[0])
    if classifier != "logistic":
        fitted = CalibratedClassifierCV(fitted, cv=folds, ensemble=False)  # pyright: ignore[reportArgumentType]
    fitted.fit(rows[train], labels)
    values = np.full((len(test), len(dataset.classes)), 1e-15)
    values[:, np.asarray(fitted.classes_)] = fitted.predict_proba(rows[test])
    pick = np.asarray(test).tolist()
    return Probabilities(
        tuple(dataset.names[i] for i in pick),
        dataset.classes,
        values / values.sum(1, keepdims=True),
        np.where(dataset.known[test], dataset.labels[test], -1),
        tuple(dataset.groups[i] for i in pick),
    )


def _check(classifier: str, dataset: Dataset, train: np.ndarray) -> None:
    if classifier not in ("logistic", "svm", "rbf"):
        raise ValueError(f"classifier={classifier!r}, expected logistic, svm or rbf")
    if dataset.target != "class" or not dataset.known[train].all():
        raise ValueError(f"a probe of {dataset.name!r} needs one known class for each training image")
