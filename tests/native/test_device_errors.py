"""Both ends of a device ring in one process: what is refused, what is named, and what is left behind."""

from __future__ import annotations

import gc
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import simulated_cuda as sim
import torch
from device_ring import CPU
from simulated_cuda import Simulator

from pipex import _native
from pipex.errors import CudaError, InputError, MessageMismatch, NativeUnavailable, OutOfDeviceMemory
from pipex.transport.header import Header, pack_table
from pipex.transport.interface import TensorForm

UNDER_WAY, ALIVE = 2, 2
HEADER = Header(bytes(16), 0, 1, "activation", 0, 0, 0, 0, 0).pack()
SIZE = (UNDER_WAY, ALIVE, HEADER)
NULL = 0

# csrc/host/segment.cpp and ring_layout.hpp: the segment's header, two queues of (bell, cells), the slots' cells (each a
# generation and an address), the offer (csrc/device/ring.hpp: generation, what is taken, bytes, handle, nonce).
READY_CELLS, FREE_CELLS, SLOT_CELLS = 128 + 128, 128 + 256 + 128, 128 + 2 * 256
OFFER = SLOT_CELLS + (UNDER_WAY + ALIVE) * 64
# A slot's memory: the segment's header, then that of the message (pipex/transport/header.py), then the table.
SLOT_PLACE, SLOT_TABLE = 128 + 33, 128 + 64


def form_of(words: int) -> _native.MessageForm:
    return _native.MessageForm(*pack_table([TensorForm((words,), torch.float32, (1,))]))


class Pair:
    """Rank 0 sends to rank 1, both in this process."""

    def __init__(self, library: Path, settings: str = "") -> None:
        self.simulator = Simulator(library, settings=settings)
        self.control = _native.Control(2)
        self.members = [_native.Member(self.control, rank, 20.0, False) for rank in range(2)]
        self.ranks: list[_native.DeviceRank] = []
        self.data = torch.arange(1000, dtype=torch.float32)
        self.sender: Any = None
        self.receiver: Any = None

    def start(self) -> Pair:
        for member in self.members:
            self.ranks.append(_native.DeviceRank(member, self.simulator.path, 0, CPU))
        return self

    def connect(self) -> Pair:
        self.start()
        self.sender = _native.DeviceRingSender(self.ranks[0], 1, *SIZE)
        self.receiver = _native.DeviceRingReceiver(self.ranks[1], 0, *SIZE)
        self.sender.connect(self.receiver.address, self.receiver.offer)
        self.receiver.connect(self.sender.offer)
        return self

    def open(self) -> Pair:
        """Connected, and through a first message grown."""
        self.connect()
        self.send()
        self.receive()
        assert self.sender.fits(form_of(64), 0)
        return self

    def send(self, microbatch: int = 0, stream: int = NULL, *, words: int = 64) -> bool:
        """Whether it went from device memory."""
        form, data = form_of(words), [self.data.data_ptr()]
        if self.sender.fits(form, 0):
            self.sender.send(form, data, stream, 1, microbatch)
            return True
        self.sender.send_from_host(form, data, 1, microbatch)
        return False

    def capsules(self, microbatch: int = 0, stream: int = NULL) -> tuple[object, ...] | None:
        return self.receiver.receive(stream, 1, microbatch)[1]

    def receive(self, microbatch: int = 0, stream: int = NULL) -> torch.Tensor:
        capsules = self.capsules(microbatch, stream)
        assert capsules is not None
        return torch.from_dlpack(capsules[0])

    def memory(self) -> mmap.mmap:
        """The ring's host part."""
        return mmap.mmap(struct.unpack_from("<ii", self.receiver.address)[1], 0)

    def slot(self, index: int) -> mmap.mmap:
        """The host memory of a slot that its first message was just sent in."""
        with self.memory() as memory:
            return mmap.mmap(struct.unpack_from("<ii", memory, SLOT_CELLS + 64 * index + 8)[1], 0)

    def close(self) -> None:
        for end in (self.sender, self.receiver):
            if end is not None:
                end.close()
        for rank in self.ranks:
            rank.free_retired()
            rank.close()


