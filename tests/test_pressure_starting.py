"""Threads that find no memory to begin, where a fence stands."""

import threading

import pytest

from moirai.pressure import starting


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", threading.Thread.start)  # put back at the end
    starting.guard_starts()


def lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system's thread end before it calls anything, as it does without memory."""
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else None
    monkeypatch.setattr(threading, name or "_start_new_thread", lambda *first, **options: 1)


def test_a_thread_that_never_began_is_an_error_for_who_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = threading.active_count()
    thread = threading.Thread(target=int)
    with monkeypatch.context() as patch:
        lose(patch)
        with pytest.raises(MemoryError, match="no memory to begin"):
            thread.start()
    assert not thread.is_alive()
    assert threading.active_count() == count
    thread.start()  # there is memory again
    thread.join()


def test_threads_start_as_ever() -> None:
    found: list[object] = []

    class Named(threading.Thread):
        def start(self) -> None:
            found.append("start")
            super().start()

        def run(self) -> None:
            found.append(threading.current_thread() is self)

    threads = [Named() for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        assert not thread.is_alive()
    assert found.count(True) == found.count("start") == 50
    with pytest.raises(RuntimeError, match="only be started once"):
        threads[0].start()


def test_what_cannot_be_started_says_so() -> None:
    class Unmade(threading.Thread):
        def __init__(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="__init__"):
        Unmade().start()


def test_a_refusal_of_the_system_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*first: object, **options: object) -> int:
        raise RuntimeError("can't start new thread")

    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else None
    thread = threading.Thread(target=int)
    with monkeypatch.context() as patch:
        patch.setattr(threading, name or "_start_new_thread", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            thread.start()
    thread.start()
    thread.join()
