"""Celery's worker processes: each is guarded from its start to its end."""

from __future__ import annotations

import pytest

from moirai import pressure
from moirai.errors import Closed

pytest.importorskip("celery")

from celery import signals

from moirai.integrations.celery_signals import guard_workers


def test_a_worker_process_is_guarded_from_its_start_to_its_end() -> None:
    guard_workers(limit="1 GiB")
    signals.worker_process_init.send(sender=None)
    try:
        guard = pressure.current()
        signals.worker_process_init.send(sender=None)
        assert pressure.current() is guard
        assert guard.source.is_running  # type: ignore[attr-defined]
    finally:
        signals.worker_process_shutdown.send(sender=None, pid=1, exitcode=0)
    with pytest.raises(Closed):
        pressure.current()
