"""Leaving in order when the system asks: preempted jobs and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(SystemExit):
    """SIGTERM or SIGINT arrived and the state was saved: exit status 143 (130 for SIGINT)."""


@contextmanager
def watched(ask: Callable[[int], None]) -> Iterator[None]:
    """Call `ask` with the number of the first SIGTERM or SIGINT; a second one kills. Does nothing outside the main
    thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        ask(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
