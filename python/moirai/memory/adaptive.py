"""A resource that finds out what a program does with memory, and serves it accordingly.

The measuring and the switching are native; the lines that tell one workload from another, and what
serves it unless told otherwise, are here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moirai import _native
from moirai._native import Resource
from moirai.errors import InvalidArgument
from moirai.memory.patterns import ClassPattern, class_patterns
from moirai.memory.resources import PoolResource

__all__ = [
    "AdaptiveResource",
    "Decision",
    "Effect",
    "Evidence",
    "Explanation",
    "Standing",
    "Workload",
]

# Evidence is collected for at least this long; two windows that agree make a verdict, so that a
# change of workload is acted on within 100 ms.
WINDOW_SECONDS = 0.015
CONFIRMATIONS = 2
# Blocks that live longer than this are long-lived. It adds to the time until a verdict.
LONG_SECONDS = 0.025
# From this share of long-lived blocks on a class is long-running.
LONG_SHARE = 0.5
# From this many requests a second on a class is one of high throughput: below, what a request
# costs is dwarfed by what lies between two of them.
HIGH_RATE = 20_000.0
# How far past a line the evidence must be, as a share of it, in either direction.
HYSTERESIS = 0.2
# A switch is taken back if requests take this many times as long after it, and the part that
# served them worse is avoided for a while.
TOLERANCE = 1.25
AVOID_SECONDS = 10.0


class Workload(enum.StrEnum):
    """What a program does with the blocks of one size class."""

    HIGH_THROUGHPUT = "high_throughput"
    """Many requests a second, of blocks that die young."""
    LOW_LATENCY = "low_latency"
    """Fewer of the same: each request counts, and memory is to be there after a pause."""
    LONG_RUNNING = "long_running"
    """Blocks that stay."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of a size class in one window.

    Attributes:
        requests: Requests, all of them.
        seconds: Length of the window.
        threads: Threads that asked.
        short: Sampled blocks that were freed before they lived long.
        long: Sampled blocks that came to live long.
        ended_elsewhere: Sampled blocks freed by another thread than the one that asked.
        sampled: Sampled requests.
        reused: Of those, served from memory that was used before.
    """

    requests: int
    seconds: float
    threads: int
    short: int
    long: int
    ended_elsewhere: int
    sampled: int
    reused: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        outcomes = self.short + self.long
        lives = f"{self.long / outcomes:.0%} of {outcomes} sampled blocks lived long"
        if not outcomes:
            lives = "no sampled block ended"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.rate:,.0f} requests/s from {threads} over {self.seconds:.3f} s, {lives}"


@dataclass(frozen=True, slots=True)
class Effect:
    """What requests of a class cost, as sampled.

    Attributes:
        median_nanoseconds: Median time of a request and its free together.
        timed: Requests it is the median of.
        reused_share: Share of requests that got memory used before, 0 to 1.
    """

    median_nanoseconds: int
    timed: int
    reused_share: float

    def __str__(self) -> str:
        return f"{self.median_nanoseconds} ns a request, {self.reused_share:.0%} reused"


Outcome = Literal["switched", "counterfactual", "taken back", "avoided"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict on a size class, and what was done about it.

    Attributes:
        time_seconds: When, as `time.monotonic()` counts.
        max_bytes: Largest size of the class.
        previous: The strategy that served the class (or, in counterfactual mode, would have).
        chosen: The strategy for the workload that was seen.
        evidence: The window that settled it.
        before: What requests cost in that window; None if too few were timed.
        expected: What they cost when `chosen` last served the class; None if it never did.
        observed: What they cost in the first window after the switch; None until it is over.
        outcome: "switched"; "counterfactual": would have been; "taken back": it was for the worse;
            "avoided": it was for the worse a short time ago.
    """

    time_seconds: float
    max_bytes: int
    previous: Workload
    chosen: Workload
    evidence: Evidence
    before: Effect | None
    expected: Effect | None
    observed: Effect | None
    outcome: Outcome

    def __str__(self) -> str:
        verb = {
            "switched": "switched",
            "counterfactual": "would switch",
            "taken back": "switched and taken back",
            "avoided": "not switched, it was for the worse",
        }[self.outcome]
        return (
            f"up to {self.max_bytes:,} bytes: {self.previous} -> {self.chosen}, {verb}\n"
            f"    evidence: {self.evidence}\n"
            f"    before: {self.before or 'too few timed'}; "
            f"expected: {self.expected or 'not known, it never served this class'}; "
            f"observed: {self.observed or 'nothing yet'}"
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a size class now.

    Attributes:
        max_bytes: Largest size of the class; the smallest is half of it plus one.
        workload: What the program does with it; None before windows agreed.
        strategy: The strategy that serves it.
        evidence: The latest window.
        effect: What requests cost when last enough of them were timed, or None.
    """

    max_bytes: int
    workload: Workload | None
    strategy: Workload
    evidence: Evidence
    effect: Effect | None

    def __str__(self) -> str:
        return (
            f"up to {self.max_bytes:,} bytes: {self.workload or 'no verdict yet'}, "
            f"served by {self.strategy}; {self.evidence}; {self.effect or 'too few timed'}"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an `AdaptiveResource` serves what as it does; ``print`` it.

    Attributes:
        standings: Every size class with a window behind it, the smallest first.
        decisions: The latest decisions, at most 256, the oldest first.
        decision_count: Decisions so far.
    """

    standings: list[Standing]
    decisions: list[Decision]
    decision_count: int

    def __str__(self) -> str:
        lines = ["size classes:", *(f"  {standing}" for standing in self.standings)]
        lines.append(f"decisions ({len(self.decisions)} of {self.decision_count}):")
        lines.extend(f"  {decision}" for decision in self.decisions)
        return "\n".join(lines)


def _effect(record: dict[str, Any] | None) -> Effect | None:
    return Effect(**record) if record else None


def _decision(record: dict[str, Any]) -> Decision:
    return Decision(
        **{
            **record,
            "previous": Workload(record["previous"]),
            "chosen": Workload(record["chosen"]),
            "evidence": Evidence(**record["evidence"]),
            **{name: _effect(record[name]) for name in ("before", "expected", "observed")},
        }
    )


def _standing(record: dict[str, Any]) -> Standing:
    return Standing(
        **{
            **record,
            "workload": Workload(record["workload"]) if record["workload"] else None,
            "strategy": Workload(record["strategy"]),
            "evidence": Evidence(**record["evidence"]),
            "effect": _effect(record["effect"]),
        }
    )


def _default_strategies() -> dict[Workload, Resource]:
    return {
        Workload.HIGH_THROUGHPUT: PoolResource(),
        Workload.LOW_LATENCY: PoolResource(decay_seconds=10),
        Workload.LONG_RUNNING: PoolResource(cache_cap_bytes=0),
    }


def _workload(argument: str, value: object) -> Workload:
    try:
        return Workload(value)  # type: ignore[arg-type]
    except ValueError:
        words = ", ".join(Workload)
        raise InvalidArgument(f"{argument}: must be one of {words}, got {value!r}") from None


class AdaptiveResource(_native.AdaptiveResource):
    """One resource that serves each size class by the strategy that suits what is done with it.

    There is a size class for each doubling, from 64 bytes. Each is watched: how often it is asked
    for (exact), how long blocks live, whether their memory was used before and what the calls cost
    (of samples). Two windows of 15 ms that agree on another workload switch the class; what was
    handed out stays where it is and goes back there. A switch after which requests cost more is
    taken back. `explain` says all of it.

    Args:
        strategies: A resource for each `Workload`; for those left out: a `PoolResource`, one that
            keeps memory for 10 s, and one that keeps none. No two may draw from the same resource.
        initial: The strategy that serves a class until there is a verdict on it.
        long_seconds: Blocks that live for so long are long-lived; > 0.
        high_rate: Requests a second from which a class is one of high throughput; > 0.
        counterfactual: Whether only to say what would be done; `initial` then serves everything.

    Raises:
        InvalidArgument: An argument is outside its range, or two strategies draw from the same
            resource, which could then not tell whose block comes back.
    """

    def __new__(
        cls,
        strategies: Mapping[Workload, Resource] | None = None,
        *,
        initial: Workload = Workload.LOW_LATENCY,
        long_seconds: float = LONG_SECONDS,
        high_rate: float = HIGH_RATE,
        counterfactual: bool = False,
    ) -> AdaptiveResource:
        chosen = {_workload("strategies", key): part for key, part in (strategies or {}).items()}
        for workload, part in chosen.items():
            if not isinstance(part, Resource):
                kind = type(part).__name__
                raise InvalidArgument(
                    f"strategies: {workload} must be a Resource, got an instance of {kind}"
                )
        missing = set(Workload) - set(chosen)
        parts = {**(_default_strategies() if missing else {}), **chosen}
        return super().__new__(
            cls,
            *(parts[workload] for workload in Workload),
            initial=_workload("initial", initial),
            window_seconds=WINDOW_SECONDS,
            long_seconds=long_seconds,
            long_share=LONG_SHARE,
            high_rate=high_rate,
            hysteresis=HYSTERESIS,
            confirmations=CONFIRMATIONS,
            tolerance=TOLERANCE,
            avoid_seconds=AVOID_SECONDS,
            is_counterfactual=counterfactual,
        )

    @property
    def strategies(self) -> dict[Workload, Resource]:
        """The resource for each workload."""
        return dict(zip(Workload, self.parts, strict=True))

    def classes(self) -> list[ClassPattern]:
        """What was asked for in each size class so far, the smallest first."""
        return class_patterns(self.class_patterns())

    def explain(self) -> Explanation:
        """Say what is known of each size class, what was decided, why, and what came of it."""
        decisions, count = self.decisions()
        return Explanation(
            standings=[_standing(record) for record in self.standings()],
            decisions=[_decision(record) for record in decisions],
            decision_count=count,
        )
