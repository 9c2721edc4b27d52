"""What comes from outside, and goes there: systemd's notices and posts to a URL."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moirai import pressure
from moirai.errors import InvalidArgument
from moirai.pressure import Guard, Registry, Sample, Stage, TraceSource, Webhook
from moirai.pressure.service_manager import PressureNotices

Runner = Callable[..., str]
WAIT_SECONDS = 60


def told(path: Path, greeting: bytes = b"") -> tuple[PressureNotices, threading.Semaphore]:
    heard = threading.Semaphore(0)
    return PressureNotices(str(path), greeting, heard.release), heard


def test_each_line_in_a_fifo_is_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "notices"
    os.mkfifo(path)
    notices, heard = told(path)
    notices.start()
    for _ in range(3):
        path.write_bytes(b"x")  # Opens and closes: the listener must outlast that.
        assert heard.acquire(timeout=WAIT_SECONDS)
    notices.stop()
    assert "moirai-notices" not in [thread.name for thread in threading.enumerate()]


def test_a_socket_is_greeted_and_heard_until_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        notices, heard = told(path, b"some 200000 2000000")
        notices.start()
        manager, _ = server.accept()
        with manager:
            assert manager.recv(100) == b"some 200000 2000000"
            manager.send(b"!")
            assert heard.acquire(timeout=WAIT_SECONDS)
    thread = notices._thread
    assert thread is not None
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    notices.stop()


def test_notices_can_be_stopped_and_started_again(tmp_path: Path) -> None:
    path = tmp_path / "notices"
    os.mkfifo(path)
    before = len(os.listdir("/proc/self/fd"))
    notices, heard = told(path)
    for _ in range(3):
        notices.start()
        notices.stop()
        notices.stop()
    assert len(os.listdir("/proc/self/fd")) == before
    notices.start()
    path.write_bytes(b"x")
    assert heard.acquire(timeout=WAIT_SECONDS)
    notices.stop()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MEMORY_PRESSURE_WATCH": "/dev/null"},
        {"MEMORY_PRESSURE_WATCH": "relative"},
        {"MEMORY_PRESSURE_WATCH": "/a", "MEMORY_PRESSURE_WRITE": "no base64!"},
    ],
)
def test_what_asks_for_nothing_is_left_alone(environment: dict[str, str]) -> None:
    assert PressureNotices.asked_for(environment, lambda: None) is None


def test_what_is_to_be_written_comes_in_base64() -> None:
    notices = PressureNotices.asked_for(
        {"MEMORY_PRESSURE_WATCH": "/a", "MEMORY_PRESSURE_WRITE": "c29tZQA="}, lambda: None
    )
    assert notices is not None
    assert (notices._path, notices._greeting) == ("/a", b"some\0")


def test_a_notice_makes_a_guarded_process_shrink_also_in_a_child(
    run_python: Runner, tmp_path: Path
) -> None:
    fifo = tmp_path / "notices"
    os.mkfifo(fifo)
    run_python(f"""
        import os, threading
        os.environ["MEMORY_PRESSURE_WATCH"] = {str(fifo)!r}
        from moirai import pressure

        asked = threading.Event()
        pressure.register("cache", lambda wanted: asked.set() or 0)
        guard = pressure.start(limit="4 GiB")
        with open({str(fifo)!r}, "w") as file:
            file.write("x")
        assert asked.wait(60)
        assert guard.stage == pressure.Stage.CALM
        pressure.stop()
        assert {{record.stage.name for record in guard.records()}} == {{"GENTLE"}}

        guard = pressure.start(limit="4 GiB")
        child = os.fork()
        if child == 0:
            threads = [thread.name for thread in threading.enumerate()]
            os._exit(0 if "moirai-notices" in threads else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_a_file_that_cannot_be_opened_leaves_the_guard(run_python: Runner) -> None:
    run_python("""
        import os
        os.environ["MEMORY_PRESSURE_WATCH"] = "/nowhere/pressure"
        from moirai import pressure

        with pressure.start(limit="4 GiB") as guard:
            guard.source.next(timeout_seconds=60)
    """)


def test_relief_is_one_gentle_round() -> None:
    registry = Registry()
    asked: list[str] = []
    registry.register("cache", lambda wanted: asked.append("cache"))
    registry.register("disk", lambda wanted: asked.append("disk"), irreversible=True)
    guard = Guard(TraceSource(os.devnull), registry=registry, built_in=())
    guard.step(Sample(0.0, 10, 100))
    assert asked == []
    guard.relieve()
    guard.step(Sample(1.0, 10, 100))
    guard.step(Sample(2.0, 10, 100))
    assert asked == ["cache"]


def refuse_thread(patch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Let no thread of that name be started."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise error
        start(thread)

    patch.setattr(threading.Thread, "start", refuse)


def test_notices_without_a_thread_leave_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notices"
    os.mkfifo(path)
    before = len(os.listdir("/proc/self/fd"))
    notices, heard = told(path)
    with monkeypatch.context() as patch:
        refuse_thread(patch, "moirai-notices", MemoryError())
        with pytest.raises(MemoryError):
            notices.start()
    assert len(os.listdir("/proc/self/fd")) == before
    notices.start()
    path.write_bytes(b"x")
    assert heard.acquire(timeout=WAIT_SECONDS)
    notices.stop()


def test_a_guard_without_a_thread_for_notices_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notices"
    os.mkfifo(path)
    monkeypatch.setenv("MEMORY_PRESSURE_WATCH", str(path))
    refuse_thread(monkeypatch, "moirai-notices", RuntimeError("can't start new thread"))
    guard = pressure.start(forecaster=None)
    try:
        assert pressure.current() is guard
    finally:
        pressure.stop()
    assert "nothing is heard of it: can't start new thread" in caplog.text


# Posts.


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    posts: list[tuple[dict[str, object], str | None]]
    status = 204

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.posts.append((json.loads(body), self.headers["Authorization"]))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[Receiver]]]:
    class Fresh(Receiver):
        posts = []  # noqa: RUF012  one for each test

    server = http.server.HTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/alerts", Fresh
    server.shutdown()
    thread.join()
    server.server_close()


