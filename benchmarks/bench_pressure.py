"""How well is the use of memory forecast, and how early and how rightly does that warn?

Recordings of real programs (`--traces`: t_seconds, rss_bytes, limit_bytes; one recorded second
stands for ten) are replayed in virtual time, one forecast a second, up to where use exceeds the
limit. Constants are trained anew for each fold on the recordings of the other folds' programs,
never on another run or another moment of the same program. The cases for values and probabilities
are the recordings with their limits; for alarms, besides these, benign runs under a limit of which
they peak at 85 %, a sixth of all cases.

Fresh runs: programs of the benchmark's own (`pressure_programs.py`) are run and recorded on the
spot, and scored in the same way with the constants that the package ships, which have not seen
them.

Against: no change ("persistence"); a least-squares line through the last 60 s, extrapolated
(OLS-60), which alarms when the line meets 90 % within 120 s; levels of 70, 80 and 85 %.

An event is the first time that use reaches 90 % of the limit. An alarm lasts while its rule says
so, and until the rule has been silent for 10 s; it is true if the event comes while it lasts or
within 120 s of its start. An event without a true alarm at least 5 s before is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import harness
import pressure_groups
import pressure_programs
import pressure_sampling
from harness import Goal
from moirai.pressure import Forecaster
from moirai.pressure.features import HORIZONS
from moirai.pressure.model import Model, trained
from pressure_scores import Replay, render_scores, replay, score

sys.path.insert(0, str(harness.ROOT / "scripts"))
import train_forecaster as training
from train_forecaster import CRITICAL_RATIO, Trace

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_pressure"

FEW_TRACES = harness.ROOT / "tests" / "fixtures" / "pressure"
BENIGN_PEAK = 0.85
BENIGN_SHARE = 1 / 6


# === cost =======================================================================================


def cost_table(traces: Sequence[Trace], model: Model, repeats: int) -> dict[str, float]:
    """CPU microseconds of `observe` at one and at ten observations a second, and of `forecast`."""
    found: dict[str, list[float]] = {"observe_1_hz": [], "observe_10_hz": [], "forecast": []}
    for _ in range(repeats):
        trace = traces[0]
        for name, interval in (("observe_1_hz", 1.0), ("observe_10_hz", 0.1)):
            forecaster = Forecaster(model=model)
            values = (trace.used * trace.limit_bytes).tolist()
            began = time.thread_time_ns()
            for index, value in enumerate(values):
                forecaster.observe(index * interval, value, trace.limit_bytes)
            found[name].append((time.thread_time_ns() - began) / 1e3 / len(values))
        spent = 0
        forecaster = Forecaster(model=model)
        for index, value in enumerate(values):
            forecaster.observe(float(index), value, trace.limit_bytes)
            began = time.thread_time_ns()
            forecaster.forecast()
            spent += time.thread_time_ns() - began
        found["forecast"].append(spent / 1e3 / len(values))
    return {name: harness.median(values) for name, values in found.items()}


# === report =====================================================================================


def render(results: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    cost = results["cost"]
    return "\n\n".join(
        [
            render_scores(results, "Recordings: "),
            render_scores(results["fresh"], "Fresh runs: "),
            f"**Cost**, CPU µs: `observe` {cost['observe_1_hz']:.0f} at one a second, "
            f"{cost['observe_10_hz']:.0f} at ten; `forecast` after each observation "
            f"{cost['forecast']:.0f}.",
            "**Sampling**",
            pressure_sampling.render(results["sampling"]),
            "**A guard in real programs**",
            pressure_groups.render(results["groups"]),
        ]
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals."""
    ours, crossing = results["values"]["moirai"], results["crossing"]
    alarms = results["alarms"]["moirai"]
    found = []
    for index, horizon in enumerate(HORIZONS):
        found += [
            Goal(f"MAPE at {horizon} s, %", ours["mape_percent"][index], (15, 19, 28)[index]),
            Goal(
                f"1 - skill at {horizon} s", 1 - ours["skill"][index], 1 - (0.22, 0.22, 0.2)[index]
            ),
            Goal(f"coverage at {horizon} s, off .90", abs(ours["coverage"][index] - 0.9), 0.03),
            Goal(
                f"median width at {horizon} s",
                ours["median_width"][index],
                (0.11, 0.25, 0.42)[index],
            ),
            Goal(
                f"P(cross) at {horizon} s: calibration error",
                crossing["calibration_error"][index],
                (0.01, 0.01, 0.02)[index],
            ),
            Goal(
                f"P(cross) at {horizon} s: 1 - Brier skill",
                1 - crossing["brier_skill"][index],
                1 - (0.5, 0.5, 0.45)[index],
            ),
        ]
    return [
        *found,
        Goal("50 s over the median lead of ramped events",
             50 / max(alarms["ramped_median_lead_seconds"], 1e-9), 1),
        Goal("ramped events with less than 30 s", 1 - alarms["ramped_with_30_s"], 0.2),
        Goal("missed", alarms["missed"], 0.08),
        Goal("false discovery", alarms["false_discovery"], 0.2),
        Goal("benign runs with a false alarm", alarms["benign_alarmed"], 0.1),
        Goal("false alarms an hour", alarms["false_per_hour"], 0.5),
        Goal("observe, µs", results["cost"]["observe_1_hz"], 50),
        *pressure_sampling.goals(results["sampling"]),
        *pressure_groups.goals(results["groups"]),
    ]  # fmt: skip


