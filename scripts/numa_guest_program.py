"""What `numa_guest.py` runs inside: where does memory lie on a machine with two nodes?"""

import os

import numpy as np

from moirai import memory

MIB = 1 << 20
OF_NODE_0, OF_NODE_1 = 0, 3  # a CPU of each


def filled(resource: memory.Resource, size_bytes: int) -> memory.Buffer:
    buffer = resource.allocate(size_bytes)
    buffer.numpy()[:] = 1
    return buffer


def reused_by_the_other_node(resource: memory.Resource) -> list[dict[int | None, int]]:
    """Where a block lies that node 0 filled and freed, and one that node 1 fills after it."""
    seen = []
    for cpu in (OF_NODE_0, OF_NODE_1):
        os.sched_setaffinity(0, {cpu})
        seen.append(memory.pages_by_node(filled(resource, 8 * MIB)))
    return seen


machine = memory.Topology.read()
print(machine)
assert [node.cpus for node in machine.nodes] == [(0, 1), (2, 3)]
assert [dict(node.distances) for node in machine.nodes] == [{0: 10, 1: 21}, {0: 21, 1: 10}]
assert all(node.memory_bytes > 1024 * MIB for node in machine.usable_nodes)

for node in (0, 1):
    for strict in (False, True):
        resource = memory.NumaResource(node, strict=strict)
        assert resource.is_effective, resource.reason
        for cpu in (OF_NODE_0, OF_NODE_1):
            os.sched_setaffinity(0, {cpu})
            for size in (100, 20_000, 300_000, 8 * MIB):
                pages = memory.pages_by_node(filled(resource, size))
                assert set(pages) == {node}, (node, cpu, size, pages)
            with memory.use(resource):
                assert set(memory.pages_by_node(np.ones(1_000_000))) == {node}
        resource.trim()  # what comes back after that comes from the same node
        assert set(memory.pages_by_node(filled(resource, 8 * MIB))) == {node}

print("a pool's warm memory:", *reused_by_the_other_node(memory.PoolResource(decay_seconds=None)))
local = memory.NumaResource("local", decay_seconds=None)
assert (local.is_effective, local.node_ids) == (True, (0, 1))
first, second = reused_by_the_other_node(local)
print("a local resource's:", first, second)
assert set(first) == {0}
assert set(second) == {1}

for huge_pages in ("never", "auto"):
    resource = memory.NumaResource("interleave", huge_pages=huge_pages)
    pages = memory.pages_by_node(filled(resource, 64 * MIB))
    print(f"interleaved, huge pages {huge_pages}:", pages)
    assert set(pages) == {0, 1}
    assert abs(pages[0] - pages[1]) <= 1024

os.sched_setaffinity(0, {OF_NODE_1})
assert memory.Topology.read().allowed_cpus == (OF_NODE_1,)
assert memory.health().ok, str(memory.health())
