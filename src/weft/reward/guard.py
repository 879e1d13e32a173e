"""Before the reward service: who may ask, how much may come, and how slowly. And the server itself."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Mapping
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.errors import WeftError
from weft.reward.mix import Scorer
from weft.reward.service import Batcher, Limits, Refused, Service

HEADER_SECONDS = 10.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guard:
    """ASGI middleware: Host, token, size and pace of the body. Nothing of a body is kept beyond its limit."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, hosts: frozenset[str] | None):
        self.app, self.limits, self.token, self.hosts = app, limits, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        try:
            self.check(scope["path"], headers)
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, self.limited(receive), send)

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises `Refused` for what the headers alone forbid."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.hosts is not None and name.lower() not in self.hosts:  # a web page that had its own name point here
            raise Refused(403, "this Host is not served: ask localhost")
        if self.token is not None and path != "/health":
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise Refused(401, "a bearer token is needed")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.body:
            raise Refused(413, f"a body of {length} bytes, {self.limits.body} is the most")

    def limited(self, receive: Receive) -> Receive:
        """`receive` that raises `Refused` when the body grows too large or takes too long."""
        loop = asyncio.get_running_loop()
        end, size, done = loop.time() + self.limits.seconds, 0, False

        async def guarded() -> Message:
            nonlocal size, done
            if done:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - loop.time()))
            except TimeoutError as error:
                raise Refused(408, f"the body did not arrive within {self.limits.seconds:g} s") from error
            size += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if size > self.limits.body:
                raise Refused(413, f"a body of more than {self.limits.body} bytes")
            return message

        return guarded


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which waits for the headers of a request for ever, with a limit to that."""

    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers_came()
        elif self._headers_due is None:  # the first bytes of a further request
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _headers_came(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_server(
    scorers: Mapping[str, Scorer],
    *,
    host: str = "127.0.0.1",
    port: int = 12341,
    token: str | None = None,
    limits: Limits | None = None,
    batch: int = 16,
    wait: float = 0.01,
) -> tuple[uvicorn.Server, Service]:
    """A server that is ready to run, and its service.

    `batch` items are scored at once at most, gathered for `wait` seconds. On an address that other machines reach, a
    `token` is needed: WeftError without. It travels in the clear: put TLS before it on a network that you do not own.
    """
    if not scorers:
        raise WeftError("there is no scorer to serve: name one")
    if not is_loopback(host) and not token:
        raise WeftError(f"{host} can be reached from other machines: set a bearer token, or use 127.0.0.1")
    if token is not None and len(token) < 16:
        raise WeftError(f"a token of {len(token)} characters can be guessed: use 16 or more")
    limits = limits or Limits()
    if not 0 <= port < 65536 or min(batch, limits.queue, limits.body) < 1 or not 0 <= wait < 60:
        raise WeftError(
            f"port {port}, batch {batch}, wait {wait:g} s, queue {limits.queue}, body {limits.body} bytes: "
            "a port is 0 to 65535, the wait below a minute, the others at least 1"
        )
    batchers = {name: Batcher(name, scorer, batch, wait, limits.queue) for name, scorer in scorers.items()}
    service = Service(batchers, limits, token, LOOPBACK_NAMES | {host.lower()} if token is None else None)
    config = uvicorn.Config(
        service.app(),
        host=host,
        port=port,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        limit_concurrency=256,
        backlog=256,
    )
    return uvicorn.Server(config), service


def run_server(server: uvicorn.Server, service: Service) -> None:
    """Serve until interrupted, then finish what is under way. WeftError if the port cannot be opened."""
    logging.basicConfig(level=logging.INFO)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it cannot bind
        where = f"port {server.config.port} of {server.config.host}"
        raise WeftError(f"{where} cannot be opened: is it in use?") from error
    finally:
        for batcher in service.batchers.values():
            batcher.close()
