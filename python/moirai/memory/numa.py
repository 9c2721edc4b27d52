"""Machines with several memory nodes: what they are made of, and memory of chosen nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from moirai import _native
from moirai._native import pages_by_node
from moirai.errors import Corrupted, InvalidArgument, Unsupported
from moirai.memory.resources import HugePages
from moirai.memory.sizes import optional_bytes

__all__ = ["NumaNode", "NumaResource", "Topology", "pages_by_node", "parse_cpu_list"]

_CPUS = "sys/devices/system/cpu"
_NODES = "sys/devices/system/node"
_MOST_IDS = 1 << 16  # more CPUs than a kernel can be built for; keeps a broken list short


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Read a list of CPU or node ids as the kernel writes it: ``"0-3,8,10-11"``.

    Args:
        text: Ids and ranges of ids, separated by commas. Blanks around them are ignored, and so is
            what follows a NUL. Empty is no id.

    Returns:
        The ids, ascending, each once.

    Raises:
        InvalidArgument: It is no such text, or an id is 65536 or larger.
    """
    ids: set[int] = set()
    for part in text.partition("\0")[0].split(","):
        match = re.fullmatch(r"\s*(?:(\d{1,9})(?:-(\d{1,9}))?)?\s*", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if first is None:
            continue
        if not int(first) <= int(last) < _MOST_IDS:
            raise InvalidArgument(
                f"text: must be ids and ranges of ids below {_MOST_IDS} such as '0-3,8', "
                f"got {part.strip()[:40]!r} in {text[:80]!r}"
            )
        ids.update(range(int(first), int(last) + 1))
    return tuple(sorted(ids))


def _parse_cpu_map(text: str) -> tuple[int, ...]:
    """Read CPU ids as older kernels write them: a mask in hex, words of 32 bits, highest first."""
    words = text.partition("\0")[0].strip().split(",")
    if not all(re.fullmatch(r"[0-9a-fA-F]{1,8}", word) for word in words):
        raise InvalidArgument(f"text: must be words of 8 hex digits, got {text[:80]!r}")
    mask = int("".join(word.zfill(8) for word in words), 16)
    return tuple(bit for bit in range(mask.bit_length()) if mask >> bit & 1)


@dataclass(frozen=True)
class NumaNode:
    """One node: memory, and the CPUs that are near to it.

    Attributes:
        id: Its number; numbers may have gaps.
        cpus: Its CPUs that are online; empty for a node of memory only.
        memory_bytes: Its memory; 0 for a node of CPUs only.
        distances: How far each node is, by id; 10 is itself. Empty where the kernel's list does not
            fit the nodes.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int
    distances: Mapping[int, int]


@dataclass(frozen=True)
class Topology:
    """Nodes and CPUs of a machine, and which of them this process may use.

    Attributes:
        nodes: The nodes that are online, by id. A kernel without nodes has one, with everything.
        online_cpus: CPUs that run.
        offline_cpus: CPUs that are there but do not run.
        allowed_cpus: Those online that the process may run on (affinity, cpuset).
        allowed_nodes: Ids of those nodes whose memory the process may use (cpuset).
    """

    nodes: tuple[NumaNode, ...]
    online_cpus: tuple[int, ...]
    offline_cpus: tuple[int, ...]
    allowed_cpus: tuple[int, ...]
    allowed_nodes: tuple[int, ...]

    @classmethod
    def read(cls, root: str | os.PathLike[str] = "/") -> Topology:
        """Read the topology that stands under `root`.

        Args:
            root: Where `sys` and `proc` are mounted, or a tree recorded on another machine.

        Raises:
            InvalidArgument: Nothing there says which CPUs there are.
            Corrupted: A file there is not what a kernel writes.
        """
        return _Tree(Path(root)).topology()

    @property
    def usable_nodes(self) -> tuple[NumaNode, ...]:
        """Nodes that have memory which the process may use."""
        return tuple(
            node for node in self.nodes if node.memory_bytes > 0 and node.id in self.allowed_nodes
        )

    def nearest(self, node_id: int) -> NumaNode:
        """The usable node nearest to a node: itself, if it is one; of equals the first.

        Raises:
            InvalidArgument: There is no such node, or none is usable.
        """
        found = [node for node in self.nodes if node.id == node_id]
        if not found or not self.usable_nodes:
            ids = [node.id for node in self.nodes]
            raise InvalidArgument(f"node_id: must be one of {_listed(ids)}, got {node_id!r}")
        distances = found[0].distances
        return min(
            self.usable_nodes,
            key=lambda node: (node.id != node_id, distances.get(node.id, 255), node.id),
        )

    def __str__(self) -> str:
        lines = []
        for node in self.nodes:
            usable = "" if node.id in self.allowed_nodes else ", not for this process"
            cpus = f"CPUs {_ranges(node.cpus)}" if node.cpus else "no CPUs"
            size = f"{node.memory_bytes / 2**30:.1f} GiB" if node.memory_bytes else "no memory"
            lines.append(f"node {node.id}: {cpus}, {size}{usable}")
        if self.offline_cpus:
            lines.append(f"offline: CPUs {_ranges(self.offline_cpus)}")
        if self.allowed_cpus != self.online_cpus:
            lines.append(f"this process may run on CPUs {_ranges(self.allowed_cpus) or 'none'}")
        return "\n".join(lines)


class _Tree:
    """The files of one machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def topology(self) -> Topology:
        ids = self._node_ids()
        cpus_of = {node_id: self._cpus_of_node(node_id) for node_id in ids}
        online = self._ids(f"{_CPUS}/online")
        if online is None:
            online = self._ids(f"{_CPUS}/present") or tuple(
                sorted({cpu for cpus in cpus_of.values() for cpu in cpus or ()})
            )
        if not online:
            raise InvalidArgument(
                f"root: must hold {_CPUS}/online or {_NODES}/node*, got {str(self._root)!r}"
            )
        nodes = tuple(
            NumaNode(
                node_id,
                tuple(cpu for cpu in cpus_of[node_id] or () if cpu in set(online)),
                self._memory_bytes(f"{_NODES}/node{node_id}/meminfo"),
                MappingProxyType(self._distances(node_id, ids)),
            )
            for node_id in ids
        )
        if not nodes:
            memory_bytes = self._memory_bytes("proc/meminfo")
            nodes = (NumaNode(0, online, memory_bytes, MappingProxyType({0: 10})),)
        # The kernel's own list has CPUs too that could be plugged in but are not there.
        present = self._ids(f"{_CPUS}/present") or self._ids(f"{_CPUS}/offline") or ()
        offline = tuple(cpu for cpu in present if cpu not in online)
        allowed_cpus, allowed_nodes = self._allowed("Cpus"), self._allowed("Mems")
        return Topology(
            nodes=nodes,
            online_cpus=online,
            offline_cpus=offline,
            allowed_cpus=_within(online, allowed_cpus),
            allowed_nodes=_within((node.id for node in nodes), allowed_nodes),
        )

    def _text(self, name: str) -> str | None:
        """A file's text, or None if it is not there (or not for us)."""
        try:
            return (self._root / name).read_text("ascii", "replace")
        except OSError:
            return None

    def _ids(self, name: str) -> tuple[int, ...] | None:
        text = self._text(name)
        if text is None:
            return None
        try:
            return parse_cpu_list(text)
        except InvalidArgument as error:
            raise Corrupted(f"{self._root / name}: {error}") from error

    def _node_ids(self) -> tuple[int, ...]:
        """Nodes that are online and described."""
        try:
            names = [path.name for path in (self._root / _NODES).iterdir()]
        except OSError:
            return ()
        described = {int(name[4:]) for name in names if re.fullmatch(r"node\d{1,9}", name)}
        return _within(sorted(described), self._ids(f"{_NODES}/online"))

    def _cpus_of_node(self, node_id: int) -> tuple[int, ...] | None:
        listed = self._ids(f"{_NODES}/node{node_id}/cpulist")
        if listed is not None:
            return listed
        name = f"{_NODES}/node{node_id}/cpumap"
        text = self._text(name)
        try:
            return None if text is None else _parse_cpu_map(text)
        except InvalidArgument as error:
            raise Corrupted(f"{self._root / name}: {error}") from error

    def _memory_bytes(self, name: str) -> int:
        match = re.search(r"MemTotal:\s*(\d+) kB", self._text(name) or "")
        return int(match[1]) * 1024 if match else 0

    def _distances(self, node_id: int, ids: Sequence[int]) -> dict[int, int]:
        """What the kernel lists, in order of id: for the nodes online, or for all there may be."""
        words = (self._text(f"{_NODES}/node{node_id}/distance") or "").split()
        possible = self._ids(f"{_NODES}/possible") or ()
        for listed in (ids, possible):
            if len(listed) == len(words) and all(word.isdecimal() for word in words):
                pairs = zip(listed, words, strict=True)
                return {other: int(word) for other, word in pairs if other in ids}
        return {}

    def _allowed(self, what: Literal["Cpus", "Mems"]) -> tuple[int, ...] | None:
        status = self._text("proc/self/status") or ""
        match = re.search(rf"^{what}_allowed_list:\s*(\S*)$", status, re.MULTILINE)
        return parse_cpu_list(match[1]) if match else None


def _within(ids: Iterable[int], allowed: Iterable[int] | None) -> tuple[int, ...]:
    """Those of `ids` that are allowed; all if that is not said."""
    if allowed is None:
        return tuple(ids)
    permitted = set(allowed)
    return tuple(one for one in ids if one in permitted)


def _ranges(ids: Sequence[int]) -> str:
    """Ids as the kernel writes them: ``0-3,8``."""
    parts: list[list[int]] = []
    for one in ids:
        if parts and parts[-1][-1] == one - 1:
            parts[-1] = [parts[-1][0], one]
        else:
            parts.append([one])
    return ",".join("-".join(map(str, part)) for part in parts)


def _listed(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))


