"""Fake trees of /proc and /sys, as kernels show them, that tests write and change in place."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20
PAGE = 4096
UNLIMITED_V1 = 9223372036854771712


class Tree:
    """A root with a machine of 16 GiB and one process, number `self`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host(total_mib=16384, available_mib=12288)
        self.process(resident_mib=100)
        self.limits()

    def write(self, path: str, text: str) -> None:
        """Write a file in place, so that whoever has it open sees the change."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def host(self, *, total_mib: int, available_mib: int) -> None:
        lines = f"MemTotal: {total_mib * 1024} kB\nMemFree: 1 kB\n"
        self.write("proc/meminfo", lines + f"MemAvailable:   {available_mib * 1024} kB\n")

    def process(
        self, *, resident_mib: int, file_mib: int = 20, data_mib: int = 300, size_mib: int = 900,
        name: str = "self",
    ) -> None:  # fmt: skip
        pages = [mib * MIB // PAGE for mib in (size_mib, resident_mib, file_mib)]
        data = data_mib * MIB // PAGE
        self.write(f"proc/{name}/statm", f"{pages[0]} {pages[1]} {pages[2]} 5 0 {data} 0\n")
        self.write(f"proc/{name}/stat", f"7 (a) b) S {' '.join(['0'] * 6)} 4321 0 0\n")

    def limits(self, *, address_space: str = "unlimited", data: str = "unlimited") -> None:
        head = "Limit                     Soft Limit           Hard Limit           Units\n"
        space = f"Max address space         {address_space}            unlimited       bytes\n"
        self.write(
            "proc/self/limits", head + f"Max data size     {data}  unlimited  bytes\n" + space
        )

    def family(self, children: dict[str, list[str]]) -> None:
        """Say who the children of each process are."""
        for parent, names in children.items():
            self.write(f"proc/{parent}/task/1/children", " ".join(names) + " ")

    def proportional(self, name: str, mib: int) -> None:
        self.write(f"proc/{name}/smaps_rollup", f"0-1 ---p [rollup]\nPss:  {mib * 1024} kB\n")

    # Control groups.

    def join_v2(self, path: str, *, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{path}\n")
        self.write(
            "proc/self/mountinfo",
            "22 1 0:20 / / rw - ext4 /dev/vda rw\n"
            f"30 22 0:26 {mount_root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
        )

    def join_v1(self, path: str, *, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"9:name=systemd:/\n4:cpu,memory:{path}\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
            "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
            f"35 31 0:32 {mount_root} /sys/fs/cgroup/cpu\\040and\\040memory rw shared:7"
            " - cgroup cgroup rw,cpu,memory\n"
            "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        )

    def v2(
        self, group: str, *, current_mib: int, maximum_mib: int | None = None,
        high_mib: int | None = None, inactive_mib: int = 0, active_mib: int = 0,
    ) -> None:  # fmt: skip
        folder = f"sys/fs/cgroup/{group}".rstrip("/")
        as_text = lambda mib: "max" if mib is None else str(mib * MIB)  # noqa: E731
        self.write(f"{folder}/memory.current", f"{current_mib * MIB}\n")
        self.write(f"{folder}/memory.max", f"{as_text(maximum_mib)}\n")
        self.write(f"{folder}/memory.high", f"{as_text(high_mib)}\n")
        stat = (
            f"anon 1\nfile 2\nactive_file {active_mib * MIB}\ninactive_file {inactive_mib * MIB}\n"
        )
        self.write(f"{folder}/memory.stat", stat)
        self.write(f"{folder}/memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n")
        self.write(f"{folder}/memory.pressure", "some avg10=12.50 avg60=0.00 total=9\n")

    def v1(
        self, group: str, *, usage_mib: int, limit_mib: int | None = None,
        hierarchical_mib: int | None = None, inactive_mib: int = 0, active_mib: int = 0,
    ) -> None:  # fmt: skip
        folder = f"sys/fs/cgroup/cpu and memory/{group}".rstrip("/")
        number = lambda mib: UNLIMITED_V1 if mib is None else mib * MIB  # noqa: E731
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage_mib * MIB}\n")
        self.write(f"{folder}/memory.limit_in_bytes", f"{number(limit_mib)}\n")
        stat = (
            "inactive_file 1\nactive_file 1\n"
            f"hierarchical_memory_limit {number(hierarchical_mib)}\n"
            f"total_inactive_file {inactive_mib * MIB}\ntotal_active_file {active_mib * MIB}\n"
        )
        self.write(f"{folder}/memory.stat", stat)
        self.write(f"{folder}/memory.failcnt", "5\n")
        self.write(f"{folder}/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
