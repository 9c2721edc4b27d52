"""Small boosted trees for `train_forecaster.py`: oblivious, by histogram, in NumPy alone.

After Friedman (2001), with leaves shrunk towards zero by `PENALTY` and trees fitted to random
halves of rows and columns. Oblivious trees ask one question a level: fewer constants, and less
room to learn a single recording by heart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTY = 30.0
LEAST_ROWS = 20


@dataclass(frozen=True)
class Settings:
    """How one ensemble is grown; `quantile` None fits log odds of a label of 0 or 1.

    `bins` is how many ranges a column is cut into, between which thresholds are looked for.
    """

    quantile: float | None
    depth: int
    rounds: int
    rate: float
    bins: int = 24
    row_share: float = 0.3
    column_share: float = 0.4


def weighted_quantile(values: Array, weights: Array, share: float) -> float:
    """The smallest value that `share` of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    totals = np.cumsum(weights[order])
    found = min(int(np.searchsorted(totals, share * totals[-1])), len(values) - 1)
    return float(values[order[found]])


def fit(rows: Array, target: Array, weights: Array, settings: Settings) -> dict[str, Any]:
    """Grow an ensemble.

    Args:
        rows: Shape (n, columns).
        target: Shape (n,).
        weights: Shape (n,), >= 0; only their ratios matter.
        settings: How.

    Returns:
        `base` and `trees`, each tree as [columns, thresholds, leaves], as `moirai.pressure` reads
        them.
    """
    random = np.random.default_rng(7)
    weights = weights / weights.mean()
    share = settings.quantile
    if share is None:
        mean = float((weights * target).sum() / weights.sum())
        base = float(np.log(mean / (1.0 - mean)))
    else:
        base = weighted_quantile(target, weights, share)
    edges = [_edges(rows[:, column], settings.bins) for column in range(rows.shape[1])]
    bins = np.stack(
        [np.searchsorted(each, rows[:, column]) for column, each in enumerate(edges)]
    ).astype(np.uint8)
    predicted = np.full(len(rows), base)
    trees = []
    for _ in range(settings.rounds):
        if share is None:
            odds = 1.0 / (1.0 + np.exp(-predicted))
            gradient, curvature = (target - odds) * weights, odds * (1.0 - odds) * weights
        else:
            gradient, curvature = np.where(target > predicted, share, share - 1) * weights, weights
        chosen = np.flatnonzero(random.random(len(rows)) < settings.row_share)
        count = max(1, int(len(edges) * settings.column_share))
        columns = random.permutation(len(edges))[:count]
        questions = _questions(
            bins[np.ix_(columns, chosen)],
            gradient[chosen],
            curvature[chosen],
            columns,
            edges,
            settings,
        )
        leaf = np.zeros(len(rows), dtype=np.int64)
        for column, index in questions:
            leaf = leaf * 2 + (bins[column] > index)
        leaves = []
        for number in range(1 << settings.depth):
            members = chosen[leaf[chosen] == number]
            step = 0.0
            if len(members) >= LEAST_ROWS:
                if share is None:
                    step = gradient[members].sum() / (curvature[members].sum() + PENALTY)
                else:
                    mass = weights[members].sum()
                    rest = target[members] - predicted[members]
                    step = weighted_quantile(rest, weights[members], share)
                    step *= mass / (mass + PENALTY)
            leaves.append(float(f"{settings.rate * step:.3g}"))
        predicted += np.array(leaves)[leaf]
        asked = [int(column) for column, _ in questions]
        thresholds = [float(edges[column][index]) for column, index in questions]
        trees.append([asked, thresholds, leaves])
    return {"base": float(f"{base:.4g}"), "trees": trees}


def _edges(values: Array, bin_count: int) -> Array:
    """Few-digit thresholds between which about equally many values lie."""
    shares = np.linspace(0.0, 1.0, bin_count + 1)[1:-1]
    return np.unique([float(f"{each:.3g}") for each in np.quantile(values, shares)])


def _questions(
    bins: NDArray[np.uint8],
    gradient: Array,
    curvature: Array,
    columns: NDArray[np.int64],
    edges: list[Array],
    settings: Settings,
) -> list[tuple[int, int]]:
    leaf = np.zeros(bins.shape[1], dtype=np.int64)
    found = []
    width = settings.bins + 1
    for level in range(settings.depth):
        cells = (1 << level) * width
        best = (-1.0, 0, 0, 0)
        for place, column in enumerate(columns):
            if not len(edges[column]):
                continue
            cell = leaf * width + bins[place]
            low = np.bincount(cell, gradient, cells).reshape(1 << level, -1).cumsum(1)
            mass = np.bincount(cell, curvature, cells).reshape(1 << level, -1).cumsum(1)
            high, rest = low[:, -1:] - low, mass[:, -1:] - mass
            gains = (low**2 / (mass + PENALTY) + high**2 / (rest + PENALTY)).sum(0)
            index = int(gains[: len(edges[column])].argmax())
            if gains[index] > best[0]:
                best = (float(gains[index]), place, int(column), index)
        _, place, column, index = best
        found.append((column, index))
        leaf = leaf * 2 + (bins[place] > index)
    return found
