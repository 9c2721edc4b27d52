"""Load and augment batches of images in worker processes, for a program that learns from them.

Workers take numbers of batches, cut and flip patches of photographs, and hand each batch to the
program: the shape of PyTorch's DataLoader with `num_workers`. The loader is written once, for
whatever module its queues come from: multiprocessing, or `moirai.channels.processes`, which copies
a batch once, into shared memory, where the program has it. With PyTorch installed, batches become
tensors (without a copy); without it, they stay arrays. The photographs come inside the wheel of
scikit-image.

    python examples/data_loader.py --batches 200
"""

import argparse
import importlib.util
import multiprocessing
import resource
import time
import zlib
from pathlib import Path

import numpy as np
from skimage import io

from moirai.channels import processes

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg")
AHEAD = 2  # batches that each worker makes in advance
CONTEXT = multiprocessing.get_context("fork")


def load():
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    return [io.imread(folder / name)[..., :3] for name in PHOTOGRAPHS]


def make_batch(photographs, number, count, size):
    """Cut `count` patches at random places, some of them mirrored; the same for a number always."""
    random = np.random.default_rng(number)
    batch = np.empty((count, size, size, 3), np.uint8)
    labels = random.integers(len(photographs), size=count)
    for patch, label in zip(batch, labels, strict=True):
        photograph = photographs[label]
        top = random.integers(photograph.shape[0] - size)
        left = random.integers(photograph.shape[1] - size)
        cut = photograph[top : top + size, left : left + size]
        patch[...] = cut[:, :: random.choice((-1, 1))]
    return batch, labels


class Loader:
    """Iterates over batches, in order, that worker processes make; `queues` has the Queue."""

    def __init__(self, queues, photographs, *, batches, count, size, workers):
        self.batches = batches
        self.wanted, self.made = queues.Queue(), queues.Queue()
        self.workers = [
            CONTEXT.Process(target=self.work, args=(photographs, count, size))
            for _ in range(workers)
        ]

    def work(self, photographs, count, size):
        while (number := self.wanted.get()) is not None:
            self.made.put((number, *make_batch(photographs, number, count, size)))

    def __iter__(self):
        for worker in self.workers:
            worker.start()
        ahead = AHEAD * len(self.workers)
        for number in range(min(ahead, self.batches)):
            self.wanted.put(number)
        early = {}
        for number in range(self.batches):
            while number not in early:
                at, batch, labels = self.made.get()
                early[at] = batch, labels
            if number + ahead < self.batches:
                self.wanted.put(number + ahead)
            yield early.pop(number)
        for _ in self.workers:
            self.wanted.put(None)
        for worker in self.workers:
            worker.join()


def cpu_seconds():
    """CPU time of this process and of those that it has waited for."""
    # Not os.times(), which counts in steps of 10 ms: a small run would have taken none.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def to_tensor():
    """How a batch becomes what the program works with."""
    if importlib.util.find_spec("torch") is None:
        return "arrays", lambda batch: batch
    import torch

    return "tensors", torch.from_numpy


def learn(loader, convert):
    """Sum the mean colour of each class, as a model would; seconds, CPU seconds, a checksum."""
    sums = np.zeros((len(PHOTOGRAPHS), 3))
    started, before = time.perf_counter(), cpu_seconds()
    for batch, labels in loader:
        pixels = np.asarray(convert(batch))[:, ::16, ::16]
        np.add.at(sums, labels, pixels.mean(axis=(1, 2)))
    seconds = time.perf_counter() - started
    return seconds, cpu_seconds() - before, zlib.crc32(sums.round(6).tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--count", type=int, default=32, help="patches of a batch")
    parser.add_argument("--size", type=int, default=160, help="pixels of a patch's side")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for name in ("batches", "count", "size", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    photographs = load()
    kind, convert = to_tensor()
    found = {}
    for name, queues in (("multiprocessing", CONTEXT), ("moirai.channels.processes", processes)):
        loader = Loader(queues, photographs, **vars(arguments))
        seconds, cpu, checksum = learn(loader, convert)
        found[name] = cpu
        size = arguments.count * arguments.size**2 * 3 / 2**20
        print(
            f"{name:26} {arguments.batches / seconds:5.0f} batches/s of {size:.1f} MiB as {kind}, "
            f"{1000 * cpu / arguments.batches:.2f} ms of CPU each, checksum {checksum:08x}"
        )
    share = found["moirai.channels.processes"] / found["multiprocessing"]
    print(f"moirai.channels.processes takes {share:.2f} of the CPU time of multiprocessing")


if __name__ == "__main__":
    main()
