"""CPython's own tests of `concurrent.futures`, with an executor of ours in the place of theirs.

They come with CPython's test package, which some distributions leave out.
"""

import concurrent.futures
import unittest
from collections.abc import Callable, Collection

import pytest

Kind = type[unittest.TestCase]


def suite_with(
    ours: type[concurrent.futures.Executor],
    parts: Collection[str],
    left_out: Callable[[Kind], Collection[str]],
) -> dict[str, Kind]:
    """CPython's test classes of the executor that `ours` is named after, testing `ours` instead.

    `parts` are modules of the suite, which was one module before 3.12. `left_out` names a class's
    tests that ask for what is not promised here. Skips the caller's module without the package.
    """
    suite = pytest.importorskip("test.test_concurrent_futures")
    if hasattr(suite, "ExecutorMixin"):
        modules = [suite]
    else:
        modules = [pytest.importorskip(f"test.test_concurrent_futures.{part}") for part in parts]
    theirs = getattr(concurrent.futures, ours.__name__)

    def with_ours(kind: Kind) -> Kind:
        def set_up(self: unittest.TestCase) -> None:
            patch = pytest.MonkeyPatch()
            patch.setattr(concurrent.futures, ours.__name__, ours)
            self.addCleanup(patch.undo)
            kind.setUp(self)

        names = {name: None for name in left_out(kind) if hasattr(kind, name)}
        # The caller's module is where a worker process looks for the class.
        changed = {"setUp": set_up, "executor_type": ours, "__module__": ours.__module__}
        return type(kind.__name__, (kind,), names | changed)

    return {
        name: with_ours(kind)
        for module in modules
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, unittest.TestCase)
        and getattr(kind, "executor_type", None) is theirs
    }