@pytest.fixture
def make(simulated_cuda: Path, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def pair(settings: str = "") -> Pair:
        made.append(Pair(sim.fresh_copy(simulated_cuda, tmp_path), settings))
        return made[-1]

    yield pair
    for each in made:
        each.close()
        each.simulator.stop()


def test_slots_are_lent_and_come_back_and_a_full_ring_says_so(make: Callable[..., Pair]) -> None:
    pair = make().open()
    for microbatch in range(4):
        pair.send(microbatch)
    held = [pair.receive(0), pair.receive(1)]
    assert held[0].data_ptr() % 512 == 0
    assert all(torch.equal(tensor, pair.data[:64]) for tensor in held)
    assert pair.receiver.lent == 2
    before = pair.simulator.operations
    assert pair.capsules(2) is None
    assert pair.simulator.operations == before  # and nothing was enqueued
    own = torch.zeros(64)
    pair.receiver.receive_into([own.data_ptr()], NULL, 1, 2)
    assert torch.equal(own, pair.data[:64])
    held.clear()
    assert pair.receiver.lent == 0
    assert torch.equal(pair.receive(3), pair.data[:64])
    pair.ranks[0].flush()
    assert pair.ranks[0].sent == 4


def test_another_message_than_announced_is_named_before_anything_waits_for_it(make: Callable[..., Pair]) -> None:
    pair = make().open()
    pair.send(microbatch=5)
    before = pair.simulator.operations
    for _ in range(2):  # the message stays where it is
        with pytest.raises(_native.HeaderMismatch):
            pair.receive(0)
    assert pair.simulator.operations == before
    assert torch.equal(pair.receive(5), pair.data[:64])


def test_a_message_larger_than_all_before_it_goes_through_host_memory_and_the_next_does_not(
    make: Callable[..., Pair],
) -> None:
    """Also after a first one that is smaller than all others."""
    pair = make().connect()
    seen = []
    for microbatch, words in enumerate([1, 64, 64, 1, 65, 65, 96, 97, 97]):
        seen.append(pair.send(microbatch, words=words))
        assert torch.equal(pair.receive(microbatch), pair.data[:words])
    assert seen == [False, False, True, True, False, True, True, False, True]  # a half more than asked is made
    assert pair.sender.grown == 3
    assert pair.simulator.violations == []


def test_messages_without_bytes_need_no_device_memory(make: Callable[..., Pair]) -> None:
    pair = make().connect()
    nothing = _native.MessageForm(b"", 0)
    for microbatch in range(10):  # more than there are slots
        assert not pair.send(2 * microbatch, words=0)
        assert pair.receive(2 * microbatch).shape == (0,)
        assert not pair.sender.fits(nothing, 0)
        pair.sender.send_from_host(nothing, [], 1, 2 * microbatch + 1)
        assert pair.capsules(2 * microbatch + 1) == ()
    assert pair.simulator.mappings == 4  # the flags, and the peer's


def test_growth_waits_for_no_message_under_way(make: Callable[..., Pair]) -> None:
    """The producer maps, and the consumer makes memory, while a send stands behind a computation that is not done."""
    pair = make().open()
    pair.simulator.start()
    held, stream = pair.simulator.stream(), pair.simulator.stream()
    gate = pair.simulator.allocate(8)
    back = _native.DeviceRingSender(pair.ranks[1], 0, *SIZE), _native.DeviceRingReceiver(pair.ranks[0], 1, *SIZE)
    back[0].connect(back[1].address, back[1].offer)
    back[1].connect(back[0].offer)
    form, data = form_of(64), [pair.data.data_ptr()]
    back[0].send_from_host(form, data, 1, 0)
    assert back[1].receive(NULL, 1, 0)[1] is not None
    assert back[0].fits(form, 0)
    pair.simulator.call("simulated_hold", held, gate, 1)
    pair.send(0, held)
    back[0].send(form, data, held, 1, 1)  # now both ranks' send streams wait
    with ThreadPoolExecutor(1) as other:

        def grow() -> bool:
            assert not pair.send(1, words=1000)
            pair.receive(0, stream)
            pair.receive(1, stream)
            return pair.sender.fits(form_of(1000), 0)

        grown = other.submit(grow)
        try:
            assert grown.result(timeout=10)
        finally:
            pair.simulator.write(NULL, gate, 1)
    for end in back:
        end.close()


def test_too_little_device_memory_for_a_larger_message_is_named_and_the_message_stays(
    make: Callable[..., Pair],
) -> None:
    pair = make().open()
    pair.send(words=1000)
    pair.simulator.set("fail:cuMemAlloc_v2", 2)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemory, match=f"on GPU 0; got {1 << 30} bytes free; needed {2 << 20} bytes"):
            pair.receive()
    pair.simulator.set("fail:cuMemAlloc_v2", "2@1000")
    assert torch.equal(pair.receive(), pair.data)
    assert pair.send(1, words=1000)
    assert torch.equal(pair.receive(1), pair.data)


