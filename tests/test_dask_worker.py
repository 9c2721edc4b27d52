"""Dask workers with the plugin: the limit they take, when they spill, and when they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pressure_trees import MIB, Tree

from moirai.errors import InvalidArgument

pytest.importorskip("distributed")

from moirai.integrations.dask_worker import PressurePlugin, WorkerWatch

Runner = Callable[..., str]

CLUSTER = """
    import warnings
    warnings.simplefilter("default")
    from distributed import Client, LocalCluster
    from moirai.integrations.dask_worker import PressurePlugin

    def one_worker(limit):
        return LocalCluster(n_workers=1, threads_per_worker=1, processes=False,
                            memory_limit=limit, dashboard_address=None)
"""


def nested(tree_root: Path) -> Path:
    """A group of 300 MiB around one without a limit, in a machine of 16 GiB."""
    tree = Tree(tree_root)
    tree.join_v2("/pod/worker")
    tree.v2("pod", current_mib=100, maximum_mib=300)
    tree.v2("pod/worker", current_mib=50)
    return tree.root


def test_a_worker_takes_its_share_of_a_nested_limit(run_python: Runner, tmp_path: Path) -> None:
    root = nested(tmp_path)
    run_python(
        CLUSTER
        + f"""
    with one_worker("2 GiB") as cluster, Client(cluster) as client:
        client.register_plugin(PressurePlugin(root={str(root)!r}, share=0.5))
        limits = client.run(lambda dask_worker: dask_worker.memory_manager.memory_limit)
        assert list(limits.values()) == [150 << 20], limits
        target = client.run(lambda dask_worker: dask_worker.data.n)
        assert list(target.values()) == [90 << 20], target
        assert client.submit(sum, [1, 2]).result(60) == 3
        client.unregister_worker_plugin("moirai-pressure")
        """
    )


def test_a_lower_limit_of_the_users_own_stays(run_python: Runner, tmp_path: Path) -> None:
    root = nested(tmp_path)
    run_python(
        CLUSTER
        + f"""
    with one_worker("100 MiB") as cluster, Client(cluster) as client:
        client.register_plugin(PressurePlugin(root={str(root)!r}, share=0.5))
        limits = client.run(lambda dask_worker: dask_worker.memory_manager.memory_limit)
        assert list(limits.values()) == [100 << 20], limits
        """
    )


def test_a_worker_that_stays_paused_leaves(run_python: Runner) -> None:
    run_python(
        CLUSTER
        + """
    import psutil

    used = psutil.Process().memory_info().rss
    # Above 80 %, where Dask pauses, and there is nothing to spill.
    with one_worker(int(used / 0.9)) as cluster, Client(cluster) as client:
        worker = cluster.workers[0]
        client.register_plugin(PressurePlugin(stall_seconds=0.1, interval_seconds=0.05))
        cluster.sync(worker.finished)
        assert worker.status.name == "closed"
        """
    )


def fake_worker(data: Any, limit: int) -> SimpleNamespace:
    """What the watch asks of a worker, with a memory use that a test sets."""
    memory = SimpleNamespace(used=0)
    return SimpleNamespace(
        memory_manager=SimpleNamespace(memory_limit=limit, data=data),
        data=data,
        monitor=SimpleNamespace(get_process_memory=lambda: memory.used),
        status=SimpleNamespace(name="running"),
        memory=memory,
    )


def test_it_spills_before_a_crossing_that_is_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed.spill import SpillBuffer

    limit = 4000 * MIB
    data = SpillBuffer(str(tmp_path / "storage"), target=limit)
    worker = fake_worker(data, limit)
    # A machine that is all but empty: whatever else runs on the real one, this worker is nearest.
    tree = Tree(tmp_path / "machine")
    tree.host(total_mib=16384, available_mib=16000)
    watch = WorkerWatch(worker, PressurePlugin(root=tree.root))
    now = [0.0]
    monkeypatch.setattr("moirai.integrations.dask_worker.time.monotonic", lambda: now[0])
    for number in range(30):
        data[f"result-{number}"] = b"x" * MIB
    assert not data.slow
    worker.memory.used = 400 * MIB
    while not data.slow:
        now[0] += 1
        worker.memory.used += 20 * MIB
        watch.look()
        # Dask spills from 70 % of the process's memory on.
        assert worker.memory.used < 0.7 * limit
    assert "dask spill" in [record.name for record in watch.guard.records()]


def test_numbers_are_checked() -> None:
    with pytest.raises(InvalidArgument, match=r"share.*got 0, 0.2 and 30"):
        PressurePlugin(share=0)
