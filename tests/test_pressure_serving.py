"""Web applications under a cap: they serve what it allows and refuse the rest politely."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from moirai.errors import InvalidArgument
from moirai.pressure import AsgiCap, ConcurrencyCap, WsgiCap


def request(app: Any, scope_type: str = "http") -> Any:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    return app({"type": scope_type}, receive, send), sent


def test_asgi_requests_beyond_the_cap_are_refused() -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        cap = ConcurrencyCap(1)
        capped = AsgiCap(app, cap, retry_after_seconds=2.5)
        served, answer = request(capped)
        task = asyncio.create_task(served)
        while cap.in_flight == 0:
            await asyncio.sleep(0)
        refused, refusal = request(capped)
        await refused
        release.set()
        await task
        assert [message["status"] for message in answer] == [200]
        assert refusal[0]["status"] == 503
        assert (b"retry-after", b"3") in refusal[0]["headers"]
        assert int(dict(refusal[0]["headers"])[b"content-length"]) == len(refusal[1]["body"])
        assert cap.in_flight == 0

    asyncio.run(main())


def test_asgi_lets_other_scopes_pass_and_gives_its_place_back_after_a_failure() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raise ValueError("app")
        await send({"type": "passed"})

    async def main() -> None:
        cap = ConcurrencyCap(1)
        with pytest.raises(ValueError, match="app"):
            await request(AsgiCap(app, cap))[0]
        assert cap.in_flight == 0
        cap.acquire()
        passed, answer = request(AsgiCap(app, cap), "lifespan")
        await passed
        assert answer == [{"type": "passed"}]

    asyncio.run(main())


def call(app: Any) -> tuple[str, dict[str, str], Any]:
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ["QUERY_STRING"] = ""
    started: list[Any] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        started.extend([status, dict(headers)])
        return lambda data: None

    answer = app(environ, start_response)
    return started[0], started[1], answer


def plain(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


def test_wsgi_requests_count_until_their_answer_is_closed() -> None:
    cap = ConcurrencyCap(1)
    app = validator(WsgiCap(validator(plain), cap))
    status, _, first = call(app)
    assert status == "200 OK"
    status, headers, refusal = call(app)
    assert status == "503 Service Unavailable"
    assert headers["Retry-After"] == "1"
    assert int(headers["Content-Length"]) == len(b"".join(refusal))
    refusal.close()
    assert cap.in_flight == 1
    assert b"".join(first) == b"ok"
    first.close()
    assert cap.in_flight == 0
    status, _, again = call(app)
    assert (status, b"".join(again)) == ("200 OK", b"ok")
    again.close()


def test_wsgi_gives_its_place_back_after_a_failure() -> None:
    def fails(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise ValueError("app")

    cap = ConcurrencyCap(1)
    with pytest.raises(ValueError, match="app"):
        call(WsgiCap(fails, cap))
    assert cap.in_flight == 0


@pytest.mark.parametrize("kind", [AsgiCap, WsgiCap])
def test_the_time_to_come_back_is_checked(kind: Any) -> None:
    with pytest.raises(InvalidArgument, match="retry_after_seconds: must be from 0 to 1e6, got -1"):
        kind(plain, ConcurrencyCap(1), retry_after_seconds=-1)
