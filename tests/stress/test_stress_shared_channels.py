"""A thousand kills, spread over all instructions of what each process does; bounded by count."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_shared_channels_killed import STORIES, Story, kill_often

pytestmark = [
    pytest.mark.endurance,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]

KILLS = 1000


@pytest.mark.parametrize("make", STORIES, ids=lambda make: make.__name__)
def test_a_thousand_kills_leave_nothing(make: Callable[[], Story]) -> None:
    kill_often(make, KILLS // len(STORIES) + 1)
