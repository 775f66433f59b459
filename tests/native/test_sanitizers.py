"""The host ring's C++ under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer.

Both ends run as threads of one process over one piece of memory, since no sanitizer sees across processes; only
csrc/host/segment.cpp, which maps shared memory, is replaced (``sanitized/one_mapping.cpp``).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cases import sampled
from sanitizers import BOTH, HARNESS, HOST, LAYOUT, MEMORY, THREADS, Flags, broken, check, program, run

pytestmark = pytest.mark.long  # to compile them takes longer than all other tests of this folder

MAILBOX, LENDER = (path for path in HOST if path.name in ("mailbox.cpp", "lender.cpp"))
STRESS, HOSTILE = HARNESS / "ring_stress.cpp", HARNESS / "ring_hostile.cpp"


def build(flags: Flags, main: Path, layout: Path = LAYOUT, instead: Path | None = None) -> Path:
    """The program with the ring, or with another ring_layout.cpp, or another source in the place of one of its name."""
    host = [instead if instead is not None and instead.name == path.name else path for path in HOST]
    return program(flags, host, layout, main)


def assert_arrived(done: subprocess.CompletedProcess[str], messages: int, most: int) -> None:
    check(done)
    arrived, grown = map(int, done.stdout.split())
    assert arrived > messages * most // 4
    assert grown > 3


@pytest.mark.parametrize("flags", BOTH)
def test_messages_of_up_to_4_kib(flags: Flags) -> None:
    done = run(build(flags, STRESS), 20_000, 4 << 10)
    assert_arrived(done, 20_000, 4 << 10)


@pytest.mark.parametrize(
    ("messages", "most"), sampled([
        pytest.param(1_000_000, 4 << 10, id="small"), pytest.param(2_000, 16 << 20, id="large"),
    ], 1, name="messages"),
)  # fmt: skip
@pytest.mark.parametrize("flags", BOTH)
def test_many_messages(flags: Flags, messages: int, most: int) -> None:
    done = run(build(flags, STRESS), messages, most)
    assert_arrived(done, messages, most)


@pytest.mark.parametrize(
    "access", ["store(std::uint64_t{lap_} << 32 | index", "cells_[next_].load("], ids=["store", "load"]
)
def test_a_slot_announced_without_order_is_reported(tmp_path: Path, access: str) -> None:
    comma = ", " if "store" in access else ""
    relaxed = broken(tmp_path, LAYOUT, f"{access})", f"{access}{comma}std::memory_order_relaxed)")
    done = run(build(THREADS, STRESS, relaxed), 2_000, 4 << 10)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_a_generation_that_is_not_advanced_is_reported(tmp_path: Path) -> None:
    """The consumer goes on in the memory that the slot had."""
    stale = broken(tmp_path, MAILBOX, "cell(slot).generation.fetch_add(1);", "")
    done = run(build(MEMORY, STRESS, instead=stale), 2_000, 4 << 10)
    assert done.returncode != 0
    assert "header mismatch" in done.stderr or "AddressSanitizer" in done.stderr


def test_memory_that_is_replaced_while_it_is_lent_is_reported(tmp_path: Path) -> None:
    """The slot is given back when it is lent, and nobody looks whether it is."""
    early = broken(tmp_path, LENDER, "loans_[slot].slot = slot;", "loans_[slot].slot = slot;\n  free_.push(slot);")
    early = broken(tmp_path, early, "if (owner->release(slot)) owner->free_.push(slot);", "")
    blind = broken(tmp_path, early, "if (is_lent_[slot]) throw", "if (false) throw")
    done = run(build(MEMORY, STRESS, instead=blind), 2_000, 4 << 10)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-use-after-free" in done.stderr or "is damaged" in done.stderr


@pytest.mark.parametrize("attempts", [20_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_hostile_memory_gives_named_errors_only(attempts: int) -> None:
    """So many times queues, slots' places, headers and tables are damaged; and so many tables besides."""
    done = run(build(MEMORY, HOSTILE), attempts)
    check(done)
    outcomes = {name: int(times) for name, times in map(str.split, done.stdout.splitlines())}
    rings = {"received", "HeaderMismatch", "MessageMismatch", "Aborted"}
    assert set(outcomes) == rings | {"table:taken", "table:MessageMismatch"}
    assert sum(outcomes[name] for name in rings) == attempts
    assert sum(outcomes.values()) == 2 * attempts
    assert min(outcomes.values()) > attempts // 100


def test_an_index_that_is_not_checked_is_reported(tmp_path: Path) -> None:
    trusting = broken(tmp_path, LAYOUT, "lap == lap_ && index < count_", "lap == lap_")
    done = run(build(MEMORY, HOSTILE, trusting), 1_000)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
