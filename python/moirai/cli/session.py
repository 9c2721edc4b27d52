"""The Moirai side of a running program: installs the memory, measures, and writes the summary.

Called by `_startup/moirai_hook.py` inside the user's process, at the first import of NumPy and at
exit; what is heavy is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time

from moirai.errors import MoiraiError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from moirai import memory, pressure
    from moirai.reports.summary import Guarded, ServedArrays, Summary

__all__ = ["build_resource", "guard", "install", "record", "start_time", "summarise", "totals"]

# Only these grow; a forked child starts with its parent's and subtracts them.
_TOTALS = (
    "total_bytes",
    "total_count",
    "hits",
    "misses",
    "reused_bytes",
    "reused_pages",
    "decommitted_bytes",
    "invalid_frees",
)

_installed: memory.Resource | None = None
_install_problem: str | None = None
_guard: pressure.Guard | None = None


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot, or "" if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def install(settings_text: str) -> None:
    """Install the memory that the settings ask for.

    Args:
        settings_text: As `moirai run` wrote them.

    Raises:
        MoiraiError, ImportError: It cannot be; also kept for the summary.
    """
    global _installed, _install_problem
    settings = json.loads(settings_text)
    if settings["memory"] == "none":
        return
    try:
        from moirai import memory
        from moirai.memory.arrays import install_for_program

        _installed = install_for_program(build_resource(settings))
        if settings["allocator"] == "auto" and not _has_tuned_malloc(os.environ):
            memory.keep_libc_heap()
    except (MoiraiError, ImportError) as error:
        _install_problem = str(error)
        raise


def guard(settings_text: str) -> None:
    """Start to guard the limit, as the settings say."""
    from moirai import pressure

    global _guard
    settings = json.loads(settings_text)
    # A child that was spawned has the fence of its parent as it stood then.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (settings["soft_data_limit"], hard))
    _guard = pressure.start(
        limit=settings["guard_limit_bytes"],
        main_process_id=settings["main_process_id"],
        fence=True,
    )


def _guarded() -> Guarded | None:
    """What this process's guard saw and did, or None if there is none."""
    if _guard is None:
        return None
    from moirai.reports.summary import Guarded

    status = _guard.status()
    taken: dict[str, list[int]] = {}
    for record in _guard.records():
        taken.setdefault(record.name, []).append(record.freed_bytes or 0)
    sample = status.sample or _guard.source.read()  # A short program ends before it decides.
    forecaster: Any = _guard.forecaster
    score = None if forecaster is None else forecaster.score()
    return Guarded(
        limit_bytes=None if sample is None else sample.limit_bytes,
        bound=None if sample is None else sample.bound,
        used_bytes=0 if sample is None else sample.used_bytes,
        highest_stage=status.highest_stage.name.lower(),
        action_count=status.action_count,
        freed_bytes=status.freed_bytes,
        actions=tuple((name, len(freed), sum(freed)) for name, freed in taken.items()),
        alarms=None
        if score is None
        else (score.alarm_count, score.true_alarm_count, score.false_alarm_count),
        median_lead_seconds=None if score is None else score.median_lead_seconds,
        ledger_error=status.ledger_error,
    )


def _has_tuned_malloc(environment: Mapping[str, str]) -> bool:
    """Whether the user has set glibc's malloc as they want it, or put another in its place."""
    return (
        "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
        or "LD_PRELOAD" in environment
        or any(name.startswith("MALLOC_") and name.endswith("_") for name in environment)
    )


def build_resource(settings: Mapping[str, Any]) -> memory.Resource:
    """Build the resource that `--memory`, `--limit`, `--cache-cap` and `--huge-pages` describe."""
    from moirai import memory

    caching = {
        "huge_pages": settings["huge_pages"],
        "cache_cap_bytes": settings["cache_cap_bytes"],
    }
    built: memory.Resource
    match settings["memory"]:
        case "pool":
            built = memory.PoolResource(**caching)
        case "large":
            built = memory.LargeObjectResource(**caching)
        case "slab":
            built = memory.SlabResource(memory.LargeObjectResource(**caching))
        case _:
            built = memory.SystemResource()
    if settings["limit_bytes"] is not None:
        built = memory.LimitAdaptor(built, limit_bytes=settings["limit_bytes"])
    return built


def totals() -> dict[str, int]:
    """Return the counters that only grow, as they stand in this process."""
    return {name: value for name, value in _statistics().items() if name in _TOTALS}


def record(
    directory: str, identity: str, baseline: Mapping[str, int], used: Mapping[str, int]
) -> None:
    """Write what this child used, in one step, for the main process to fold in."""
    content = {
        "statistics": _statistics_since(baseline),
        "peak_rss_bytes": used["VmHWM"],
        "problem": _install_problem,
    }
    path = os.path.join(directory, identity)
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.rename(path + ".partial", path + ".json")


