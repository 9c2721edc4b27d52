"""The forecaster's trained part: a few small trees that are read from `forecaster.json`.

All trees of an ensemble are oblivious (one question a level, the same for all branches), so that
every tree is answered at once by comparing, packing bits and looking leaves up. After Kohavi and
Li (1995); boosted as in Friedman (2001). How they were made is in `scripts/train_forecaster.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moirai.pressure.features import HORIZONS, crossing_features
from moirai.pressure.straight import straight_odds

__all__ = ["Ensemble", "Model", "trained"]

Array = NDArray[np.float64]

# An interval is at least this wide, as a share of the recent peak: a page more is no surprise.
_LEAST_WIDTH = 0.01


class Ensemble:
    """Sums of trees, several sums from the same rows.

    Args:
        sums: For each sum its start and its trees; all trees of the same depth. A tree is a list
            of columns, a list of thresholds (deepest last) and a list of leaves.
    """

    def __init__(self, sums: Sequence[Mapping[str, Any]]) -> None:
        trees = [tree for each in sums for tree in each["trees"]]
        self._columns = np.array([tree[0] for tree in trees])
        self._thresholds = np.array([tree[1] for tree in trees], dtype=np.float64)
        depth = self._columns.shape[1]
        self._powers = 1 << np.arange(depth - 1, -1, -1)
        self._leaves = np.array([tree[2] for tree in trees], dtype=np.float64).ravel()
        self._offsets = np.arange(len(trees)) << depth
        self._starts = np.cumsum([0, *(len(each["trees"]) for each in sums[:-1])])
        self._base = np.array([each["base"] for each in sums])

    def predict(self, rows: Array) -> Array:
        """One line a row, one column a sum."""
        answers = rows[:, self._columns] > self._thresholds
        leaves = self._leaves[answers @ self._powers + self._offsets]
        sums: Array = np.add.reduceat(leaves, self._starts, axis=1) + self._base
        return sums


class Model:
    """Ensembles with their calibration; immutable, so any number of forecasters share one."""

    def __init__(self, constants: Mapping[str, Any]) -> None:
        value = constants["value"]
        self._value = Ensemble([value["low"], value["middle"], value["high"]])
        self._crossing = Ensemble([constants["crossing"]])
        self._margins = np.array([constants["margins"][str(h)] for h in HORIZONS])
        self._sharpness = np.array([constants["sharpness"][str(h)] for h in HORIZONS])
        self._confidence = [np.array(constants["confidence"][str(h)]) for h in HORIZONS]

    def changes(self, rows: Array) -> Array:
        """Low, middle and high change by each horizon, in units of the scale, calibrated."""
        found = self.raw_changes(rows)
        width = np.maximum(found[:, 2] - found[:, 0], _LEAST_WIDTH)
        found[:, 0] -= self._margins * width
        found[:, 2] += self._margins * width
        np.minimum(found[:, 0], found[:, 1], out=found[:, 0])
        np.maximum(found[:, 2], found[:, 1], out=found[:, 2])
        return found

    def raw_changes(self, rows: Array) -> Array:
        """The ensemble's own quantiles, put in order; what calibration starts from."""
        found = self._value.predict(rows)
        found.sort(axis=1)
        return found

    def confidence(self, width_ratios: Array) -> Array:
        """Probability that each horizon's error stays within 5 % of the limit.

        Args:
            width_ratios: Width of each interval over the limit.
        """
        found = [
            np.interp(ratio, widths, shares)
            for ratio, (widths, shares) in zip(width_ratios, self._confidence, strict=True)
        ]
        return np.array(found)

    def crossing(self, rows: Array, gap: float) -> Array:
        """Probability of a rise by `gap` (in units of the scale) within each horizon."""
        logits = self._crossing.predict(crossing_features(rows, gap))[:, 0]
        found = np.maximum(_probability(logits * self._sharpness), straight_odds(rows, gap))
        return np.maximum.accumulate(found)


def _probability(logits: Array) -> Array:
    found: Array = 1.0 / (1.0 + np.exp(-np.maximum(logits, -30.0)))
    return found


@functools.cache
def trained() -> Model:
    """The model that the package ships."""
    text = resources.files("moirai.pressure").joinpath("forecaster.json").read_text("utf-8")
    return Model(json.loads(text))
