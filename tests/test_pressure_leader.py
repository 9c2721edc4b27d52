"""One process of those under a limit acts first."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable

from running import in_forked_child

from moirai.pressure import Registry, start, stop
from moirai.pressure.leader import Leader

Runner = Callable[..., str]

OTHER = """
import sys
from moirai.pressure.leader import Leader

leader = Leader(sys.argv[1])
for line in sys.stdin:
    if line == "release\\n":
        leader.release()
    else:
        print(leader(), flush=True)
"""


def name() -> str:
    return f"test {uuid.uuid4()}"


def test_the_next_that_asks_leads_when_the_leader_ends() -> None:
    limit = name()
    leader = Leader(limit)
    assert leader()
    assert leader()
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, limit],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as other:  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None

        def other_leads() -> bool:
            assert other.stdin is not None
            assert other.stdout is not None
            other.stdin.write("ask\n")
            return other.stdout.readline() == "True\n"

        assert not other_leads()
        leader.release()
        assert other_leads()
        assert not leader()
        other.kill()  # The kernel gives the lock back; nobody takes the file away.
        other.wait()
        assert leader()
    leader.release()
    assert not os.path.exists(leader.path)


def test_a_forked_child_does_not_lead_while_its_parent_does() -> None:
    leader = Leader(name())
    assert leader()

    def child() -> None:
        assert not leader()

    in_forked_child(child)
    assert leader()
    leader.release()


def test_a_child_leads_when_its_parent_does_not() -> None:
    leader = Leader(name())

    def child() -> None:
        assert leader()

    in_forked_child(child)
    assert leader()
    leader.release()


def test_limits_of_other_names_have_other_leaders() -> None:
    first, second = Leader(name()), Leader(name())
    assert first()
    assert second()
    first.release()
    second.release()


def test_without_a_place_for_the_file_everybody_leads(tmp_path: object) -> None:
    leader = Leader(name())
    leader.path = f"{tmp_path}/nowhere/leader"
    assert leader()


def test_a_guard_of_a_budget_has_a_leader_and_gives_it_back(tmp_path: object) -> None:
    guard = start(limit="1 GiB", registry=Registry())
    leads = guard._leads
    assert isinstance(leads, Leader)
    assert leads()
    assert os.path.exists(leads.path)
    stop()
    assert not os.path.exists(leads.path)
