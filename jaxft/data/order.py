"""In which order an epoch takes its examples: pure functions of (dataset, indices, seed, epoch)."""

import numpy as np

from jaxft.data.dataset import Dataset, checked_indices


def shuffled(dataset: Dataset, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Every example once, in an order of its own for each (seed, epoch).

    Args:
        dataset: not used; other orders look at its labels.
        indices: int64 [n].
        seed, epoch: at least 0.

    Returns:
        int64 [n].
    """
    return indices[_permutation(len(indices), seed, epoch)]


def balanced(dataset: Dataset, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """n examples in which every class that is present is equally frequent, to one example.

    A class runs through all of its examples, in an order of its own each time, before one of them comes again; where
    an epoch ends inside of that, the next epoch goes on. Examples whose label is unknown are left out.

    Args:
        dataset: of target "class".
        indices: int64 [n].
        seed, epoch: at least 0.

    Returns:
        int64 [n]: as many draws as there are examples.

    Raises:
        ValueError: the dataset has another target, or no label is known.
    """
    labels = _class_labels(dataset, indices, "order.balanced", "draw with order.shuffled")
    classes = np.unique(labels[labels >= 0]).tolist()
    if not classes:
        raise ValueError(f"order.balanced: none of the {len(indices)} labels is known; use order.shuffled")
    # Draw t of all epochs goes to class t mod C, so the number of draws that a class has had needs no memory.
    first, last = epoch * len(indices), (epoch + 1) * len(indices)
    drawn = []
    for place, label in enumerate(classes):
        members = indices[labels == label]
        start, stop = (max(0, -(-(t - place) // len(classes))) for t in (first, last))
        for turn in range(start // len(members), -(-stop // len(members))):
            shuffled_members = members[_permutation(len(members), seed, turn, label + 1)]
            before = turn * len(members)
            drawn.append(shuffled_members[max(start - before, 0) : stop - before])
    return np.concatenate(drawn)[_permutation(len(indices), seed, epoch)]


def class_weights(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """Sample weights by which every class has the same part in the loss.

    An example of class c weighs n / (classes present · examples of c), counted in `indices` alone.

    Args:
        dataset: of target "class".
        indices: examples to train on, distinct, int [n].

    Returns:
        float32 [N] for the whole dataset, to be given as `Inputs.weights`; 1 for unknown labels and absent classes.

    Raises:
        ValueError: the dataset has another target, or the indices are not those of examples.

    Source: scikit-learn's class weights "balanced".
    """
    indices = checked_indices(dataset, indices)
    labels = _class_labels(dataset, indices, "order.class_weights", "give Inputs.weights of your own")
    counts = np.bincount(labels[labels >= 0], minlength=len(dataset.classes))
    of_class = np.ones(len(counts) + 1)  # the last is for label -1
    present = np.flatnonzero(counts)
    of_class[present] = counts.sum() / (len(present) * counts[present])
    return of_class[dataset.labels].astype(np.float32)


def _class_labels(dataset: Dataset, indices: np.ndarray, what: str, remedy: str) -> np.ndarray:
    if dataset.target != "class":
        raise ValueError(
            f"{what} needs one class an image, but dataset {dataset.name!r} has target {dataset.target!r}; {remedy}"
        )
    return dataset.labels[indices]


def _permutation(length: int, *seeds: int) -> np.ndarray:
    # Raw words of the generator: NumPy promises them across versions, unlike `Generator.permutation`.
    words = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(length)
    return np.argsort(words, kind="stable")
