"""How pip builds Moirai: with maturin, and beside it the library that `moirai run` can preload.

maturin builds one compiled module. The preloadable library is another crate, which links nothing
of Python; it is built first and put where `[tool.maturin] include` finds it. As a program, this
builds that library alone.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maturin
from maturin import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent
# Not named *.so: maturin leaves such files out.
LIBRARY = ROOT / "python" / "moirai" / "_preload" / "libmoirai_malloc.so.1"
COMMAND = ["cargo", "build", "--quiet", "--release", "-p", "moirai-preload"]


def build_preload_library() -> None:
    """Build the library and put it into the package.

    Raises:
        CalledProcessError: cargo failed; it has said why on standard error.
    """
    command = [*COMMAND, "--message-format=json-render-diagnostics"]
    built = subprocess.run(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    (path,) = [
        path
        for message in messages
        if message["reason"] == "compiler-artifact" and message["target"]["name"] == "moirai_malloc"
        for path in message["filenames"]
    ]
    LIBRARY.parent.mkdir(exist_ok=True)
    # Under another name first: a process that has the old one preloaded goes on with it.
    new = LIBRARY.with_suffix(".new")
    shutil.copy(path, new)
    new.replace(LIBRARY)


def _environment() -> dict[str, str]:
    """As maturin does, get Rust for this build where there is none; it has asked pip for how."""
    if shutil.which("cargo") or os.environ.get("MATURIN_NO_INSTALL_RUST"):
        return dict(os.environ)
    from puccinialin import setup_rust

    return {**os.environ, **setup_rust()}


def build_wheel(
    wheel_directory: str,
    config_settings: Mapping[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """PEP 517: build a wheel into the folder, and return its name."""
    build_preload_library()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Mapping[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """PEP 660: build a wheel that refers to this source tree, and return its name."""
    build_preload_library()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


if __name__ == "__main__":
    build_preload_library()
