"""Asking a server that may fail: bounded retries with back-off, and a circuit breaker that pauses during an outage.

A request that keeps failing while the server answers others is given up after a few tries. When every request fails,
the breaker opens: callers wait, one at a time tries again after each cool-down, and all go on when the server is back,
or give up when it has been away for longer than `patience`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from weft.errors import WeftError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Failed(Exception):
    """A request that got no usable answer; the message says why. `status` is the last HTTP status, if there was one."""

    def __init__(self, reason: str, status: int | None = None):
        super().__init__(reason)
        self.status = status


@dataclass(slots=True, frozen=True)
class Patience:
    """How long to insist. Times in seconds.

    `retries` after the first try, `delay` before the first of them, doubled each time up to `longest`; `threshold`
    failures in a row open the breaker, which tries again every `cooldown`, for `patience` in all.
    """

    retries: int = 2
    delay: float = 0.5
    longest: float = 30.0
    threshold: int = 5
    cooldown: float = 5.0
    patience: float = 120.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.threshold < 1 or min(self.delay, self.cooldown, self.patience) < 0:
            raise WeftError(f"retries, delays and patience must not be negative, threshold at least 1: {self}")


class Breaker:
    """The state of one server as its callers see it. Thread-safe."""

    def __init__(
        self,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.patience, self.clock, self.sleep = patience, clock, sleep
        self.opened = 0  # how often it has opened, for logs
        self._lock = threading.Lock()
        self._failures = 0
        self._since: float | None = None  # when it opened
        self._next = 0.0  # when somebody may try

    @property
    def is_open(self) -> bool:
        """Whether the server is taken to be away."""
        return self._since is not None

    def wait(self) -> None:
        """Return when a request may be sent. Raises `Failed` if the server has been away for too long."""
        while True:
            with self._lock:
                if self._since is None:
                    return
                now = self.clock()
                if now >= self._next:
                    self._next = now + self.patience.cooldown  # this caller tries, the others wait
                    return
                if now - self._since > self.patience.patience:
                    raise Failed(f"the server has been away for {now - self._since:.0f} s")
                pause = min(self._next - now, 1.0)
            self.sleep(pause)

    def success(self) -> None:
        """The server answered."""
        with self._lock:
            self._failures, self._since = 0, None

    def failure(self) -> None:
        """It did not."""
        with self._lock:
            self._failures += 1
            if self._failures >= self.patience.threshold:
                now = self.clock()
                if self._since is None:
                    self._since, self.opened = now, self.opened + 1
                self._next = now + self.patience.cooldown

    def gave_up(self) -> bool:
        """Whether it has been open for longer than `patience`."""
        since = self._since
        return since is not None and self.clock() - since > self.patience.patience


def open_client(url: str, example: str, *, key_env: str | None, timeout: float, connections: int) -> httpx.Client:
    """A client of the server at `url`, at most `connections` at once; `key_env` names the environment variable with the
    key that it sends. Raises WeftError for what is no such address (`example` is one) and for a key that is not set."""
    try:
        import httpx
    except ImportError as error:
        raise WeftError("asking a server needs httpx: pip install 'weft[reward]'") from error
    if connections < 1 or not timeout > 0:
        raise WeftError(f"{url}: {connections} requests at once, {timeout:g} s for each: both must be above 0")
    headers = {}
    if key_env is not None:
        key = os.environ.get(key_env, "").strip()  # a key read from a file often ends in a line break
        if not key:
            raise WeftError(f"the environment variable {key_env} is not set: put the server's key there")
        if not (key.isascii() and key.isprintable()):  # an HTTP library would show the key in its complaint
            raise WeftError(f"the environment variable {key_env} holds characters that no key has: put the key there")
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=connections)
    try:
        if not url.startswith(("http://", "https://")) or not httpx.URL(url).host:
            raise httpx.InvalidURL("it has no host")
        return httpx.Client(base_url=url, headers=headers, timeout=timeout, limits=limits)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise WeftError(f"{url}: not a server's address ({error}): write {example}") from error


def insist(send: Callable[[], httpx.Response], read: Callable[[httpx.Response], T], breaker: Breaker) -> T:
    """`read(send())`, as often as it takes.

    Transport errors, statuses 408, 425, 429 and 5xx, and a `read` that raises ValueError are tried again; a 429 or
    503 waits for what its Retry-After says. Raises `Failed` when patience has run out, and at once for any other
    status, which asking again would not change.
    """
    import httpx

    patience, tries = breaker.patience, 0
    while True:
        breaker.wait()
        pause = min(patience.delay * 2**tries, patience.longest)
        try:
            response = send()
            if response.status_code in RETRIED:
                status: int | None = response.status_code
                reason = f"HTTP {status}: {detail(response)}"
                pause = max(pause, min(_retry_after(response), patience.longest))
                breaker.success() if status == 429 else breaker.failure()  # too many requests is no outage
            elif response.is_success:
                answer = read(response)
                breaker.success()
                return answer
            else:
                breaker.success()
                raise Failed(f"HTTP {response.status_code}: {detail(response)}", response.status_code)
        except (httpx.TransportError, httpx.DecodingError) as error:
            status, reason = None, f"{type(error).__name__}: {error}".rstrip(": ")
            breaker.failure()
        except ValueError as error:
            status, reason = 200, f"unusable reply ({error})"
            breaker.failure()
        tries += 1
        if breaker.gave_up() or tries > patience.retries and not breaker.is_open:
            raise Failed(f"{reason} ({tries} {'try' if tries == 1 else 'tries'})", status)
        breaker.sleep(pause)


def detail(response: httpx.Response) -> str:
    """What a refusal says of itself, cut to a line."""
    try:
        found = response.json()
        found = found.get("detail", found.get("error", found)) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = response.text
    text = " ".join(str(found).split())
    return text[:200] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:  # a date: the back-off must do
        return 0.0
