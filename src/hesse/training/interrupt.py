"""Ctrl-C as a wish: the first finishes and saves the step under way, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interruptible"]


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C sets the event and the second raises :class:`KeyboardInterrupt`.

    Outside the main thread, which alone gets signals, and where the caller has SIGINT ignored (``nohup``), nothing
    changes and the event stays unset.
    """
    event = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not main or before in (signal.SIG_IGN, None):
        yield event
        return

    def note(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
