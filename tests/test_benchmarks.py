"""The benchmarks' arithmetic, tables and files, and that each script runs from end to end."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def harness():
    return importlib.import_module("harness")


# --- numbers ------------------------------------------------------------------------------------


def test_median_of_nothing_is_nan(harness):
    assert math.isnan(harness.median([]))


def test_spread_is_half_the_interquartile_range_over_the_median(harness):
    assert harness.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.0 / 3.0)
    assert harness.spread([7.0]) == 0.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_percentile_is_not_exceeded_by_its_share(values, share):
    import harness

    found = harness.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_ratios_are_taken_within_a_round(harness):
    samples = {"glibc": [1.0, 10.0], "moirai": [0.5, 20.0]}
    assert harness.round_ratios(samples) == {"glibc": [1.0, 1.0], "moirai": [0.5, 2.0]}


def test_ratios_need_a_sample_in_each_round(harness):
    with pytest.raises(ValueError, match=r"moirai: expected 2 samples, as glibc, got 1"):
        harness.round_ratios({"glibc": [1.0, 1.0], "moirai": [1.0]})


def test_best_peer_is_never_moirai(harness):
    assert harness.best_peer({"glibc": 1.0, "tcmalloc": 0.9, "moirai": 0.5}) == ("tcmalloc", 0.9)
    assert math.isnan(harness.best_peer({"moirai": 0.5})[1])


def test_every_round_visits_each_configuration_and_starts_with_another(harness):
    visits = list(harness.interleaved(["a", "b", "c"], 3))
    assert visits[:3] == [(0, "a"), (0, "b"), (0, "c")]
    assert [name for index, name in visits if index == 1] == ["b", "c", "a"]
    assert len(visits) == 9


# --- goals, tables, files -----------------------------------------------------------------------


def test_goal_says_whether_it_is_met_and_a_missing_number_is_a_miss(harness):
    assert str(harness.Goal("faults", 0.0, 0.0)).startswith("met")
    assert str(harness.Goal("ratio", 1.2, 1.05)) == "MISSED ratio: 1.2, limit 1.05"
    assert not harness.Goal("ratio", math.nan, 1.05).met


def test_table_aligns_numbers_to_the_right(harness):
    table = harness.markdown_table(["", "16 KiB"], [["glibc", "1.46"], ["a|b", "0.9"]])
    assert table.splitlines() == [
        "|       | 16 KiB |",
        "| ----- | -----: |",
        "| glibc |   1.46 |",
        "| a\\|b  |    0.9 |",
    ]


def test_table_refuses_a_row_of_another_length(harness):
    with pytest.raises(ValueError, match=r"expected 2 cells, got 1"):
        harness.markdown_table(["", "x"], [["only"]])


@pytest.mark.parametrize(
    ("size_bytes", "label"),
    [(64, "64 B"), (1536, "1536 B"), (16384, "16 KiB"), (1 << 28, "256 MiB")],
)
def test_sizes_are_labelled_in_the_largest_whole_unit(harness, size_bytes, label):
    assert harness.size_label(size_bytes) == label


def test_section_of_a_page_is_replaced_and_the_rest_kept(harness, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n", encoding="utf-8")
    harness.write_section(page, "x", "new")
    harness.write_section(page, "x", "newer")
    assert page.read_text(encoding="utf-8") == (
        "before\n<!-- x:begin -->\n\nnewer\n\n<!-- x:end -->\nafter\n"
    )


def test_page_without_the_section_is_refused(harness, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md: expected the markers <!-- x:begin -->"):
        harness.write_section(page, "x", "new")


def test_docs_have_a_section_for_each_benchmark():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f"<!-- {name}:begin -->\n" in text
        assert f"<!-- {name}:end -->" in text


def shown(page, name):
    _, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->\n")
    return rest.partition(f"<!-- {name}:end -->")[0].strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_docs_show_what_was_measured(harness, name):
    document = json.loads((harness.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert shown(harness.DOCS, name) == harness.section(document).strip()


README_SECTIONS = ["bench_programs", "bench_shared_channels", "bench_executor",
                   "bench_process_executor", "bench_oom"]  # fmt: skip


@pytest.mark.parametrize("name", README_SECTIONS)
def test_readme_shows_what_was_measured(harness, name):
    document = json.loads((harness.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    table = shown(ROOT / "README.md", name)
    assert document["digest"].strip() in table
    assert harness.short_machine_line(document["machine"]) in table


@pytest.mark.parametrize("name", README_SECTIONS[1:])
def test_a_digest_says_what_the_results_say(harness, name):
    document = json.loads((harness.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    script = importlib.import_module(name)
    size = [harness.size_label(document["parameters"]["size_bytes"])] if "process" in name else []
    assert script.digest(document["results"], *size) == document["digest"]


def test_a_digest_has_ours_beside_the_fastest_peer(harness):
    samples = {"usual": [4.0, 2.0, 3.0], "quick": [1.5], "Moirai": [6.0], "Moirai, other": [0.1]}
    one = harness.Comparison("a call", samples, "usual", "Moirai")
    without_us = harness.Comparison("none", {"usual": [1.0]}, "usual", "Moirai")
    table = harness.digest([one, without_us], "over usual's").splitlines()
    assert [cell.strip() for cell in table[-1].split("|")[1:4]] == [
        "a call",
        "quick",
        "**2.00** / 0.50",
    ]
    assert len(table) == 3
    assert harness.digest([without_us], "over usual's") == ""


def test_a_missing_number_stays_a_miss_in_the_docs(harness):
    report = harness.Report("x", "?", {}, {}, "table", [harness.Goal("ratio", math.nan, 1.0)])
    section = harness.section(json.loads(json.dumps(report.as_dict(harness.machine()))))
    assert section.splitlines()[-1].split("|")[2:5] == ["      nan ", "     1 ", " **missed** "]


def test_machine_names_no_path_and_no_host(harness):
    import platform

    line = harness.machine_line(harness.machine())
    assert str(ROOT) not in line
    assert platform.node() not in line
    assert "numpy" in line


# --- configurations and workers -----------------------------------------------------------------


def test_configuration_inherits_no_allocator(harness, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/libelse.so")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    environment = harness.Configuration("glibc", "glibc").full_environment()
    assert "LD_PRELOAD" not in environment
    assert "GLIBC_TUNABLES" not in environment


def test_moirai_and_glibc_are_among_the_configurations(harness):
    found = list(harness.find_configurations())
    assert found[0] == harness.BASELINE
    assert found[-1] == harness.MOIRAI


def test_unknown_configuration_is_refused_by_name(harness):
    with pytest.raises(ValueError, match=r"configurations: expected some of glibc, got nomalloc"):
        harness.select_configurations(
            {"glibc": harness.Configuration("glibc", "glibc")}, ["nomalloc"]
        )


ECHO = """\
import sys
import harness

