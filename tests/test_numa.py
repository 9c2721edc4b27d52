"""Topologies of recorded machines, and memory of chosen nodes."""

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moirai import _native, memory
from moirai.errors import Corrupted, InvalidArgument, Unsupported
from moirai.memory.numa import parse_cpu_list

MACHINES = Path(__file__).parent / "fixtures" / "numa"
LSTOPO = shutil.which("lstopo-no-graphics")
GIB = 1 << 30
MIB = 1 << 20

RunPython = Callable[..., str]


def read(machine: str) -> memory.Topology:
    return memory.Topology.read(MACHINES / machine)


# --- lists of ids -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", ()),
        ("\n", ()),
        ("0", (0,)),
        ("0-3\n", (0, 1, 2, 3)),
        ("0-1,88-89,250", (0, 1, 88, 89, 250)),
        (" 3 , 1-2 ,", (1, 2, 3)),
        ("7,5-6,6-8", (5, 6, 7, 8)),
        ("4-4", (4,)),
        ("0-1\n\0\0garbage", (0, 1)),  # a buffer recorded with what lay behind it
    ],
)
def test_a_list_of_ids_is_read_as_the_kernel_means_it(text: str, ids: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == ids


@given(st.sets(st.integers(0, 2000), max_size=60))
def test_every_list_the_kernel_can_write_is_read_back(ids: set[int]) -> None:
    runs: list[list[int]] = []
    for one in sorted(ids):
        if runs and runs[-1][-1] == one - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    assert parse_cpu_list(text + "\n") == tuple(sorted(ids))


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "1-", "1-2-3", "0:2", "1 2", "65536", "9" * 30])
def test_what_is_no_list_is_refused_with_what_came(text: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(text[:40])):
        parse_cpu_list("0," + text)


@given(st.text(max_size=30))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    try:
        ids = parse_cpu_list(text)
    except InvalidArgument:
        return
    assert list(ids) == sorted(set(ids))


# --- machines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "cpus_of_node"),
    [
        ("one-node", {0: range(16)}),
        ("no-nodes", {0: range(2)}),
        ("two-nodes", {0: [0], 1: [1]}),
        ("four-nodes", {0: [0, 4], 1: [1, 5], 2: [2, 6], 3: [3, 7]}),
        ("eight-nodes", {node: [2 * node, 2 * node + 1] for node in range(8)}),
        (
            "sparse-ids",
            {
                node: range(6 * place, 6 * place + 6)
                for place, node in enumerate([0, 1, 2, 33, 34, 45, 72, 73])
            },
        ),
        (
            "memory-only",
            {0: range(16), 8: range(88, 104), **{node: [] for node in range(250, 256)}},
        ),
        ("offline-node", {1: range(5, 20, 2)}),
        (
            "cpus-without-memory",
            {node: [2 * node, 2 * node + 1] if node < 4 else [] for node in range(11)},
        ),
    ],
)
def test_each_node_of_a_recorded_machine_has_its_cpus(
    machine: str, cpus_of_node: dict[int, list[int]]
) -> None:
    topology = read(machine)
    found = {node.id: list(node.cpus) for node in topology.nodes}
    assert found == {node: list(cpus) for node, cpus in cpus_of_node.items()}
    assert topology.allowed_cpus == topology.online_cpus
    assert topology.allowed_nodes == tuple(cpus_of_node)


def test_memory_and_distances_are_those_of_the_machine() -> None:
    two = read("two-nodes")
    assert [node.memory_bytes for node in two.nodes] == [2095800 * 1024, 2097152 * 1024]
    assert [dict(node.distances) for node in two.nodes] == [{0: 10, 1: 20}, {0: 20, 1: 10}]
    sparse = read("sparse-ids").nodes[3]
    assert (sparse.id, sparse.memory_bytes) == (33, 16 * GIB)
    assert sparse.distances == {0: 22, 1: 16, 2: 16, 33: 10, 34: 16, 45: 16, 72: 22, 73: 22}


