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

_M_MMAP_THRESHOLD = -3  # of malloc.h


def anonymous_bytes() -> int:
    """Resident pages that no file backs: what the process holds, without the page cache of mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest growth of the anonymous memory while ``call`` runs; its result is kept alive until the end.

    From the first call on every piece of 1 MiB and more is mapped and unmapped by itself. By default glibc
    raises that bound up to 32 MiB as such pieces are freed; then it keeps smaller ones, and they hide use.
    Free pieces of the heap, which are taken first, would stay resident: each count gives them back before.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)

    def used_bytes() -> int:
        libc.malloc_trim(0)
        return anonymous_bytes()

    start = peak = used_bytes()
    running = threading.Event()
    running.set()

    def sample() -> None:
        nonlocal peak
        while running.is_set():
            peak = max(peak, used_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        result = call()
        peak = max(peak, used_bytes())
    finally:
        running.clear()
        sampler.join()
    del result
    return peak - start