def answer(request):
    print("this is not an answer")
    if request.get("fail"):
        raise ValueError("asked to fail")
    if request.get("exit"):
        sys.exit(3)
    return request["x"] * 2

harness.serve(answer)
"""


@pytest.fixture
def echo_worker(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    script = tmp_path / "echo.py"
    script.write_text(ECHO, encoding="utf-8")
    worker = harness.Worker(harness.Configuration("glibc", "glibc"), script)
    yield worker
    worker.close()


def test_worker_answers_many_requests_whatever_it_prints(echo_worker):
    assert [echo_worker.ask({"x": number}) for number in range(5)] == [0, 2, 4, 6, 8]


def test_worker_reports_an_error_and_lives_on(harness, echo_worker):
    with pytest.raises(harness.WorkerFailed, match=r"glibc: ValueError: asked to fail"):
        echo_worker.ask({"fail": True})
    assert echo_worker.ask({"x": 4}) == 8


def test_worker_that_ends_is_reported_with_its_status(harness, echo_worker):
    with pytest.raises(harness.WorkerFailed, match=r"glibc: ended with status 3"):
        echo_worker.ask({"exit": True})


# --- the scripts --------------------------------------------------------------------------------

# The name and type of every key of a result; a change needs a new schema_version.
SCHEMA = {
    "schema_version": int,
    "benchmark": str,
    "question": str,
    "machine": dict,
    "parameters": dict,
    "results": dict,
    "markdown": str,
    "digest": str,
    "goals": list,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs_from_end_to_end(name, tmp_path):
    pytest.importorskip("skimage" if name == "bench_programs" else "numpy")
    output = tmp_path / "result.json"
    run = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / f"{name}.py"),
            "--quick",
            "--configurations=glibc,moirai",
            f"--output={output}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Moirai" in run.stdout
    document = json.loads(output.read_text(encoding="utf-8"))
    assert {key: type(value) for key, value in document.items()} == SCHEMA
    assert document["benchmark"] == name
    assert document["goals"], "a run with Moirai has goals"
    for goal in document["goals"]:
        assert set(goal) == {"text", "measured", "limit", "met"}
    assert document["markdown"] in run.stdout
    assert str(ROOT) not in output.read_text(encoding="utf-8")


def test_a_quick_run_is_kept_out_of_the_docs_before_anything_is_measured(harness, capsys):
    with pytest.raises(SystemExit):
        harness.argument_parser("Why?").parse_args(["--quick", "--write-docs"])
    assert "--write-docs: expected a full run, got --quick" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_first_line_of_a_benchmark_is_its_question(name):
    text = (BENCHMARKS / f"{name}.py").read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith('"""')
    assert text.splitlines()[0].endswith("?")


def test_fragmentation_keeps_its_accounts(harness):
    bench_fragmentation = importlib.import_module("bench_fragmentation")
    churn = bench_fragmentation.Churn(1, 1 << 20, [1024, 8192])
    churn._logarithm = math.log(1024)
    for step in (churn._fill, churn._churn, lambda: churn._shrink(1 << 17), churn._fill):
        step()
        live = [block.nbytes for block in churn._slots if block.nbytes]
        assert len(live) == churn._live_count
        assert sum(live) == churn._live_bytes == sum(churn._slot_bytes[: len(live)])
    assert 1 << 20 <= churn._live_bytes < (1 << 20) + 65536
    churn._shrink(0)
    assert not any(block.nbytes for block in churn._slots)


def test_a_fresh_run_is_recorded_until_its_end_or_its_limit(tmp_path, monkeypatch):
    programs = importlib.import_module("pressure_programs")
    programs.record(tmp_path, programs=["backlog"], seeds=1, seconds=1)
    monkeypatch.setattr(programs, "LIMIT_BYTES", 40 << 20)
    programs.record(tmp_path, programs=["load_then_serve"], seeds=1, seconds=60)
    assert {path.name for path in tmp_path.iterdir()} == {
        "fresh-ok-backlog-s0.csv",
        "fresh-oom-load_then_serve-s0.csv",
    }
    lines = (tmp_path / "fresh-oom-load_then_serve-s0.csv").read_text().splitlines()
    assert lines[0] == "t_seconds,rss_bytes,limit_bytes"
    assert lines[1].startswith("0.000,")
    used = [int(line.split(",")[1]) for line in lines[1:]]
    assert max(used[:-1], default=0) <= 40 << 20 < used[-1]


def test_nothing_is_recorded_of_a_program_that_has_ended():
    programs = importlib.import_module("pressure_programs")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lines: list[str] = []
        assert not programs._look(process, 0.0, lines)
        assert lines == []
