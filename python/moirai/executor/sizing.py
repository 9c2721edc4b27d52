"""How many workers a machine is good for, and on which of its nodes they are."""

from __future__ import annotations

import math
import re
from pathlib import Path

from moirai.errors import InvalidArgument
from moirai.memory import NumaNode, Topology

__all__ = [
    "check_initializer",
    "checked_worker_count",
    "cpu_of_workers",
    "cpu_quota",
    "default_worker_count",
    "node_of_cpu",
    "steal_order",
    "working_nodes",
]


def cpu_quota(root: str | Path = "/") -> float | None:
    """CPUs that the process's control group may use at once, or None if that is not limited.

    The least of what the group and those above it may, in either version of control groups.

    Args:
        root: Where the file system with ``proc`` and ``sys`` is mounted.
    """
    base = Path(root)
    try:
        groups = (base / "proc/self/cgroup").read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    quotas = []
    for line in groups:
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers == "":
            mount, read = base / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            mount, read = base / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        group = mount / path.lstrip("/")
        while True:
            quotas.append(read(group))
            if group in (mount, group.parent):
                break
            group = group.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    match = re.fullmatch(r"(\d+) (\d+)\s*", _text(group / "cpu.max"))
    return int(match[1]) / int(match[2]) if match else None


def _quota_v1(group: Path) -> float | None:
    quota = re.fullmatch(r"(\d+)\s*", _text(group / "cpu.cfs_quota_us"))
    period = re.fullmatch(r"(\d+)\s*", _text(group / "cpu.cfs_period_us"))
    return int(quota[1]) / int(period[1]) if quota and period else None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def default_worker_count(topology: Topology, quota: float | None) -> int:
    """One for each CPU that the process may use at once, at least one."""
    cpus = len(topology.allowed_cpus) or 1
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def checked_worker_count(max_workers: int | None, topology: Topology, most: int) -> int:
    """How many workers an executor gets that was made with `max_workers`.

    Args:
        max_workers: What was asked for; None: as many as the machine is good for.
        topology: The machine.
        most: More than these are refused.

    Raises:
        TypeError: It is no int.
        InvalidArgument: It is not between 1 and `most`.
    """
    if max_workers is None:
        return min(default_worker_count(topology, cpu_quota()), most)
    if isinstance(max_workers, bool) or not isinstance(max_workers, int):
        kind = type(max_workers).__name__
        raise TypeError(f"max_workers: must be an int or None, got {kind}")
    if not 1 <= max_workers <= most:
        # In concurrent.futures' words, which its tests look for.
        raise InvalidArgument(
            f"max_workers must be greater than 0, and at most {most}, got {max_workers}"
        )
    return max_workers


def check_initializer(initializer: object) -> None:
    """Refuse what cannot be called, in concurrent.futures' words.

    Raises:
        TypeError: It is neither None nor callable.
    """
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")


def working_nodes(topology: Topology) -> list[NumaNode]:
    """The nodes that have CPUs for this process; one with all of them where there are no nodes."""
    allowed = set(topology.allowed_cpus)
    return [node for node in topology.nodes if allowed.intersection(node.cpus)] or [
        topology.nodes[0]
    ]


def cpu_of_workers(
    topology: Topology, worker_count: int
) -> list[tuple[int, int | None, tuple[int, ...]]]:
    """For each worker the place of its node among `working_nodes`, its CPU and its node's CPUs.

    Each CPU gets a worker before one gets a second, nodes in turn by their CPUs; CPU None where
    the system does not say.
    """
    allowed = set(topology.allowed_cpus)
    slots: list[tuple[int, int | None, tuple[int, ...]]] = []
    for place, node in enumerate(working_nodes(topology)):
        cpus = tuple(cpu for cpu in node.cpus if cpu in allowed)
        slots.extend((place, cpu, cpus) for cpu in cpus)
    slots = slots or [(0, None, ())]
    # Nodes in turn, so that few workers are spread over all nodes.
    ranks: dict[int, int] = {}
    keyed = []
    for slot in slots:
        rank = ranks[slot[0]] = ranks.get(slot[0], -1) + 1
        keyed.append((rank, slot))
    keyed.sort(key=lambda pair: (pair[0], pair[1][0]))
    return [keyed[worker % len(keyed)][1] for worker in range(worker_count)]


def node_of_cpu(topology: Topology, worker_count: int) -> list[int]:
    """By number of the CPU, the place of the nearest of `working_nodes` that has workers.

    Empty where that is always the first.
    """
    nodes = working_nodes(topology)
    places = sorted({place for place, _, _ in cpu_of_workers(topology, worker_count)})
    if places == [0]:
        return []
    found = [0] * (1 + max(cpu for node in topology.nodes for cpu in node.cpus))
    for node in topology.nodes:
        far = [
            (nodes[place] != node, node.distances.get(nodes[place].id, math.inf), place)
            for place in places
        ]
        for cpu in node.cpus:
            found[cpu] = min(far)[-1]
    return found


def steal_order(topology: Topology) -> list[list[int]]:
    """For each of `working_nodes`, the places of all of them by distance, itself first."""
    nodes = working_nodes(topology)
    order = []
    for place, node in enumerate(nodes):
        far = [
            (node.distances.get(other.id, math.inf), other_place)
            for other_place, other in enumerate(nodes)
            if other_place != place
        ]
        order.append([place, *(other for _, other in sorted(far))])
    return order
