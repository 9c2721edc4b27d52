"""Keeping the workers of a `ProcessExecutor` busy until a test lets them go on."""

import os

from running import wait_until

from moirai.executor import process_parts

# Calls that a busy worker has, whose calls are not short: the one it runs, and those sent ahead.
CALLS_AT_WORKER = process_parts._LEAST_AHEAD


class Gate:
    """For forked workers: they inherit its descriptors, so make it before the executor."""

    def __init__(self):
        self._told, self._tell = os.pipe()
        self._hold, self._open = os.pipe()

    def shut(self, executor, **where):
        """Have one worker hold a call."""
        future = executor.submit(hold, self._tell, self._hold, **where)
        os.read(self._told, 1)
        return future

    def fill(self, executor):
        """Have the one worker hold a call, and all that are sent to it ahead."""
        futures = [self.shut(executor)]
        while len(futures) < CALLS_AT_WORKER:
            futures.append(executor.submit(abs, 1))
            wait_until(futures[-1].running)  # and has no room any more
        return futures

    def open(self, count=1):
        """Let so many held calls end."""
        os.write(self._open, b"x" * count)

    def close(self):
        """Close its descriptors."""
        for descriptor in (self._told, self._tell, self._hold, self._open):
            os.close(descriptor)


def hold(tell, held):
    os.write(tell, b"x")
    return os.read(held, 1)
