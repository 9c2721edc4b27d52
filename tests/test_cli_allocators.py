"""Allocators are found where pip and distributions put them, and selected by the environment."""

from pathlib import Path

import pytest

from moirai.cli.allocators import Allocator, find_all, select, with_allocator
from moirai.errors import InvalidArgument, Unsupported

GLIBC = ("glibc", "2.36")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_libraries_are_found_in_the_first_directory_that_has_them(tmp_path: Path) -> None:
    from_pip = touch(tmp_path / "site" / "cmeel.prefix" / "lib" / "libmimalloc.so")
    touch(tmp_path / "usr" / "libmimalloc.so.2.0")
    jemalloc = touch(tmp_path / "usr" / "libjemalloc.so.2")
    tcmalloc = touch(tmp_path / "usr" / "libtcmalloc_minimal.so.4")
    directories = [from_pip.parent, tmp_path / "absent", tmp_path / "usr"]
    found = find_all(library_directories=directories, libc=GLIBC)
    assert found == {
        "system": Allocator("system", None),
        "tuned": Allocator("tuned", None),
        "jemalloc": Allocator("jemalloc", str(jemalloc)),
        "mimalloc": Allocator("mimalloc", str(from_pip)),
        "tcmalloc": Allocator("tcmalloc", str(tcmalloc)),
    }


def test_versioned_library_serves_where_the_plain_name_is_missing(tmp_path: Path) -> None:
    touch(tmp_path / "libmimalloc.so.2")
    newest = touch(tmp_path / "libmimalloc.so.3")
    touch(tmp_path / "libmimalloc-debug.so")
    found = find_all(library_directories=[tmp_path], libc=GLIBC)
    assert found["mimalloc"].library == str(newest)


def test_library_whose_path_the_loader_would_split_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "with space" / "libjemalloc.so.2")
    assert "jemalloc" not in find_all(library_directories=[tmp_path / "with space"], libc=GLIBC)


def test_tunables_need_the_gnu_c_library(tmp_path: Path) -> None:
    found = find_all(library_directories=[tmp_path], libc=("", ""))
    assert list(found) == ["system"]
    with pytest.raises(Unsupported, match=r"tuned was not found .* GNU C library"):
        select("tuned", found)


def test_absent_allocator_says_how_to_get_it(tmp_path: Path) -> None:
    found = find_all(library_directories=[tmp_path], libc=GLIBC)
    with pytest.raises(Unsupported, match=r"mimalloc was not found .* pip install cmeel-mimalloc"):
        select("mimalloc", found)
    with pytest.raises(Unsupported, match="libjemalloc2"):
        select("jemalloc", found)
    with pytest.raises(Unsupported, match="libtcmalloc-minimal4"):
        select("tcmalloc", found)


def test_unknown_allocator_is_refused_by_name() -> None:
    with pytest.raises(
        InvalidArgument, match=r"allocator: expected one of system, .*, got 'hoard'"
    ):
        select("hoard", {})


def test_system_changes_nothing() -> None:
    assert with_allocator(Allocator("system", None), {"LD_PRELOAD": "x.so"}) == {}


def test_what_the_user_preloads_comes_after_the_allocator() -> None:
    jemalloc = Allocator("jemalloc", "/lib/libjemalloc.so.2")
    variables = with_allocator(jemalloc, {"LD_PRELOAD": "/lib/a.so", "MALLOC_CONF": "narenas:1"})
    assert variables["LD_PRELOAD"] == "/lib/libjemalloc.so.2:/lib/a.so"
    # jemalloc takes the last of equal options: the user's.
    assert variables["MALLOC_CONF"].startswith("oversize_threshold:0,thp:always,")
    assert variables["MALLOC_CONF"].endswith(",narenas:1")


def test_tunables_of_the_user_come_last_and_ours_only_once() -> None:
    tuned = Allocator("tuned", None)
    once = with_allocator(tuned, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=1"})
    assert once["GLIBC_TUNABLES"].startswith("glibc.malloc.hugetlb=1:")
    assert once["GLIBC_TUNABLES"].endswith(":glibc.malloc.top_pad=1")
    assert with_allocator(tuned, once) == once
