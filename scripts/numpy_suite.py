"""Run NumPy's own tests plain and under Moirai, and compare how many pass, fail and are skipped.

    python scripts/numpy_suite.py [--quick]

Both runs get the same options. Exits with 0 only if the counts are equal and every run ended
by itself; a test that fails in both is NumPy's own affair and is printed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

MODULES = ["_core", "lib", "linalg", "ma", "fft", "random"]
QUICK_MODULES = ["fft", "ma"]
OUTCOMES = ["passed", "failed", "error", "skipped", "xfailed"]


def pytest_options(modules: list[str], junit: Path) -> list[str]:
    return [
        *["-m", "pytest", "--pyargs", *(f"numpy.{module}" for module in modules)],
        *["-q", "--no-header", "-m", "not slow"],
        # Nothing of this repository's configuration, and nothing kept between the two runs.
        *["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(junit.parent)],
        f"--junit-xml={junit}",
    ]


def outcomes(junit: Path) -> dict[str, str]:
    """Read the outcome of each test: name -> one of OUTCOMES."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag == "skipped":
                outcome = "xfailed" if child.get("type") == "pytest.xfail" else "skipped"
            elif child.tag in {"failure", "error"}:
                outcome = "failed" if child.tag == "failure" else "error"
        name = f"{case.get('classname')}::{case.get('name')}"
        # Parametrised objects put their address into the name of a few tests.
        found[re.sub(r"0x[0-9a-f]+", "0x", name)] = outcome
    return found


def run(label: str, launcher: list[str], modules: list[str], folder: Path) -> dict[str, str]:
    junit = folder / f"{label}.xml"
    command = [sys.executable, *launcher, *pytest_options(modules, junit)]
    print(f"== {label}", flush=True)
    done = subprocess.run(command, cwd=folder, check=False)
    # pytest: 0 all passed, 1 some failed. Anything else means that the run did not finish.
    if done.returncode not in {0, 1} or not junit.exists():
        sys.exit(f"{label}: the run ended with {done.returncode} and is no result")
    return outcomes(junit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK_MODULES)}")
    modules = QUICK_MODULES if parser.parse_args().quick else MODULES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = run("plain", [], modules, folder)
        ours = run("moirai", ["-m", "moirai", "run", "--summary", "none"], modules, folder)

    counts = {"plain": Counter(plain.values()), "moirai": Counter(ours.values())}
    print(f"\nnumpy {', '.join(modules)}, not slow")
    print(f"{'':8}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for label, count in counts.items():
        print(f"{label:8}" + "".join(f"{count[outcome]:9}" for outcome in OUTCOMES))
    different = sorted(
        name for name in plain.keys() | ours.keys() if plain.get(name) != ours.get(name)
    )
    for name in different[:50]:
        print(f"differs: {name}: {plain.get(name)} plain, {ours.get(name)} under moirai")
    if counts["plain"] != counts["moirai"] or not plain:
        print("the counts differ")
        return 1
    print("the counts are equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
