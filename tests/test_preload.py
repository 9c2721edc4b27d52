"""The preloadable library: a process's malloc with the large-object heap behind it."""

import os
import subprocess
import sys

import pytest

from moirai.cli.allocators import find_all, with_allocator

FOUND = find_all()
pytestmark = pytest.mark.skipif("moirai" not in FOUND, reason="the library is not built")

PRELUDE = """
import ctypes, os, random, sys, threading

libc = ctypes.CDLL(None, use_errno=True)
pointer, size_t = ctypes.c_void_p, ctypes.c_size_t
for name, result, arguments in [
    ("malloc", pointer, [size_t]),
    ("calloc", pointer, [size_t, size_t]),
    ("realloc", pointer, [pointer, size_t]),
    ("free", None, [pointer]),
    ("aligned_alloc", pointer, [size_t, size_t]),
    ("memalign", pointer, [size_t, size_t]),
    ("valloc", pointer, [size_t]),
    ("pvalloc", pointer, [size_t]),
    ("malloc_usable_size", size_t, [pointer]),
    ("posix_memalign", ctypes.c_int, [ctypes.POINTER(pointer), size_t, size_t]),
]:
    function = getattr(libc, name)
    function.restype, function.argtypes = result, arguments

LARGE = 64 << 10

def is_ours(address):
    # The heap's blocks are aligned to a cache line; glibc's lie 16 bytes behind one of its own.
    return address % 64 == 0

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
"""


def run(code: str, *, shell_limit: str = "") -> str:
    environment = {**os.environ, **with_allocator(FOUND["moirai"], {})}
    command = [sys.executable, "-c", PRELUDE + code]
    if shell_limit:
        command = ["sh", "-c", f'{shell_limit} && exec "$@"', "sh", *command]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.strip()


def test_blocks_keep_their_bytes_whatever_becomes_of_them() -> None:
    run("""
source = random.Random(7)
live = []

def size():
    return source.choice([0, 1, 100, 5000, LARGE - 1, LARGE, LARGE + 1, 300_000, 3 << 20, 9 << 20])

def fill(address, bytes_):
    mark = source.randrange(1, 256)
    ctypes.memset(address, mark, bytes_)
    live.append((address, bytes_, mark))

def intact(address, bytes_, mark):
    if bytes_:
        text = ctypes.string_at(address, bytes_)
        assert text.count(mark) == bytes_

for _ in range(1500):
    action = source.randrange(6)
    bytes_ = size()
    if action < 2:
        address = libc.malloc(bytes_)
        assert address and libc.malloc_usable_size(address) >= bytes_
        fill(address, bytes_)
    elif action == 2:
        address = libc.calloc(bytes_ or 1, 1)
        assert not any(ctypes.string_at(address, min(bytes_, 70_000)))
        fill(address, bytes_)
    elif action == 3:
        alignment = 1 << source.randrange(3, 22)
        place = pointer()
        assert libc.posix_memalign(ctypes.byref(place), alignment, bytes_) == 0
        assert place.value % alignment == 0
        fill(place.value, bytes_)
    elif live:
        address, old, mark = live.pop(source.randrange(len(live)))
        if action == 4:
            intact(address, old, mark)
            libc.free(address)
        else:
            bytes_ = bytes_ or 1
            address = libc.realloc(address, bytes_)
            intact(address, min(old, bytes_), mark)
            fill(address, bytes_)
for address, bytes_, mark in live:
    intact(address, bytes_, mark)
    libc.free(address)
""")


def test_large_blocks_are_the_heaps_and_small_ones_are_not() -> None:
    run("""
assert is_ours(libc.malloc(LARGE)) and is_ours(libc.calloc(1, 1 << 20))
assert is_ours(libc.valloc(1 << 20)) and is_ours(libc.pvalloc(LARGE))
assert not all(is_ours(libc.malloc(5000)) for _ in range(20))
assert "libmoirai_malloc" in open("/proc/self/maps").read()
""")


def test_bad_requests_answer_as_libc_does() -> None:
    run("""
import errno
for ask in (lambda: libc.malloc(1 << 62), lambda: libc.calloc(1 << 40, 1 << 40),
            lambda: libc.realloc(None, 1 << 62), lambda: libc.pvalloc((1 << 64) - 1)):
    ctypes.set_errno(0)
    assert ask() is None and ctypes.get_errno() == errno.ENOMEM
place = pointer()
assert libc.posix_memalign(ctypes.byref(place), 3, 100) == errno.EINVAL
assert libc.posix_memalign(ctypes.byref(place), 4, 100) == errno.EINVAL
block = libc.malloc(1 << 20)
ctypes.memset(block, 7, 1 << 20)
assert libc.realloc(block, 1 << 62) is None, "and the block is still there"
assert ctypes.string_at(block, 1 << 20).count(7) == 1 << 20
assert libc.realloc(block, 0) is None
libc.free(None)
assert libc.malloc_usable_size(None) == 0
assert libc.malloc(0)
""")


def test_freed_memory_stays_warm_and_goes_back_by_age() -> None:
    run("""
import time
before = resident()
blocks = [libc.malloc(8 << 20) for _ in range(16)]
for block in blocks:
    ctypes.memset(block, 1, 8 << 20)
assert resident() - before > 120 << 20
for block in blocks:
    libc.free(block)
deadline = time.monotonic() + 30
while resident() - before > 16 << 20:
    assert time.monotonic() < deadline, "nothing went back"
    time.sleep(0.01)
""")


def test_threads_and_forked_children_use_the_same_heap() -> None:
    run("""
stop = threading.Event()

def work():
    while not stop.is_set():
        libc.free(libc.realloc(libc.malloc(100_000), 300_000))

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        for _ in range(20):
            libc.free(libc.malloc(1 << 20))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
""")


def test_little_address_space_is_enough() -> None:
    assert (
        run(
            "print(sum(bytearray(b'x') * (20 << 20)) // (20 << 20))",
            shell_limit="ulimit -v 4000000",
        )
        == "120"
    )


def test_other_programs_run_under_it() -> None:
    environment = {**os.environ, **with_allocator(FOUND["moirai"], {})}
    ended = subprocess.run(
        ["sort", "-r"],
        input="".join(f"{number:06}\n" for number in range(100_000)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.startswith("099999\n099998\n")
    assert ended.stderr == ""


def test_numpy_is_left_to_it_unless_a_memory_is_named() -> None:
    code = "import numpy; from moirai import memory; print(memory.installed() is not None)"
    for options, expected in (([], "False"), (["--memory", "pool"], "True")):
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "moirai", "run", "--allocator", "moirai"),
                *("--summary", "none", *options, "-c", code),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ended.stdout.strip(), ended.stderr) == (expected, "")
