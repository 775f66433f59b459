"""The simulated driver does what CUDA's manual says, so that what is tested on it means something."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import simulated_cuda as sim
from simulated_cuda import ROOT, CallFailed, Simulator

WAIT = 0.03  # seconds in which a stream that is not held up would have moved


@pytest.fixture
def make(simulated_cuda: Path, tmp_path: Path) -> Iterator[Callable[[str], Simulator]]:
    made = []

    def start(settings: str = "") -> Simulator:
        simulator = Simulator(sim.fresh_copy(simulated_cuda, tmp_path), settings=settings)
        simulator.start()
        made.append(simulator)
        return simulator

    yield start
    for simulator in made:
        simulator.stop()


def flags(simulator: Simulator, count: int = 1) -> list[int]:
    base = simulator.allocate(sim.BLOCK)
    simulator.call("cuMemsetD8Async", base, 0, 128 * count, 0)
    return [base + 128 * i for i in range(count)]


def test_our_description_of_the_driver_is_nvidia_s() -> None:
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))  # for its include path only
    if nvcc is None:
        pytest.skip("no CUDA toolkit")
    source = ROOT / "tests" / "native" / "driver_api_matches_cuda.cpp"
    command = [nvcc, "-x", "c++", "-std=c++20", "--cudart", "none", "-I", ROOT / "csrc", "-c", source]
    subprocess.run([*command, "-o", os.devnull], check=True)


def test_device_memory_is_poisoned_and_belongs_to_one_allocation(make: Callable[..., Simulator]) -> None:
    simulator = make()
    pointer = simulator.allocate(1000)
    assert set(ctypes.string_at(pointer, 1000)) == {sim.POISON}
    for address in (pointer + 1, pointer + 996, 4096):  # not aligned; over the end; nobody's
        with pytest.raises(CallFailed):
            simulator.write(0, address, 1)
    simulator.call("cuMemFree_v2", pointer)
    assert simulator.mappings == 0
    with pytest.raises(CallFailed):
        simulator.call("cuMemFree_v2", pointer)


def test_a_stream_keeps_its_order_and_does_not_hold_up_another(make: Callable[..., Simulator]) -> None:
    simulator = make()
    (flag, other) = flags(simulator, 2)
    first, second = simulator.stream(), simulator.stream()
    simulator.wait(first, flag, 5)
    simulator.write(first, other, 1)
    time.sleep(WAIT)
    assert not simulator.is_done(first)
    assert sim.word(other) == 0
    simulator.write(second, flag, 7)  # at least 5
    simulator.synchronize(first)
    assert sim.word(other) == 1


@pytest.mark.parametrize(("queues", "free"), [(1, False), (2, True)])
def test_streams_that_share_a_hardware_queue_hold_each_other_up(
    make: Callable[..., Simulator], queues: int, free: bool
) -> None:
    simulator = make(f"queues={queues},shared=1")
    (flag, other) = flags(simulator, 2)
    first, second = simulator.stream(0), simulator.stream(-5)
    simulator.wait(first, flag, 1)
    simulator.write(second, other, 1)
    time.sleep(WAIT)
    assert simulator.is_done(second) is free
    ctypes.c_uint64.from_address(flag).value = 1
    simulator.synchronize(second)


def test_streams_of_different_priority_have_queues_of_their_own(make: Callable[..., Simulator]) -> None:
    simulator = make("queues=1")
    (flag, other) = flags(simulator, 2)
    simulator.wait(simulator.stream(0), flag, 1)
    urgent = simulator.stream(-5)
    simulator.write(urgent, other, 1)
    simulator.synchronize(urgent)
    simulator.write(urgent, flag, 1)


@pytest.mark.parametrize(
    ("value", "needed", "passes"),
    [(5, 5, True), (4, 5, False), (1 << 62, 5, True), (0, 2**64 - 1, True), (2**64 - 1, 1, False)],
)
def test_a_wait_compares_on_a_circle(make: Callable[..., Simulator], value: int, needed: int, passes: bool) -> None:
    simulator = make()
    (flag,) = flags(simulator)
    stream = simulator.stream()
    ctypes.c_uint64.from_address(flag).value = value
    simulator.wait(stream, flag, needed)
    time.sleep(WAIT)
    assert simulator.is_done(stream) is passes


def test_the_null_stream_is_the_caller(make: Callable[..., Simulator]) -> None:
    simulator = make()
    (flag,) = flags(simulator)
    gate = flags(simulator)[0]
    simulator.write(0, flag, 3)
    assert sim.word(flag) == 3
    stream = simulator.stream()
    simulator.call("simulated_hold", stream, gate, 1)
    simulator.write(stream, flag, 9)
    ctypes.c_uint64.from_address(gate).value = 1
    simulator.wait(0, flag, 9)  # blocks until it is
    assert sim.word(flag) == 9


def test_the_null_stream_waits_for_blocking_streams_as_the_legacy_one_does(make: Callable[..., Simulator]) -> None:
    simulator = make()
    flag, gate = flags(simulator, 2)
    stream = simulator.stream(flags=0)
    simulator.call("simulated_hold", stream, gate, 1)
    simulator.write(simulator.stream(), gate, 1)
    simulator.write(0, flag, 1)
    assert simulator.is_done(stream)


def test_a_stream_waits_for_an_event_as_it_was_recorded_last(make: Callable[..., Simulator]) -> None:
    simulator = make()
    first_gate, second_gate = flags(simulator, 2)
    source, waiting, event = simulator.stream(), simulator.stream(), simulator.event()
    simulator.call("simulated_hold", source, first_gate, 1)
    simulator.call("cuEventRecord", event, source)
    simulator.call("cuStreamWaitEvent", waiting, event, 0)
    simulator.call("simulated_hold", source, second_gate, 1)
    simulator.call("cuEventRecord", event, source)  # later: the wait above does not see it
    time.sleep(WAIT)
    assert not simulator.is_done(waiting)
    ctypes.c_uint64.from_address(first_gate).value = 1
    simulator.synchronize(waiting)
    with pytest.raises(CallFailed) as caught:
        simulator.call("cuEventQuery", event)
    assert caught.value.result == sim.NOT_READY
    ctypes.c_uint64.from_address(second_gate).value = 1
    simulator.synchronize(source)
    simulator.call("cuEventQuery", event)


def test_a_record_on_another_stream_that_is_reached_earlier_does_not_stand_for_the_first(
    make: Callable[..., Simulator],
) -> None:
    simulator = make()
    (gate,) = flags(simulator)
    slow, fast, waiting, event = simulator.stream(), simulator.stream(), simulator.stream(), simulator.event()
    simulator.call("simulated_hold", slow, gate, 1)
    simulator.call("cuEventRecord", event, slow)
    simulator.call("cuStreamWaitEvent", waiting, event, 0)
    simulator.call("cuEventRecord", event, fast)
    simulator.synchronize(fast)
    time.sleep(WAIT)
    assert not simulator.is_done(waiting)
    ctypes.c_uint64.from_address(gate).value = 1
    simulator.synchronize(waiting)
    simulator.call("cuEventQuery", event)


def test_a_slow_copy_can_be_seen_half_done(make: Callable[..., Simulator]) -> None:
    simulator = make("seed=1,delay=3000")
    words = 1 << 14
    source, target = simulator.allocate(8 * words), simulator.allocate(8 * words)
    simulator.fill(0, source, words, 1)
    stream = simulator.stream()
    seen = set()
    for _ in range(20):
        simulator.call("cuMemsetD8Async", target, 0, 8 * words, 0)
        simulator.copy(target, source, 8 * words, stream)
        while not simulator.is_done(stream):
            seen.add((sim.word(target) != 0, sim.word(target + 8 * words - 8) != 0))
    assert (True, False) in seen
    simulator.check(0, target, words, 1)
    assert simulator.mismatches == 0
    simulator.check(0, target, words, 2)
    assert simulator.mismatches == words


def test_another_process_maps_exported_memory(make: Callable[..., Simulator], simulated_cuda: Path) -> None:
    simulator = make()
    (flag, answer) = flags(simulator, 2)
    handle = simulator.export(flag)
    pid = os.fork()
    if pid == 0:
        try:
            mine = Simulator(Path(simulator.path))
            with pytest.raises(CallFailed):
                mine.allocate(8)  # the child has never called cuInit
            mine.start()
            mapped = mine.map(handle)
            stream = mine.stream()
            mine.wait(stream, mapped, 4)
            mine.write(stream, mapped + 128, 6)
            mine.synchronize(stream)
            mine.call("cuIpcCloseMemHandle", mapped)
            os._exit(mine.mappings)
        finally:
            os._exit(1)
    simulator.write(0, flag, 4)
    simulator.wait(0, answer, 6)
    assert os.waitpid(pid, 0)[1] == 0
    simulator.call("cuMemFree_v2", flag)
    assert simulator.violations == []


def test_misuse_that_a_driver_would_not_notice_is_noted(make: Callable[..., Simulator]) -> None:
    simulator = make()
    first, second = simulator.allocate(64), simulator.allocate(64)
    mapped = simulator.map(simulator.export(first))
    assert simulator.violations.pop() == "exported memory that may share its block with other memory"
    simulator.call("cuMemFree_v2", first)
    assert simulator.violations[1:] == ["freed while a peer has it mapped"]
    simulator.call("cuIpcCloseMemHandle", mapped)
    gate = simulator.allocate(8)
    stream = simulator.stream()
    simulator.call("simulated_hold", stream, gate, 1)
    simulator.fill(stream, second, 8, 1)
    simulator.call("cuMemFree_v2", second)
    assert simulator.violations[2:] == ["freed while operations use it"]


def test_functions_fail_and_attributes_lack_as_told(make: Callable[..., Simulator]) -> None:
    simulator = make(f"fail:cuMemAlloc_v2={sim.OUT_OF_MEMORY}@2,attribute:122=0")
    simulator.allocate(8)
    for _ in range(2):
        with pytest.raises(CallFailed) as caught:
            simulator.allocate(8)
        assert caught.value.result == sim.OUT_OF_MEMORY
    values = []
    for attribute in (41, 122):
        value = ctypes.c_int(-1)
        simulator.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        values.append(value.value)
    assert values == [1, 0]


def test_a_thread_without_a_context_is_refused(make: Callable[..., Simulator]) -> None:
    simulator = make()
    context = ctypes.c_void_p()
    simulator.call("cuCtxPopCurrent_v2", ctypes.byref(context))
    with pytest.raises(CallFailed) as caught:
        simulator.allocate(8)
    assert caught.value.result == sim.INVALID_CONTEXT


@pytest.mark.parametrize("legacy", [False, True])
def test_a_seed_may_be_set_anew_at_any_time(make: Callable[[str], Simulator], legacy: bool) -> None:
    simulator = make("seed=1,delay=1")
    (flag,) = flags(simulator)
    stream = 0 if legacy else simulator.stream()

    def drawn(seed: int) -> int:
        simulator.set("seed", seed)
        before = simulator.drawn
        for value in range(10):
            simulator.write(stream, flag, value)
        simulator.synchronize(stream)
        return (simulator.drawn - before) % 2**64

    first = drawn(5)
    assert drawn(6) != first
    assert drawn(5) == first
