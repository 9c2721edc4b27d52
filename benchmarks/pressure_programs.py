"""Programs whose use of memory `bench_pressure.py` records itself, to score the forecaster on.

`python pressure_programs.py PROGRAM SEED SECONDS` is one of them. Each does in seconds what one of
its kind does in minutes, as in the recordings that the forecaster learnt from: one second stands
for ten. They know their limit as little as real ones do; who exceeds it is killed, and its
recording ends.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness

MIB = 1 << 20
LIMIT_BYTES = 192 * MIB
INTERVAL_SECONDS = 0.1
PAGE_BYTES = 4096
AT_ONCE = 10


class Run:
    """Chance and time of one run."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.random = random.Random(seed)
        self.seconds = seconds

    def ticks(self, per_second: float) -> Iterator[float]:
        """Beat so often until the end; gives the share of the time that is over."""
        start = time.monotonic()
        number = 0
        while (share := (time.monotonic() - start) / self.seconds) < 1:
            yield share
            number += 1
            time.sleep(max(0.0, start + number / per_second - time.monotonic()))

    def block(self, size: float) -> bytearray:
        """Memory that is touched."""
        return bytearray(b"x") * int(size)


def leaking_service(run: Run) -> None:
    """Requests with working memory of their own, of which a little stays."""
    leaked = []
    rate = run.random.uniform(2.5, 5) * MIB
    for _ in run.ticks(20):
        working = run.block(run.random.expovariate(1 / MIB))
        leaked.append(run.block(run.random.uniform(0, 2) * rate / 20))
        del working


def bounded_cache(run: Run) -> None:
    """The least recently used goes once the cache is full."""
    cache: OrderedDict[int, bytearray] = OrderedDict()
    size, places = MIB // 4, run.random.randrange(380, 560)
    for _ in run.ticks(60):
        key = int(run.random.paretovariate(0.35))
        if key in cache:
            cache.move_to_end(key)
            continue
        cache[key] = run.block(size)
        if len(cache) > places:
            cache.popitem(last=False)


