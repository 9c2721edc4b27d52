"""Whether every resource that is alive is sound: by itself, and together with its upstream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moirai import _native
from moirai._native import HealthReport, Statistics

__all__ = ["Finding", "Health", "ResourceHealth", "health"]

# A count read while another thread is between two of them proves nothing; one that is wrong in each
# look at a resource that nobody uses meanwhile does. A thread between two counts may have lost its
# processor, and nothing tells when it goes on: the rests between looks are there for it to do so.
_RESTS_SECONDS = (0.01, 0.1)


@dataclass(frozen=True)
class Finding:
    """One broken promise.

    Attributes:
        resource: The resource, as `ResourceHealth.label` has it.
        text: What was expected and what was found.
        settled: Whether nobody used the resource while it was looked at. What is found at a busy
            resource may be a count that another thread was just changing.
    """

    resource: str
    text: str
    settled: bool

    def __str__(self) -> str:
        return f"{self.resource}: {self.text}{'' if self.settled else ' (seen while in use)'}"


@dataclass(frozen=True)
class ResourceHealth:
    """One live resource.

    Attributes:
        number: Resources are numbered as they are made, from 1.
        name: Its class.
        sources: Numbers of the resources it draws from: its upstream, or the parts it was given.
        statistics: Its counts.
        counts: What `check` counted on its way, upstream's included.
        settled: Whether nobody used it while it was looked at.
    """

    number: int
    name: str
    sources: tuple[int, ...]
    statistics: Statistics
    counts: dict[str, int]
    settled: bool

    @property
    def label(self) -> str:
        """Its name and number, such as ``PoolResource #3``."""
        return f"{self.name} #{self.number}"


@dataclass(frozen=True)
class Health:
    """What `health` found; ``str()`` gives it as text.

    Attributes:
        resources: Every resource that was alive, oldest first.
        findings: What is wrong; empty when all is well.
    """

    resources: tuple[ResourceHealth, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. What was seen at a busy resource only does not count."""
        return not any(finding.settled for finding in self.findings)

    def __str__(self) -> str:
        total = f"{len(self.resources)} resource{'' if len(self.resources) == 1 else 's'}"
        count = len(self.findings)
        verdict = f"{count} finding{'' if count == 1 else 's'}" if count else "healthy"
        lines = [f"{total}: {verdict}", *(f"- {finding}" for finding in self.findings)]
        for resource in self.resources:
            now = resource.statistics
            numbers = " and ".join(f"#{number}" for number in resource.sources)
            below = f" over {numbers}" if numbers else ""
            lines.append(
                f"{resource.label}{below}: {now.current_count} blocks, {now.current_bytes} bytes "
                f"in use; {now.resident_bytes} held, {now.cached_bytes} of them kept"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Walked:
    """One resource as one walk saw it."""

    number: int
    name: str
    sources: list[int]
    before: Statistics
    report: HealthReport
    held_upstream: tuple[int, int] | None
    after: Statistics

    @property
    def label(self) -> str:
        return f"{self.name} #{self.number}"


def health() -> Health:
    """Walk every live resource: does each keep its promises, and do they agree with each other?

    Each resource's own structures are walked (`Resource.check`: blocks on two lists, sizes that do
    not add up), its counts are compared with each other, and what resources hold from an upstream
    is compared with what that one says is out. Blocks that were out when their resource went, so
    that they can never come back, are reported as well.

    Nothing is stopped meanwhile. A finding is `settled` if it was there in each of three looks over
    a tenth of a second and nobody used the resource during them; only then does it count against
    `Health.ok`.

    Takes the locks of one resource at a time; the time of a look is proportional to runs and spans.
    """
    looks = [_look()]
    for rest_seconds in _RESTS_SECONDS:
        if not _findings(looks[-1]):
            break
        time.sleep(rest_seconds)
        looks.append(_look())
    last = looks[-1]
    # Figures may differ from look to look, so what must persist is that the resource has a finding.
    always = set.intersection(*({number for number, _ in _findings(look)} for look in looks))
    findings = [
        Finding(last[number].label, text, number in always and _was_idle(number, looks))
        for number, text in _findings(last)
    ]
    findings += [
        Finding(
            f"{name} #{number}",
            f"{count} blocks of {size} bytes are out, and nobody is left who could free them",
            settled=True,
        )
        for number, name, count, size in _native.lost_blocks()
    ]
    resources = [
        ResourceHealth(
            number=number,
            name=seen.name,
            sources=tuple(seen.sources),
            statistics=seen.after,
            counts=seen.report.counts,
            settled=_was_idle(number, looks),
        )
        for number, seen in last.items()
    ]
    return Health(tuple(resources), tuple(findings))


def _look() -> dict[int, _Walked]:
    walked = (_Walked(*record) for record in _native.walk_resources())
    return {seen.number: seen for seen in walked}


def _was_idle(number: int, looks: Iterable[dict[int, _Walked]]) -> bool:
    """Whether a resource's counts stayed the same from the first look to the last."""
    counts = []
    for look in looks:
        if number not in look:
            return False
        counts += [look[number].before, look[number].after]
    return all(count == counts[0] for count in counts)


def _findings(look: dict[int, _Walked]) -> list[tuple[int, str]]:
    """(number of the resource, text) of all that is wrong in one look."""
    found = []
    for number, seen in look.items():
        # A report includes those of its sources, which are in the list by themselves.
        below = [look[source].report.findings for source in seen.sources if source in look]
        passed_on = {text for findings in below for text in findings}
        texts = [text for text in seen.report.findings if text not in passed_on]
        found += [(number, text) for text in [*texts, *_unbalanced(seen.after)]]
    return found + list(_disagreements(look))


def _unbalanced(now: Statistics) -> Iterator[str]:
    """The equations that a resource's own counts must fulfil."""
    if now.hits + now.misses != now.total_count:
        yield f"{now.hits} hits and {now.misses} misses are not {now.total_count} blocks"
    if now.cached_bytes > now.resident_bytes:
        yield f"{now.cached_bytes} bytes are kept of {now.resident_bytes} that are held"
    for unit in ("bytes", "count"):
        current, peak, total = (
            getattr(now, f"{kind}_{unit}") for kind in ("current", "peak", "total")
        )
        if not current <= peak <= total:
            yield f"{unit}: {current} now, {peak} at most, {total} in all do not ascend"
    if (now.current_bytes == 0) != (now.current_count == 0):
        yield f"{now.current_bytes} bytes are in {now.current_count} blocks"


def _disagreements(look: dict[int, _Walked]) -> Iterator[tuple[int, str]]:
    """Upstreams that say that less is out than those above them hold."""
    held: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for seen in look.values():
        if len(seen.sources) == 1 and seen.held_upstream is not None:
            held[seen.sources[0]].append(seen.held_upstream)
    for number, claims in held.items():
        size = sum(size for size, _ in claims)
        count = sum(count for _, count in claims)
        now = look[number].after
        if size > now.current_bytes or count > now.current_count:
            yield (
                number,
                f"{now.current_count} blocks of {now.current_bytes} bytes are out, but {count} of "
                f"{size} bytes are held by those that draw from it",
            )
