"""Pass frames from a camera to two filters and on, each in a process of its own.

One process makes frames (crops that wander over photographs, as a camera that pans), one finds the
edges in each, one counts how much moved from frame to frame and shows what it found. The same
pipeline runs twice: over multiprocessing's queues, and over Moirai's shared channels, where a frame
is written once into shared memory and read there. The photographs come inside the wheel of
scikit-image.

    python examples/frame_pipeline.py --frames 200
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

from moirai.channels import SharedChannel

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg")
CONTEXT = multiprocessing.get_context("fork")


def load(height, width):
    """Read the photographs, each repeated to at least the size of two frames."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    found = []
    for name in PHOTOGRAPHS:
        image = io.imread(folder / name)[..., :3]
        repeats = (-(-2 * height // image.shape[0]), -(-2 * width // image.shape[1]), 1)
        found.append(np.tile(image, repeats))
    return found


def crops(photographs, count, height, width):
    """Yield the views of a camera that pans over one photograph after the other."""
    for number in range(count):
        photograph = photographs[number * len(photographs) // count]
        top = 3 * number % (photograph.shape[0] - height)
        left = 5 * number % (photograph.shape[1] - width)
        yield photograph[top : top + height, left : left + width]


def find_edges(frame, out):
    """Write the frame's edges: how far each pixel is from its right and lower neighbours."""
    grey = frame[..., 1].astype(np.int16)
    out[...] = 0
    across = np.abs(grey[:, 1:] - grey[:, :-1])
    down = np.abs(grey[1:] - grey[:-1])
    out[:-1, :-1] = np.minimum(across[:-1] + down[:, :-1], 255)


class Watcher:
    """Counts the pixels that changed by more than a little, and sums up what came."""

    def __init__(self):
        self.last = None
        self.moved = 0
        self.checksum = 0

    def see(self, edges):
        if self.last is not None:
            self.moved += int(np.count_nonzero(np.abs(edges.astype(np.int16) - self.last) > 16))
        self.last = edges.astype(np.int16)
        self.checksum = zlib.crc32(edges, self.checksum)

    def report(self):
        return f"moved {self.moved}, checksum {self.checksum:08x}"


# === over multiprocessing's queues ==============================================================


def run_queues(photographs, count, height, width):
    frames, edges, result = CONTEXT.Queue(4), CONTEXT.Queue(4), CONTEXT.SimpleQueue()

    def camera():
        for frame in crops(photographs, count, height, width):
            frames.put(frame)
        frames.put(None)

    def detector():
        while (frame := frames.get()) is not None:
            found = np.empty(frame.shape[:2], np.uint8)
            find_edges(frame, found)
            edges.put(found)
        edges.put(None)

    def watcher():
        watching = Watcher()
        while (found := edges.get()) is not None:
            watching.see(found)
        result.put(watching.report())

    return run([camera, detector, watcher], result)


# === over shared channels =======================================================================


def run_channels(photographs, count, height, width):
    frames = SharedChannel.create(capacity_bytes=4 * (height * width * 3 + 65536))
    edges = SharedChannel.create(capacity_bytes=4 * (height * width + 65536))
    result = CONTEXT.SimpleQueue()

    def camera():
        with frames.sender() as sender:
            for frame in crops(photographs, count, height, width):
                with sender.reserve(frame.shape, np.uint8) as slot:
                    slot[...] = frame

    def detector():
        with frames.receiver() as receiver, edges.sender() as sender:
            for frame in receiver:
                with sender.reserve(frame.shape[:2], np.uint8) as slot:
                    find_edges(frame, slot)

    def watcher():
        watching = Watcher()
        with edges.receiver() as receiver:
            for found in receiver:
                watching.see(found)
        result.put(watching.report())

    return run([camera, detector, watcher], result)


def cpu_seconds():
    """CPU time of this process and of those that it has waited for."""
    # Not os.times(), which counts in steps of 10 ms: a small run would have taken none.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def run(stages, result):
    """Run each stage in a process; seconds, CPU seconds, and what the last one reported."""
    workers = [CONTEXT.Process(target=stage) for stage in stages]
    started, before = time.perf_counter(), cpu_seconds()
    for worker in workers:
        worker.start()
    report = result.get()
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"{worker.name} ended with status {worker.exitcode}")
    return seconds, cpu_seconds() - before, report


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=150, help="how many frames to pass")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    arguments = parser.parse_args()
    if arguments.frames < 1:
        parser.error(f"--frames: must be at least 1, got {arguments.frames}")
    photographs = load(arguments.height, arguments.width)
    found = {}
    for name, body in (("multiprocessing.Queue", run_queues), ("SharedChannel", run_channels)):
        seconds, cpu, report = body(
            photographs, arguments.frames, arguments.height, arguments.width
        )
        found[name] = cpu
        rate, each = arguments.frames / seconds, 1000 * cpu / arguments.frames
        print(f"{name:22} {rate:7.0f} frames/s, {each:.2f} ms of CPU each")
        print(f"{'':22} {report}")
    share = found["SharedChannel"] / found["multiprocessing.Queue"]
    print(f"SharedChannel takes {share:.2f} of the CPU time of multiprocessing")


if __name__ == "__main__":
    main()
