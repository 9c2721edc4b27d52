"""Tells somebody else: posts stages to a URL, without holding the guard up."""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping

from moirai._arguments import check_instance, check_number, wrong_type
from moirai.errors import InvalidArgument
from moirai.pressure.samples import Sample
from moirai.pressure.stages import Stage

__all__ = ["Webhook"]

log = logging.getLogger("moirai.pressure")

_WAITING_COUNT = 16


class Webhook:
    """Posts JSON to a URL when a stage begins or is over; give it to a guard as `on_stage`.

    It is called on the guard's thread and posts on one of its own, which is started here: near the
    limit there may be no memory for another. In a forked child the thread is started at the first
    call. Several guards may share one.
    """

    def __init__(
        self,
        url: str,
        *,
        from_stage: Stage = Stage.AGGRESSIVE,
        repeat_seconds: float = 60.0,
        timeout_seconds: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to post.

        Args:
            url: Where to; http or https.
            from_stage: Stages below are not told, but for the end of one that was.
            repeat_seconds: A stage that is no harder than the one told last is told after so long.
            timeout_seconds: How long a post may take; > 0, at most 1e9.
            headers: To be sent besides the content type.

        Raises:
            InvalidArgument: The URL or a number is outside its range.
            WrongType: An argument is of another kind.
        """
        if not _is_address(url):
            raise InvalidArgument(f"url: must be http:// or https:// with a host, got {url!r}")
        check_instance("from_stage", from_stage, Stage)
        check_number("repeat_seconds", repeat_seconds)
        check_number("timeout_seconds", timeout_seconds)
        if headers is not None and not isinstance(headers, Mapping):
            raise wrong_type("headers", "a mapping or None", headers)
        for name, value in (headers or {}).items():
            check_instance("headers: each name", name, str)
            check_instance(f"headers: {name}", value, str)
        if not (repeat_seconds >= 0 and 0 < timeout_seconds <= 1e9):
            raise InvalidArgument(
                "repeat_seconds, timeout_seconds: must be >= 0 and > 0, the latter at most 1e9, "
                f"got {repeat_seconds} and {timeout_seconds}"
            )
        self._url = url
        self._from_stage = from_stage
        self._repeat_seconds = repeat_seconds
        self._timeout_seconds = timeout_seconds
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._told: tuple[Stage, float] | None = None
        self._failed_count = self._dropped_count = 0
        self._start()

    def _start(self) -> None:
        waiting: queue.Queue[bytes] = queue.Queue(_WAITING_COUNT)
        thread = threading.Thread(
            target=self._post_all, args=(waiting,), name="moirai-alerts", daemon=True
        )
        thread.start()
        self._waiting = waiting
        self._process_id = os.getpid()

    @property
    def failed_count(self) -> int:
        """Posts that did not arrive; each is logged."""
        return self._failed_count

    @property
    def dropped_count(self) -> int:
        """Stages that were not posted because too many waited."""
        return self._dropped_count

    def __call__(self, stage: Stage, sample: Sample) -> None:
        """Tell of a stage if it is worth telling; returns at once.

        Raises:
            WrongType: An argument is of another kind.
            RuntimeError, MemoryError: A forked child cannot start its thread; the next call tries.
        """
        check_instance("stage", stage, Stage)
        check_instance("sample", sample, Sample)
        if self._process_id != os.getpid():
            self._start()
        if not self._is_news(stage, sample.time_seconds):
            return
        try:
            self._waiting.put_nowait(_body(stage, sample))
        except queue.Full:
            self._dropped_count += 1

    def _is_news(self, stage: Stage, now: float) -> bool:
        told = self._told
        if stage < self._from_stage:
            self._told = None
            return told is not None
        if told is not None and stage <= told[0] and now - told[1] < self._repeat_seconds:
            return False
        self._told = (stage, now)
        return True

    def _post_all(self, waiting: queue.Queue[bytes]) -> None:
        while True:
            body = waiting.get()
            try:
                request = urllib.request.Request(self._url, body, self._headers, method="POST")
                with urllib.request.urlopen(request, timeout=self._timeout_seconds):
                    pass
            except Exception as error:  # Also what a server answers that is no HTTP.
                self._failed_count += 1
                log.warning("no alert was posted: %s: %s", type(error).__name__, error)
            finally:
                waiting.task_done()

    def join(self) -> None:
        """Wait until everything was posted, or failed to be."""
        self._waiting.join()


def _is_address(url: object) -> bool:
    try:
        parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
        return parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # Half an IPv6 address.
        return False


def _body(stage: Stage, sample: Sample) -> bytes:
    told = {
        "stage": stage.name.lower(),
        "used_bytes": sample.used_bytes,
        "limit_bytes": sample.limit_bytes,
        "used_ratio": round(sample.used_ratio, 4),
        "bound": sample.bound,
        "resident_bytes": sample.resident_bytes,
        "process_id": os.getpid(),
        "host": socket.gethostname(),
        "unix_seconds": round(time.time(), 3),
    }
    return json.dumps(told).encode()
