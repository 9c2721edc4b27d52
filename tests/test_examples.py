"""Each example runs: the same with and without Moirai's memory, or over either kind of queue."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "image_pipeline.py": ["--photographs", "chelsea"],
    "photo_segmentation.py": ["--photographs", "coffee", "--segments", "3", "--iterations", "1"],
    "signal_chain.py": ["--exercises", "1"],
}
# Programs that import Moirai, and pass the same over multiprocessing: small input, what both say.
CHANNELS = {
    "data_loader.py": (["--batches", "6", "--count", "4", "--size", "64"], r"checksum \w{8}"),
    "frame_pipeline.py": (["--frames", "6", "--height", "90"], r"moved \d+, checksum \w{8}"),
    "log_collector.py": (["--workers", "2", "--records", "50"], r"in order"),
}
PLAIN = [sys.executable]
MOIRAI = [sys.executable, "-m", "moirai", "run", "--summary", "none"]

needs_libraries = pytest.mark.usefixtures("libraries")


@pytest.fixture
def libraries():
    for name in ("scipy", "sklearn", "skimage", "seglearn"):
        # Not importorskip: seglearn is only data to us, and its import warns.
        if not any((Path(entry) / name).is_dir() for entry in sys.path):
            pytest.skip(f"{name} is not installed (dependency group `examples`)")


def printed_by(interpreter, program, *arguments, **variables):
    run = subprocess.run(
        [*interpreter, str(EXAMPLES / program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **variables},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SMALL, *CHANNELS}


@needs_libraries
@pytest.mark.parametrize("program", SMALL)
def test_example_prints_the_same_under_moirai(program):
    plain = printed_by(PLAIN, program, *SMALL[program], MALLOC_PERTURB_="90")
    assert re.search(r"checksum [0-9a-f]{8}", plain)
    assert printed_by(MOIRAI, program, *SMALL[program]) == plain


@needs_libraries
@pytest.mark.parametrize("program", CHANNELS)
def test_example_passes_the_same_over_channels_and_over_multiprocessing(program):
    arguments, report = CHANNELS[program]
    printed = printed_by([*PLAIN, "-W", "error"], program, *arguments)
    assert re.search(r"takes \d+\.\d\d of the CPU time", printed)
    over_queues, over_channels = re.findall(report, printed)
    assert over_queues == over_channels


@pytest.mark.parametrize("program", SMALL)
def test_example_does_not_mention_moirai_in_its_code(program):
    assert "import moirai" not in (EXAMPLES / program).read_text(encoding="utf-8")


@needs_libraries
@pytest.mark.parametrize("program", SMALL)
def test_example_refuses_to_repeat_less_than_once(program):
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / program), "--repeat", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "--repeat: must be at least 1, got 0" in run.stderr
