"""Hooks Moirai into a Python process at its start, before the program's first line.

Only modules that every interpreter has loaded by then are imported here, so that a program which
does not use NumPy starts as it would without us; the rest waits in `moirai.cli.session`. Started by
`sitecustomize` beside this file; what to do arrives in the environment:

    MOIRAI_RUN      settings of `moirai run` as JSON; children of the program inherit it
    MOIRAI_RECORDS  main process id : its start time : directory for the records of children;
                    absent if no summary is wanted
    MOIRAI_PROBE    file in which `moirai compare` finds the memory use of the main process

Fork: a child inherits the installed resource and the totals counted so far; `_before_fork` keeps
those as a baseline for the child to subtract.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import time
from _frozen_importlib_external import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Protocol

    class Finder(Protocol):
        """The part of `importlib.abc.MetaPathFinder` that the import system calls."""

        def find_spec(
            self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
        ) -> ModuleSpec | None: ...


def _name_and_start(pid: str) -> tuple[bytes, str] | None:
    """Return a process's name, and when it started in clock ticks since boot; None: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            name, _, fields = file.read().partition(b"(")[2].rpartition(b")")
    except OSError:
        return None
    return name, fields.split()[19].decode()


def _start_time() -> str:
    """Return when this process started; exec does not change it."""
    found = _name_and_start("self")
    return str(time.monotonic_ns()) if found is None else found[1]


class Process:
    """What this process is to the run. A forked child makes itself a new one."""

    def __init__(self, *, is_forked: bool, baseline: dict[str, int]) -> None:
        self.identity = f"{os.getpid()}-{_start_time()}"
        self.is_forked = is_forked
        self.baseline = baseline
        self.is_recorded = False


def _serves() -> bool:
    """Whether this is a server of multiprocessing or loky, which outlives the program."""
    services = ("forkserver import main", "resource_tracker import main")
    if sys.argv[:1] != ["-c"]:
        return False
    code = sys.orig_argv[-len(sys.argv)]  # What follows it is in both.
    return any(service in code for service in services)


# Name of a main process that has read the records; the kernel keeps 15 bytes.
RECORDS_READ = b"moirai-summary"

# As they stood at the start: the program may change its environment and its arguments.
_settings = os.environ.get("MOIRAI_RUN", "")
_records = os.environ.get("MOIRAI_RECORDS", "")
_is_server = _serves()
# Where Python's own modules are, and what is installed: the script's folder comes later.
_given_path = [
    os.path.abspath(entry) if os.path.isdir(entry or os.curdir) else entry
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
]
_path = [entry for entry in sys.path if entry and entry not in _given_path]

process = Process(is_forked=False, baseline={})
_baseline_before_fork: dict[str, int] = {}


def start() -> None:
    """Install the hooks that the environment asks for; called once, by `sitecustomize`."""
    if _is_subinterpreter():
        return
    if _settings:
        # First registered, so that it runs after the program's own exit handlers.
        if _records:
            atexit.register(_finish)
        _watch_for_numpy()
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
        if _records and not _is_main() and not _is_service():
            _record_start()
        if '"guard": true' in _settings and not _is_service():
            _guard()
    probe_path = os.environ.get("MOIRAI_PROBE")
    if probe_path and _claims(probe_path):
        atexit.register(_write_probe, probe_path, os.getpid())


def _is_subinterpreter() -> bool:
    """Whether another interpreter of this process was there first, which has the hooks."""
    import _signal  # type: ignore[import-not-found, unused-ignore]

    try:
        _signal.set_wakeup_fd(-1)  # As it is at the start; only the first may call it.
    except ValueError:
        return True
    return False


# The session: everything that needs more than this file.