def summarise(settings_text: str, directory: str, used: Mapping[str, int]) -> None:
    """Write the summary of the whole run and remove the children's records.

    Args:
        settings_text: As `moirai run` wrote them.
        directory: Where the children left their records.
        used: VmRSS and VmHWM in bytes, taken when the program's own code was done.
    """
    settings = json.loads(settings_text)
    ended_seconds = time.monotonic()
    records, started_count = _take_records(directory)
    if not _has_run():
        return
    from moirai.reports import summary as report

    measured = _measured(settings, used, ended_seconds, records, started_count)
    as_text = report.to_json if settings["summary"] == "json" else report.to_text
    _write(as_text(measured), settings["summary_file"])


def _has_run() -> bool:
    """Whether there was a program: of a script that cannot be opened nothing is to be said."""
    main = sys.modules.get("__main__")
    script = sys.argv[0] if sys.argv else ""
    is_script = script not in ("", "-", "-c", "-m")
    return not is_script or hasattr(main, "__file__") or os.path.exists(script)


def _statistics() -> dict[str, int]:
    return _installed.statistics().as_dict() if _installed is not None else {}


def _statistics_since(baseline: Mapping[str, int]) -> dict[str, int]:
    return {name: value - baseline.get(name, 0) for name, value in _statistics().items()}


def _take_records(directory: str) -> tuple[list[dict[str, Any]], int]:
    """Read the records of the children that ended, count those that started, remove all."""
    records = []
    identities = set()
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return [], 0
    for name in names:
        path = os.path.join(directory, name)
        identities.add(name.rpartition(".")[0])
        try:
            if name.endswith(".json"):
                with open(path, encoding="utf-8") as file:
                    records.append(json.load(file))
            os.unlink(path)
        except (OSError, ValueError):
            continue
    with contextlib.suppress(OSError):
        os.rmdir(directory)
    return records, len(identities)


def _measured(
    settings: Mapping[str, Any],
    used: Mapping[str, int],
    ended_seconds: float,
    records: list[dict[str, Any]],
    started_count: int,
) -> Summary:
    from moirai.cli.program import interpreter_options
    from moirai.reports.summary import Summary

    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Summary(
        program=tuple(interpreter_options(sys.orig_argv)[1]),
        memory=settings["memory"],
        allocator=settings["allocator"],
        huge_pages=settings["huge_pages"],
        cache_cap_bytes=settings["cache_cap_bytes"],
        limit_bytes=settings["limit_bytes"],
        wall_seconds=ended_seconds - settings["started_seconds"],
        user_seconds=own.ru_utime - settings["launcher_user_seconds"] + children.ru_utime,
        system_seconds=own.ru_stime - settings["launcher_system_seconds"] + children.ru_stime,
        peak_rss_bytes=used["VmHWM"],
        end_rss_bytes=used["VmRSS"],
        child_peak_rss_bytes=max((record["peak_rss_bytes"] for record in records), default=0),
        minor_faults=own.ru_minflt - settings["launcher_minor_faults"] + children.ru_minflt,
        major_faults=own.ru_majflt - settings["launcher_major_faults"] + children.ru_majflt,
        process_count=1 + started_count,
        unreported_count=started_count - len(records),
        has_numpy="numpy" in sys.modules,
        install_problem=_install_problem,
        replaced_by=_replaced_by(),
        served=_served([_statistics(), *(record["statistics"] for record in records)]),
        largest=_largest_arrays(),
        thp_mode=_thp_mode(),
        guarded=_guarded(),
    )


def _served(statistics: Iterable[Mapping[str, int]]) -> ServedArrays | None:
    """Fold the statistics of all processes: totals add up, peaks are the largest of one process."""
    from moirai.reports.summary import ServedArrays

    known = [each for each in statistics if each]
    if not known:
        return None
    total = {name: sum(each[name] for each in known) for name in _TOTALS}
    return ServedArrays(
        **total,
        peak_bytes=max(each["peak_bytes"] for each in known),
        cached_bytes=_statistics().get("cached_bytes", 0),
    )


def _replaced_by() -> str | None:
    """Name what stands in the place of the memory that was installed, if the program changed it."""
    if _installed is None:
        return None
    from moirai import memory

    now = memory.installed()
    if now is _installed:
        return None
    return "numpy" if now is None else type(now).__name__


def _largest_arrays() -> tuple[tuple[int, str | None], ...]:
    if _installed is None:
        return ()
    from moirai import memory

    return tuple((array.size_bytes, array.site) for array in memory.largest_arrays())


def _thp_mode() -> str | None:
    """Return the selected mode of transparent huge pages, or None if the kernel has none."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return file.read().partition("[")[2].partition("]")[0] or None
    except OSError:
        return None


def _write(text: str, path: str | None) -> None:
    """Write to the file, or past whatever the program made of `sys.stderr` to standard error."""
    content = (text + "\n").encode(errors="backslashreplace")
    if path is not None:
        with open(path, "wb") as file:
            file.write(content)
        return
    stream = sys.__stderr__
    if stream is None or stream.closed:
        return
    stream.flush()
    while content:
        content = content[os.write(stream.fileno(), content) :]
