"""Which examples train and which test: whole groups, such as drivers, or strata in proportion."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def group_folds(
    groups: Sequence[str], folds: int, *, labels: Sequence[int] | np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """The fold of each example: groups stay whole, and folds are as equal in examples as that allows.

    Args:
        groups: the group of each of N examples, such as its driver; their order decides nothing.
        folds: how many.
        labels: of the N examples; folds are then as equal in examples of each label as that allows.
        seed: another seed gives another partition, balanced as well.

    Returns:
        int32 [N], 0 to folds - 1, every fold present.

    Raises:
        ValueError: fewer than two groups, fewer than two folds, more folds than groups, or labels of another length.
    """
    totals = Counter(groups)
    if len(totals) < 2:
        raise ValueError(f"folds of whole groups need at least two groups, found {len(totals)}: {', '.join(totals)}")
    if not 2 <= folds <= len(totals):
        why = "one fold leaves nothing to train on" if folds < 2 else "a fold with no group could not be scored"
        raise ValueError(f"{folds} folds of {len(totals)} groups: {why}; choose 2 to {len(totals)} folds")
    names = sorted(totals)
    shares = _shares(groups, names, labels)
    # Largest first, each to the lightest fold, balances best. Sizes blurred by a fifth let the seed matter.
    blur = 1 + 0.2 * np.random.default_rng(seed).random(len(names))
    order = sorted(range(len(names)), key=lambda i: -totals[names[i]] * blur[i])
    sizes = np.zeros((folds, shares.shape[1]))
    fold_of: dict[str, int] = {}
    for place, i in enumerate(order):
        # The product of what a fold has with what the group brings is what the sum of squares grows by. A fold without
        # a group takes the next one, where just as many are left.
        empty = np.flatnonzero(~sizes.any(1))
        choice = empty if len(empty) == len(order) - place else np.arange(folds)
        fold = int(choice[np.argmin(sizes[choice] @ shares[i])])
        fold_of[names[i]] = fold
        sizes[fold] += shares[i]
    return np.asarray([fold_of[group] for group in groups], np.int32)


def _shares(groups: Sequence[str], names: Sequence[str], labels: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Examples of each group, [G, 1]; by label, as shares of the label's examples, [G, L], so that rare ones count."""
    found = np.zeros(len(groups), int) if labels is None else np.unique(np.asarray(labels), return_inverse=True)[1]
    if len(found) != len(groups):
        raise ValueError(f"{len(found)} labels for {len(groups)} examples; give one for each")
    counts = np.zeros((len(names), found.max() + 1))
    place = {name: i for i, name in enumerate(names)}
    np.add.at(counts, (np.asarray([place[group] for group in groups]), found), 1)
    return counts if labels is None else counts / counts.sum(0)


def random_folds(labels: Sequence[int] | np.ndarray, folds: int, *, seed: int = 0) -> np.ndarray:
    """The fold of each example by chance, each label in proportion: what films and groups make a lie of.

    Frames of one film fall into several folds. Beside `group_folds` it shows how much of a score is that leak.

    Returns:
        int32 [N], 0 to folds - 1.

    Raises:
        ValueError: not 2 to N folds.
    """
    labels = np.asarray(labels)
    if not 2 <= folds <= len(labels):
        raise ValueError(f"{folds} folds of {len(labels)} examples; choose 2 to {len(labels)} folds")
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # label by label, dealt out in turn
    found = np.empty(len(labels), np.int32)
    found[order] = np.arange(len(labels)) % folds
    return found


def check_folds(groups: Sequence[str], fold_of: np.ndarray) -> None:
    """Refuses folds that divide a group, such as a driver whose images are in two.

    Args:
        groups: of N examples.
        fold_of: the fold of each, int [N].

    Raises:
        ValueError: of other lengths, or a group is in two folds; the message names it.
    """
    if len(groups) != len(fold_of):
        raise ValueError(f"{len(fold_of)} folds for {len(groups)} examples; give one for each")
    first: dict[str, int] = {}
    for group, fold in zip(groups, np.asarray(fold_of).tolist(), strict=True):
        if first.setdefault(group, fold) != fold:
            raise ValueError(
                f"{group} is in the folds {first[group]} and {fold}: a net would be judged on a group that it was "
                f"trained on; keep groups whole, as folds.group_folds does"
            )


def split(groups: Sequence[str], fold: int, folds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The examples outside and inside one of the folds of `group_folds`.

    Returns:
        (train, test), int64 indices in ascending order; no group is in both.

    Raises:
        ValueError: `fold` is not one of 0 to folds - 1, and what `group_folds` raises.
    """
    of_example = group_folds(groups, folds, seed=seed)
    if not 0 <= fold < folds:
        raise ValueError(f"fold {fold} does not exist: {folds} folds are numbered 0 to {folds - 1}")
    return np.flatnonzero(of_example != fold), np.flatnonzero(of_example == fold)


def stratified_split(strata: Sequence[Hashable], fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divide examples, and each stratum of them in the same proportion.

    The first part has exactly round(fraction · N) examples; a stratum's share differs by less than one example from
    `fraction` of it.

    Args:
        strata: the stratum of each of N examples, such as (label, type).
        fraction: of the first part, in (0, 1).
        seed: which examples of a stratum.

    Returns:
        (first, second), int64 indices in ascending order.

    Raises:
        ValueError: the fraction is outside (0, 1), or leaves a part empty.
    """
    total = round(fraction * len(strata)) if 0 < fraction < 1 else 0
    if not 0 < total < len(strata):
        raise ValueError(
            f"a fraction of {fraction} of {len(strata)} examples leaves a part empty; it must lie within (0, 1)"
        )
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    shares = [fraction * len(m) for m in members.values()]
    taken = [int(share) for share in shares]
    # Largest remainder: the examples lost by rounding down go where most was lost.
    by_remainder = sorted(range(len(shares)), key=lambda i: taken[i] - shares[i])
    for i in by_remainder[: total - sum(taken)]:
        taken[i] += 1
    rng = np.random.default_rng(seed)
    first = np.zeros(len(strata), bool)
    for indices, count in zip(members.values(), taken, strict=True):
        first[rng.permutation(indices)[:count]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)
