"""`moirai doctor` reads what the kernel says, here from trees written as kernels write them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moirai.cli import doctor, machine
from moirai.reports import doctor as report

NO_LIMIT = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)


def test_smallest_limit_on_the_way_up_counts_in_version_2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a.slice/b.service\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "sys/fs/cgroup/a.slice/memory.max": "1073741824\n",
            "sys/fs/cgroup/a.slice/memory.current": "1000\n",
            "sys/fs/cgroup/a.slice/b.service/cgroup.controllers": "memory pids",
            "sys/fs/cgroup/a.slice/b.service/memory.max": "max\n",
            "sys/fs/cgroup/a.slice/b.service/memory.current": "500\n",
        },
    )
    assert machine.cgroup_memory(root) == machine.CgroupMemory(2, 1 << 30, "/a.slice", 1000)


def test_container_sees_its_own_limit_at_the_mount_point(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../docker/abc\n",
            "proc/self/mountinfo": V2_MOUNT.replace("0:26 / ", "0:26 /docker/xyz "),
            "sys/fs/cgroup/cgroup.controllers": "memory",
            "sys/fs/cgroup/memory.max": "536870912\n",
            "sys/fs/cgroup/memory.current": "100\n",
        },
    )
    assert machine.cgroup_memory(root) == machine.CgroupMemory(2, 512 << 20, "/", 100)


def test_version_1_is_read_beside_an_empty_version_2(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/jobs/1\n1:cpu:/\n0::/\n",
            "proc/self/mountinfo": V1_MOUNT,
            top + "memory.limit_in_bytes": NO_LIMIT,
            top + "jobs/memory.limit_in_bytes": "2147483648\n",
            top + "jobs/memory.usage_in_bytes": "7\n",
            top + "jobs/1/memory.limit_in_bytes": "4294967296\n",
            top + "jobs/1/memory.usage_in_bytes": "6\n",
        },
    )
    assert machine.cgroup_memory(root) == machine.CgroupMemory(1, 2 << 30, "/jobs", 7)


def test_no_limit_anywhere_is_none(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "proc/self/mountinfo": V1_MOUNT,
            top + "memory.limit_in_bytes": NO_LIMIT,
        },
    )
    assert machine.cgroup_memory(root) == machine.CgroupMemory(1, None, None, None)


def test_machine_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    assert machine.cgroup_memory(tmp_path) is None
    assert machine.meminfo(tmp_path) == {}
    assert machine.hugetlb_pages(tmp_path) is None
    assert machine.numa_node_count(tmp_path) == 1
    assert machine.selected(tmp_path / "enabled") is None
    examined = doctor.examine(tmp_path)
    assert (examined.thp_mode, examined.memory_bytes) == (None, None)
    assert "no transparent huge pages" in report.to_text(examined)


def test_memory_nodes_and_modes_are_read(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": (
                "MemTotal:       16384 kB\nMemAvailable:    8192 kB\nHugePages_Total:       4\n"
                "HugePages_Free:        3\nHugepagesize:       2048 kB\n"
            ),
            "sys/devices/system/node/online": "0-1,4\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            "sys/kernel/mm/transparent_hugepage/defrag": "always [defer+madvise] never\n",
            "proc/sys/vm/overcommit_memory": "2\n",
        },
    )
    examined = doctor.examine(root)
    assert (examined.memory_bytes, examined.available_bytes) == (16 << 20, 8 << 20)
    assert (examined.hugetlb_total, examined.hugetlb_free) == (4, 3)
    assert examined.hugetlb_bytes == 2 << 20
    assert (examined.numa_node_count, examined.overcommit_mode) == (3, 2)
    assert (examined.thp_mode, examined.thp_defrag) == ("never", "defer+madvise")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, "nothing to install into"),
        ("1.26.4", "default data handler"),
        ("2.4.6", "default data handler"),
        ("2.5.0rc1", "default data handler"),
        ("2.10.0", "default data handler"),
    ],
)
def test_install_is_described_for_the_version_of_numpy(version: str | None, expected: str) -> None:
    assert expected in doctor.how_install_works(version)


@pytest.fixture(scope="module")
def sound() -> report.Machine:
    """This machine's facts, with everything that could give a finding put right."""
    return replace(
        doctor.examine(Path("/")),
        native_problem=None,
        numpy="2.4.6",
        thp_mode="madvise",
        cgroup_limit_bytes=None,
        address_space_limit_bytes=None,
        overcommit_mode=0,
        numa_node_count=1,
        cpu_count=2,
        usable_cpu_count=2,
        memory_bytes=16 << 30,
        page_bytes=4096,
    )


def test_sound_machine_has_no_findings(sound: report.Machine) -> None:
    assert report.findings(sound) == []
    assert "nothing stands in the way" in report.to_text(sound)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"native_problem": "no such file"}, "cannot be loaded: no such file"),
        ({"numpy": None}, "NumPy is not installed"),
        ({"thp_mode": "never"}, "huge pages cannot help"),
        ({"thp_mode": None}, "has no transparent huge pages"),
        ({"thp_mode": "always"}, "every allocator gets them"),
        ({"address_space_limit_bytes": 4 << 30}, "limited to 4.0 GiB"),
        ({"overcommit_mode": 2}, "Overcommit"),
        ({"numa_node_count": 2}, "2 NUMA nodes"),
        ({"usable_cpu_count": 1}, "Only 1 of 2 CPUs"),
        ({"page_bytes": 65536}, "64.0 KiB"),
        (
            {"cgroup_limit_bytes": 1 << 30, "cgroup_used_bytes": 1 << 20},
            "the cgroup's 1.0 GiB, not the machine's 16.0 GiB",
        ),
        (
            {
                "cgroup_limit_bytes": 32 << 30,
                "cgroup_used_bytes": 30 << 30,
                "cgroup_limit_path": "/jobs",
            },
            "The cgroup /jobs uses 30.0 GiB",
        ),
    ],
)
def test_finding_names_what_stands_in_the_way(
    sound: report.Machine, change: dict[str, object], expected: str
) -> None:
    (sentence,) = report.findings(replace(sound, **change))  # type: ignore[arg-type]
    assert expected in sentence


def test_command_prints_text_and_json() -> None:
    command = [sys.executable, "-m", "moirai", "doctor"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (text.returncode, text.stderr) == (0, "")
    for name in ("transparent huge pages", "cgroup memory", "NUMA nodes", "mimalloc", "install()"):
        assert name in text.stdout
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    content = json.loads(as_json.stdout)
    assert content["schema"] == "moirai.doctor/1"
    assert content["memory_bytes"] > 0
    assert content["findings"] == report.findings(doctor.examine(Path("/")))


def test_unknown_option_is_refused() -> None:
    command = [sys.executable, "-m", "moirai", "doctor", "--jsn"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "unrecognized arguments: --jsn" in result.stderr