def test_where_half_more_is_too_much_just_enough_is_made(make: Callable[..., Pair]) -> None:
    pair = make().connect()
    pair.data = torch.arange(300_000, dtype=torch.float32)
    for microbatch, words in enumerate([1 << 18, 1 << 18, 300_000, 300_000]):
        if words == 300_000:  # 4 slots of 1.2 MB; of half more than 1 MiB they would take 8 MiB
            pair.simulator.set("memory", 6 << 20)
        assert pair.send(microbatch, words=words) == microbatch % 2
        assert torch.equal(pair.receive(microbatch), pair.data[:words])
    assert pair.sender.grown == 1


def test_without_growth_a_message_arrives_and_none_as_small_makes_any(make: Callable[..., Pair]) -> None:
    pair = make().open()
    pair.send(words=1000)
    seen, (capsule,) = pair.receiver.receive(NULL, 1, 0, may_grow=False)
    assert seen is not None
    assert torch.equal(torch.from_dlpack(capsule), pair.data)
    del capsule
    for microbatch, (words, fits) in enumerate([(999, False), (1000, False), (64, True)], 1):
        assert pair.send(microbatch, words=words) == fits
        assert torch.equal(pair.receive(microbatch), pair.data[:words])
    assert pair.sender.grown == 0
    pair.data = torch.arange(1001, dtype=torch.float32)
    for microbatch, fits in ((4, False), (5, True)):
        assert pair.send(microbatch, words=1001) == fits
        assert torch.equal(pair.receive(microbatch), pair.data)


HOSTILE = {
    "generation 0": (0, "<I", 0, MessageMismatch, "got device memory of generation 0; needed 2"),
    "generation 3": (0, "<I", 3, MessageMismatch, "got device memory of generation 3; needed 2"),
    "more bytes than there are": (8, "<Q", 1 << 40, NativeUnavailable, "cannot map .* of rank 1; got other memory"),
    "fewer bytes": (8, "<Q", 1, NativeUnavailable, "cannot map .* of rank 1; got other memory"),
    "bytes of which two are more than any number": (8, "<Q", 1 << 63, NativeUnavailable, "got other memory"),
    "another handle": (16, "<Q", 0, NativeUnavailable, "cannot map .* of rank 1; got cuIpcOpenMemHandle"),
    "another nonce": (80, "<Q", 0, NativeUnavailable, "cannot map .* of rank 1; got other memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_an_offer_that_no_pipex_makes_is_named(make: Callable[..., Pair], what: str) -> None:
    place, layout, value, error, named = HOSTILE[what]
    pair = make().open()
    pair.send(words=1000)
    pair.receive()
    with pair.memory() as memory:
        before = memory[OFFER : OFFER + 96]
        struct.pack_into(layout, memory, OFFER + place, value)
        for _ in range(2 if error is MessageMismatch else 1):
            with pytest.raises(error, match=named):
                pair.send(1, words=1000)
        memory[OFFER : OFFER + 96] = before
    assert pair.send(1, words=1000)
    assert torch.equal(pair.receive(1), pair.data)
    assert pair.simulator.violations == []


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (SLOT_PLACE, 0, "a message that changes"),
        (SLOT_PLACE, 2, "256 bytes in device memory of generation 2; needed a payload within memory"),
        (SLOT_TABLE + 16, 32, "a message that changes"),
        (SLOT_TABLE + 16, 65, "260 bytes at 0 of 256"),
    ],
)
def test_a_message_that_changes_while_memory_is_made_for_it_is_named(
    make: Callable[..., Pair], place: int, value: int, named: str
) -> None:
    pair = make().open()
    held = []
    for microbatch in range(2):
        pair.send(microbatch)
        held.append(pair.receive(microbatch))
    pair.send(2)
    with pair.slot(2) as slot:
        assert pair.capsules(2) is None
        own = torch.zeros(64)
        before, slot[place] = slot[place], value
        with pytest.raises(MessageMismatch, match=named):
            pair.receiver.receive_into([own.data_ptr()], NULL, 1, 2)
        assert own.count_nonzero() == 0
        slot[place] = before
    with pytest.raises(MessageMismatch, match="a message that changes"):
        pair.receiver.receive_into([], NULL, 1, 2)
    assert pair.receiver.lent == len(held) == 2


