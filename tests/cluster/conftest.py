"""A real Dask cluster of processes on this machine, and an executor over it."""

import pytest


@pytest.fixture(scope="module")
def client():
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as made,
    ):
        yield made


@pytest.fixture
def executor(client):
    from moirai.integrations.dask import DistributedExecutor

    with DistributedExecutor(client) as made:
        yield made


@pytest.fixture
def gate(tmp_path):
    """A file that calls wait for."""
    path = tmp_path / "gate"
    yield path
    path.touch()