def test_distances_to_nodes_that_are_offline_are_left_out() -> None:
    # The kernel of this one lists all nodes there may be: "21 10".
    (node,) = read("offline-node").nodes
    assert (node.id, node.distances) == (1, {1: 10})


def test_cpus_that_do_not_run_are_told_apart() -> None:
    offline = read("offline-node")
    assert offline.online_cpus == tuple(range(4, 21))
    assert offline.offline_cpus == (0, 1, 2, 3, 21, 22, 23)  # of 192 there may be, 24 are there
    limited = read("eight-nodes-cpuset")
    assert limited.offline_cpus == (4,)
    assert limited.nodes[2].cpus == (5,)


def test_a_cpuset_limits_cpus_and_nodes() -> None:
    limited = read("eight-nodes-cpuset")
    assert limited.allowed_cpus == (0, 1, 2, 3, 5, 6, 12, 13, 14, 15)
    assert limited.allowed_nodes == (1, 2, 3, 4)
    assert [node.id for node in limited.usable_nodes] == [1, 2, 3, 4]
    assert len(limited.nodes) == 8
    text = str(limited)
    assert "node 0: CPUs 0-1, 8.0 GiB, not for this process\n" in text
    assert "this process may run on CPUs 0-3,5-6,12-15" in text
    assert "offline: CPUs 4" in text


def test_nodes_without_memory_are_not_usable_and_have_a_nearest_that_is() -> None:
    machine = read("cpus-without-memory")
    assert [node.id for node in machine.usable_nodes] == [5, 6, 7, 8, 9, 10]
    assert [machine.nearest(node).id for node in (0, 1, 2, 3, 7)] == [5, 8, 6, 9, 7]
    with pytest.raises(InvalidArgument, match=r"node_id: must be one of 0, 1, .*, 10, got 11"):
        machine.nearest(11)


def test_this_machine_has_the_cpus_that_python_sees() -> None:
    here = memory.Topology.read()
    assert set(os.sched_getaffinity(0)) == set(here.allowed_cpus)
    assert here.usable_nodes
    assert sum(node.memory_bytes for node in here.nodes) > 0


