"""How much memory a call holds beyond what was there before it: anonymous pages, sampled while it runs."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def anonymous_bytes() -> int:
    """Resident pages that no file backs: what the process holds, without the page cache of mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest growth of the anonymous memory while ``call`` runs; its result is kept alive until the end.

    Tensors of 32 MiB and more are mapped and unmapped one by one, so no earlier free memory hides them.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = peak = anonymous_bytes()
    running = threading.Event()
    running.set()

    def sample() -> None:
        nonlocal peak
        while running.is_set():
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        result = call()
        peak = max(peak, anonymous_bytes())
    finally:
        running.clear()
        sampler.join()
    del result
    return peak - start
