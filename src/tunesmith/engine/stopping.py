"""Ctrl-C and termination, heard in the middle of work and obeyed at its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stopping(ask: Callable[[], None], *, echo: float = 0.0) -> Iterator[None]:
    """The first Ctrl-C or termination calls `ask`, and the second ends at once. In the main thread only.

    echo: seconds within which another signal is the same one again: a launcher passes on what the terminal has sent to
    every process already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[float] = []

    def handle(number: int, frame: Any) -> None:
        if heard and time.monotonic() - heard[0] >= echo:
            raise KeyboardInterrupt
        heard.append(time.monotonic())
        ask()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
