"""What pip builds and what a source archive contains."""

import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("maturin") is None, reason="needs maturin, as the build does"
)


@pytest.fixture
def backend():
    path = ROOT / "scripts" / "build_backend.py"
    spec = importlib.util.spec_from_file_location("build_backend", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_backend_has_every_hook_of_maturins(backend):
    import maturin

    hooks = {name for name in dir(maturin) if re.match("build_|get_requires_|prepare_", name)}
    assert set(backend.__all__) == hooks
    assert all(callable(getattr(backend, hook)) for hook in hooks)


def test_library_is_built_with_the_rust_that_maturin_gets(backend, tmp_path, monkeypatch):
    built = tmp_path / "libmoirai_malloc.so"
    built.write_bytes(b"library")
    artifact = {"reason": "compiler-artifact", "target": {"name": "moirai_malloc"}}
    lines = [json.dumps({"reason": "build-script-executed"})]
    lines += [json.dumps({**artifact, "filenames": [str(built)]})]
    cargo = tmp_path / "rust" / "cargo"
    cargo.parent.mkdir()
    cargo.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    cargo.chmod(0o755)
    got = types.SimpleNamespace(setup_rust=lambda: {"PATH": f"{cargo.parent}:/bin:/usr/bin"})
    monkeypatch.setitem(sys.modules, "puccinialin", got)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MATURIN_NO_INSTALL_RUST", raising=False)
    monkeypatch.setattr(backend, "LIBRARY", tmp_path / "_preload" / "libmoirai_malloc.so.1")
    backend.build_preload_library()
    assert backend.LIBRARY.read_bytes() == b"library"
    assert [path.name for path in backend.LIBRARY.parent.iterdir()] == [backend.LIBRARY.name]


def test_source_archive_builds_every_crate(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone: the archive has what git knows")
    subprocess.run(
        [sys.executable, "-m", "maturin", "sdist", "--out", str(tmp_path)],
        cwd=ROOT,
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        top = archive.name.removesuffix(".tar.gz")
        names = {name.removeprefix(f"{top}/") for name in source.getnames()}
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (folder,) = project["build-system"]["backend-path"]
    assert names >= {f"{crate}/Cargo.toml" for crate in workspace["members"]}
    assert names >= {"Cargo.lock", "LICENSE", "LICENSE-APACHE", "LICENSE-MIT", "README.md"}
    assert names >= {f"{folder}/build_backend.py", "python/moirai/py.typed"}
    assert not [name for name in names if name.endswith((".so", ".so.1", ".pyc"))]
