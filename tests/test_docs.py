"""Every Python and shell snippet of README.md and docs/ runs as it is printed.

The Python blocks of a page run in order in one namespace, in a process of their own; the commands
of its `console` and `sh` blocks run in a folder with the page's sample program, app.py. After the
language, a fence may say `file: NAME` (the block is also that file) or `no-run: REASON` (for what
installs or builds).
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {"moirai", "python"}
SAMPLE = """\
import numpy as np

total = sum(float(np.ones(200_000).sum()) for _ in range(100))
print(total)
"""

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)?(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """One fenced block: its language, what follows it on the fence, where it is, its text."""

    language: str
    info: str
    line: int
    body: str

    @property
    def file_name(self) -> str | None:
        return self.info.removeprefix("file:").strip() if self.info.startswith("file:") else None

    @property
    def skipped(self) -> bool:
        return self.info.startswith("no-run")


def snippets(text: str) -> Iterator[Snippet]:
    for match in FENCE.finditer(text):
        indent = match["indent"]
        body = "".join(
            line.removeprefix(indent) for line in match["body"].splitlines(keepends=True)
        )
        line = text.count("\n", 0, match.start()) + 1
        yield Snippet(match["language"] or "", match["info"].strip(), line, body)


def commands(snippet: Snippet) -> list[str]:
    """Give the commands of a shell block: lines with a prompt in `console`, every line in `sh`.

    A line that ends with a backslash goes on in the next one.
    """
    lines = snippet.body.replace("\\\n", " ").splitlines()
    if snippet.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_python_blocks(blocks: list[Snippet], folder: Path) -> subprocess.CompletedProcess[str]:
    # Blank lines put each block at its line of the page, so that a traceback points there.
    program = ["namespace = {'__name__': '__main__'}"]
    program += [
        f"exec(compile({chr(10) * block.line + block.body!r}, 'page', 'exec'), namespace)"
        for block in blocks
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(SAMPLE)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path, folder: Path) -> None:
    blocks = [
        snippet
        for snippet in snippets(page.read_text())
        if snippet.language == "python" and not snippet.skipped
    ]
    done = run_python_blocks(blocks, folder)
    assert done.returncode == 0, f"{page.name}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, folder: Path) -> None:
    for snippet in snippets(page.read_text()):
        if snippet.file_name and not snippet.skipped:
            (folder / snippet.file_name).write_text(snippet.body)
        if snippet.language not in {"console", "sh"} or snippet.skipped:
            continue
        for command in commands(snippet):
            where = f"{page.name}:{snippet.line}: {command}"
            words = [word for word in command.split() if "=" not in word]
            assert words[0] in COMMANDS, f"{where}\nneither of {COMMANDS}; or say no-run: why"
            done = run_command(command, folder)
            assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_snippet_that_is_not_run_says_why(page: Path) -> None:
    for snippet in snippets(page.read_text()):
        if snippet.skipped:
            reason = snippet.info.removeprefix("no-run").removeprefix(":").strip()
            assert reason, f"{page.name}:{snippet.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\[[^\]]*\]\(([^)#\s]+)", page.read_text())
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


def test_a_broken_python_snippet_is_found_at_its_line(folder: Path) -> None:
    page = "# Page\n\n```python\na = 1\n```\n\n```python\nassert a == 1\nassert a == 2\n```\n"
    done = run_python_blocks(list(snippets(page)), folder)
    assert done.returncode != 0
    assert "line 9" in done.stderr


def test_a_broken_command_is_found(folder: Path) -> None:
    (block,) = snippets("```console\n$ moirai no-such-command\noutput\n```\n")
    (command,) = commands(block)
    assert run_command(command, folder).returncode == 2


def test_snippets_are_read_as_printed() -> None:
    page = (
        "1. item\n\n   ```sh no-run: installs\n   # first\n   pip install \\\n     x\n   ```\n"
        "```text\nnothing\n```\n```python file: a.py\npass\n```\n"
    )
    shell, text, python = snippets(page)
    assert (shell.language, shell.skipped, shell.line) == ("sh", True, 3)
    assert commands(shell) == ["pip install    x"]
    assert (text.language, text.skipped) == ("text", False)
    assert (python.file_name, python.body) == ("a.py", "pass\n")