def test_stages_are_posted_from_one_on_and_their_end(receiver: tuple[str, type[Receiver]]) -> None:
    url, posted = receiver
    webhook = Webhook(url, headers={"Authorization": "Bearer x"})
    guard = Guard(
        TraceSource(os.devnull),
        forecaster=None,
        registry=Registry(),
        built_in=(),
        on_stage=webhook,
    )
    for second, used in enumerate([10, 85, 92, 97, 97, 60, 60, 60]):
        guard.step(Sample(float(second), used << 20, 100 << 20))
    webhook.join()
    stages = [body["stage"] for body, _ in posted.posts]
    assert stages[:2] == ["aggressive", "emergency"]
    assert stages[-1] in ("calm", "monitor")
    first, authorization = posted.posts[0]
    assert authorization == "Bearer x"
    assert first["used_ratio"] == 0.92
    assert first["process_id"] == os.getpid()


def test_the_same_stage_is_not_posted_again_at_once(receiver: tuple[str, type[Receiver]]) -> None:
    url, posted = receiver
    webhook = Webhook(url, repeat_seconds=60)
    for second in (0, 1, 59, 61):
        webhook(Stage.EMERGENCY, Sample(float(second), 97, 100))
    webhook.join()
    assert len(posted.posts) == 2


def test_what_does_not_arrive_is_counted_and_the_guard_goes_on(
    receiver: tuple[str, type[Receiver]],
) -> None:
    url, posted = receiver
    posted.status = 500
    webhook = Webhook(url)
    webhook(Stage.EMERGENCY, Sample(0.0, 97, 100))
    webhook.join()
    assert webhook.failed_count == 1


def test_a_webhook_whose_thread_could_not_be_started_in_a_child_tries_again(
    receiver: tuple[str, type[Receiver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, posted = receiver
    webhook = Webhook(url)
    webhook._process_id -= 1  # Made by the parent, as it seems.
    with monkeypatch.context() as patch:
        refuse_thread(patch, "moirai-alerts", RuntimeError("can't start new thread"))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            webhook(Stage.EMERGENCY, Sample(0.0, 97, 100))
    webhook(Stage.EMERGENCY, Sample(1.0, 97, 100))
    webhook.join()
    assert len(posted.posts) == 1


def test_a_webhook_is_checked() -> None:
    with pytest.raises(InvalidArgument, match="url: must be http:// or https:// with a host"):
        Webhook("file:///etc/passwd")
    with pytest.raises(InvalidArgument, match="timeout_seconds"):
        Webhook("http://localhost", timeout_seconds=0)
