"""Reports turn numbers into strings: quantities, the summary's advice, the comparison's choice."""

import json
from dataclasses import replace

import pytest

from moirai.reports import comparison, summary
from moirai.reports.quantities import bytes_text, count_text, seconds_text, share_text

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (150 * 1024, "150 KiB"),
        (MIB - 1, "1.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_sizes_use_the_largest_unit_that_fits(size_bytes: int, text: str) -> None:
    assert bytes_text(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0854, "85 ms"), (0.9999, "1.00 s"), (2.414, "2.41 s"), (312.3, "312 s")],
)
def test_durations_keep_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_counts_and_shares() -> None:
    assert count_text(1234567) == "1 234 567"
    assert [share_text(*pair) for pair in ((0, 0), (0, 5), (5, 5), (1, 1000), (999, 1000))] == [
        "-",
        "0 %",
        "100 %",
        "< 1 %",
        "> 99 %",
    ]


# The summary.

SERVED = summary.ServedArrays(
    total_bytes=1000 * MIB,
    total_count=100,
    hits=90,
    misses=10,
    reused_bytes=900 * MIB,
    reused_pages=230_400,
    decommitted_bytes=0,
    invalid_frees=0,
    peak_bytes=100 * MIB,
    cached_bytes=0,
)
SUMMARY = summary.Summary(
    program=("app.py",),
    memory="pool",
    allocator="auto",
    huge_pages="auto",
    cache_cap_bytes=None,
    limit_bytes=None,
    wall_seconds=2.5,
    user_seconds=2.0,
    system_seconds=0.25,
    peak_rss_bytes=200 * MIB,
    end_rss_bytes=150 * MIB,
    child_peak_rss_bytes=0,
    minor_faults=5000,
    major_faults=1,
    process_count=1,
    unreported_count=0,
    has_numpy=True,
    install_problem=None,
    replaced_by=None,
    served=SERVED,
    largest=((64 * MIB, "app.py:12"), (8 * MIB, None)),
    thp_mode="madvise",
)


def test_summary_says_that_the_fence_stood_alone() -> None:
    guarded = summary.Guarded(
        limit_bytes=1 << 30,
        bound="budget",
        used_bytes=MIB,
        highest_stage="calm",
        action_count=0,
        freed_bytes=0,
        actions=(),
    )
    assert "fence" not in summary.to_text(replace(SUMMARY, guarded=guarded))
    alone = replace(guarded, ledger_error="Permission denied")
    text = summary.to_text(replace(SUMMARY, guarded=alone))
    assert "the ledger cannot be opened (Permission denied)" in text
    assert '"ledger_error": "Permission denied"' in summary.to_json(replace(SUMMARY, guarded=alone))


def test_summary_names_every_number() -> None:
    assert summary.to_text(SUMMARY).splitlines() == [
        "moirai run: memory pool, huge pages auto",
        "  wall            2.50 s",
        "  CPU             2.25 s (user 2.00 s, system 250 ms)",
        "  peak RSS        200 MiB",
        "  end RSS         150 MiB",
        "  page faults     5 000 minor, 1 major",
        "  arrays          100 served, 1000 MiB in all, 100 MiB at once at most",
        "  reused          90 % of them from memory that was already there (900 MiB of pages)",
        "  faults avoided  at most 230 400: pages handed out again while in memory",
        "  given back      0 B during the run; 0 B still cached at the end",
        "  largest arrays   64.0 MiB  app.py:12",
        "                    8.0 MiB  (site unknown)",
    ]


def test_summary_without_arrays_is_about_the_process_only() -> None:
    text = summary.to_text(replace(SUMMARY, memory="none", served=None, largest=()))
    assert "arrays" not in text
    assert text.startswith("moirai run: memory none\n")


