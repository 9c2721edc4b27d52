"""The layers of ARCHITECTURE.md, read from the sources: nothing points back up.

Each rule is a function from a source tree to its violations, so that the same code judges the
repository and the small trees below, in which one violation each is planted.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first; a module imports only from layers below its own, or from its own package.
LAYERS = [
    {"errors"},
    {"_arguments", "_dtypes", "_event_loop", "_waiting"},
    {"_native"},
    {"memory"},
    {"pools"},
    {"channels"},
    {"executor"},
    {"pressure"},
    {"integrations"},
    {"reports"},
    {"cli"},
    {"__main__", "_startup"},
]
LAYER_OF = {module: index for index, layer in enumerate(LAYERS) for module in layer}
FACADES = {"channels", "executor", "memory", "pools", "pressure"}
# The package itself reads the version and the build profile of the compiled module.
NATIVE_IMPORTERS = FACADES | {"__init__"}
# What a report must not touch: it turns dataclasses into strings.
REPORTS_MUST_NOT_IMPORT = {
    "ctypes", "io", "mmap", "multiprocessing", "numpy", "os", "pathlib", "psutil", "resource",
    "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading",
}  # fmt: skip
REPORTS_MUST_NOT_CALL = {"open", "print", "input", "exec", "eval"}

# The buffer protocol, NumPy's C API, the interpreter's stack, slots and methods, messages in their
# places, and descriptors from elsewhere.
BINDINGS_WITH_UNSAFE = (
    "attached",
    "buffer",
    "channel/awaitable",
    "channel/fast",
    "channel/mod",
    "channel/queue",
    "executor/call",
    "executor/maker",
    "numpy",
    "pools/buffer",
    "pools/vector",
    "pools/view",
    "shared_channel",
    "site",
)


def python_modules(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (top-level module, dotted name, path) of each file of the package."""
    package = root / "python" / "moirai"
    for path in sorted(package.rglob("*.py*")):
        if path.suffix not in {".py", ".pyi"} or "__pycache__" in path.parts:
            continue
        parts = path.relative_to(package).with_suffix("").parts
        yield parts[0], ".".join(("moirai", *parts)), path


