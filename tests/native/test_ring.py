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

BYTES, UNDER_WAY, ALIVE = 256, 2, 2
SLOTS = UNDER_WAY + ALIVE
FORM = TensorForm((64,), torch.float32)
HEADER = header.Header(bytes(range(16)), 3, 4, "gradient", 0, 0, 0, 0, FORM)
SPEC = EdgeSpec(3, 4, "gradient", 0, 0, UNDER_WAY, ALIVE, (FORM,))

# csrc/host/segment.cpp and ring_layout.hpp: the segment's header, then two queues of (bell, cells), then headers.
READY = 128
FREE = READY + 256
CELLS = 128
HEADERS = FREE + 256
PAYLOADS = HEADERS + SLOTS * header.SIZE
TOTAL = PAYLOADS + SLOTS * BYTES


def template(expected: header.Header = HEADER) -> _native.TensorTemplate:
    return _native.TensorTemplate(expected.pack(), expected.form.shape, 2, 32)


class Ring:
    """Both ends in one process, and the raw memory between them."""

    def __init__(self) -> None:
        self.member = _native.Member(_native.Control(1), 0, 20.0, False)
        self.member.fail("so that a wait in these tests ends at once")
        self.receiver = _native.RingReceiver(self.member, 0, BYTES, UNDER_WAY, ALIVE)
        self.sender = _native.RingSender(self.member, 0, self.receiver.address, BYTES, UNDER_WAY, ALIVE)
        fd = struct.unpack_from("<ii", self.receiver.address)[1]
        self.memory = mmap.mmap(fd, 0)
        self.data = torch.arange(64, dtype=torch.float32)

    def send(self, step: int = 1, expected: header.Header = HEADER) -> None:
        self.sender.send(template(expected), self.data.data_ptr(), step, 0)

    def receive(self, step: int = 1) -> torch.Tensor:
        return torch.from_dlpack(self.receiver.receive(template(), step, 0))


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.memory.close()


def test_the_layout_of_these_tests_is_the_rings(ring: Ring) -> None:
    assert len(ring.memory) == TOTAL
    ring.send()
    assert struct.unpack_from("<II", ring.memory, READY + CELLS) == (0, 1)  # slot 0 in lap 1
    assert ring.memory[HEADERS : HEADERS + 4] == header.MAGIC
    assert ring.memory[PAYLOADS : PAYLOADS + BYTES] == ring.data.numpy().tobytes()
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
        ("tensor", 1, "tensor 1 of"),
        ("form", TensorForm((8, 8), torch.float32), r"float32\[8, 8\]"),
        ("form", TensorForm((64,), torch.int32), r"int32\[64\]"),
    ],
)
def test_every_fixed_field_of_a_header_is_compared(ring: Ring, field: str, value: object, named: str) -> None:
    ring.send(expected=HEADER._replace(**{field: value}))
    for _ in range(2):  # the message stays where it is
        with pytest.raises(_native.HeaderMismatch) as caught:
            ring.receive()
        with pytest.raises(MessageMismatch, match=named):
            raise header.mismatch(SPEC, *map(header.describe, caught.value.args))


def test_header_fields_patched_by_the_ring_stand_where_the_format_says(ring: Ring) -> None:
    for message in range(3):
        ring.sender.send(template(), ring.data.data_ptr(), 2**40 + message, 70_000 + message)
    for message in range(3):
        with pytest.raises(_native.HeaderMismatch) as caught:
            ring.receiver.receive(template(), 5, 6)
        got, needed = caught.value.args
        assert got == HEADER._replace(microbatch=70_000 + message, step=2**40 + message, sequence=message).pack()
        assert needed == HEADER._replace(microbatch=6, step=5, sequence=message).pack()
        ring.receiver.receive(template(), 2**40 + message, 70_000 + message)


def test_every_single_bit_of_a_header_counts(ring: Ring) -> None:
    ring.send()
    clean = ring.memory[HEADERS : HEADERS + header.SIZE]
    for bit in range(8 * header.SIZE):
        broken = bytearray(clean)
        broken[bit // 8] ^= 1 << bit % 8
        ring.memory[HEADERS : HEADERS + header.SIZE] = bytes(broken)
        with pytest.raises(_native.HeaderMismatch):
            ring.receive()
    ring.memory[HEADERS : HEADERS + header.SIZE] = clean
    assert torch.equal(ring.receive(), ring.data)


@pytest.mark.parametrize("queue", [READY, FREE])
def test_hostile_memory_gives_named_errors_only(queue: int) -> None:
    random_bytes = random.Random(queue)
    attempts = 10_000
    ring = Ring()
    for attempt in range(attempts):
        if attempt % 100 == 0:
            ring.memory.close()
            ring = Ring()
        if attempt % 2:  # random bytes anywhere in front of the payloads, or cells that are nearly right
            start = random_bytes.randrange(READY, PAYLOADS - 8)
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
    ring.memory[HEADERS : HEADERS + header.SIZE] = HEADER._replace(step=1, sequence=1).pack()
    ring.memory[READY + CELLS + 8 : READY + CELLS + 16] = struct.pack("<II", 0, 1)
    with pytest.raises(MessageMismatch, match="slot 0 filled while in use"):
        ring.receive()
    assert torch.equal(held, ring.data)


def test_a_capsule_that_nobody_takes_gives_its_slot_back(ring: Ring) -> None:
    ring.send()
    capsule = ring.receiver.receive(template(), 1, 0)
    assert ring.receiver.lent == 1
    del capsule
    assert ring.receiver.lent == 0
