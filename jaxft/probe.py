"""Probes: features of a net's stages with a linear classifier, where images are too few to fine-tune."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxft import features
from jaxft.data import Dataset, Inputs
from jaxft.ensemble import Probabilities


def probe(
    model: Any,
    dataset: Dataset,
    train: np.ndarray,
    test: np.ndarray,
    *,
    stages: str | Sequence[str],
    classifier: Literal["logistic", "svm"] = "logistic",
    pools: Sequence[Literal["mean", "max", "std"]] = ("mean",),
    penalty: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Probabilities:
    """Fits a linear classifier on the features of some images and predicts others.

    Features are scaled to mean 0 and deviation 1 on the training images.

    Args:
        model: a `Model`; nothing of it is trained.
        dataset: of one class an image.
        train, test: indices of it, int; the labels of `test` are not looked at.
        stages: one stage of the net or several, whose features stand side by side.
        classifier: logistic regression, or a linear support vector machine whose scores are made probabilities by
            Platt's method, with three folds of the training images.
        pools: over places, of stages that have them; several stand side by side.
        penalty: C of scikit-learn divided by the number of training images is the weight of the loss: larger fits
            closer.
        image_size: (height, width) in pixels; by default that of the model.

    Raises:
        ValueError: an unknown classifier, pool or stage; a label of `train` is not known.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    if classifier not in ("logistic", "svm"):
        raise ValueError(f"classifier={classifier!r}, expected logistic or svm")
    if dataset.target != "class" or not dataset.known[train].all():
        raise ValueError(f"a probe of {dataset.name!r} needs one known class for each training image")
    size = image_size or model.image_size
    if size is None:
        raise ValueError("the size of the images is not known: say image_size=(224, 224)")
    inputs = Inputs(dataset, np.concatenate([train, test]), size, decode=model.decode)
    names = [stages] if isinstance(stages, str) else list(stages)
    found = features.of_stages(model, names, inputs, pools)
    scaler = StandardScaler()
    if classifier == "logistic":
        fitted = make_pipeline(scaler, LogisticRegression(C=penalty / len(train), max_iter=2000))
    else:
        machine = LinearSVC(C=penalty / len(train), dual="auto", max_iter=20_000, random_state=0)
        fitted = make_pipeline(scaler, CalibratedClassifierCV(machine, cv=3))
    fitted.fit(found[: len(train)], dataset.labels[train])
    values = np.full((len(test), len(dataset.classes)), 1e-15)
    values[:, np.asarray(fitted.classes_)] = fitted.predict_proba(found[len(train) :])
    pick = np.asarray(test).tolist()
    return Probabilities(
        tuple(dataset.names[i] for i in pick),
        dataset.classes,
        values / values.sum(1, keepdims=True),
        np.where(dataset.known[test], dataset.labels[test], -1),
        tuple(dataset.groups[i] for i in pick),
    )
