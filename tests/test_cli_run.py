"""`moirai run` behaves as `python` does, serves NumPy, and sums up what happened."""

import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

PYTHON = [sys.executable]
RUN = [sys.executable, "-m", "moirai", "run"]
QUIET = [*RUN, "--summary", "none"]


def execute(
    command: list[str],
    *,
    cwd: Path,
    stdin: bytes = b"",
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MOIRAI_")
    }
    return subprocess.run(
        command,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        env={**environment, **(variables or {})},
        timeout=60,
    )


def summary_of(result: subprocess.CompletedProcess[bytes]) -> dict[str, object]:
    """Parse the JSON summary: the last line of standard error."""
    content: dict[str, object] = json.loads(result.stderr.splitlines()[-1])
    return content


# The same program under python and under `moirai run`: output, errors and status byte for byte.

SCRIPTS = {
    "argv and path": "import sys; print(sys.argv, sys.path, sys.flags, sys.orig_argv[1:])",
    "main module": (
        "import sys\nm = sys.modules['__main__']\n"
        "print(sorted(vars(m)), __name__, __file__, __spec__, __cached__ if '__cached__' in vars(m)"
        " else None, __builtins__, type(__loader__).__name__, m.__dict__ is globals())"
    ),
    "no modules of ours": (
        "import sys\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in"
        " ('argparse', 'json', 'rich', 'numpy', 'moirai', 'sitecustomize', 'runpy')))"
    ),
    "exit with a number": "import sys; print('out'); sys.exit(7)",
    "exit with a message": "import sys; sys.exit('no more')",
    "exit with None": "import sys; sys.exit(None)",
    "uncaught exception": "def f():\n    return 1 / 0\nf()",
    "chained exceptions": (
        "try:\n    {}['a']\nexcept KeyError as e:\n    raise ValueError('b') from e"
    ),
    "exception group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "syntax error": "x = (1,\nprint(",
    "indentation error": "if True:\npass",
    "null byte": "print(1)\0",
    "own excepthook": (
        "import sys\nsys.excepthook = lambda t, v, tb: print('mine', t.__name__, tb.tb_lineno)\n"
        "raise OSError(3)"
    ),
    "interrupt": "raise KeyboardInterrupt",
    "signal to itself": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "hard exit": "import os; print('lost, it is buffered'); os._exit(5)",
    "exit handlers in order": (
        "import atexit\nfor i in range(3): atexit.register(print, 'exit', i)\nprint('end')"
    ),
    "thread alive at the end": (
        "import threading\nbegin = threading.Event()\n"
        "def late():\n    begin.wait()\n    print('late')\n"
        "threading.Thread(target=late).start()\n"
        "print('main done', flush=True)\nbegin.set()"
    ),
    "standard input": "import sys; print(sys.stdin.read()[::-1], sys.stdin.isatty())",
    "standard error closed": "import sys, os; print(1); os.close(2); sys.stderr = None",
    "pickle of a class in main": (
        "import pickle\nclass P:\n    x = 1\nprint(pickle.loads(pickle.dumps(P())).x, P.__module__)"
    ),
    "warnings": "import warnings\nwarnings.warn('old')",
    "sibling import": "import sibling; print(sibling.__file__)",
    "annotations": "x: int = 1\nprint(__annotations__)",
    "encoding declared": "# -*- coding: latin-1 -*-\nprint(ascii('\\xe9'))",
    "free descriptors": "print(open(__file__).fileno())",
    "signal dispositions": (
        "import signal\nprint([signal.getsignal(s) for s in (signal.SIGPIPE, signal.SIGINT)])"
    ),
}


@pytest.mark.parametrize("code", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_script_behaves_as_under_python(code: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(code)
    (tmp_path / "sibling.py").write_text("")
    command = ["app.py", "-x", "--memory", "none", "--", "ä b"]
    plain, ours = (
        execute([*start, *command], cwd=tmp_path, stdin=b"abc") for start in (PYTHON, QUIET)
    )
    assert (ours.stdout, ours.stderr) == (plain.stdout, plain.stderr)
    assert ours.returncode == plain.returncode


TARGETS = {
    "code": ["-c", "import sys; print(sys.argv, __name__, sys.path[0])", "-a", "--summary"],
    "code, glued": ["-cimport sys; print(sys.argv)", "1"],
    "module": ["-m", "mod", "-v", "x"],
    "module, glued": ["-mmod", "x"],
    "package": ["-m", "pack"],
    "package without main": ["-m", "empty"],
    "missing module": ["-m", "no_such_module"],
    "missing module in a package": ["-m", "pack.no"],
    "missing file": ["no_such.py", "a"],
    "directory": ["directory", "a"],
    "directory without main": ["empty"],
    "zip": ["archive.zip", "a"],
    "standard input": ["-", "a", "-b"],
    "unittest": ["-m", "unittest", "-q", "suite"],
    "failing unittest": ["-m", "unittest", "-q", "failing"],
    "error in a module": ["-m", "raising"],
    "a directory that is no program": ["/"],
}


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    show = "import sys; print(sys.argv, __name__, __spec__ and __spec__.name, sys.path[0])"
    for package in ("pack", "directory", "empty"):
        (tmp_path / package).mkdir()
    (tmp_path / "mod.py").write_text(show)
    (tmp_path / "pack" / "__init__.py").write_text("print('package')")
    (tmp_path / "empty" / "__init__.py").write_text("")
    (tmp_path / "pack" / "__main__.py").write_text(show)
    (tmp_path / "directory" / "__main__.py").write_text(show)
    (tmp_path / "raising.py").write_text("raise LookupError('here')")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", show)
    (tmp_path / "suite.py").write_text(
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): print('tested')"
    )
    (tmp_path / "failing.py").write_text("import unittest\nraise SystemExit(9)")
    return tmp_path


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_target_is_started_as_python_starts_it(target: list[str], targets: Path) -> None:
    stdin = b"import sys\nprint(sys.argv, __name__)"
    plain, ours = (
        execute([*start, *target], cwd=targets, stdin=stdin) for start in (PYTHON, QUIET)
    )
    assert ours.returncode == plain.returncode
    assert ours.stdout == plain.stdout
    # unittest prints how long it took.
    hidden = [line for line in ours.stderr.splitlines() if not line.startswith(b"Ran ")]
    assert hidden == [line for line in plain.stderr.splitlines() if not line.startswith(b"Ran ")]


def test_options_of_the_interpreter_reach_the_program(tmp_path: Path) -> None:
    options = ["-W", "error::UserWarning", "-Xdev", "-u", "-P", "-bb"]
    code = ["-c", "import sys; print(sys.flags, sys.warnoptions, sys._xoptions, sys.path)"]
    plain = execute([*PYTHON, *options, *code], cwd=tmp_path)
    ours = execute([*PYTHON, *options, *QUIET[1:], *code], cwd=tmp_path)
    assert ours.stdout == plain.stdout


@pytest.mark.parametrize("option", ["-I", "-E", "-S", "-sE"])
def test_options_that_keep_the_hook_out_are_refused(option: str, tmp_path: Path) -> None:
    # The command as installed does not need PYTHONPATH to be found.
    code = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); import moirai.cli as c; c.main()"
    path = ":".join(entry for entry in sys.path if entry)
    result = execute([*PYTHON, option, "-c", code, path, "run", "-c", "print(1)"], cwd=tmp_path)
    assert result.returncode == 2
    assert b"keeps Moirai out of the program" in result.stderr


def test_interrupt_from_outside_kills_by_the_signal(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import signal; print('up', flush=True); signal.pause()")
    with subprocess.Popen(
        [*RUN, "app.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.index(b"KeyboardInterrupt") < errors.index(b"moirai run: memory pool")


def test_closed_pipe_is_the_programs_own_affair(tmp_path: Path) -> None:
    code = "for i in range(100000): print(i)"
    statuses = []
    for start in (PYTHON, QUIET):
        with subprocess.Popen(
            [*start, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr is not None
            statuses.append((process.stderr.read(), process.wait(timeout=30)))
    assert statuses[0] == statuses[1]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed: str, tmp_path: Path) -> None:
    code = "import sys; open('seen', 'w').write(repr((sys.stdin, sys.stdout, sys.stderr)))"
    seen = []
    for start in (PYTHON, QUIET, RUN):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
        assert execute([*shell, *start, "-c", code], cwd=tmp_path).returncode == 0
        seen.append((tmp_path / "seen").read_text())
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("arguments", [["x" * 50] * 4000, ["x" * 131_000]], ids=["many", "long"])
def test_arguments_may_be_as_long_as_under_python(arguments: list[str], tmp_path: Path) -> None:
    code = "import sys; print(sum(map(len, sys.argv[1:])))"
    result = execute([*RUN, "--summary", "json", "-c", code, *arguments], cwd=tmp_path)
    assert result.stdout == b"%d\n" % sum(map(len, arguments))
    assert summary_of(result)["program"] == ["-c", code, *arguments]


@pytest.mark.parametrize("language", ["C", "POSIX", "C.utf8", "no_SUCH", None])
def test_locale_is_as_under_python(language: str | None, tmp_path: Path) -> None:
    code = (
        "import locale, os, sys\n"
        "print(sys.flags.utf8_mode, os.environ.get('LC_CTYPE'), locale.getpreferredencoding(),"
        " sys.stdout.encoding, sys.stdout.errors, sys.argv, '\u20ac')"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))
    }
    if language is not None:
        environment["LANG"] = language
    plain, ours = (
        subprocess.run(
            [*start, "-c", code, "\u00e4"], env=environment, cwd=tmp_path, capture_output=True
        )
        for start in (PYTHON, QUIET)
    )
    assert (ours.stdout, ours.stderr) == (plain.stdout, plain.stderr)


# The startup hook leaves the interpreter as it was.


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    code = ["-c", "import sys; print(sys.modules['sitecustomize'].__file__)"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ours = execute([*QUIET, *code], cwd=tmp_path, variables={"PYTHONPATH": path})
    # The launcher is a Python too.
    assert ours.stdout.decode().splitlines() == ["theirs", "theirs", f"{tmp_path}/sitecustomize.py"]


def test_another_sitecustomize_that_fails_is_reported_as_by_python(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('theirs')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path}
    plain = execute([*PYTHON, "-c", "print(1)"], cwd=tmp_path, variables=variables)
    ours = execute([*QUIET, "-c", "print(1)"], cwd=tmp_path, variables=variables)
    assert ours.stdout == plain.stdout
    assert ours.stderr == 2 * plain.stderr


def test_interpreter_of_another_build_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "os.environ['MOIRAI_BUILD'] = 'cpython-27'\n"
        "code = 'import sys; print(\"moirai_hook\" in sys.modules, sys.path)'\n"
        "subprocess.run([sys.executable, '-c', code])"
    )
    plain, ours = (execute([*start, "-c", code], cwd=tmp_path) for start in (PYTHON, QUIET))
    assert ours.stdout == plain.stdout
    assert b"False" in ours.stdout


def test_numpy_keeps_its_own_loader(tmp_path: Path) -> None:
    code = "import numpy; print(type(numpy.__loader__), numpy.__spec__.loader is numpy.__loader__)"
    plain, ours = (execute([*start, "-c", code], cwd=tmp_path) for start in (PYTHON, QUIET))
    assert ours.stdout == plain.stdout


def test_failing_import_of_numpy_fails_as_under_python_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('broken')")
    code = (
        "for _ in range(2):\n"
        "    try:\n        import numpy\n"
        "    except ImportError as error:\n        print(error)"
    )
    plain, ours = (execute([*start, "-c", code], cwd=tmp_path) for start in (PYTHON, QUIET))
    assert (ours.stdout, ours.stderr) == (plain.stdout, plain.stderr)


SHADOWS = ("bisect", "copy", "dataclasses", "json", "resource")


@pytest.mark.parametrize("is_imported", [False, True], ids=["unused", "imported"])
@pytest.mark.parametrize("options", [[], ["--guard", "--limit", "1GiB"]], ids=["", "guard"])
def test_files_named_like_pythons_modules_are_the_programs_alone(
    options: list[str], is_imported: bool, tmp_path: Path
) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"print({name!r}, 'of the program'); MARK = 1")
    # NumPy itself would import some of them.
    (tmp_path / "numpy.py").write_text("print('numpy')")
    before, after = (SHADOWS[:3], SHADOWS[3:]) if is_imported else ((), SHADOWS)
    (tmp_path / "app.py").write_text(
        "".join(f"import {name}; {name}.MARK\n" for name in before)
        + "import numpy\n"
        + "".join(f"import {name}; {name}.MARK\n" for name in after)
    )
    plain, ours = (
        execute([*start, "app.py"], cwd=tmp_path)
        for start in (PYTHON, [*RUN, *options, "--summary-file", "summary"])
    )
    assert ours.stdout == plain.stdout
    assert ours.returncode == 0
    assert (tmp_path / "summary").read_text().startswith("moirai run:"), ours.stderr


def test_default_encodings_are_not_asked_for(tmp_path: Path) -> None:
    options = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    (tmp_path / "app.py").write_text(
        "import subprocess, sys, numpy\nnumpy.ones(10**6)\n"
        "subprocess.run([sys.executable, '-X', 'warn_default_encoding', '-c', 'import numpy'])"
    )
    command = ["--guard", "--limit", "1GiB", "--summary-file", "summary", "app.py"]
    result = execute([*PYTHON, *options, *RUN[1:], *command], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert re.search(r"processes +2\n", (tmp_path / "summary").read_text())


INTERPRETERS = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
other = interpreters.create()
interpreters.run_string(other, "print('other', flush=True)")
interpreters.destroy(other)
"""


def test_other_interpreters_of_the_process_have_no_summary(tmp_path: Path) -> None:
    result = execute([*RUN, "-c", INTERPRETERS], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, b"other\n")
    assert result.stderr.count(b"moirai run:") == 1, result.stderr.decode()


def test_current_folder_may_be_gone(tmp_path: Path) -> None:
    shell = ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh"]
    code = "import sys, numpy; print(sys.path[:2])"
    plain, ours = (
        execute([*shell, *start, "-c", code], cwd=tmp_path)
        for start in (PYTHON, [*RUN, "--summary-file", str(tmp_path / "summary")])
    )
    assert (ours.stdout, ours.stderr) == (plain.stdout, plain.stderr)
    assert (tmp_path / "summary").read_text().startswith("moirai run:")


# NumPy under Moirai, and the summary.

ARRAYS = """
import numpy as np
total = 0.0
for _ in range(20):
    total += np.multiply(np.ones(500_000), 2).sum()
print(total)
"""


@pytest.mark.parametrize("memory", ["pool", "slab", "large", "system"])
def test_arrays_are_served_by_the_memory_asked_for(memory: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ARRAYS)
    result = execute([*RUN, "--memory", memory, "--summary", "json", "app.py"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, b"20000000.0\n")
    summary = summary_of(result)
    served = summary["served"]
    assert isinstance(served, dict)
    assert summary["memory"] == memory
    assert served["total_bytes"] >= 40 * 4_000_000
    assert served["hits"] + served["misses"] == served["total_count"]
    if memory in ("pool", "large"):
        assert served["hits"] > 30
        assert served["reused_pages"] * 4096 > 30 * 4_000_000


def test_no_memory_measures_only(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ARRAYS)
    result = execute([*RUN, "--memory", "none", "--summary", "json", "app.py"], cwd=tmp_path)
    summary = summary_of(result)
    assert summary["served"] is None
    assert summary["has_numpy"] is True
    assert 0 < summary["end_rss_bytes"] <= summary["peak_rss_bytes"]  # type: ignore[operator]
    assert summary["minor_faults"] > 0  # type: ignore[operator]


def test_resource_is_installed_for_all_threads(tmp_path: Path) -> None:
    code = (
        "import threading, numpy as np\nfrom moirai import memory\n"
        "def f(): print(memory.handler_of(np.ones(10**6)) is memory.installed())\n"
        "t = threading.Thread(target=f); t.start(); t.join(); f()"
    )
    assert execute([*QUIET, "-c", code], cwd=tmp_path).stdout == b"True\nTrue\n"


@pytest.mark.parametrize("order", ["import numpy, moirai.memory", "import moirai.memory"])
def test_program_may_install_a_resource_of_its_own(order: str, tmp_path: Path) -> None:
    code = (
        f"{order}\nfrom moirai import memory\n"
        "slab = memory.install(memory.SlabResource())\n"
        "import numpy as np\n"
        "assert memory.handler_of(np.ones(100)) is memory.installed() is slab\n"
        "try:\n    memory.install()\nexcept ValueError as error:\n    print(error)"
    )
    plain, ours = (execute([*start, "-c", code], cwd=tmp_path) for start in (PYTHON, RUN))
    assert (ours.returncode, ours.stdout) == (0, plain.stdout)
    assert b"SlabResource is installed already" in ours.stdout
    assert b"The program installed a resource of its own (SlabResource)" in ours.stderr


def test_program_may_use_a_resource_before_it_imports_numpy(tmp_path: Path) -> None:
    code = (
        "from moirai import memory\npool = memory.PoolResource()\n"
        "with memory.use(pool):\n"
        "    import numpy as np\n"
        "    assert memory.handler_of(np.ones(100)) is pool\n"
        "assert memory.handler_of(np.ones(100)) is memory.installed() is not pool"
    )
    result = execute([*QUIET, "-c", code], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")


def test_program_may_empty_its_environment(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "os.environ.clear()\nimport numpy\nnumpy.ones(10**6)"
    )
    summary = summary_of(execute([*RUN, "--summary", "json", "-c", code], cwd=tmp_path))
    served = summary["served"]
    assert isinstance(served, dict)
    assert served["total_bytes"] >= 8_000_000
    assert (summary["process_count"], summary["unreported_count"]) == (2, 0)


def test_limit_raises_memory_error_in_the_program(tmp_path: Path) -> None:
    code = "import numpy as np\nnp.ones(10**6)\nnp.ones(10**7)"
    result = execute([*QUIET, "--limit", "16MiB", "-c", code], cwd=tmp_path)
    assert result.returncode == 1
    assert b"MemoryError" in result.stderr


def test_largest_arrays_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import numpy as np\n\nbig = np.ones(3_000_000)\n")
    result = execute([*RUN, "app.py"], cwd=tmp_path)
    assert b"app.py:3" in result.stderr


def test_summary_comes_after_the_programs_own_exit_handlers(tmp_path: Path) -> None:
    code = "import atexit, sys; atexit.register(print, 'mine', file=sys.stderr)"
    result = execute([*RUN, "-c", code], cwd=tmp_path)
    assert result.stderr.startswith(b"mine\nmoirai run:")


def test_summary_file_is_found_from_where_the_run_started(tmp_path: Path) -> None:
    code = "import os; os.chdir('/')"
    options = ["--summary", "json", "--summary-file", "out.json"]
    result = execute([*RUN, *options, "-c", code], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads((tmp_path / "out.json").read_text())["schema"] == "moirai.summary/1"


def test_program_that_closes_standard_error_gets_no_summary_elsewhere(tmp_path: Path) -> None:
    code = "import sys, os; sys.stderr.close(); sys.__stderr__.close(); f = open('f', 'w')"
    result = execute([*RUN, "-c", code], cwd=tmp_path)
    assert result.returncode == 0
    assert (tmp_path / "f").read_text() == ""


def test_missing_script_gets_no_summary(tmp_path: Path) -> None:
    result = execute([*RUN, "no_such.py"], cwd=tmp_path)
    assert result.returncode == 2
    assert b"moirai" not in result.stderr.replace(str(tmp_path).encode(), b"")


# Children.

POOLS = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

def work(x):
    import numpy as np
    from moirai import memory
    array = np.ones(10**6)
    assert memory.handler_of(array) is memory.installed()
    return x + float(array[0])

class Value:
    pass

def same(value):
    return type(value) is Value

if __name__ == "__main__":
    import numpy
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        print(list(pool.map(work, range(4), chunksize=2)), pool.submit(same, Value()).result())
    process = context.Process(target=work, args=(1,))
    process.start()
    process.join()
    print(process.exitcode)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_run_under_moirai_and_report(method: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(POOLS)
    command = [*RUN, "--summary", "json", "app.py", method]
    result = execute(command, cwd=tmp_path, variables={"TMPDIR": str(tmp_path)})
    assert result.stdout == b"[1.0, 2.0, 3.0, 4.0] True\n0\n", result.stderr
    summary = summary_of(result)
    assert 3 <= summary["process_count"] <= 4  # type: ignore[operator]
    assert summary["unreported_count"] == 0
    served = summary["served"]
    assert isinstance(served, dict)
    # Five arrays of 8 MB, each in a child, each counted once.
    assert 40_000_000 <= served["total_bytes"] < 60_000_000
    assert not list(tmp_path.glob("moirai-*"))


def test_forked_child_does_not_count_what_its_parent_served(tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "kept = [np.ones(10**6) for _ in range(5)]\n"
        "pid = os.fork()\n"
        "if pid: os.waitpid(pid, 0)\n"
        "else: np.ones(2 * 10**6); sys.exit()"
    )
    result = execute([*RUN, "--summary", "json", "-c", code], cwd=tmp_path)
    summary = summary_of(result)
    assert summary["process_count"] == 2
    served = summary["served"]
    assert isinstance(served, dict)
    assert 56_000_000 <= served["total_bytes"] < 70_000_000


def test_started_python_runs_under_moirai_and_is_counted(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import numpy; numpy.ones(10**6)'])"
    )
    summary = summary_of(execute([*RUN, "--summary", "json", "-c", code], cwd=tmp_path))
    assert (summary["process_count"], summary["unreported_count"]) == (2, 0)
    served = summary["served"]
    assert isinstance(served, dict)
    assert served["total_bytes"] >= 8_000_000


def test_children_that_end_without_a_report_are_named(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; os._exit(0)'])"
    )
    result = execute([*RUN, "-c", code], cwd=tmp_path, variables={"TMPDIR": str(tmp_path)})
    assert b"2 (1 ended without a report)" in result.stderr
    assert not list(tmp_path.glob("moirai-*"))


def test_child_that_starts_another_program_in_its_place_is_one(tmp_path: Path) -> None:
    child = "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    summary = summary_of(execute([*RUN, "--summary", "json", "-c", code], cwd=tmp_path))
    assert (summary["process_count"], summary["unreported_count"]) == (2, 0)


def test_children_may_have_any_arguments(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text("import numpy; numpy.ones(10**6)")
    code = "import subprocess, sys; subprocess.run([sys.executable, 'child.py', '-c'])"
    result = execute([*RUN, "--summary", "json", "-c", code, "-c"], cwd=tmp_path)
    summary = summary_of(result)
    assert len(result.stderr.splitlines()) == 1
    assert (summary["process_count"], summary["unreported_count"]) == (2, 0)


@pytest.mark.parametrize("folder", [".", "no/such"])
def test_children_are_counted_wherever_temporary_files_go(folder: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', ''], cwd='elsewhere')\n"
        "os.chdir('elsewhere')\n"
        "subprocess.run([sys.executable, '-c', ''])"
    )
    command = [*RUN, "--summary", "json", "-c", code]
    result = execute(command, cwd=tmp_path, variables={"TMPDIR": folder})
    summary = summary_of(result)
    assert (summary["process_count"], summary["unreported_count"]) == (3, 0)
    assert [path.name for path in tmp_path.rglob("*")] == ["elsewhere"]


def test_records_are_removed_after_an_exception(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', '']); 1 / 0"
    result = execute([*RUN, "-c", code], cwd=tmp_path, variables={"TMPDIR": str(tmp_path)})
    assert result.returncode == 1
    assert b"processes" in result.stderr
    assert not list(tmp_path.glob("moirai-*"))


def test_child_that_outlives_the_program_leaves_nothing(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = f"open({str(fifo)!r}).read()"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stderr=subprocess.DEVNULL,"
        " stdout=subprocess.DEVNULL)\n"
        "print(child.pid)"
    )
    result = execute([*RUN, "-c", code], cwd=tmp_path, variables={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0
    process_id = int(result.stdout)
    descriptor = os.pidfd_open(process_id)
    with open(fifo, "w"):  # Opens once the child reads, which then ends.
        pass
    select.select([descriptor], [], [])
    os.close(descriptor)
    assert not list(tmp_path.glob("moirai-*"))


def test_run_inside_a_run_has_a_summary_of_its_own(tmp_path: Path) -> None:
    inner = "[sys.executable, '-m', 'moirai', 'run', '--memory', 'slab', '-c', 'pass']"
    code = f"import subprocess, sys; subprocess.run({inner})"
    result = execute([*RUN, "-c", code], cwd=tmp_path)
    assert result.stderr.index(b"memory slab") < result.stderr.index(b"memory pool")


# malloc.


def test_tuned_sets_tunables_and_leaves_numpy_alone(tmp_path: Path) -> None:
    code = "import os, numpy; numpy.ones(9); print(os.environ['GLIBC_TUNABLES'])"
    result = execute(
        [*RUN, "--allocator", "tuned", "--summary", "json", "-c", code],
        cwd=tmp_path,
        variables={"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
    )
    assert result.stdout.startswith(b"glibc.malloc.hugetlb=1:")
    assert result.stdout.endswith(b":glibc.malloc.arena_max=1\n")
    summary = summary_of(result)
    assert (summary["allocator"], summary["memory"], summary["served"]) == ("tuned", "none", None)


MAPPED_BLOCKS = """
import ctypes
import numpy

class MallocInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.mallinfo2.restype = MallocInfo
before = libc.mallinfo2().hblks
block = libc.malloc(24 << 20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("options", "variables", "mapped"),
    [
        ([], {}, "0"),
        (["--allocator", "system"], {}, "1"),
        (["--memory", "none"], {}, "1"),
        ([], {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, "1"),
        ([], {"MALLOC_ARENA_MAX": "4"}, "0"),
        ([], {"MALLOC_TOP_PAD_": "4096"}, "1"),
    ],
)
def test_libc_keeps_its_heap_unless_the_user_tuned_it(
    options: list[str], variables: dict[str, str], mapped: str
) -> None:
    ended = subprocess.run(
        [*RUN, "--summary", "none", *options, "-c", MAPPED_BLOCKS],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, mapped, "")


@pytest.mark.parametrize("name", ["jemalloc", "mimalloc", "tcmalloc"])
def test_preloaded_allocator_is_in_the_process_with_moirai_beside_it(
    name: str, tmp_path: Path
) -> None:
    code = "import numpy; numpy.ones(10**6); print('lib%s' in open('/proc/self/maps').read())"
    command = [*RUN, "--allocator", name, "--memory", "pool", "--summary", "json"]
    result = execute([*command, "-c", code % name], cwd=tmp_path)
    if b"was not found on this machine" in result.stderr:
        pytest.skip(result.stderr.decode())
    assert result.stdout == b"True\n"
    assert summary_of(result)["served"] is not None


# Mistakes.

MISTAKES = {
    "nothing to run": ([], "expected a script, -m module, -c code"),
    "no value": (["-m"], "expected a value after -m"),
    "no such option": (["--memry", "pool", "x.py"], "unrecognized arguments: --memry"),
    "no abbreviation": (["--mem", "pool", "x.py"], "unrecognized arguments: --mem"),
    "no such memory": (["--memory", "heap", "x.py"], "--memory: invalid choice: 'heap'"),
    "bad size": (["--limit", "lots", "x.py"], "--limit: must be .*, got 'lots'"),
    "negative size": (["--cache-cap", "-1", "x.py"], "--cache-cap"),
    "useless limit": (["--memory", "none", "--limit", "1GiB", "x.py"], "--limit: needs --memory"),
    "useless cap": (
        ["--memory", "system", "--cache-cap", "1GiB", "x.py"],
        "--cache-cap: needs --memory pool, slab, large; got --memory system",
    ),
    "limit beside a malloc": (
        ["--allocator", "tuned", "--limit", "1GiB", "x.py"],
        "--limit: needs --memory .*; got --memory none --allocator tuned",
    ),
    "no directory": (["--summary-file", "no/such/file", "x.py"], "--summary-file: must be a file"),
    "file without summary": (
        ["--summary", "none", "--summary-file", "f", "x.py"],
        "--summary-file: expected with --summary text or json",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_named_and_nothing_runs(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "x.py").write_text("print('ran')")
    result = execute([*RUN, *arguments], cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == b""
    assert re.search(message, result.stderr.decode()), result.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ([], 2, b"expected a command"),
        (["fly"], 2, b"unknown command 'fly', expected one of run, compare, doctor"),
        (["--help"], 0, b"compare"),
        (["--version"], 0, b"moirai "),
        (["run", "--help"], 0, b"--cache-cap"),
    ],
)
def test_command_line_of_moirai(
    arguments: list[str], status: int, expected: bytes, tmp_path: Path
) -> None:
    result = execute([*PYTHON, "-m", "moirai", *arguments], cwd=tmp_path)
    assert result.returncode == status
    assert expected in (result.stdout if status == 0 else result.stderr)
    assert (result.stderr if status == 0 else result.stdout) == b""
