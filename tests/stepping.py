"""Kill a process after any number of its instructions, by single steps: no point is missed."""

import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any

_TRACEME, _SINGLESTEP = 0, 9
_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


def _run(prepare: Callable[[], Any], act: Callable[[Any], object]) -> None:
    state = prepare()
    if _ptrace(_TRACEME, 0, None, None) != 0:
        os._exit(3)
    os.kill(os.getpid(), signal.SIGSTOP)
    act(state)
    # Not the end of the process, which would close what the kernel would have to.
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(steps: int | None, prepare: Callable[[], Any], act: Callable[[Any], object]) -> int:
    """Fork; run `prepare` freely, then so many instructions of `act`, then kill; None: all of it.

    Returns:
        How many instructions ran; -1 if this machine does not let a process be traced.
    """
    child = os.fork()
    if child == 0:
        try:
            _run(prepare, act)
        finally:
            os._exit(4)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSTOPPED(status):
        assert os.waitstatus_to_exitcode(status) == 3, f"the child ended early: {status}"
        return -1
    done = 0
    while steps is None or done < steps:
        if _ptrace(_SINGLESTEP, child, None, None) != 0:
            break
        status = os.waitpid(child, 0)[1]
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
            return done
        done += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return done