class _OwnImports:
    """While entered, this thread imports Python's modules, not the program's of the same names.

    The program may have a `resource.py` beside it, may have imported that, and finds it, not what
    was imported here, when it does later.
    """

    def __init__(self, program_path: list[str]) -> None:
        self._program_path = program_path

    def __enter__(self) -> None:
        self._thread = _thread.get_ident()
        self._hidden = {name: sys.modules.pop(name) for name in self._shadowing()}
        self._before = set(sys.modules)
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or name == "numpy" or _thread.get_ident() != self._thread:
            return None
        return PathFinder.find_spec(name, _path, target)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        for name in set(sys.modules) - self._before:
            package = name.partition(".")[0]
            if self._is_pythons(package) and self._has(package):
                sys.modules.pop(name, None)
        sys.modules.update(self._hidden)

    def _shadowing(self) -> list[str]:
        """Name the modules that the program has imported in place of Python's own."""
        return [
            name
            for name in list(sys.modules)
            if name.partition(".")[0] in sys.stdlib_module_names
            and not self._is_pythons(name.partition(".")[0])
        ]

    def _is_pythons(self, package: str) -> bool:
        """Whether what was imported under this name is of the standard library."""
        file = getattr(sys.modules.get(package), "__file__", None) or ""
        folder, _, ending = file.rpartition("/")
        if ending.startswith("__init__."):
            folder = os.path.dirname(folder)
        return package in sys.stdlib_module_names and folder not in self._program_path

    def _has(self, package: str) -> bool:
        """Whether the program would find a file of its own under this name."""
        is_built_in = package in sys.builtin_module_names
        return not is_built_in and PathFinder.find_spec(package, self._program_path) is not None


def _program_path() -> list[str]:
    """Return where the program finds its own modules."""
    entries = [entry or _current_folder() for entry in sys.path if entry not in _path]
    return [entry for entry in entries if os.path.isabs(entry)]


def _coming_program_path() -> list[str]:
    """Return where the program will find its own modules; it has not begun."""
    if sys.flags.safe_path:
        return _given_path
    script = sys.argv[0]
    if script in ("", "-", "-c", "-m"):
        folder = _current_folder()
    elif os.path.isdir(script):
        folder = os.path.abspath(script)
    else:
        folder = os.path.dirname(os.path.realpath(script)) if os.path.exists(script) else ""
    return [entry for entry in (folder, *_given_path) if os.path.isabs(entry)]


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # It is gone, and nothing can be in it.
        return ""


def _session() -> Any:
    """Import `moirai.cli.session` of the installation this file is part of."""
    import importlib

    if "moirai" not in sys.modules:
        # By place, not by name: the program's sys.path need not lead to it.
        import importlib.util

        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        spec = importlib.util.spec_from_file_location(
            "moirai", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["moirai"] = package
        spec.loader.exec_module(package)
    return importlib.import_module("moirai.cli.session")


def _finish() -> None:
    """Exit handler: the main process writes the summary, any other its record."""
    try:
        if _is_main():
            used = _used_memory()
            _close_records()
            with _OwnImports(_program_path()):
                _session().summarise(_settings, _records.split(":", 2)[2], used)
        else:
            _record()
    except Exception as error:  # The program is done: nothing here may change how it ended.
        _say(f"moirai: run: no summary: {type(error).__name__}: {error}")
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        _stay_interrupted()


def _stay_interrupted() -> None:
    """Let the interpreter still die of SIGINT, as it does after an uncaught KeyboardInterrupt.

    CPython remembers the interrupt in a flag that any eval or exec of a string resets, and modules
    that define dataclasses or named tuples do that when imported, in exit handlers too. Raising it
    in such a string sets the flag anew.
    """
    try:  # noqa: SIM105  contextlib is not imported here
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        pass


def _say(line: str) -> None:
    """Write one line to the real standard error, if there still is one."""
    stream = sys.__stderr__
    try:
        if stream is not None:
            stream.flush()
            os.write(stream.fileno(), (line + "\n").encode(errors="backslashreplace"))
    except (OSError, ValueError):
        pass


# NumPy: install as soon as it is imported.


class _InstallAfterNumPy:
    """Finder that lets the others find `numpy` and has Moirai installed once it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "numpy":
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _LoaderThenInstall(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _LoaderThenInstall:
    """Stands in for NumPy's loader until the module is executed."""

    def __init__(self, loader: Any, finder: _InstallAfterNumPy) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Before the module runs, so that nothing ever sees this stand-in.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _install()


def _watch_for_numpy() -> None:
    if "numpy" in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, _InstallAfterNumPy())


