"""Put the tables of benchmarks/results into README.md and docs/benchmarks.md, and check every link.

They stand between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, where NAME.json is the result.
README.md has one table of it, docs/benchmarks.md all. Nothing is written for a benchmark that has
no result yet. Only links to files of the repository are checked.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402  found through the line above

PAGES = ["*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md"]
MARKER = re.compile(r"^<!-- (\w+):begin -->$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def digest(document: dict[str, Any]) -> str:
    measured_on = f"Measured on: {harness.short_machine_line(document['machine'])}."
    return f"{document.get('digest') or document['markdown']}\n\n{measured_on}"


def refresh(page: Path, show: Callable[[dict[str, Any]], str]) -> None:
    for name in MARKER.findall(page.read_text(encoding="utf-8")):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{page.name}: {name} has no result yet; `make bench` makes it")
            continue
        document = json.loads(path.read_text(encoding="utf-8"))
        harness.write_section(page, name, show(document))
        print(f"{page.name}: {name} refreshed")


def broken_links(page: Path) -> list[str]:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    return [
        f"{page.relative_to(ROOT)}: {target} does not exist"
        for target in targets
        if "://" not in target and not (page.parent / target).exists()
    ]


def main() -> int:
    refresh(ROOT / "README.md", digest)
    refresh(harness.DOCS, harness.section)
    pages = sorted(page for pattern in PAGES for page in ROOT.glob(pattern))
    broken = [problem for page in pages for problem in broken_links(page)]
    print("\n".join(broken) or f"{len(pages)} pages, every link leads somewhere")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
