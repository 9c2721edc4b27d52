"""The summary of one `moirai run`: what the program used, what Moirai served, what to change.

Plain text without rich: it is written inside the user's process at its very end, where importing
anything large would be felt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from moirai.reports.quantities import bytes_text, count_text, seconds_text, share_text

__all__ = ["SCHEMA", "ServedArrays", "Summary", "advice", "to_json", "to_text"]

SCHEMA = "moirai.summary/1"
_MIB = 1 << 20
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class ServedArrays:
    """What the installed resource did, all reporting processes together.

    `hits + misses == total_count`; `peak_bytes` is the largest of one process; `cached_bytes` is
    what the main process held free at its end.
    """

    total_bytes: int
    total_count: int
    hits: int
    misses: int
    reused_bytes: int
    reused_pages: int
    decommitted_bytes: int
    invalid_frees: int
    peak_bytes: int
    cached_bytes: int


@dataclass(frozen=True)
class Guarded:
    """What the guard of the main process saw and did.

    `actions` holds (name, how often, bytes it said it freed); `highest_stage` is one of calm,
    monitor, gentle, aggressive, emergency; `used_bytes` is what was used of the limit at last;
    `alarms` is (raised, true, false) of its forecaster, None if that was not called for;
    `ledger_error` says why its fence did not know of other processes, None if it could.
    """

    limit_bytes: int | None
    bound: str | None
    used_bytes: int
    highest_stage: str
    action_count: int
    freed_bytes: int
    actions: tuple[tuple[str, int, int], ...]
    alarms: tuple[int, int, int] | None = None
    median_lead_seconds: float | None = None
    ledger_error: str | None = None


@dataclass(frozen=True)
class Summary:
    """One finished run. CPU and faults include the children that were waited for.

    `peak_rss_bytes` and `end_rss_bytes` are the main process's; `child_peak_rss_bytes` is the
    largest peak among the children that reported, 0 if none did. `largest` holds (bytes, call
    site or None) of the main process, largest first. `served` is None if nothing was installed.
    `replaced_by` names the class of the resource that the main process itself installed instead,
    "numpy" if it uninstalled what was there; what that served is not counted.
    """

    program: tuple[str, ...]
    memory: str
    allocator: str
    huge_pages: str
    cache_cap_bytes: int | None
    limit_bytes: int | None
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_bytes: int
    end_rss_bytes: int
    child_peak_rss_bytes: int
    minor_faults: int
    major_faults: int
    process_count: int
    unreported_count: int
    has_numpy: bool
    install_problem: str | None
    replaced_by: str | None
    served: ServedArrays | None
    largest: tuple[tuple[int, str | None], ...]
    thp_mode: str | None
    guarded: Guarded | None = None


def to_json(summary: Summary) -> str:
    """Write the summary as one JSON object of the schema `SCHEMA`, on one line."""
    content = asdict(summary)
    content["largest"] = [{"size_bytes": size, "site": site} for size, site in summary.largest]
    return json.dumps({"schema": SCHEMA, **content, "advice": advice(summary)})


def to_text(summary: Summary) -> str:
    """Write the summary for a terminal: one line a fact, then the advice."""
    rows = [*_process_rows(summary), *_guard_rows(summary), *_array_rows(summary)]
    width = max(len(name) for name, _ in rows)
    lines = [f"moirai run: {_setup_text(summary)}"]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += [f"  * {sentence}" for sentence in advice(summary)]
    return "\n".join(lines)


def advice(summary: Summary) -> list[str]:
    """Return what the measured numbers suggest, the most important first; may be empty."""
    return [sentence for rule in RULES if (sentence := rule(summary)) is not None]


def _setup_text(summary: Summary) -> str:
    parts = [f"memory {summary.memory}"]
    if summary.served is not None and summary.memory != "system":
        parts.append(f"huge pages {summary.huge_pages}")
    if summary.cache_cap_bytes is not None:
        parts.append(f"cache cap {bytes_text(summary.cache_cap_bytes)}")
    if summary.limit_bytes is not None:
        parts.append(f"limit {bytes_text(summary.limit_bytes)}")
    if summary.allocator != "auto":
        parts.append(f"malloc {summary.allocator}")
    return ", ".join(parts)


def _guard_rows(summary: Summary) -> list[tuple[str, str]]:
    guarded = summary.guarded
    if guarded is None:
        return []
    limit = "no limit" if guarded.limit_bytes is None else bytes_text(guarded.limit_bytes)
    rows = [
        (
            "guard",
            f"{bytes_text(guarded.used_bytes)} of {limit} ({guarded.bound}) used at the end; "
            f"highest stage {guarded.highest_stage}",
        )
    ]
    if guarded.actions:
        parts = [
            f"{name} {count_text(count)}x, {bytes_text(freed)}"
            for name, count, freed in guarded.actions
        ]
        rows.append(("freed", "; ".join(parts)))
    if guarded.alarms is not None:
        raised, right, wrong = guarded.alarms
        text = f"alarms {count_text(raised)}: {right} true, {wrong} false"
        if guarded.median_lead_seconds is not None:
            text += f"; median lead {seconds_text(guarded.median_lead_seconds)}"
        rows.append(("forecast", text))
    if guarded.ledger_error is not None:
        text = f"other processes unknown: the ledger cannot be opened ({guarded.ledger_error})"
        rows.append(("fence", text))
    return rows


def _process_rows(summary: Summary) -> list[tuple[str, str]]:
    cpu_seconds = summary.user_seconds + summary.system_seconds
    peak = bytes_text(summary.peak_rss_bytes)
    if summary.child_peak_rss_bytes:
        peak += f"; largest child {bytes_text(summary.child_peak_rss_bytes)}"
    rows = [
        ("wall", seconds_text(summary.wall_seconds)),
        (
            "CPU",
            f"{seconds_text(cpu_seconds)} (user {seconds_text(summary.user_seconds)}, "
            f"system {seconds_text(summary.system_seconds)})",
        ),
        ("peak RSS", peak),
        ("end RSS", bytes_text(summary.end_rss_bytes)),
        (
            "page faults",
            f"{count_text(summary.minor_faults)} minor, {count_text(summary.major_faults)} major",
        ),
    ]
    if summary.process_count > 1:
        unreported = summary.unreported_count
        note = f" ({count_text(unreported)} ended without a report)" if unreported else ""
        rows.append(("processes", count_text(summary.process_count) + note))
    return rows


def _array_rows(summary: Summary) -> list[tuple[str, str]]:
    served = summary.served
    if served is None:
        return []
    rows = [
        (
            "arrays",
            f"{count_text(served.total_count)} served, {bytes_text(served.total_bytes)} in all, "
            f"{bytes_text(served.peak_bytes)} at once at most",
        ),
        (
            "reused",
            f"{share_text(served.hits, served.total_count)} of them from memory that was already "
            f"there ({bytes_text(served.reused_bytes)} of pages)",
        ),
        (
            "faults avoided",
            f"at most {count_text(served.reused_pages)}: pages handed out again while in memory",
        ),
        (
            "given back",
            f"{bytes_text(served.decommitted_bytes)} during the run; "
            f"{bytes_text(served.cached_bytes)} still cached at the end",
        ),
    ]
    for index, (size_bytes, site) in enumerate(summary.largest):
        name = "largest arrays" if index == 0 else ""
        rows.append((name, f"{bytes_text(size_bytes):>9}  {site or '(site unknown)'}"))
    return rows


# Advice: one rule, one function; the sentence carries the numbers that led to it.


def _install_failed(summary: Summary) -> str | None:
    if summary.install_problem is None:
        return None
    return f"NumPy kept its own memory: {summary.install_problem}"


def _replaced(summary: Summary) -> str | None:
    if summary.replaced_by is None:
        return None
    done = (
        "uninstalled Moirai's memory"
        if summary.replaced_by == "numpy"
        else f"installed a resource of its own ({summary.replaced_by})"
    )
    return f"The program {done}: arrays made from then on are not counted above."


def _no_numpy(summary: Summary) -> str | None:
    if summary.has_numpy or summary.memory == "none" or summary.served is not None:
        return None
    if summary.unreported_count:
        return None
    return (
        "The program did not import NumPy, so Moirai's memory served nothing. If it allocates "
        "much, `--allocator mimalloc` or tuned reaches all of its malloc."
    )


def _little_asked(summary: Summary) -> str | None:
    """Below 64 MiB in all, no allocation policy can matter."""
    served = summary.served
    if served is None or served.total_bytes >= 64 * _MIB:
        return None
    if summary.unreported_count or summary.replaced_by is not None:
        return None
    return (
        f"NumPy asked for {bytes_text(served.total_bytes)} in the whole run (less than 64 MiB): "
        "Moirai has little to do here."
    )


def _little_reused(summary: Summary) -> str | None:
    """Reuse below half of the bytes, while freed memory was given back: the cap is too low."""
    served = summary.served
    if served is None or served.total_bytes < 256 * _MIB:
        return None
    if served.reused_bytes >= served.total_bytes / 2:
        return None
    if served.decommitted_bytes < served.total_bytes / 4:
        return None
    cap_bytes = max(256 * _MIB, 2 * (summary.cache_cap_bytes or 0))
    return (
        f"Only {share_text(served.reused_bytes, served.total_bytes)} of the bytes were reused, and "
        f"{bytes_text(served.decommitted_bytes)} went back to the kernel in between: try "
        f"`--cache-cap {cap_bytes // _MIB}MiB`, at the price of a higher RSS."
    )


def _faults_elsewhere(summary: Summary) -> str | None:
    """Faults of more than 1 GiB, four fifths reused: they are not the arrays'."""
    served = summary.served
    if served is None or served.total_bytes < 64 * _MIB or summary.replaced_by is not None:
        return None
    if summary.minor_faults * _PAGE_BYTES < 1024 * _MIB:
        return None
    if served.reused_bytes < 0.8 * served.total_bytes:
        return None
    # Pages are reused whole, and a block may leave a part of its last one unused.
    reused_bytes = min(served.reused_bytes, served.total_bytes)
    return (
        f"{share_text(reused_bytes, served.total_bytes)} of the array bytes were reused, "
        f"yet {count_text(summary.minor_faults)} faults are left: they come from memory that NumPy "
        "does not allocate (buffers of BLAS, SciPy or pandas, Python objects). "
        "`--memory pool --allocator tuned` reaches those too."
    )