class NumaResource(_native.NumaResource):
    """A pool whose pages come from chosen nodes of the machine.

    Any thread may use it; a forked child goes on with it. Where the machine has one node, or the
    kernel refuses (a container's filter, for instance), it is an ordinary pool, and says so.

    Args:
        node: Id of the node to take memory from; "local": a pool for each node, of which a thread
            uses the one of the CPU it runs on, or the nearest to it; "interleave": pages from each
            usable node in turn.
        strict: Whether to take memory from the node and from nowhere else, whatever happens: where
            it has none left, the kernel ends the process. Otherwise other nodes help out.
        topology: The machine; None reads it.
        huge_pages: As for `LargeObjectResource`. "interleave" takes turns by huge page, where there
            are any.
        cache_cap_bytes: As for `LargeObjectResource`, for each pool.
        decay_seconds: As for `LargeObjectResource`.

    Attributes:
        node: As given.
        node_ids: The nodes that memory comes from.

    Raises:
        InvalidArgument: There is no such node, or this process may not use its memory; the message
            names those it may use. Or another argument is outside its range.
        Unsupported: `strict` was asked for and the kernel refuses.

    Source:
        mbind(2): the policy is set on reserved address space before any of its pages exists.
    """

    node: int | Literal["local", "interleave"]
    node_ids: tuple[int, ...]
    _reason: str | None

    def __new__(
        cls,
        node: int | Literal["local", "interleave"],
        *,
        strict: bool = False,
        topology: Topology | None = None,
        huge_pages: HugePages = "auto",
        cache_cap_bytes: int | str | None = None,
        decay_seconds: float | None = 0.5,
    ) -> NumaResource:
        machine = Topology.read() if topology is None else topology
        usable = [usable.id for usable in machine.usable_nodes]
        chosen = _chosen(node, machine, usable)
        if strict and node == "interleave":
            raise InvalidArgument("strict: must be False for node='interleave', got True")
        reason = _why_not_needed(usable)
        pools = [[one] for one in chosen] if node == "local" else [chosen]
        policy = "interleave" if node == "interleave" else "bind" if strict else "prefer"
        self = super().__new__(
            cls,
            policy="none" if reason else policy,
            node_sets=pools[:1] if reason else pools,
            pool_of_cpu=_pool_of_cpu(machine, chosen) if node == "local" and not reason else [],
            huge_pages=huge_pages,
            cache_cap_bytes=optional_bytes(cache_cap_bytes, "cache_cap_bytes"),
            decay_seconds=decay_seconds,
        )
        self.node = node
        self.node_ids = tuple(chosen)
        self._reason = reason
        if strict and self.refusal is not None:
            raise Unsupported(f"strict: {self.refusal}")
        return self

    @property
    def is_effective(self) -> bool:
        """Whether memory is placed at all; `reason` says why if it is not."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why memory is not placed, or not all of it; None if it is."""
        return self._reason or self.refusal


def _chosen(node: object, machine: Topology, usable: list[int]) -> list[int]:
    """Ids of the nodes to take memory from."""
    if node == "interleave" or not usable:
        return usable
    if node == "local":
        return sorted({machine.nearest(near.id).id for near in machine.nodes if near.cpus})
    if isinstance(node, int) and not isinstance(node, bool) and node in usable:
        return [node]
    raise InvalidArgument(
        f'node: must be "local", "interleave" or a node with memory that this process may use '
        f"({_listed(usable) or 'there is none'}), got {node!r}"
    )


def _why_not_needed(usable: list[int]) -> str | None:
    if len(usable) == 1:
        return f"this process may use the memory of one node only, {usable[0]}: all comes from it"
    if not usable:
        return "the system does not say on which nodes there is memory"
    return None


def _pool_of_cpu(machine: Topology, chosen: list[int]) -> list[int]:
    """By number of the CPU: which of `chosen` is the nearest to it."""
    pools = [0] * (max(machine.online_cpus) + 1)
    for node in machine.nodes:
        for cpu in node.cpus:
            pools[cpu] = chosen.index(machine.nearest(node.id).id)
    return pools