def test_summary_as_json_holds_every_field() -> None:
    content = json.loads(summary.to_json(SUMMARY))
    assert content["schema"] == "moirai.summary/1"
    assert content["served"]["hits"] == 90
    assert content["largest"][0] == {"size_bytes": 64 * MIB, "site": "app.py:12"}
    assert content["advice"] == []


def test_processes_and_the_largest_child_are_named() -> None:
    text = summary.to_text(
        replace(SUMMARY, process_count=5, unreported_count=2, child_peak_rss_bytes=7 * MIB)
    )
    assert "200 MiB; largest child 7.0 MiB" in text
    assert "processes       5 (2 ended without a report)" in text
    assert "2 of 4 child processes" in text


ADVICE = {
    "install failed": (replace(SUMMARY, install_problem="too old"), "kept its own memory: too old"),
    "no NumPy": (replace(SUMMARY, served=None, has_numpy=False), "did not import NumPy"),
    "little asked": (
        replace(SUMMARY, served=replace(SERVED, total_bytes=63 * MIB, reused_bytes=0)),
        "63.0 MiB in the whole run",
    ),
    "near the limit": (replace(SUMMARY, limit_bytes=110 * MIB), "100 MiB of the limit of 110 MiB"),
    "cap too low": (
        replace(
            SUMMARY,
            cache_cap_bytes=300 * MIB,
            served=replace(SERVED, reused_bytes=400 * MIB, decommitted_bytes=500 * MIB),
        ),
        "Only 40 % .* 500 MiB went back .*--cache-cap 600MiB",
    ),
    "faults elsewhere": (replace(SUMMARY, minor_faults=300_000), "90 % .* 300 000 faults are left"),
    "whole pages reused": (
        replace(SUMMARY, minor_faults=300_000, served=replace(SERVED, reused_bytes=1060 * MIB)),
        "^100 % of the array bytes .* 300 000 faults are left",
    ),
    "faults without memory": (
        replace(SUMMARY, memory="none", served=None, minor_faults=300_000),
        "try `--memory pool`",
    ),
    "no huge pages": (replace(SUMMARY, thp_mode="never"), r"switched off .*64\.0 MiB"),
    "much cached": (
        replace(SUMMARY, served=replace(SERVED, cached_bytes=80 * MIB)),
        "80.0 MiB of the 150 MiB resident",
    ),
    "nothing is said of arrays that were not counted": (
        replace(SUMMARY, served=None, has_numpy=False, process_count=2, unreported_count=1),
        "1 of 1 child processes",
    ),
    "nor of their sum": (
        replace(
            SUMMARY,
            served=replace(SERVED, total_bytes=MIB, reused_bytes=0),
            process_count=2,
            unreported_count=1,
        ),
        "1 of 1 child processes",
    ),
    "resource of the program": (
        replace(
            SUMMARY,
            minor_faults=300_000,
            replaced_by="SlabResource",
            served=replace(SERVED, total_bytes=MIB, reused_bytes=0),
        ),
        r"installed a resource of its own \(SlabResource\): .* not counted",
    ),
    "memory uninstalled": (
        replace(SUMMARY, minor_faults=300_000, replaced_by="numpy"),
        "uninstalled Moirai's memory: .* not counted",
    ),
    "invalid frees": (replace(SUMMARY, served=replace(SERVED, invalid_frees=3)), "3 blocks"),
}


@pytest.mark.parametrize(("measured", "pattern"), ADVICE.values(), ids=ADVICE.keys())
def test_advice_is_drawn_from_the_numbers(measured: summary.Summary, pattern: str) -> None:
    (sentence,) = summary.advice(measured)
    with pytest.raises(LookupError, match=pattern):
        raise LookupError(sentence)


# The comparison.


def configuration(
    name: str, cpu_seconds: list[float], *, peak_mib: int = 100
) -> comparison.Configuration:
    return comparison.Configuration(
        name,
        f"run {name}",
        tuple(
            comparison.Run(index, seconds * 1.1, seconds, peak_mib * MIB, 50 * MIB, 1000, 0)
            for index, seconds in enumerate(cpu_seconds)
        ),
    )