def test_a_tree_without_cpus_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="root: must hold sys/devices/system/cpu/online"):
        memory.Topology.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sys/devices/system/cpu/online", "0-z"),
        ("sys/devices/system/node/online", "3-1"),
        ("sys/devices/system/node/node1/cpulist", "\x80\x81"),
        ("sys/devices/system/node/node1/cpulist", "99999999999"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(MACHINES / "eight-nodes", tmp_path / "root")
    (tmp_path / "root" / name).write_text(content, "latin-1")
    with pytest.raises(Corrupted, match=re.escape(name)):
        memory.Topology.read(tmp_path / "root")


def test_a_broken_mask_is_named(tmp_path: Path) -> None:
    shutil.copytree(MACHINES / "two-nodes", tmp_path / "root")
    name = "sys/devices/system/node/node1/cpumap"
    (tmp_path / "root" / name).write_text("123456789")
    with pytest.raises(Corrupted, match=re.escape(name)):
        memory.Topology.read(tmp_path / "root")


def test_missing_files_cost_what_they_say_and_no_more(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(MACHINES / "eight-nodes", root)
    node = root / "sys/devices/system/node/node3"
    (node / "distance").write_text("10 20\n")  # too few
    (node / "meminfo").unlink()
    (root / "sys/devices/system/node/online").unlink()
    topology = memory.Topology.read(root)
    assert len(topology.nodes) == 8
    assert (topology.nodes[3].distances, topology.nodes[3].memory_bytes) == ({}, 0)
    assert 3 not in [usable.id for usable in topology.usable_nodes]


@pytest.mark.skipif(LSTOPO is None, reason="hwloc's lstopo is not installed")
@pytest.mark.parametrize(
    "machine", sorted(path.name for path in MACHINES.iterdir() if path.is_dir())
)
def test_hwloc_sees_the_same_machine(machine: str, tmp_path: Path) -> None:
    """hwloc's own reader as an oracle: nodes, their CPUs, their memory and their distances."""
    topology = read(machine)
    root = tmp_path / "root"
    shutil.copytree(MACHINES / machine, root)
    for cpu in topology.online_cpus:  # hwloc wants caches and cores as well: one core for each CPU
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        words = [f"{(1 << cpu) >> shift & 0xFFFFFFFF:08x}" for shift in range(224, -1, -32)]
        for name in ("core_siblings", "thread_siblings"):
            (folder / name).write_text(",".join(words) + "\n")
    done = subprocess.run(
        [str(LSTOPO), "--of", "xml", "--disallowed", "-"],
        env=os.environ
        | {
            "HWLOC_FSROOT": str(root),
            "HWLOC_THISSYSTEM": "0",
            "HWLOC_COMPONENTS": "linux,stop",
            "HWLOC_KEEP_NVIDIA_GPU_NUMA_NODES": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seen = xml.etree.ElementTree.fromstring(done.stdout)
    nodes = {
        int(node.attrib["os_index"]): node
        for node in seen.iter("object")
        if node.attrib["type"] == "NUMANode"
    }
    assert sorted(nodes) == [node.id for node in topology.nodes]
    for node in topology.nodes:
        theirs = nodes[node.id].attrib
        assert int(theirs.get("local_memory", 0)) == node.memory_bytes
        mask = int("".join(f"{int(w or '0', 16):08x}" for w in theirs["cpuset"].split(",")), 16)
        cpus = [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
        if node.cpus:  # to a node without CPUs hwloc gives those of its neighbours
            assert cpus == list(node.cpus)
    for matrix in seen.iter("distances2"):
        ids = [int(word) for part in matrix.iter("indexes") for word in (part.text or "").split()]
        values = [int(w) for part in matrix.iter("u64values") for w in (part.text or "").split()]
        ours = [dict(node.distances) for node in topology.nodes]
        rows = [dict(zip(ids, values[i * len(ids) :], strict=False)) for i in range(len(ids))]
        assert rows == ours


# --- memory of a node ---------------------------------------------------------------------------


def can_place() -> bool:
    """Whether this kernel, and the container around us, lets memory be placed."""
    return memory.NumaResource(0, topology=read("two-nodes")).is_effective


def test_on_one_node_a_numa_resource_says_that_it_changes_nothing() -> None:
    for node in (0, "local", "interleave"):
        resource = memory.NumaResource(node, topology=read("one-node"))  # type: ignore[arg-type]
        assert not resource.is_effective
        assert resource.reason is not None
        assert "one node only, 0" in resource.reason
        assert (resource.node, resource.node_ids) == (node, (0,))
        assert resource.allocate(100_000, zeroed=True).numpy().sum() == 0


@pytest.mark.parametrize(
    ("machine", "node", "listed"),
    [
        ("two-nodes", 2, "(0, 1)"),
        ("two-nodes", -1, "(0, 1)"),
        ("two-nodes", True, "(0, 1)"),
        ("two-nodes", "remote", "(0, 1)"),
        ("two-nodes", None, "(0, 1)"),
        ("eight-nodes-cpuset", 0, "(1, 2, 3, 4)"),
        ("cpus-without-memory", 0, "(5, 6, 7, 8, 9, 10)"),
        ("sparse-ids", 3, "(0, 1, 2, 33, 34, 45, 72, 73)"),
    ],
)
def test_a_node_that_cannot_be_used_is_refused_with_those_that_can(
    machine: str, node: object, listed: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"node: must be .*{re.escape(listed)}, got {node!r}"):
        memory.NumaResource(node, topology=read(machine))  # type: ignore[arg-type]


def test_memory_comes_from_the_node_it_was_asked_of() -> None:
    if not can_place():
        pytest.skip("memory cannot be placed here")
    for strict in (False, True):
        resource = memory.NumaResource(0, strict=strict, topology=read("two-nodes"))
        assert (resource.is_effective, resource.reason, resource.node_ids) == (True, None, (0,))
        for size in (100, 20_000, 300_000, 8 * MIB):
            buffer = resource.allocate(size)
            buffer.numpy()[:] = 1
            pages = memory.pages_by_node(buffer)
            assert set(pages) == {0}
            assert pages[0] >= size // 4096
        with memory.use(resource):
            assert set(memory.pages_by_node(np.ones(100_000))) == {0}


def test_a_refusal_of_the_kernel_is_said_and_the_memory_is_good() -> None:
    # This machine is not the recorded one: it has no node 73.
    machine = read("sparse-ids")
    resource = memory.NumaResource(73, topology=machine)
    assert not resource.is_effective
    assert resource.reason is not None
    assert "the kernel refuses to place pages on node 73: " in resource.reason
    buffer = resource.allocate(MIB)
    buffer.numpy()[:] = 1
    with pytest.raises(Unsupported, match="strict: the kernel refuses to place pages on node 73"):
        memory.NumaResource(73, strict=True, topology=machine)


def test_interleave_takes_all_usable_nodes_and_cannot_be_strict() -> None:
    machine = read("eight-nodes-cpuset")
    assert memory.NumaResource("interleave", topology=machine).node_ids == (1, 2, 3, 4)
    with pytest.raises(InvalidArgument, match="strict: must be False for node='interleave'"):
        memory.NumaResource("interleave", strict=True, topology=machine)


def test_local_has_a_pool_for_each_node_that_is_nearest_to_a_cpu() -> None:
    machine = read("cpus-without-memory")
    local = memory.NumaResource("local", topology=machine)
    assert local.node_ids == (5, 6, 8, 9)
    assert memory.NumaResource("local", topology=read("memory-only")).node_ids == (0, 8)
    assert memory.NumaResource("interleave", topology=machine).node_ids == (5, 6, 7, 8, 9, 10)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU only")
def test_a_local_resource_keeps_each_cpus_memory_apart(run_python: RunPython) -> None:
    run_python(f"""
        import os
        from moirai import memory

        def node(node_id, cpu):
            return memory.NumaNode(node_id, (cpu,), 1 << 30, {{node_id: 10}})

        first, second = sorted(os.sched_getaffinity(0))[:2]
        machine = memory.Topology(
            (node(0, first), node(1, second)), (first, second), (), (first, second), (0, 1)
        )
        local = memory.NumaResource("local", topology=machine, decay_seconds=None)

        def hit_on(cpu):
            os.sched_setaffinity(0, {{cpu}})
            before = local.statistics().hits
            local.allocate({8 * MIB})
            return local.statistics().hits > before

        assert not hit_on(first)
        assert hit_on(first), "the block of before is warm"
        assert not hit_on(second), "the other CPU's pool has none yet"
        assert hit_on(second)
        assert hit_on(first)
        os.sched_setaffinity(0, {{first}})
        buffer = local.allocate(100)
        os.sched_setaffinity(0, {{second}})
        del buffer  # back to where it came from
        assert local.statistics().current_count == 0
        assert local.check().ok and memory.health().ok
    """)


def test_pages_that_were_not_touched_lie_nowhere() -> None:
    untouched = memory.LargeObjectResource(huge_pages="never").allocate(8 * MIB, zeroed=True)
    pages = memory.pages_by_node(untouched)
    assert pages.get(None, 0) >= 2000
    untouched.numpy()[:] = 1
    assert None not in memory.pages_by_node(untouched)
    assert memory.pages_by_node(bytearray()) == {}
    with pytest.raises(InvalidArgument, match="buffer: must be contiguous"):
        memory.pages_by_node(np.ones(1000)[::2])
    with pytest.raises(TypeError):
        memory.pages_by_node(3)  # type: ignore[arg-type]


# --- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [-1, 1024, "0", None])
def test_a_node_that_cannot_be_is_refused(node: object) -> None:
    with pytest.raises((InvalidArgument, TypeError), match="node"):
        _native.prefer_node(node)  # type: ignore[arg-type]


def test_a_node_that_is_not_there_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="node: the kernel does not take 1023"):
        _native.prefer_node(1023)