def _faults_without_memory(summary: Summary) -> str | None:
    """NumPy left alone, more than 1 GiB faulted in: worth a try."""
    if summary.memory != "none" or not summary.has_numpy:
        return None
    if summary.minor_faults * _PAGE_BYTES < 1024 * _MIB:
        return None
    return (
        f"{count_text(summary.minor_faults)} page faults and "
        f"{seconds_text(summary.system_seconds)} in the kernel: try `--memory pool`."
    )


def _no_huge_pages(summary: Summary) -> str | None:
    """Huge pages asked for or automatic, arrays of 2 MiB and more, and a host that has none."""
    largest_bytes = max((size for size, _ in summary.largest), default=0)
    if summary.served is None or summary.memory == "system" or summary.huge_pages == "never":
        return None
    if largest_bytes < 2 * _MIB or summary.thp_mode not in (None, "never"):
        return None
    mode = "are switched off (`never`)" if summary.thp_mode else "are not in the kernel"
    return (
        f"Transparent huge pages {mode} on this host, so each new page of the largest array "
        f"({bytes_text(largest_bytes)}) cost a fault of its own; `madvise` would let Moirai use "
        "them."
    )


def _much_cached(summary: Summary) -> str | None:
    """More than 64 MiB and a quarter of the RSS at the end is cached free memory."""
    served = summary.served
    if served is None or served.cached_bytes < max(64 * _MIB, summary.end_rss_bytes / 4):
        return None
    return (
        f"{bytes_text(served.cached_bytes)} of the {bytes_text(summary.end_rss_bytes)} resident at "
        "the end were freed arrays kept ready: a lower `--cache-cap` gives them back sooner."
    )


