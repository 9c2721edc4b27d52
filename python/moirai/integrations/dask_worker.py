"""A plugin for Dask's workers: the right limit, spilling before it is reached, leaving stalls."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from distributed import WorkerPlugin  # type: ignore[import-not-found, unused-ignore]

from moirai._arguments import check_bool, check_number, path_text
from moirai.errors import InvalidArgument
from moirai.pressure import Guard, Registry, Sample, Source, Stage
from moirai.pressure.actions import built_in_actions

if TYPE_CHECKING:
    # Dask may not be installed where types are checked.
    Worker = Any

__all__ = ["PressurePlugin"]

log = logging.getLogger("moirai.pressure")

_SPILL_COST = 5.0
_NAME = "moirai-pressure"


class PressurePlugin(WorkerPlugin):  # type: ignore[misc, unused-ignore]
    """Keeps a Dask worker within its limit; register it with `client.register_plugin`.

    - The worker's `memory_limit` becomes its share of the nearest limit there is: Dask looks at the
      root of the mounted control groups alone, and so misses one that is nested.
    - It spills when a crossing is forecast, at half of its limit or more, not only above a level.
    - A worker that stays at emergency, or paused, without its memory falling closes gracefully: its
      results move to others, and its nanny starts another.

    Everything runs on the worker's event loop.
    """

    name = _NAME

    def __init__(
        self,
        *,
        share: float | None = None,
        interval_seconds: float = 0.2,
        stall_seconds: float = 30.0,
        restart: bool = True,
        root: str | os.PathLike[str] = "/",
    ) -> None:
        """Describe what workers are to do.

        Args:
            share: A worker's part of the nearest limit; None: its threads over the CPUs of the
                machine, as Dask has it; in (0, 1].
            interval_seconds: Time between two looks; > 0.
            stall_seconds: How long a worker may be stuck before it leaves; >= 0.
            restart: Whether its nanny, if it has one, is to start another.
            root: Folder that `proc` and `sys` are in.

        Raises:
            InvalidArgument: A number is outside its range.
        """
        check_number("share", share, or_none=True)
        check_number("interval_seconds", interval_seconds)
        check_number("stall_seconds", stall_seconds)
        check_bool("restart", restart)
        if not ((share is None or 0 < share <= 1) and interval_seconds > 0 and stall_seconds >= 0):
            raise InvalidArgument(
                "share, interval_seconds, stall_seconds: must be in (0, 1], > 0 and >= 0, got "
                f"{share}, {interval_seconds} and {stall_seconds}"
            )
        self.share = share
        self.interval_seconds = interval_seconds
        self.stall_seconds = stall_seconds
        self.restart = restart
        self.root = path_text("root", root)

    def setup(self, worker: Worker) -> None:
        """Called by Dask in each worker."""
        from tornado.ioloop import (  # type: ignore[import-not-found, unused-ignore]
            PeriodicCallback,
        )

        watch = WorkerWatch(worker, self)
        watch.correct_limit()
        callback = PeriodicCallback(watch.look, 1000 * self.interval_seconds)
        worker.periodic_callbacks[_NAME] = callback
        worker.extensions[_NAME] = watch
        worker.loop.add_callback(callback.start)

    def teardown(self, worker: Worker) -> None:
        """Called by Dask when the worker closes, or the plugin is unregistered."""
        callback = worker.periodic_callbacks.pop(_NAME, None)
        if callback is not None:
            callback.stop()
        worker.extensions.pop(_NAME, None)


class WorkerWatch:
    """A guard of one worker, stepped by its event loop. It is its own source of samples."""

    def __init__(self, worker: Worker, plugin: PressurePlugin) -> None:
        self._worker = worker
        self._plugin = plugin
        self._source = Source(root=plugin.root)
        registry = Registry()
        registry.register("dask spill", self._spill, size=self._spillable, cost=_SPILL_COST)
        self._paused: tuple[float, int] | None = None
        self._is_leaving = False
        self.guard = Guard(
            self,
            registry=registry,
            built_in=built_in_actions(),
            on_stall=lambda guard: self._leave("at emergency"),
            stall_seconds=plugin.stall_seconds,
        )

    def correct_limit(self) -> None:
        """Lower the worker's limit to its share of the nearest limit, if that is less."""
        self._source.read()
        limits = [bound.limit_bytes for bound in self._source.bounds()]
        if not limits:
            return
        manager = self._worker.memory_manager
        right = int(min(limits) * self._share())
        if manager.memory_limit and manager.memory_limit <= right:
            return
        log.info("%s: memory limit %s becomes %d", self._worker, manager.memory_limit, right)
        manager.memory_limit = right
        target = manager.memory_target_fraction or manager.memory_spill_fraction
        if target and hasattr(manager.data, "evict"):
            manager.data.n = int(right * target)

    def _share(self) -> float:
        if self._plugin.share is not None:
            return self._plugin.share
        from dask.system import CPU_COUNT  # type: ignore[import-not-found, unused-ignore]

        return min(1.0, float(self._worker.state.nthreads) / float(CPU_COUNT))

    def look(self) -> None:
        """Take a sample, decide and act."""
        if not self._is_leaving:
            sample = self.read()
            self.guard.step(sample)
            self._watch_pause(sample)

    def read(self) -> Sample:
        """Give the worker's own level, or that of a wider limit if less is left there."""
        near = self._source.read()
        limit = self._worker.memory_manager.memory_limit
        if not limit:
            return near
        used = int(self._worker.monitor.get_process_memory())
        own = Sample(time.monotonic(), used, int(limit), "dask", resident_bytes=used)
        return near if near.used_ratio > own.used_ratio else own

    def _spillable(self) -> int:
        fast = getattr(self._worker.data, "fast", None)
        return 0 if not fast else int(fast.total_weight)

    def _spill(self, wanted_bytes: int) -> int:
        data = self._worker.data
        freed = 0
        while freed < wanted_bytes and data.fast:
            weight = int(data.evict())
            if weight < 0:  # It says why by itself.
                break
            freed += weight
        return freed

    def _watch_pause(self, sample: Sample) -> None:
        """A worker that was paused and does not get better is as good as dead: let it leave."""
        if self._worker.status.name != "paused":
            self._paused = None
            return
        used = sample.used_bytes
        if self._paused is None or used < 0.98 * self._paused[1]:
            self._paused = (sample.time_seconds, used)
        if sample.time_seconds - self._paused[0] >= self._plugin.stall_seconds:
            self._leave("paused")

    def _leave(self, how: str) -> None:
        if self._is_leaving:
            return
        self._is_leaving = True
        stage = self.guard.stage if self.guard.stage > Stage.CALM else Stage.MONITOR
        reason = f"moirai: {how} for {self._plugin.stall_seconds} s, {stage.name.lower()}"
        log.warning("%s leaves: %s", self._worker, reason)
        self._worker.loop.add_callback(
            self._worker.close_gracefully, restart=self._plugin.restart, reason=reason
        )
