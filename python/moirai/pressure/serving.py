"""A cap on the requests that a web application serves at once: 503 with Retry-After beyond it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any, Generic, TypeVar

from moirai._arguments import check_callable, check_instance, check_number
from moirai.errors import InvalidArgument
from moirai.pressure.concurrency import ConcurrencyCap

__all__ = ["AsgiCap", "WsgiCap"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_AsgiApplication = Callable[[_Scope, _Receive, _Send], Awaitable[None]]
_StartResponse = Callable[..., Any]
_WsgiApplication = Callable[[dict[str, Any], _StartResponse], Iterable[bytes]]

_Application = TypeVar("_Application", bound=Callable[..., Any])

_BODY = b"Over capacity, try again later.\n"


class _Cap(Generic[_Application]):
    """An application that serves as many requests at once as a cap allows, and refuses others."""

    def __init__(
        self, app: _Application, cap: ConcurrencyCap, *, retry_after_seconds: float = 1.0
    ) -> None:
        """Wrap `app`; refusals ask to come back after `retry_after_seconds`, rounded up.

        Raises:
            InvalidArgument: `retry_after_seconds` is not from 0 to 1e6.
            WrongType: `app` cannot be called, or `cap` is no `ConcurrencyCap`.
        """
        check_callable("app", app)
        check_instance("cap", cap, ConcurrencyCap)
        check_number("retry_after_seconds", retry_after_seconds)
        if not 0 <= retry_after_seconds <= 1e6:
            raise InvalidArgument(
                f"retry_after_seconds: must be from 0 to 1e6, got {retry_after_seconds}"
            )
        self.cap = cap
        self._app = app
        self._retry_after = str(math.ceil(retry_after_seconds))


class AsgiCap(_Cap[_AsgiApplication]):
    """An ASGI application that serves as many requests at once as a cap allows, and refuses others.

    Websockets and the application's own life cycle pass. Any number of tasks may use it at once.
    """

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve, or refuse, one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self.cap.try_acquire():
            try:
                await self._app(scope, receive, send)
            finally:
                self.cap.release()
        else:
            headers = [
                (b"content-type", b"text/plain"),
                (b"content-length", str(len(_BODY)).encode()),
                (b"retry-after", self._retry_after.encode()),
            ]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})


class WsgiCap(_Cap[_WsgiApplication]):
    """A WSGI application that serves as many requests at once as a cap allows, and refuses others.

    A request counts until its answer is closed. Any number of threads may use it at once.
    """

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        """Serve, or refuse, one request."""
        if not self.cap.try_acquire():
            headers = [
                ("Content-Type", "text/plain"),
                ("Content-Length", str(len(_BODY))),
                ("Retry-After", self._retry_after),
            ]
            start_response("503 Service Unavailable", headers)
            return [_BODY]
        try:
            return _Counted(self._app(environ, start_response), self.cap)
        except BaseException:
            self.cap.release()
            raise


class _Counted:
    """An application's answer, which holds its place under the cap until the server closes it."""

    def __init__(self, answer: Iterable[bytes], cap: ConcurrencyCap) -> None:
        self._answer = answer
        self._cap: ConcurrencyCap | None = cap

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        """End the request; called once by the server, also when the client has left."""
        cap, self._cap = self._cap, None
        try:
            close = getattr(self._answer, "close", None)
            if close is not None:
                close()
        finally:
            if cap is not None:
                cap.release()
