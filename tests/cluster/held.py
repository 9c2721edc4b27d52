"""Calls that wait in a worker of the cluster, and how long to wait for others."""

import os
import time

WAIT_SECONDS = 60


def hold(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return "held"
