"""The device ring's C++ on the simulated driver, under ThreadSanitizer, AddressSanitizer, UndefinedBehaviorSanitizer.

Both ranks are threads of one process, each with a driver of its own, since a GPU's memory is mapped by another process
only. Both drivers map the very same memory (``sanitized/one_device_memory.cpp``): so ThreadSanitizer also sees the
ring's protocol, whose only order between a copy, a read and the next copy is that of the streams and their flags.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import sampled
from sanitizers import (
    BOTH,
    HARNESS,
    HOST,
    LAYOUT,
    MEMORY,
    ROOT,
    SIMULATOR,
    THREADS,
    Flags,
    broken,
    check,
    program,
    run,
    shared_object,
)

pytestmark = pytest.mark.long  # as in test_sanitizers.py

STRESS = [
    ROOT / "csrc/common/driver_library.cpp",
    *(ROOT / "csrc/device" / f"{name}.cpp" for name in ("context", "driver", "memory", "rank", "rescue")),
    HARNESS / "device_stress.cpp",
]
RING, TRAIL = (ROOT / "csrc/device" / f"{name}.cpp" for name in ("ring", "trail"))
DRIVER = [
    HARNESS / "one_device_memory.cpp",
    *(SIMULATOR / f"{name}.cpp" for name in ("memory", "operations", "state", "streams")),
]

# What a device does to data in a run that has ended is in no order, and nobody looks at it.
DATA = "simulated::(anonymous namespace)::copy*lambda", "simulated_fill*lambda", "simulated_check*lambda"


def stress(
    folder: Path, flags: Flags, messages: int, words: int, *end: int, settings: str,
    replace: Path | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs the program, perhaps with another source in the place of the one of that name."""
    sources = {path.name: path for path in (RING, TRAIL)}
    if replace is not None:
        sources[replace.name] = replace
    with ThreadPoolExecutor() as pool:
        driver_flags = tuple(flag.replace(",undefined", "") for flag in flags)
        driver = pool.submit(shared_object, driver_flags, DRIVER)
        executable = program(flags, HOST, LAYOUT, STRESS, *sources.values())
    library = driver.result()
    other = Path(shutil.copy(library, folder / "other.so"))  # the loader takes it for another one
    environment = {"SIMULATED_CUDA": f"{settings},poison=1"}
    if end:
        suppressions = folder / "suppressions"
        suppressions.write_text("".join(f"race:{name}\n" for name in DATA))
        environment["TSAN_OPTIONS"] = f"suppressions={suppressions} print_suppressions=0"
    return run(executable, library, other, messages, words, *end, environment=environment)


def assert_all_arrived(done: subprocess.CompletedProcess[str], messages: int) -> None:
    check(done)
    lent, copied, hosted, aborted = map(int, done.stdout.split())
    assert (lent + copied + hosted, aborted) == (2 * messages, 0)
    assert min(lent, copied) > messages // 10
    assert 4 < hosted < messages  # both ways, the first and some larger ones


@pytest.mark.parametrize("settings", ["seed=1,queues=8,delay=50", "seed=2,queues=2,shared=1,delay=50"])
@pytest.mark.parametrize("flags", BOTH)
def test_messages_kept_for_a_while(tmp_path: Path, flags: Flags, settings: str) -> None:
    assert_all_arrived(stress(tmp_path, flags, 500, 64, settings=settings), 500)


@pytest.mark.parametrize("end", [0, 1, 7, 40])
@pytest.mark.parametrize("flags", BOTH)
def test_a_run_that_ends_while_streams_wait(tmp_path: Path, flags: Flags, end: int) -> None:
    done = stress(tmp_path, flags, 100, 64, end, settings=f"seed={end},queues=8,delay=50")
    check(done)
    assert done.stdout.split()[3] == "2"


@pytest.mark.parametrize(
    ("messages", "words", "queues"), sampled([
        pytest.param(25_000, 32, "queues=8", id="small"),
        pytest.param(500, 100_000, "queues=8", id="large"),
        pytest.param(500, 100_000, "queues=1,shared=1", id="large, one queue"),
    ], 1, name="messages of devices"),
)  # fmt: skip
@pytest.mark.parametrize("flags", BOTH)
def test_many_messages(tmp_path: Path, flags: Flags, messages: int, words: int, queues: str) -> None:
    """So many each way."""
    done = stress(tmp_path, flags, messages, words, settings=f"seed=3,{queues},delay=5")
    assert_all_arrived(done, messages)


@pytest.mark.parametrize("first", sampled(range(0, 100, 10), 1, name="runs that end"))
@pytest.mark.parametrize("flags", BOTH)
def test_many_runs_that_end(tmp_path: Path, flags: Flags, first: int) -> None:
    for seed in range(first, first + 10):
        settings = f"seed={seed},queues={1 + seed % 8},delay={20 * (seed % 7)}"
        done = stress(tmp_path, flags, 300, 64, seed, settings=settings)
        check(done)
        assert done.stdout.split()[3] == "2"


LOCK, ORDER = "const std::lock_guard lock(mutex_);", "kWaitGreaterOrEqual"
RACES = [
    pytest.param(TRAIL, LOCK, "", 5, id="a trail without a lock"),
    pytest.param(RING, f"use - 1, {ORDER}", f"0, {ORDER}", 1, id="a send that does not wait for its credit"),
    pytest.param(RING, f"messages, {ORDER}", f"messages - messages, {ORDER}", 1,
                 id="a receive that does not wait for its data"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "right", "wrong", "times"), RACES)
def test_what_lacks_an_order_is_reported(tmp_path: Path, source: Path, right: str, wrong: str, times: int) -> None:
    replace = broken(tmp_path, source, right, wrong, times=times)
    done = stress(tmp_path, THREADS, 200, 64, settings="seed=1,queues=8,delay=50", replace=replace)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


BYTES, PLACE = "  offer().bytes = payloads_.back().bytes;\n", "static_cast<std::uint8_t>(payloads_.size())"
GROWTH = [
    pytest.param(BYTES, "  offer().generation.store(payloads_.size());\n"
                        "  std::this_thread::sleep_for(std::chrono::milliseconds(20));\n" + BYTES,
                 id="an offer that is published before its memory"),
    pytest.param(PLACE, "std::uint8_t{1}", id="a header that names the first generation"),
    pytest.param("payloads_.back()->payload(slot)", "payloads_.front()->payload(slot)",
                 id="a copy into the first generation"),
    pytest.param("taken.load() == payloads", "taken.load() <= payloads", id="an offer over one that is not taken yet"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), GROWTH)
def test_growth_with_a_mistake_is_reported(tmp_path: Path, right: str, wrong: str) -> None:
    replace = broken(tmp_path, RING, right, wrong)
    runs = (
        stress(tmp_path, THREADS, 500, 64, settings=f"seed={seed},queues=8,delay=50", replace=replace)
        for seed in range(1, 11)  # it shows only where the peer looks at the wrong moment
    )
    assert any(done.returncode != 0 for done in runs)


def test_memory_that_is_freed_before_the_peer_is_done_is_reported(tmp_path: Path) -> None:
    early = broken(tmp_path, RING, "rank_->retire(std::move(memory_))", "memory_.reset()")
    done = stress(tmp_path, MEMORY, 20, 64, settings="seed=1,queues=8,delay=50", replace=early)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: heap-use-after-free" in done.stderr