def imports_of(dotted: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import anywhere in the file, nested ones included."""
    package = dotted.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func)
            if name in {"import_module", "importlib.import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def own_module(imported: str) -> str | None:
    """Name the part of moirai that an import reaches: `moirai.cli.run` -> `cli`."""
    match imported.split("."):
        case ["moirai"]:
            return "__init__"
        case ["moirai", part, *_]:
            return part if part in LAYER_OF else "__init__"
        case _:
            return None


def python_layer_violations(root: Path) -> list[str]:
    found = []
    for module, dotted, path in python_modules(root):
        where = path.relative_to(root)
        if module not in LAYER_OF and module != "__init__":
            found.append(f"{where}: module {module!r} has no layer in LAYERS")
            continue
        for line, imported in imports_of(dotted, path):
            target = own_module(imported)
            if target is None or target == module or target == "__init__" or module == "__init__":
                continue
            if LAYER_OF[target] >= LAYER_OF[module]:
                found.append(f"{where}:{line}: {module} must not import {target} ({imported})")
    return found


def native_import_violations(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: only facades import moirai._native, not {module}"
        for module, dotted, path in python_modules(root)
        for line, imported in imports_of(dotted, path)
        if own_module(imported) == "_native" and module not in NATIVE_IMPORTERS | {"_native"}
    ]


def report_violations(root: Path) -> list[str]:
    found = []
    for module, dotted, path in python_modules(root):
        if module != "reports":
            continue
        where = path.relative_to(root)
        for line, imported in imports_of(dotted, path):
            if imported.split(".")[0] in REPORTS_MUST_NOT_IMPORT:
                found.append(f"{where}:{line}: a report does no I/O, yet imports {imported}")
            if own_module(imported) in FACADES | {"_native"}:
                found.append(f"{where}:{line}: a report gets dataclasses, yet imports {imported}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in REPORTS_MUST_NOT_CALL:
                name = ast.unparse(node.func)
                found.append(f"{where}:{node.lineno}: a report does no I/O, yet calls {name}()")
    return found


def light_import_violations(root: Path) -> list[str]:
    """`import moirai` is light: what it imports at module level reaches no NumPy."""
    found = []
    for module, _, path in python_modules(root):
        if module != "__init__" and path.name != "errors.py":
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] in {"numpy", "rich"} for name in names):
                where = path.relative_to(root)
                found.append(f"{where}:{node.lineno}: import moirai must not import {names[0]}")
    return found


RUST_TOKENS = re.compile(
    r"""(?P<drop>//[^\n]*|/\*.*?\*/|b?r(?P<hashes>\#*)".*?"(?P=hashes)|b?"(?:\\.|[^"\\])*"
    |b?'(?:\\.[^']*|[^'\\])')""",
    re.DOTALL | re.VERBOSE,
)


def rust_code(path: Path) -> list[str]:
    """Give the file's lines without comments and literals, so that prose cannot offend."""
    blank = RUST_TOKENS.sub(lambda match: "\n" * match.group().count("\n"), path.read_text())
    return blank.split("\n")


def rust_files(root: Path, crate: str) -> Iterator[tuple[str, Path]]:
    """Yield (path inside src, file) of each Rust source of a crate."""
    sources = root / "crates" / crate / "src"
    for path in sorted(sources.rglob("*.rs")):
        yield path.relative_to(sources).as_posix(), path


def rust_matches(
    root: Path, crate: str, pattern: str, allowed: Callable[[str], bool]
) -> Iterator[str]:
    regex = re.compile(pattern)
    for name, path in rust_files(root, crate):
        if allowed(name):
            continue
        for number, line in enumerate(rust_code(path), start=1):
            if regex.search(line):
                yield f"{path.relative_to(root)}:{number}: {line.strip()}"


def in_module(module: str) -> Callable[[str], bool]:
    return lambda name: name == f"{module}.rs" or name.startswith(f"{module}/")


def core_names_python_violations(root: Path) -> list[str]:
    manifest = root / "crates" / "core" / "Cargo.toml"
    found = list(rust_matches(root, "core", r"\b(pyo3|numpy)\b", lambda _: False))
    for number, line in enumerate(manifest.read_text().splitlines(), start=1):
        if re.match(r"\s*(pyo3|numpy)", line):
            found.append(f"{manifest.relative_to(root)}:{number}: {line.strip()}")
    return found


def libc_violations(root: Path) -> list[str]:
    return list(rust_matches(root, "core", r"\b(libc|rustix)::", in_module("os")))


def atomics_violations(root: Path) -> list[str]:
    pattern = r"\b(std|core)::sync::atomic|\bloom::"
    return list(rust_matches(root, "core", pattern, in_module("sync")))


def bindings_unsafe_violations(root: Path) -> list[str]:
    def allowed(name: str) -> bool:
        return any(in_module(module)(name) for module in BINDINGS_WITH_UNSAFE)

    return list(rust_matches(root, "python", r"\bunsafe\b", allowed))


RULES = [
    python_layer_violations,
    native_import_violations,
    report_violations,
    light_import_violations,
    core_names_python_violations,
    libc_violations,
    atomics_violations,
    bindings_unsafe_violations,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_its_layers(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


def test_the_rules_read_real_sources() -> None:
    assert {module for module, _, _ in python_modules(ROOT)} >= {"__init__", "errors", "memory"}
    for crate in ("core", "python"):
        assert list(rust_files(ROOT, crate)), f"no Rust source under crates/{crate}/src"


# rule, file with the violation, its source, what the message must say
PLANTED = [
    (
        python_layer_violations,
        "python/moirai/memory/arrays.py",
        "from moirai.cli import run",
        "memory must not import cli",
    ),
    (
        python_layer_violations,
        "python/moirai/memory/arrays.py",
        "from .. import reports",
        "memory must not import reports",
    ),
    (
        python_layer_violations,
        "python/moirai/reports/text.py",
        "def late():\n    import moirai.cli.run\n",
        "text.py:2: reports must not import cli",
    ),
    (
        python_layer_violations,
        "python/moirai/errors.py",
        "import importlib\nimportlib.import_module('moirai.memory')",
        "errors must not import memory",
    ),
    (
        python_layer_violations,
        "python/moirai/utils.py",
        "",
        "'utils' has no layer",
    ),
    (
        native_import_violations,
        "python/moirai/cli/run.py",
        "from moirai._native import install",
        "only facades import moirai._native, not cli",
    ),
    (
        native_import_violations,
        "python/moirai/cli/run.py",
        "from moirai import _native",
        "only facades import moirai._native, not cli",
    ),
    (
        native_import_violations,
        "python/moirai/reports/text.py",
        "from .._native import Statistics",
        "only facades import moirai._native, not reports",
    ),
    (
        report_violations,
        "python/moirai/reports/text.py",
        "import subprocess",
        "yet imports subprocess",
    ),
    (
        report_violations,
        "python/moirai/reports/text.py",
        "from moirai import memory",
        "yet imports moirai.memory",
    ),
    (
        report_violations,
        "python/moirai/reports/text.py",
        "def render():\n    print('x')",
        "text.py:2: a report does no I/O, yet calls print()",
    ),
    (
        light_import_violations,
        "python/moirai/__init__.py",
        "import numpy as np",
        "must not import numpy",
    ),
    (
        core_names_python_violations,
        "crates/core/src/resource/slab.rs",
        "use pyo3::prelude::*;",
        "slab.rs:1: use pyo3",
    ),
    (
        core_names_python_violations,
        "crates/core/Cargo.toml",
        '[dependencies]\npyo3 = "0.30"',
        "Cargo.toml:2: pyo3",
    ),
    (
        libc_violations,
        "crates/core/src/resource/system.rs",
        "fn f() {\n    libc::free(p);\n}",
        "system.rs:2: libc::free",
    ),
    (
        atomics_violations,
        "crates/core/src/resource/slab.rs",
        "use std::sync::atomic::AtomicUsize;",
        "slab.rs:1: use std::sync::atomic",
    ),
    (
        bindings_unsafe_violations,
        "crates/python/src/memory.rs",
        "fn f() { unsafe { g() } }",
        "memory.rs:1: fn f()",
    ),
]


@pytest.fixture
def clean_tree(tmp_path: Path) -> Path:
    """A small tree that keeps every rule, with the words of each rule where they are allowed."""
    files = {
        "python/moirai/__init__.py": "from moirai._native import build_profile\n",
        "python/moirai/errors.py": "class MoiraiError(Exception): ...\n",
        "python/moirai/memory/arrays.py": (
            "from moirai import errors\nfrom moirai._native import use\n"
        ),
        "python/moirai/reports/text.py": "from dataclasses import dataclass\n",
        "python/moirai/cli/run.py": "import os\nfrom moirai import memory, reports\n",
        "crates/core/Cargo.toml": '[dependencies]\nlibc = "0.2"\n',
        "crates/core/src/os.rs": "pub fn page() { libc::sysconf(0); }\n",
        "crates/core/src/sync.rs": "pub use std::sync::atomic::AtomicUsize;\n",
        "crates/core/src/error.rs": '// knows no pyo3\nconst A: &str = "libc::free";\n',
        "crates/python/src/buffer.rs": "fn f() { unsafe { g() } }\n",
        "crates/python/src/memory.rs": "/// Nothing unsafe.\nfn f<'a>(x: &'a u8) {}\n",
    }
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_tree_has_no_violation(rule: Callable[[Path], list[str]], clean_tree: Path) -> None:
    assert rule(clean_tree) == []


@pytest.mark.parametrize(
    ("rule", "name", "source", "message"),
    PLANTED,
    ids=[f"{rule.__name__}-{index}" for index, (rule, *_) in enumerate(PLANTED)],
)
def test_a_planted_violation_is_found(
    rule: Callable[[Path], list[str]], name: str, source: str, message: str, clean_tree: Path
) -> None:
    path = clean_tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)

    (violation,) = rule(clean_tree)

    assert message in violation


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, *_ in PLANTED} == set(RULES)
