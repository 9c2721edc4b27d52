"""What tests of the cluster share: calls that wait, how long to wait, a cluster to kill."""

import contextlib
import os
import time

WAIT_SECONDS = 60


def hold(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return "held"


@contextlib.contextmanager
def executor_of_one_worker():
    """Make a cluster of one worker, a process that may be killed: its client and executor."""
    import distributed

    from moirai.integrations.dask import DistributedExecutor

    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0",
            silence_logs=50,
        ) as cluster,
        distributed.Client(cluster) as client,
        DistributedExecutor(client) as executor,
    ):  # fmt: skip
        yield client, executor
