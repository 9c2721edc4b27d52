"""Bring the logs of many processes together in one file, in the order of each process.

Workers log through the standard library's `logging`. Their records go to one collector, which sorts
nothing and writes everything: the usual set-up of the logging cookbook, over multiprocessing.Queue,
against the same over a shared channel, to which each worker sends batches that follow its traffic.

    python examples/log_collector.py --workers 4 --records 5000
"""

import argparse
import logging
import logging.handlers
import multiprocessing
import pickle
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

from moirai.channels import BatchingSender, SharedChannel

CONTEXT = multiprocessing.get_context("fork")


class ChannelHandler(logging.handlers.QueueHandler):
    """Sends each record to a shared channel, batched."""

    def __init__(self, channel):
        self.sender = channel.sender()
        super().__init__(BatchingSender(self.sender, max_delay_seconds=0.02, max_batch=256))

    def enqueue(self, record):
        self.queue.send(pickle.dumps(record.__dict__, protocol=5))

    def close(self):
        self.queue.close()
        self.sender.close()
        super().close()


def work(handler, worker, records):
    """Do something that logs."""
    logger = logging.getLogger(f"worker-{worker}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    for number in range(records):
        logger.info("handled request %d in %.1f ms", number, number % 7 + 0.5)
    logger.removeHandler(handler)
    handler.close()


def write_to(path):
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    return handler


# === over multiprocessing.Queue =================================================================


def run_queue(workers, records, path):
    queue = CONTEXT.Queue()

    def worker(index):
        work(logging.handlers.QueueHandler(queue), index, records)

    started = time.perf_counter()
    children = start(worker, workers)
    output = write_to(path)
    for _ in range(workers * records):
        output.emit(queue.get())
    seconds = time.perf_counter() - started
    output.close()
    join(children)
    return seconds


# === over a shared channel ======================================================================


def run_channel(workers, records, path):
    channel = SharedChannel.create(capacity_bytes="4 MiB")

    def worker(index):
        work(ChannelHandler(channel), index, records)

    started = time.perf_counter()
    children = start(worker, workers)
    output = write_to(path)
    # A sender of its own: else a worker that is done before another begins would be the last one.
    with channel.receiver() as receiver, channel.sender():
        left = workers * records
        while left:
            found = receiver.receive_many(256)
            for data in found:
                output.emit(logging.makeLogRecord(pickle.loads(data)))
            left -= len(found)
    seconds = time.perf_counter() - started
    output.close()
    join(children)
    channel.close()
    return seconds


def cpu_seconds():
    """CPU time of this process and of those that it has waited for."""
    # Not os.times(), which counts in steps of 10 ms: a small run would have taken none.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def start(body, count):
    children = [CONTEXT.Process(target=body, args=(index,)) for index in range(count)]
    for child in children:
        child.start()
    return children


def join(children):
    for child in children:
        child.join()
        if child.exitcode:
            raise SystemExit(f"{child.name} ended with status {child.exitcode}")


def check(path, workers, records):
    """Every record is there, and each worker's are in order; says how many."""
    expected = Counter()
    for line in path.read_text().splitlines():
        name, number = line.split()[2], int(line.split()[6])
        if number != expected[name]:
            raise SystemExit(f"{name}: expected record {expected[name]}, got {number}")
        expected[name] += 1
    if len(expected) != workers or set(expected.values()) != {records}:
        raise SystemExit(f"records are missing: {dict(expected)}")
    return expected.total()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=4, help="how many processes log")
    parser.add_argument("--records", type=int, default=5000, help="how many records each")
    arguments = parser.parse_args()
    for name in ("workers", "records"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    found = {}
    for name, body in (("multiprocessing.Queue", run_queue), ("SharedChannel", run_channel)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "all.log"
            before = cpu_seconds()
            seconds = body(arguments.workers, arguments.records, path)
            found[name] = cpu_seconds() - before
            count = check(path, arguments.workers, arguments.records)
        each = 1e6 * found[name] / count
        print(f"{name:22} {count / seconds:7.0f} records/s, {each:.0f} us of CPU each, in order")
    share = found["SharedChannel"] / found["multiprocessing.Queue"]
    print(f"SharedChannel takes {share:.2f} of the CPU time of multiprocessing")


if __name__ == "__main__":
    main()
