"""The thread that a guard's actions run on, where there is little memory to start it."""

import _thread
import threading

import pytest

from moirai.pressure.worker import Worker


def test_a_call_runs_here_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    worker = Worker()
    call = worker.call(threading.get_ident, timeout_seconds=60)
    assert call.result == threading.get_ident()
    worker.stop()


def test_a_thread_that_never_runs_leaves_its_call_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        # What the interpreter does where a thread finds no memory for its first steps.
        patch.setattr(_thread, "start_new_thread", lambda *arguments: 0)
        worker = Worker()
        assert not worker.call(int, timeout_seconds=0.01).done.is_set()
    # The next gets another thread.
    assert worker.call(lambda: 7, timeout_seconds=60).result == 7
    worker.stop()
    worker.stop()
