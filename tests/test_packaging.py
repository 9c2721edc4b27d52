"""What pip builds and what a source archive contains."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("maturin") is None, reason="needs maturin, as the build does"
)


def test_build_backend_has_every_hook_of_maturins():
    import maturin

    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "scripts/build_backend.py"
    )
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    hooks = {name for name in dir(maturin) if re.match("build_|get_requires_|prepare_", name)}
    assert set(backend.__all__) == hooks
    assert all(callable(getattr(backend, hook)) for hook in hooks)


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