def _install() -> None:
    try:
        with _OwnImports(_program_path()):
            _session().install(_settings)
    except Exception as error:  # The program is the user's: it runs without us then.
        if _is_main():
            _say(f"moirai: run: NumPy keeps its own memory: {type(error).__name__}: {error}")


def _guard() -> None:
    try:
        with _OwnImports(_coming_program_path()):
            _session().guard(_settings)
    except Exception as error:  # As above.
        if _is_main():
            _say(f"moirai: run: nothing guards the limit: {type(error).__name__}: {error}")


# Other processes of the program.


def _is_main() -> bool:
    return f'"main_process_id": {os.getpid()},' in _settings


def _is_service() -> bool:
    """Whether this is a server still, not a child that it forked."""
    return _is_server and not process.is_forked


def _open_records() -> str | None:
    """Return where children leave their records, or None if nobody would read them any more.

    The main process must live (not another with its number) and must not have read them yet: it
    says so in its own name, which dies with it.
    """
    pid, _, rest = _records.partition(":")
    started, _, directory = rest.partition(":")
    if not directory:
        return None
    found = _name_and_start(pid)
    if found is None:
        return None
    name, start = found
    return directory if name != RECORDS_READ and start == started else None


def _close_records() -> None:
    """Let children know that what they leave from now on is not read."""
    try:
        with open("/proc/self/comm", "wb") as file:
            file.write(RECORDS_READ)
    except OSError:
        pass


def _leave(write: Callable[[str], None]) -> None:
    """Have something written into the directory of records, and nothing left that nobody reads."""
    directory = _open_records()
    try:
        if directory is not None:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            write(directory)
        if _open_records() is None:
            _remove_own_records()
    except OSError:
        pass


def _remove_own_records() -> None:
    directory = _records.split(":", 2)[-1]
    for ending in (".started", ".json"):
        try:
            os.unlink(os.path.join(directory, process.identity + ending))
        except FileNotFoundError:
            continue
    os.rmdir(directory)


def _record_start() -> None:
    """Leave a sign that this process was there, should it end without a record."""

    def write(directory: str) -> None:
        with open(os.path.join(directory, process.identity + ".started"), "xb"):
            pass

    _leave(write)


def _record() -> None:
    """Write this child's record once; multiprocessing and atexit may both call."""
    if process.is_recorded or _is_service() or not _records:
        return
    process.is_recorded = True

    def write(directory: str) -> None:
        with _OwnImports(_program_path()):
            _session().record(directory, process.identity, process.baseline, _used_memory())

    _leave(write)


def _before_fork() -> None:
    """Keep the totals counted so far, in the parent, where taking locks is safe."""
    global _baseline_before_fork
    session = sys.modules.get("moirai.cli.session")
    _baseline_before_fork = session.totals() if session is not None else {}


def _after_fork_in_child() -> None:
    global process
    process = Process(is_forked=True, baseline=_baseline_before_fork)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # multiprocessing's children clear their finalizers, then run what is registered here, and
        # leave by os._exit: no atexit.
        util.register_after_fork(process, _after_multiprocessing_fork)


def _after_multiprocessing_fork(_: Process) -> None:
    util = sys.modules["multiprocessing.util"]
    if _records and not _is_main():
        _record_start()
        util.Finalize(None, _record, exitpriority=-100)


# Measurement for `moirai compare`.


def _claims(probe_path: str) -> bool:
    """Claim the probe for this process, unless a process other than this one already has."""
    try:
        with open(probe_path, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        with open(probe_path, encoding="ascii") as file:
            return file.read() == str(os.getpid())
    except OSError:
        return False
    return True


def _used_memory() -> dict[str, int]:
    """Return VmRSS and VmHWM of this process in bytes."""
    used = {}
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith((b"VmRSS:", b"VmHWM:")):
                name, value, _ = line.split()
                used[name[:-1].decode()] = int(value) * 1024
    return used


def _write_probe(probe_path: str, pid: int) -> None:
    """Write VmRSS and the peak of this process and of the children it waited for, in bytes."""
    if os.getpid() != pid:
        return
    used = _used_memory()
    try:
        import resource

        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        with open(probe_path, "w", encoding="ascii") as file:
            file.write(f"{used['VmRSS']} {max(used['VmHWM'], children)}")
    except (ImportError, OSError):
        pass
