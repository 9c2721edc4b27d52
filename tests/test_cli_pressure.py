"""`moirai pressure replay`: what it draws of a recording, and what it refuses."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moirai import cli
from moirai.cli import pressure_replay

TRACE = next((Path(__file__).parent / "fixtures" / "pressure").glob("*-leaky_loop-*.csv"))


def test_replay_draws_the_recording_and_its_record(capsys):
    assert cli.main(["pressure", "replay", "--time-scale", "10", str(TRACE)]) == 0

    out = capsys.readouterr().out
    assert TRACE.name in out
    assert "●" in out
    assert "░" in out
    assert "30 s ahead:" in out
    assert "alarms: 1, 1 true, 0 false; crossings of 90 %: 1, 0 without an alarm" in out


def test_replay_writes_its_record_as_json(capsys):
    assert cli.main(["pressure", "replay", "--json", "--time-scale", "10", str(TRACE)]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moirai.pressure.replay/1"
    assert found["score"]["crossing_count"] == 1


def test_replay_draws_in_the_terminal_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    png = tmp_path / "out.png"

    assert cli.main(["pressure", "replay", "--png", str(png), str(TRACE)]) == 0

    captured = capsys.readouterr()
    assert "matplotlib is not installed" in captured.err
    assert "●" in captured.out
    assert not png.exists()


def test_replay_draws_to_a_file_with_matplotlib(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "out.png"

    assert (
        cli.main(["pressure", "replay", "--time-scale", "10", "--png", str(png), str(TRACE)]) == 0
    )

    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n", "expected the columns t_seconds and used_bytes"),
        ("t_seconds,used_bytes,limit_bytes\n", "expected at least one line"),
        ("t_seconds,used_bytes\n1,two\n", r"trace.csv:2: could not convert"),
        ("t_seconds,used_bytes\n1,nan\n", "expected finite numbers of at least 0, got [1.0, nan"),
        ("t_seconds,used_bytes,limit_bytes\n1,2,-3\n", "expected finite numbers of at least 0"),
        ("", "got none"),
        (f"t_seconds,used_bytes\n1,{'2' * 200_000}\n", "trace.csv: field larger than"),
    ],
)
def test_what_is_no_recording_is_refused(text, problem, capsys, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(text)

    assert cli.main(["pressure", "replay", str(path)]) == 2

    assert problem in capsys.readouterr().err


def test_a_missing_file_is_refused(capsys, tmp_path):
    assert cli.main(["pressure", "replay", str(tmp_path / "none.csv")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0,1000,\n", "0,1000,0\n1,1000,0\n", "5,0,0\n"])
def test_short_recordings_without_a_limit_are_drawn(text, capsys, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("\ufefft_seconds,used_bytes,limit_bytes\n" + text, encoding="utf-8")

    assert cli.main(["pressure", "replay", str(path)]) == 0

    assert "alarms: 0" in capsys.readouterr().out


def test_the_axis_of_time_is_the_recordings(capsys, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("t_seconds,used_bytes\n1000,5\n1060,6\n")

    assert cli.main(["pressure", "replay", str(path)]) == 0

    assert re.search(r"\n +1000 s +1060 s\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pressure", "--help"], ["pressure", "watch", "--count", "1"]]
)
def test_a_terminal_without_the_signs_is_written_to(arguments):
    command = [sys.executable, "-m", "moirai", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_an_unknown_subcommand_is_refused(capsys):
    assert cli.main(["pressure", "foresee"]) == 2
    assert "expected one of watch, replay, got 'foresee'" in capsys.readouterr().err
    assert cli.main(["pressure"]) == 2


def test_help_lists_the_subcommands(capsys):
    assert cli.main(["pressure", "--help"]) == 0
    assert pressure_replay.SUMMARY in capsys.readouterr().out