def unbounded_cache(run: Run) -> None:
    """Nothing ever goes; new keys become rarer."""
    cache: dict[int, bytearray] = {}
    exponent = run.random.uniform(0.3, 0.45)
    for _ in run.ticks(60):
        key = int(run.random.paretovariate(exponent))
        if key not in cache:
            cache[key] = run.block(MIB // 3)


def batches(run: Run) -> None:
    """A batch is read piece by piece, worked on, and let go of; each about as large as the last."""
    usual = run.random.uniform(70, 110)
    _batches(run, lambda share: usual * run.random.uniform(0.85, 1.15))


def growing_batches(run: Run) -> None:
    """The same, each larger."""
    first, growth = run.random.uniform(30, 60), run.random.uniform(100, 170)
    _batches(run, lambda share: first + growth * share)


def _batches(run: Run, size_mib: Callable[[float], float]) -> None:
    pieces: list[bytearray] = []
    wanted, pause = 0.0, 0
    for share in run.ticks(20):
        if pause:
            pause -= 1
        elif not pieces:
            wanted = size_mib(share)
            pieces.append(run.block(MIB))
        elif len(pieces) * 1.5 < wanted:
            pieces.append(run.block(1.5 * MIB))
        else:
            pieces.clear()
            pause = run.random.randrange(5, 25)


def backlog(run: Run) -> None:
    """A queue that is worked off as fast as it fills, until its consumer slows down."""
    waiting: deque[bytearray] = deque()
    slow_from, speed = run.random.uniform(0.3, 0.6), run.random.uniform(0.1, 0.5)
    credit = 0.0
    for share in run.ticks(40):
        for _ in range(run.random.choice((0, 1, 1, 2))):
            waiting.append(run.block(MIB // 3))
        credit += 1.05 if share < slow_from else speed
        while credit >= 1 and waiting:
            waiting.popleft()
            credit -= 1
        credit = min(credit, 2.0)


def sessions(run: Run) -> None:
    """Users come and go, in waves."""
    ends: list[tuple[float, bytearray]] = []
    level, wave = run.random.uniform(5, 8), run.random.uniform(1.5, 4)
    for share in run.ticks(20):
        up = 1 + 0.5 * triangle(wave * share)
        for _ in range(int(run.random.expovariate(1 / (level * up)) / 10 + run.random.random())):
            ends.append((share + run.random.expovariate(8), run.block(1.5 * MIB)))
        ends[:] = [each for each in ends if each[0] > share]


def triangle(turns: float) -> float:
    """A triangle between -1 and 1."""
    return 4 * abs(turns % 1 - 0.5) - 1


def load_then_serve(run: Run) -> None:
    """Data is loaded in steps, then served with small working memory."""
    data: list[bytearray] = []
    total, until = run.random.uniform(90, 150), run.random.uniform(0.15, 0.4)
    for share in run.ticks(20):
        while share < until and len(data) * 4 < total * share / until:
            data.append(run.block(4 * MIB))
        working = run.block(run.random.uniform(0, 3) * MIB)
        del working


def releases(run: Run) -> None:
    """A slow leak that a restart of the part that leaks gives back now and then."""
    kept: list[bytearray] = []
    most = run.random.uniform(80, 130)
    for _ in run.ticks(20):
        kept.append(run.block(run.random.uniform(0.1, 0.7) * MIB))
        if sum(map(len, kept)) > most * MIB:
            del kept[: int(len(kept) * run.random.uniform(0.5, 0.95))]


def late_leak(run: Run) -> None:
    """Steady for a while, then something holds on to everything."""
    kept: list[bytearray] = [run.block(run.random.uniform(30, 70) * MIB)]
    start, rate = run.random.uniform(0.3, 0.6), run.random.uniform(5, 12) * MIB
    for share in run.ticks(20):
        working = run.block(run.random.uniform(0, 4) * MIB)
        if share > start:
            kept.append(run.block(rate / 20))
        del working


PROGRAMS = {
    program.__name__: program
    for program in (
        leaking_service,
        bounded_cache,
        unbounded_cache,
        batches,
        growing_batches,
        backlog,
        sessions,
        load_then_serve,
        releases,
        late_leak,
    )
}


# --- the recorder -------------------------------------------------------------------------------


def record(folder: Path, *, programs: Sequence[str], seeds: int, seconds: float) -> None:
    """Run the programs, some at once, and write a recording of each to a folder."""
    jobs = [(program, seed) for seed in range(seeds) for program in programs]
    for first in range(0, len(jobs), AT_ONCE):
        harness.progress(f"recording {first + 1} to {min(first + AT_ONCE, len(jobs))}")
        _record_some(folder, jobs[first : first + AT_ONCE], seconds)


def _record_some(folder: Path, jobs: Sequence[tuple[str, int]], seconds: float) -> None:
    running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], list[str]]] = {}
    for program, seed in jobs:
        command = [sys.executable, __file__, program, str(seed), str(seconds)]
        running[program, seed] = (subprocess.Popen(command), [])
    ended: dict[tuple[str, int], str] = {}
    try:
        start = planned = time.monotonic()
        while len(ended) < len(running):
            now = time.monotonic() - start
            for job, (process, lines) in running.items():
                if job not in ended and not _look(process, now if lines else 0.0, lines):
                    ended[job] = "oom" if process.wait() else "ok"
            planned += INTERVAL_SECONDS
            time.sleep(max(0.0, planned - time.monotonic()))
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
    for (program, seed), (_, lines) in running.items():
        path = folder / f"fresh-{ended[program, seed]}-{program}-s{seed}.csv"
        text = "\n".join(["t_seconds,rss_bytes,limit_bytes", *lines])
        path.write_text(text + "\n", encoding="ascii")


def _look(process: subprocess.Popen[bytes], now: float, lines: list[str]) -> bool:
    """Note what a process has; False once it has ended, or was killed for exceeding the limit."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    if pages == 0:  # It has ended, and nobody waited for it yet.
        return False
    lines.append(f"{now:.3f},{pages * PAGE_BYTES},{LIMIT_BYTES}")
    if pages * PAGE_BYTES > LIMIT_BYTES:
        process.kill()
        return False
    return True


def main() -> None:
    name, seed, seconds = sys.argv[1:]
    run: Any = Run(int(seed), float(seconds))
    PROGRAMS[name](run)


if __name__ == "__main__":
    main()
