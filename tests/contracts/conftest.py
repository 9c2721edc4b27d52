"""What the contract suites share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Have `gc.collect()` look at what the tests make, not at all of pytest each time.

    The suites collect after every example, and a limit does before it refuses.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