def test_a_payload_that_cannot_be_where_its_header_says_is_named(make: Callable[..., Pair]) -> None:
    pair = make().open()
    held = []
    for microbatch in range(2):
        pair.send(microbatch)
        held.append(pair.receive(microbatch))
    pair.send(2)
    held.clear()
    with pair.slot(2) as slot:
        for place in (2, 255):
            slot[SLOT_PLACE] = place
            before = pair.simulator.operations
            with pytest.raises(MessageMismatch, match=f"256 bytes in device memory of generation {place}; needed"):
                pair.receive(2)
            assert pair.simulator.operations == before
        slot[SLOT_PLACE] = 1
    assert torch.equal(pair.receive(2), pair.data[:64])


@pytest.mark.timing  # no other process may come or go
def test_descriptors_and_memory_stay_as_they_are_once_the_largest_message_has_passed(make: Callable[..., Pair]) -> None:
    pair = make().connect()
    lengths = [1 + 20 * (7 * i % 50) for i in range(50)]
    held: list[torch.Tensor] = []
    seen = set()
    for message in range(40 * len(lengths)):
        pair.send(message, words=lengths[message % 50])
        held.append(pair.receive(message))
        assert held[-1].numel() == lengths[message % 50]
        del held[: len(held) - message % 2]
        if message >= 10 * len(lengths) and message % 100 == 99:
            with open("/proc/self/status") as status:
                shared = next(line for line in status if line.startswith("RssShmem"))
            seen.add((shared, len(os.listdir("/proc/self/fd")), pair.simulator.mappings, pair.sender.nbytes))
    assert len(seen) == 1, seen
    held.clear()


@pytest.mark.parametrize("end", ["send", "receive"])
def test_a_captured_stream_is_refused_before_anything_is_enqueued(make: Callable[..., Pair], end: str) -> None:
    pair = make().open()
    pair.simulator.start()
    stream = pair.simulator.stream()
    if end == "receive":
        pair.send()
    pair.simulator.capture(stream, True)
    before = pair.simulator.operations
    with pytest.raises(InputError, match="while a CUDA graph is being captured"):
        getattr(pair, end)(0, stream)
    assert pair.simulator.operations == before
    pair.simulator.capture(stream, False)
    if end == "send":
        pair.send(0, stream)
    received = pair.receive(0, stream)
    pair.simulator.synchronize(stream)
    assert torch.equal(received, pair.data[:64])


