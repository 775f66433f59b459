"""A ring whose other end is hostile or broken: named errors only, never an access out of bounds."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Iterator

import pytest
import torch

from pipex import _native
from pipex.errors import MessageMismatch
from pipex.transport import header
from pipex.transport.interface import EdgeSpec, TensorForm

UNDER_WAY, ALIVE = 2, 2
SLOTS = UNDER_WAY + ALIVE
FORM = TensorForm((64,), torch.float32, (1,))
TABLE, BYTES = header.pack_table([FORM])
HEADER = header.Header(bytes(range(16)), 3, 4, "gradient", 0, 0, 0, 0, 0)
SPEC = EdgeSpec(3, 4, "gradient", 0, 0, UNDER_WAY, ALIVE)

# csrc/host/segment.cpp and ring_layout.hpp: the segment's header, then two queues of (bell, cells), then slots' cells.
READY = 128
FREE = READY + 256
CELLS = 128
PLACES = FREE + 256
TOTAL = PLACES + SLOTS * 64 + 256
# A slot's memory: the segment's header, then header, table and tensors.
SLOT_HEADER = 128
SLOT_TABLE = SLOT_HEADER + header.SIZE
PAYLOAD = 1024


class Ring:
    """Both ends in one process, and the raw memory between them."""

    def __init__(self) -> None:
        self.member = _native.Member(_native.Control(1), 0, 20.0, False)
        self.member.fail("so that a wait in these tests ends at once")
        self.receiver = _native.RingReceiver(self.member, 0, UNDER_WAY, ALIVE, HEADER.pack())
        self.other = HEADER
        self.address = self.receiver.address
        self.sender = self.sender_of(HEADER)
        self.memory = mapped(self.address)
        self.data = torch.arange(64, dtype=torch.float32)

    def sender_of(self, expected: header.Header) -> _native.RingSender:
        return _native.RingSender(self.member, 0, self.address, UNDER_WAY, ALIVE, expected.pack())

    def slot(self, index: int = 0) -> mmap.mmap:
        """The memory of a slot; before another message is sent."""
        place = PLACES + 64 * index
        return mapped(self.memory[place + 8 : place + 40])

    def send(self, step: int = 1) -> None:
        self.sender.send(_native.MessageForm(TABLE, BYTES), [self.data.data_ptr()], step, 0)

    def receive(self, step: int = 1) -> torch.Tensor:
        _, (capsule,) = self.receiver.receive(step, 0)
        return torch.from_dlpack(capsule)


def mapped(address: bytes) -> mmap.mmap:
    return mmap.mmap(struct.unpack_from("<ii", address)[1], 0)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.memory.close()


def test_the_layout_of_these_tests_is_the_rings(ring: Ring) -> None:
    assert len(ring.memory) == TOTAL
    ring.send()
    assert struct.unpack_from("<II", ring.memory, READY + CELLS) == (0, 1)  # slot 0 in lap 1
    slot = ring.slot()
    assert slot[SLOT_HEADER : SLOT_HEADER + 4] == header.MAGIC
    assert slot[SLOT_TABLE : SLOT_TABLE + len(TABLE)] == TABLE
    assert slot[PAYLOAD : PAYLOAD + BYTES] == ring.data.numpy().tobytes()
    received = ring.receive()
    assert torch.equal(received, ring.data)
    assert struct.unpack_from("<II", ring.memory, FREE + CELLS) == (0, 0)
    del received
    assert struct.unpack_from("<II", ring.memory, FREE + CELLS) == (0, 1)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("digest", bytes(16), "plan 00000000"),
        ("source", 5, "gradient 5→4"),
        ("destination", 9, "gradient 3→9"),
        ("kind", "tied", "tied 3→4"),
    ],
)
def test_every_fixed_field_of_a_header_is_compared(ring: Ring, field: str, value: object, named: str) -> None:
    ring.sender = ring.sender_of(HEADER._replace(**{field: value}))
    ring.send()
    for _ in range(2):  # the message stays where it is
        with pytest.raises(_native.HeaderMismatch) as caught:
            ring.receive()
        with pytest.raises(MessageMismatch, match=named):
            raise header.mismatch(SPEC, *map(header.describe, caught.value.args))


def test_header_fields_patched_by_the_ring_stand_where_the_format_says(ring: Ring) -> None:
    for message in range(3):
        form = _native.MessageForm(TABLE, BYTES)
        ring.sender.send(form, [ring.data.data_ptr()], 2**40 + message, 70_000 + message)
    for message in range(3):
        with pytest.raises(_native.HeaderMismatch) as caught:
            ring.receiver.receive(5, 6)
        got, needed = caught.value.args
        of = HEADER._replace(sequence=message, tensors=1, nbytes=BYTES)
        assert got == of._replace(microbatch=70_000 + message, step=2**40 + message).pack()
        assert needed == of._replace(microbatch=6, step=5).pack()
        ring.receiver.receive(2**40 + message, 70_000 + message)


def test_every_single_bit_of_header_and_table_counts(ring: Ring) -> None:
    """It is refused, or says something else that the table shows."""
    ring.send()
    slot = ring.slot()
    clean = slot[SLOT_HEADER:PAYLOAD]
    wanted = (64,), (1,), torch.float32
    learned = 0
    for bit in range(8 * (header.SIZE + len(TABLE))):
        broken = bytearray(clean)
        broken[bit // 8] ^= 1 << bit % 8
        slot[SLOT_HEADER:PAYLOAD] = bytes(broken)
        try:
            seen, capsules = ring.receiver.receive(1, 0)
        except (_native.HeaderMismatch, MessageMismatch):
            continue
        learned += 1
        assert seen is not None
        assert seen != (TABLE, BYTES)
        del capsules
        slot[SLOT_HEADER:PAYLOAD] = clean
        ring = Ring()
        ring.send()
        slot = ring.slot()
        clean = slot[SLOT_HEADER:PAYLOAD]
    slot[SLOT_HEADER:PAYLOAD] = clean
    assert 0 < learned < 400  # unused bytes, smaller shapes, whether a gradient is wanted
    received = ring.receive()
    assert (tuple(received.shape), received.stride(), received.dtype) == wanted
    assert torch.equal(received, ring.data)


HUGE = 2**62
IMPOSSIBLE = {
    "a tensor behind the end": {"offset": 64},
    "one that is not aligned": {"offset": 4, "shape": (1,)},
    "too many dimensions": {"dimensions": 9},
    "elements of no bits": {"bits": 0},
    "elements of odd bits": {"bits": 12},
    "a negative size": {"shape": (-1,)},
    "a negative stride": {"strides": (-1,)},
    "a size beyond all memory": {"shape": (HUGE, HUGE), "strides": (1, 1), "dimensions": 2},
    "strides beyond all memory": {"strides": (HUGE,)},
    "a row too many elements": {"shape": (65,)},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_table_that_cannot_be_is_refused(name: str) -> None:
    change = IMPOSSIBLE[name]
    shape, strides = (tuple(change.get(key, ()))  # type: ignore[arg-type]
                      for key in ("shape", "strides"))  # fmt: skip
    shape, strides = shape or (64,), strides or (1,)
    row = header.RECORD.pack(
        0, change.get("dimensions", len(shape)), 0, 2, change.get("bits", 32), change.get("offset", 0),
        *shape, *[0] * (8 - len(shape)), *strides, *[0] * (8 - len(strides)),
    )  # fmt: skip
    with pytest.raises(MessageMismatch, match="says what cannot be"):
        _native.MessageForm(row, BYTES)
    with pytest.raises(MessageMismatch, match="says what cannot be"):
        _native.MessageForm(TABLE[:-1], BYTES)
    _native.MessageForm(TABLE, BYTES)


def test_a_tensor_of_size_0_needs_no_bytes_whatever_its_strides() -> None:
    row = header.RECORD.pack(0, 2, 0, 2, 32, 0, 0, HUGE, *[0] * 6, HUGE, 1, *[0] * 6)
    _native.MessageForm(row, 0)


@pytest.mark.parametrize("queue", [READY, FREE])
def test_hostile_memory_gives_named_errors_only(queue: int) -> None:
    random_bytes = random.Random(queue)
    attempts = 10_000
    ring = Ring()
    for attempt in range(attempts):
        if attempt % 100 == 0:
            ring.memory.close()
            ring = Ring()
        if attempt % 2:  # random bytes anywhere, or cells that are nearly right
            start = random_bytes.randrange(READY, TOTAL - 8)
            ring.memory[start : start + 8] = random_bytes.randbytes(8)
        else:
            cell = queue + CELLS + 8 * random_bytes.randrange(SLOTS)
            index, lap = random_bytes.choice([0, 1, 3, 4, 2**32 - 1]), random_bytes.randrange(4)
            ring.memory[cell : cell + 8] = struct.pack("<II", index, lap)
        try:
            if random_bytes.random() < 0.5:
                ring.send()
            ring.receive()
        except _native.HeaderMismatch as error:
            header.mismatch(SPEC, *map(header.describe, error.args))  # whatever arrived can be described
        except (MessageMismatch, _native.Aborted):
            pass
    ring.memory.close()


@pytest.mark.parametrize("cell", [(4, 1), (2**32 - 1, 1), (0, 2), (0, 2**32 - 1)], ids=str)
def test_an_impossible_index_is_named_at_either_end(ring: Ring, cell: tuple[int, int]) -> None:
    for queue, act in ((READY, ring.receive), (FREE, ring.send)):
        ring.memory[queue + CELLS : queue + CELLS + 8] = struct.pack("<II", *cell)
        with pytest.raises(MessageMismatch, match="hold what pipex never writes"):
            act()


def test_a_slot_returned_twice_or_filled_while_in_use_is_named(ring: Ring) -> None:
    ring.memory[FREE + CELLS : FREE + CELLS + 8] = struct.pack("<II", 2, 1)
    with pytest.raises(MessageMismatch, match="slot 2 returned twice"):
        ring.send()
    ring.memory[FREE + CELLS : FREE + CELLS + 8] = bytes(8)
    ring.send()
    held = ring.receive()
    ring.memory[READY + CELLS + 8 : READY + CELLS + 16] = struct.pack("<II", 0, 1)
    with pytest.raises(MessageMismatch, match="slot 0 filled while in use"):
        ring.receive()
    assert torch.equal(held, ring.data)


def test_capsules_that_nobody_takes_give_their_slot_back(ring: Ring) -> None:
    table, nbytes = header.pack_table([FORM, FORM])
    ring.sender.send(_native.MessageForm(table, nbytes), [ring.data.data_ptr()] * 2, 1, 0)
    _, capsules = ring.receiver.receive(1, 0)
    first = torch.from_dlpack(capsules[0])
    del capsules
    assert ring.receiver.lent == 1  # for the one that was taken
    del first
    assert ring.receiver.lent == 0
