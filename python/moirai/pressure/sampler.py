"""A thread of the compiled core that samples memory use, which Python code cannot hold up."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass

from moirai import _native
from moirai._arguments import check_instance, check_number, check_timeout, path_text
from moirai.errors import Closed, InvalidArgument, Timeout
from moirai.pressure.fence import Fence
from moirai.pressure.samples import Sample
from moirai.pressure.source import (
    Source,
    optional_limit,
    optional_process,
    process_text,
    sample_of,
)
from moirai.pressure.starting import guard_starts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Sampler", "SamplerStatistics"]

log = logging.getLogger("moirai.pressure")

_samplers: weakref.WeakSet[Sampler] = weakref.WeakSet()


@dataclass(frozen=True)
class SamplerStatistics:
    """What sampling cost since `start`.

    Attributes:
        sample_count: Samples taken.
        reading_seconds: Time that reading them took, in sum.
        largest_delay_seconds: Longest time that a sample came later than planned.
        interval_seconds: Time planned until the next sample.
        fence_room_bytes: What the fence still lets the process map; None without a fence.
        sharer_count: Processes that share the fence's room, this one included.
        is_leader: Whether this one is to act for those that share.
        ledger_error: Why the fence's ledger cannot be opened, so that this process counts as alone;
            None if it can, or there is none.
    """

    sample_count: int
    reading_seconds: float
    largest_delay_seconds: float
    interval_seconds: float
    fence_room_bytes: int | None
    sharer_count: int
    is_leader: bool
    ledger_error: str | None


class Sampler:
    """Samples a process's memory use on a thread that the interpreter's lock does not stall.

    Samples come the more often the less room is left and the faster it shrinks. Any number of
    threads may use it at once. In a forked child it goes on by itself, if it ran in the parent,
    with samples of the child's own.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] = "/",
        process_id: int | None = None,
        budget_bytes: int | str | None = None,
        budget_process_id: int | None = None,
        shortest_seconds: float = 0.005,
        longest_seconds: float = 1.0,
        capacity: int = 1024,
        fence: Fence | None = None,
    ) -> None:
        """Prepare to sample; `start` starts.

        Args:
            root: Folder that `proc` and `sys` are in.
            process_id: The process to sample; default: this one.
            budget_bytes: A limit of your own for the process and its children, as an int or such
                as "2 GiB".
            budget_process_id: The process that the budget is for, with its children; default: the
                one that is sampled, also after a fork.
            shortest_seconds: Shortest time between two samples; > 0.
            longest_seconds: Longest time between two samples; at least the shortest.
            capacity: Samples to keep; from 1 to 1048576.
            fence: Keep one, for this process alone; at most one sampler of a process can.

        Raises:
            InvalidArgument: An argument is outside its range.
        """
        check_number("shortest_seconds", shortest_seconds)
        check_number("longest_seconds", longest_seconds)
        if not 0 < shortest_seconds <= longest_seconds <= 3600:
            raise InvalidArgument(
                "shortest_seconds, longest_seconds: must be 0 < shortest <= longest <= 3600, got "
                f"{shortest_seconds} and {longest_seconds}"
            )
        check_instance("fence", fence, Fence, or_none=True)
        if fence is not None and process_id is not None:
            raise InvalidArgument(
                f"fence: only this process can be fenced in, got process_id={process_id}"
            )
        budget = optional_limit(budget_bytes, "budget_bytes")
        process = process_text(process_id)
        # Of a child that goes on sampling, the parent stays the one that the budget is for.
        eldest = optional_process(budget_process_id, "budget_process_id") or (
            os.getpid() if process_id is None else process_id
        )
        folder = path_text("root", root)
        self._arguments = (folder, process_id, budget, eldest)
        self._source: Source | None = None
        self._native = _native.PressureSampler(
            root=folder,
            process=process,
            budget_bytes=budget,
            eldest=eldest,
            shortest_seconds=shortest_seconds,
            longest_seconds=longest_seconds,
            capacity=capacity,
            fence_margin_bytes=None if fence is None else fence.margin_bytes,
            fence_ledger=None if fence is None else fence.ledger,
        )
        self.fence = fence
        self._has_told_of_ledger = False
        self._is_wanted = False
        _samplers.add(self)

    def start(self) -> None:
        """Take a first sample and start the thread; does nothing if it runs.

        Raises:
            Unsupported: There is no such process, or no `/proc`; or another sampler of this process
                keeps a fence.
            OutOfMemory: No thread can be started.
        """
        if self.fence is not None:
            guard_starts()
        self._native.start()
        self._is_wanted = True
        self.look_at_ledger()

    def stop(self) -> None:
        """End the thread and take the fence down; does nothing if it does not run."""
        self._is_wanted = False
        self._native.stop()

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether the thread runs in this process."""
        return self._native.is_running

    def read(self) -> Sample:
        """Give the newest sample.

        Raises:
            Closed: It was not started.
        """
        return self._newest()[1]

    def read_now(self) -> Sample:
        """Read once more, in the calling thread; for who cannot go by the newest sample.

        Behind a fence, what that lets the process map is a limit too, of the kind "data".

        Raises:
            Closed: The process is gone.
        """
        source = self._source
        if source is None:
            root, process_id, budget, eldest = self._arguments
            source = Source(
                root=root,
                process_id=process_id,
                budget_bytes=budget,
                budget_process_id=eldest,
            )
            self._source = source
        return source.read()

    def _newest(self) -> tuple[int, Sample]:
        found = self._native.latest()
        if found is None:
            raise Closed("the sampler was not started")
        number, values = found
        return number, sample_of(values)

    def next(self, *, timeout_seconds: float | None = None) -> Sample:
        """Wait for a sample that is taken after this call.

        Args:
            timeout_seconds: Longest time to wait; None: for ever.

        Raises:
            InvalidArgument: The time is no number from 0 to 1e9.
            Closed: The sampler is stopped, or the process that it samples is gone.
            Timeout: The time has passed; nothing is left behind.
        """
        check_timeout("timeout_seconds", timeout_seconds)
        number, _ = self._newest()
        found = self._native.wait(number, timeout_seconds=timeout_seconds)
        if found is None:
            raise Closed("the sampler is stopped, or the process is gone")
        if found == 0:
            raise Timeout(f"no sample within {timeout_seconds} seconds")
        return self.read()

    def history(self, count: int = 1 << 20) -> tuple[Sample, ...]:
        """Give the newest `count` samples that are kept, oldest first."""
        return tuple(sample_of(values) for values in self._native.history(count))

    def statistics(self) -> SamplerStatistics:
        """Say what sampling cost since `start`."""
        found = self._native.statistics()
        error = None if found[7] is None else os.strerror(found[7])
        return SamplerStatistics(*found[:7], ledger_error=error)

    def look_at_ledger(self) -> None:
        """Log once that the fence's ledger cannot be opened, if it cannot; a guard calls this."""
        fence = self.fence
        if fence is None or fence.ledger is None or self._has_told_of_ledger:
            return
        error = self.statistics().ledger_error
        if error is not None:
            self._has_told_of_ledger = True
            log.warning(
                "the ledger %s cannot be opened (%s): the fence stands as if this process were "
                "alone under its limit",
                fence.ledger,
                error,
            )


def _after_fork_in_child() -> None:
    for sampler in list(_samplers):
        sampler._source = None  # Its files are the parent's.
        if not sampler._is_wanted:
            continue
        try:
            sampler._native.start()
        except Exception:  # The child must come up; without a thread no fence may stay behind.
            if sampler.fence is not None:
                _native.lift_inherited_fence()


os.register_at_fork(after_in_child=_after_fork_in_child)