def test_a_graph_that_is_captured_while_messages_are_under_way_is_not_spoilt(make: Callable[..., Pair]) -> None:
    """The rescue thread asks for the messages' events all the time, which CUDA forbids a thread that has not said that
    it means no other's capture; and it took the refusal for a broken device."""
    pair = make().open()
    pair.simulator.start()
    held, captured = pair.simulator.stream(), pair.simulator.stream()
    gate = pair.simulator.allocate(8)
    pair.simulator.call("simulated_hold", held, gate, 1)
    pair.send(0, held)
    pair.simulator.capture(captured, True)
    time.sleep(0.1)  # the thread looks every 20 ms
    pair.simulator.capture(captured, False)
    pair.simulator.write(0, gate, 1)
    assert torch.equal(pair.receive(0), pair.data[:64])
    assert pair.simulator.violations == []


def test_a_slot_that_cannot_be_given_back_is_told_at_the_next_receive(make: Callable[..., Pair]) -> None:
    pair = make().open()
    pair.simulator.start()
    stream = pair.simulator.stream()
    pair.send()
    pair.send(1)
    held = pair.receive(0, stream)
    pair.simulator.capture(stream, True)
    del held
    pair.simulator.capture(stream, False)
    with pytest.raises(InputError, match="while a CUDA graph is being captured"):
        pair.receive(1, stream)
    with pair.memory() as memory:  # the producer never gets a slot whose release is not enqueued
        assert memory[FREE_CELLS + 8 : FREE_CELLS + 16] == bytes(8)


def test_a_tensor_may_die_on_any_thread_after_its_ring_its_rank_and_its_world(make: Callable[..., Pair]) -> None:
    pair = make().open()
    pair.send()
    pair.send(1)
    held = [pair.receive(0), pair.receive(1)]
    contexts = []

    def die() -> None:
        held.pop()
        contexts.append(pair.simulator.contexts)

    threads = [threading.Thread(target=die) for _ in range(2)]
    threads[0].start()
    threads[0].join()
    pair.send(2)  # its slot, or another one
    pair.close()
    pair.sender = pair.receiver = None
    gc.collect()
    assert torch.equal(held[0], pair.data[:64])
    assert pair.simulator.mappings == 2  # the memory that the tensor lies in, and the flags
    threads[1].start()
    threads[1].join()
    assert pair.simulator.mappings == 0
    assert contexts == [0, 0]
    assert pair.simulator.violations == []


def test_a_forked_child_gives_nothing_back_and_ends_in_peace(make: Callable[..., Pair]) -> None:
    pair = make().open()
    pair.send()
    held = [pair.receive()]
    pid = os.fork()
    if pid == 0:  # such as a data loader's worker
        held.clear()
        pair.sender = pair.receiver = None
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert pair.receiver.lent == 1
    assert torch.equal(held[0], pair.data[:64])


