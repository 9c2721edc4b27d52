"""Odds that a straight climb reaches a line: what recordings show too little of.

Programs that leak the same each second are rare among recordings, and trees learnt from those do
not take a climb that is straight to the last page for what it is. Here it is said outright, of what
climbed straight for 40 s and has not fallen before: it goes on, but for those that stop. (In the
recordings, three of four such climbs that would reach the line within 45 s reached it within 60 s.)
The constants were chosen by hand.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moirai.pressure.features import HORIZONS, NAMES

__all__ = ["straight_odds"]

Array = NDArray[np.float64]

_WINDOW = 40
# How straight, as the correlation with time: below the first it is no line, from the second on it
# counts fully.
_BENT, _STRAIGHT = 0.985, 0.99
# As many of those left stop in each second; after this time a share of 1/e still climbs.
_CLIMB_SECONDS = 110.0
# How sure the time of arrival is: half arrive by 1.1 times the time that the slope says, nine of
# ten by 1.4 times.
_LATE = 1.1
_STEEPNESS = 8.0

_SECONDS = np.array(HORIZONS, dtype=np.float64)
_TRENDS = [NAMES.index(f"trend_{w}") for w in (10, 20, _WINDOW)]
_RMS = NAMES.index(f"rms_{_WINDOW}")
_AGE = NAMES.index("age")
_FALLS = NAMES.index("falls")
_LEAST_AGE = 30


def straight_odds(rows: Array, gap: float) -> Array:
    """Odds of a rise by `gap` within each horizon, if the last 40 s were straight, else 0.

    Args:
        rows: Of `describe`: one a horizon.
        gap: Distance up to the line in units of the scale, > 0.
    """
    # The same for all horizons, but for the unit of trends.
    row = rows[0]
    slopes = row[_TRENDS] / _SECONDS[0]
    slope = slopes.min()
    count = min(float(row[_AGE]), _WINDOW)
    if slope <= 0.0 or count < _LEAST_AGE or row[_FALLS]:
        return np.zeros(len(_SECONDS))
    explained = slopes[-1] * ((count * count - 1.0) / 12.0) ** 0.5
    share = explained / np.hypot(explained, row[_RMS])
    straight = min(max((share - _BENT) / (_STRAIGHT - _BENT), 0.0), 1.0)
    arrival = gap / slope
    late = np.clip(_STEEPNESS * (_SECONDS / arrival - _LATE), -30.0, 30.0)
    found: Array = straight * np.exp(-arrival / _CLIMB_SECONDS) / (1.0 + np.exp(-late))
    return found