def cases(traces: Sequence[Trace]) -> list[list[float]]:
    """The limits that each recording is replayed under, as factors on its use."""
    found = [[1.0] for _ in traces]
    peaks = [float(trace.used.max()) for trace in traces]
    benign = [number for number, peak in enumerate(peaks) if peak < CRITICAL_RATIO]
    count = min(len(benign), max(1, round(len(traces) * BENIGN_SHARE / (1 - BENIGN_SHARE))))
    for place in np.linspace(0, len(benign) - 1, count).round().astype(int) if benign else []:
        number = benign[place]
        found[number].append(BENIGN_PEAK / peaks[number])
    return found


def fresh_runs(*, quick: bool) -> dict[str, Any]:
    """Run and record the benchmark's own programs; score what the package ships on them."""
    programs = list(pressure_programs.PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        pressure_programs.record(
            Path(folder),
            programs=programs[::5] if quick else programs,
            seeds=1 if quick else 2,
            seconds=15 if quick else 40,
        )
        traces = training.read_traces(Path(folder))
    replays = [
        replay(trace, ratio, trained())
        for trace, ratios in zip(traces, cases(traces), strict=True)
        for ratio in ratios
    ]
    return score(replays)


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Train and replay fold by fold."""
    traces = training.read_traces(arguments.traces)
    sampling = pressure_sampling.measure(quick=arguments.quick)
    groups = pressure_groups.measure(quick=arguments.quick)
    fresh = fresh_runs(quick=arguments.quick)
    step = 8 if arguments.quick else training.STEP
    shown = training.lessons(traces)
    table = training.describe_traces(shown, step)
    folds = training.program_folds(shown, arguments.folds)
    ratios = cases(traces)
    replays: list[Replay] = []
    for fold in range(arguments.folds):
        harness.progress(f"fold {fold + 1} of {arguments.folds}")
        model = Model(training.train(table.where(folds[table.trace] != fold), shown))
        for number in np.flatnonzero(folds[: len(traces)] == fold):
            trace = traces[number]
            replays += [replay(trace, ratio, model) for ratio in ratios[number]]
    results = {
        "sampling": sampling,
        "groups": groups,
        "fresh": fresh,
        **score(replays),
        "cost": cost_table(traces, model, 1 if arguments.quick else 5),
    }
    parameters = {
        "traces": len(traces),
        "programs": len({trace.program for trace in traces}),
        "cases": len(replays),
        "folds": arguments.folds,
        "quick": arguments.quick,
    }
    markdown, reached = render(results), goals(results)
    return harness.Report(NAME, QUESTION, parameters, finite(results), markdown, reached)


def finite(found: Any) -> Any:
    """The same with None for what is no number, as where a quick run has no event."""
    if isinstance(found, Mapping):
        return {name: finite(each) for name, each in found.items()}
    if isinstance(found, list):
        return [finite(each) for each in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument(
        "--traces",
        type=Path,
        default=os.environ.get("MOIRAI_TRACES"),
        help="folder of recordings (MOIRAI_TRACES; when quick, four of the repository)",
    )
    parser.add_argument("--folds", type=int, help="by program (5; 2 when quick)")
    arguments = parser.parse_args()
    if arguments.traces is None and not arguments.quick:
        parser.error("--traces: expected a folder of recordings, got nothing")
    arguments.traces = arguments.traces or FEW_TRACES
    arguments.folds = arguments.folds or (2 if arguments.quick else 5)
    if not arguments.traces.is_dir():
        parser.error(f"--traces: expected a folder of recordings, got {arguments.traces}")
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
