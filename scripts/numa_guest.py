"""Boot a machine with two memory nodes in an emulator, and look there where memory really lies.

Most machines that tests run on have one node. This makes an archive of this interpreter, NumPy and
the built package, boots it under a Linux kernel in qemu (two nodes of two CPUs each), and runs
`numa_guest_program.py` inside. Needs `qemu-system-x86_64` and a kernel image that can be read, such
as that of Debian's linux-image-cloud-amd64; takes about half a minute.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "scripts" / "numa_guest_program.py"
LEFT_OUT = {"test", "tests", "idlelib", "ensurepip", "__pycache__", "site-packages"}
NODE_MIB = 1536


def package_files() -> Iterator[Path]:
    """Every file that the guest needs, by its path on this machine, which it keeps."""
    import numpy

    import moirai

    yield Path(os.path.realpath(sys.executable))
    standard_library = Path(os.__file__).parent
    numpy_package = Path(numpy.__file__).parent
    folders = [standard_library, numpy_package, Path(moirai.__file__).parent]
    folders.append(numpy_package.with_name("numpy.libs"))
    for folder in folders:
        for place, names, files in os.walk(folder):
            names[:] = [name for name in names if name not in LEFT_OUT]
            yield from (Path(place) / name for name in files)


def libraries(files: list[Path]) -> set[Path]:
    """The shared libraries that some of the files link, the loader included."""
    binaries = [str(path) for path in files if ".so" in path.name or path == files[0]]
    linked = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+\.so\S*) \(0x", linked)}


def write_archive(archive: BinaryIO, files: list[Path], init: str) -> None:
    """Write a file system in the format a kernel unpacks at boot (cpio, "newc")."""
    count = 0

    def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        nonlocal count
        count += 1
        path = name.lstrip("/").encode() + b"\0"
        fields = [count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + path
        archive.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    folders = {Path(name) for name in ("/proc", "/sys", "/dev")}
    for path in files:
        folders.update(path.parents)
    for folder in sorted(folders - {Path("/")}):
        add(str(folder), stat.S_IFDIR | 0o755)
    for path in files:
        add(str(path), stat.S_IFREG | 0o755, path.read_bytes())
    add("/init", stat.S_IFREG | 0o755, init.encode())
    add("/dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    add("TRAILER!!!", 0)


def init_program() -> str:
    """What the guest's kernel starts: mounts what Python needs, runs the program, turns off."""
    paths = [str(ROOT / "python"), *(path for path in sys.path if "site-packages" in path)]
    return f"""#!{os.path.realpath(sys.executable)} -B
import ctypes, sys, traceback
libc = ctypes.CDLL(None)
for kind, place in ((b"proc", b"/proc"), (b"sysfs", b"/sys"), (b"devtmpfs", b"/dev")):
    libc.mount(kind, place, kind, 0, None)
sys.path += {paths!r}
try:
    exec({PROGRAM.read_text()!r})
    print("guest: passed")
except BaseException:
    traceback.print_exc(file=sys.stdout)
    print("guest: failed")
sys.stdout.flush()
libc.reboot(0x4321FEDC)
"""


def boot(kernel: Path, archive: Path, timeout_seconds: float) -> str:
    """Run the guest to its end; what it printed."""
    command = ["qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-smp", "4"]
    command += ["-m", f"{2 * NODE_MIB}M", "-kernel", str(kernel), "-initrd", str(archive)]
    command += ["-append", "console=ttyS0 quiet panic=-1", "-nographic", "-no-reboot"]
    command += ["-net", "none"]
    for node in (0, 1):
        command += ["-object", f"memory-backend-ram,size={NODE_MIB}M,id=memory{node}"]
        cpus = f"cpus={2 * node}-{2 * node + 1}"
        command += ["-numa", f"node,nodeid={node},memdev=memory{node},{cpus}"]
    command += ["-numa", "dist,src=0,dst=1,val=21"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_seconds,
        check=False,
    )
    return (done.stdout + done.stderr).decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel", type=Path, help="a Linux kernel image with NUMA support")
    parser.add_argument("--timeout-seconds", type=float, default=600)
    arguments = parser.parse_args()
    files = list(package_files())
    files += sorted(libraries(files))
    with tempfile.NamedTemporaryFile(suffix=".cpio") as archive:
        write_archive(archive, list(dict.fromkeys(files)), init_program())
        archive.flush()
        printed = boot(arguments.kernel, Path(archive.name), arguments.timeout_seconds)
    print(printed)
    return 0 if "guest: passed" in printed else 1


if __name__ == "__main__":
    sys.exit(main())
