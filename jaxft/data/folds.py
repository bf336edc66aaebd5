"""Which examples train and which test: whole groups, such as drivers, or strata in proportion."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def group_folds(groups: Sequence[str], folds: int, *, seed: int = 0) -> np.ndarray:
    """The fold of each example: groups stay whole, and folds are as equal in examples as that allows.

    Args:
        groups: the group of each of N examples, such as its driver; their order decides nothing.
        folds: how many.
        seed: another seed gives another partition, balanced as well.

    Returns:
        int32 [N], 0 to folds - 1, every fold present.

    Raises:
        ValueError: fewer than two groups, fewer than two folds, or more folds than groups.
    """
    counts = Counter(groups)
    if len(counts) < 2:
        raise ValueError(f"folds of whole groups need at least two groups, found {len(counts)}: {', '.join(counts)}")
    if not 2 <= folds <= len(counts):
        why = "one fold leaves nothing to train on" if folds < 2 else "a fold with no group could not be scored"
        raise ValueError(f"{folds} folds of {len(counts)} groups: {why}; choose 2 to {len(counts)} folds")
    names = sorted(counts)
    # Largest first, each to the lightest fold, balances best. Sizes blurred by a fifth let the seed matter.
    blur = 1 + 0.2 * np.random.default_rng(seed).random(len(names))
    order = sorted(range(len(names)), key=lambda i: -counts[names[i]] * blur[i])
    sizes = [0] * folds
    fold_of: dict[str, int] = {}
    for i in order:
        fold = sizes.index(min(sizes))
        fold_of[names[i]] = fold
        sizes[fold] += counts[names[i]]
    return np.asarray([fold_of[group] for group in groups], np.int32)


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