def compared(*configurations: comparison.Configuration) -> comparison.Comparison:
    return comparison.Comparison("app.py", 3, True, configurations)


PLAIN = configuration("plain", [1.0, 2.0, 1.0])


def test_ratios_pair_runs_of_the_same_round() -> None:
    fast = configuration("fast", [0.5, 1.0, 0.6])
    assert comparison.ratios(compared(PLAIN, fast), fast) == [0.5, 0.5, 0.6]


def test_lowest_cpu_ratio_is_best() -> None:
    fast = configuration("fast", [0.5, 1.0, 0.5], peak_mib=500)
    assert comparison.best(compared(PLAIN, fast)) is fast


def test_tie_is_won_by_the_lower_peak() -> None:
    fast = configuration("fast", [0.50, 1.0, 0.55], peak_mib=500)
    small = configuration("small", [0.51, 1.02, 0.52])
    tied = compared(PLAIN, fast, small)
    assert comparison.best(tied) is small
    text = comparison.to_text(tied)
    assert "* small: no clear difference in CPU time from fast" in text
    assert "Keep it with:  run small" in text


def test_close_ratios_whose_spreads_do_not_overlap_are_no_tie() -> None:
    fast = configuration("fast", [0.50, 1.0, 0.50], peak_mib=500)
    small = configuration("small", [0.51, 1.02, 0.51])
    assert comparison.best(compared(PLAIN, fast, small)) is fast


def test_after_one_round_close_ratios_are_a_tie() -> None:
    fast = configuration("fast", [0.50], peak_mib=500)
    small = configuration("small", [0.51])
    once = comparison.Comparison("app.py", 1, True, (configuration("plain", [1.0]), fast, small))
    assert comparison.best(once) is small
    text = comparison.to_text(once)
    assert "app.py: one round" in text
    assert "from fast (ratios within 2 %), and the lowest peak RSS" in text
    assert "One round does not say how far runs differ" in text
    assert "0.51-0.51" not in text
    assert "One round" not in comparison.to_text(compared(PLAIN))


def test_short_program_is_told_what_starting_costs() -> None:
    short = compared(PLAIN, configuration("moirai", [0.9, 1.9, 0.9]))
    assert "The program is short (1.00 s CPU, less than 2 s)" in comparison.to_text(short)
    assert "is short" not in comparison.to_text(compared(PLAIN, configuration("tuned", [1.0] * 3)))
    long = compared(configuration("plain", [5.0] * 3), configuration("moirai", [4.0] * 3))
    assert "is short" not in comparison.to_text(long)


def test_interrupted_comparison_shows_what_there_is() -> None:
    partial = comparison.Comparison(
        "app.py", 3, False, (configuration("plain", [1.0]), configuration("tuned", []))
    )
    text = comparison.to_text(partial)
    assert "Interrupted: between 0 and 1 of 3 rounds measured." in text
    assert "Keep it" not in text
    assert json.loads(comparison.to_json(partial))["best"] is None


def test_unknown_end_of_a_run_is_no_number() -> None:
    plain = replace(PLAIN, runs=tuple(replace(run, end_rss_bytes=None) for run in PLAIN.runs))
    row = next(
        line for line in comparison.to_text(compared(plain)).splitlines() if "plain *" in line
    )
    assert [cell.strip() for cell in row.strip("│ ").split("│")][4] == "-"


def test_comparison_as_json_holds_runs_ratios_and_choice() -> None:
    content = json.loads(
        comparison.to_json(compared(PLAIN, configuration("fast", [0.5, 1.0, 0.6])))
    )
    assert (content["schema"], content["best"]) == ("moirai.comparison/1", "fast")
    assert content["configurations"][1]["cpu_ratio"] == {
        "median": 0.5,
        "lowest": 0.5,
        "highest": 0.6,
    }
    assert len(content["configurations"][0]["runs"]) == 3