def _near_limit(summary: Summary) -> str | None:
    """The peak came within a tenth of the limit."""
    served = summary.served
    if served is None or summary.limit_bytes is None:
        return None
    if served.peak_bytes < 0.9 * summary.limit_bytes:
        return None
    return (
        f"Arrays took {bytes_text(served.peak_bytes)} of the limit of "
        f"{bytes_text(summary.limit_bytes)}: there was little room left."
    )


def _unreported_children(summary: Summary) -> str | None:
    if not summary.unreported_count:
        return None
    return (
        f"{count_text(summary.unreported_count)} of {count_text(summary.process_count - 1)} child "
        "processes were terminated, left by os._exit or still run (`with multiprocessing.Pool` "
        "terminates its workers; close() and join() do not): their arrays are not counted."
    )


def _invalid_frees(summary: Summary) -> str | None:
    if summary.served is None or not summary.served.invalid_frees:
        return None
    return (
        f"{count_text(summary.served.invalid_frees)} blocks were freed that Moirai had not handed "
        "out: please report this, with the program if you can."
    )


RULES: tuple[Callable[[Summary], str | None], ...] = (
    _install_failed,
    _replaced,
    _invalid_frees,
    _no_numpy,
    _little_asked,
    _near_limit,
    _little_reused,
    _faults_elsewhere,
    _faults_without_memory,
    _no_huge_pages,
    _much_cached,
    _unreported_children,
)