def test_a_driver_that_is_missing_or_no_driver_is_named(make: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make()
    with pytest.raises(NativeUnavailable, match=r"the CUDA driver cannot be loaded.*nowhere/libcuda.so"):
        _native.DeviceRank(pair.members[0], str(tmp_path / "nowhere" / "libcuda.so"), 0, CPU)
    with pytest.raises(NativeUnavailable, match=r"the CUDA driver is too old; got no cuInit"):
        _native.DeviceRank(pair.members[0], "libc.so.6", 0, CPU)


@pytest.mark.parametrize(
    ("failing", "error", "named"),
    [
        ("cuInit=100", NativeUnavailable, "the CUDA driver does not start: cuInit: error 100"),
        ("cuDeviceGet=1", CudaError, r"cuDeviceGet of GPU 0: CUDA_ERROR_INVALID_VALUE \(simulated\)"),
        ("cuDevicePrimaryCtxRetain=2", CudaError, "cuDevicePrimaryCtxRetain of GPU 0"),
        ("cuStreamCreateWithPriority=1", CudaError, "cuStreamCreateWithPriority on GPU 0"),
        ("cuMemAlloc_v2=2", OutOfDeviceMemory, f"on GPU 0; got {1 << 30} bytes free; needed {2 << 20} bytes"),
        ("cuIpcGetMemHandle=801", NativeUnavailable, "GPU 0 exports no memory.*CUDA_ERROR_NOT_SUPPORTED.*WSL"),
        ("cuIpcOpenMemHandle_v2=205", NativeUnavailable, "rank 0 cannot map the device memory of rank 1.*MAP_FAILED"),
        ("cuMemsetD8Async=1", CudaError, "cuMemsetD8Async on GPU 0"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_what_fails_at_set_up_is_named_and_leaves_no_memory(
    make: Callable[..., Pair], failing: str, error: type[Exception], named: str
) -> None:
    pair = make(f"fail:{failing}")
    with pytest.raises(error, match=named):
        pair.open()
    pair.close()
    pair.sender = pair.receiver = None
    gc.collect()
    assert pair.simulator.mappings == 0
    assert pair.simulator.violations == []


@pytest.mark.parametrize(
    ("failing", "act", "named"),
    [
        ("cuStreamWriteValue64_v2", Pair.send, "cuStreamWriteValue64 to rank 1: CUDA_ERROR_INVALID_VALUE"),
        ("cuMemcpyDtoDAsync_v2", Pair.send, "cuMemcpyDtoDAsync to rank 1"),
        ("cuEventRecord", Pair.send, "cuEventRecord on GPU 0"),
        ("cuStreamWaitValue64_v2", Pair.receive, "cuStreamWaitValue64 for a message of rank 0"),
        ("cuStreamIsCapturing", Pair.receive, "cuStreamIsCapturing"),
    ],
)
def test_a_failing_call_is_named_with_what_it_was_for(
    make: Callable[..., Pair], failing: str, act: Callable[[Pair], None], named: str
) -> None:
    pair = make().open()
    if act is Pair.receive:
        pair.send()
    with pair.memory() as memory:
        before = memory[:SLOT_CELLS]
        pair.simulator.set(f"fail:{failing}", 1)
        with pytest.raises(CudaError, match=named):
            act(pair)
        assert memory[:SLOT_CELLS] == before  # a message is announced, a slot given back, behind its operations only


def test_memory_that_is_not_the_offered_one_is_refused(make: Callable[..., Pair]) -> None:
    pair = make().start()
    sender = _native.DeviceRingSender(pair.ranks[0], 1, *SIZE)
    receiver = _native.DeviceRingReceiver(pair.ranks[1], 0, *SIZE)
    with pytest.raises(NativeUnavailable, match="rank 1 cannot map the device memory of rank 0; got other memory"):
        receiver.connect(sender.offer[:-16] + bytes(16))
    with pytest.raises(InputError, match="this is no offer of device memory; got 79 bytes; needed 80"):
        receiver.connect(sender.offer[:-1])
    other = _native.DeviceRingReceiver(pair.ranks[1], 0, UNDER_WAY + 1, ALIVE, HEADER)
    with pytest.raises(InputError, match="rank 1 offers buffers of another size"):
        sender.connect(other.address, other.offer)
    del sender, receiver, other
    gc.collect()


def test_a_slot_filled_while_in_use_is_named(make: Callable[..., Pair]) -> None:
    pair = make().open()
    with pair.memory() as memory:
        pair.send()
        held = pair.receive()  # in slot 0
        memory[READY_CELLS + 16 : READY_CELLS + 24] = struct.pack("<II", 0, 1)
        before = pair.simulator.operations
        with pytest.raises(MessageMismatch, match="slot 0 filled while in use"):
            pair.receive(1)
    assert pair.simulator.operations == before
    assert torch.equal(held, pair.data[:64])


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ("", ""),
        ("attribute:122=0", "GPU 0 has no 64-bit stream memory operations"),
        ("attribute:41=0", "GPU 0 shares no address space with the host"),
        ("queues=1", ""),
        ("queues=1,shared=1", "on GPU 0 a stream that waits is not freed by another one"),
        ("bug=equal-wait", "on GPU 0 a stream that waits is not freed by another one"),
    ],
    ids=str,
)
def test_the_probe_says_what_is_missing(make: Callable[..., Pair], settings: str, missing: str) -> None:
    pair = make(settings).open()
    mappings = pair.simulator.mappings
    assert pair.ranks[0].missing() == missing
    assert pair.simulator.mappings == mappings
    pair.send()
    assert torch.equal(pair.receive(), pair.data[:64])  # nothing is left blocked
