"""Freed memory goes back to the system, where the C library can be asked for that."""

import ctypes
import platform

import pytest

from foretune import memory


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_free_inside_the_heap_is_given_back():
    # small pieces are never mapped one by one; the last one keeps the heap from shrinking by itself
    pieces = [ctypes.create_string_buffer(60_000) for _ in range(2_000)]
    last, before = pieces[-1], resident()
    del pieces
    memory.give_back()
    assert resident() < before - 80e6
    assert len(last) == 60_000


def test_another_c_library_is_left_alone(monkeypatch):
    memory._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.give_back() is None
    monkeypatch.undo()
    memory._trim.cache_clear()
