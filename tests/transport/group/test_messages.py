"""What the two ends of an edge say to each other, over groups that are queues in this process: the way of NCCL, where
bodies are not received ahead, and messages that no sender sends."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pipex.errors import MessageMismatch, OutOfSharedMemory, PipexError
from pipex.transport.group.edges import GroupReceiver, GroupSender, Lane
from pipex.transport.header import LAYOUT, RECORD, SIZE, Header, pack_table
from pipex.transport.interface import EdgeSpec, form_of

CPU = torch.device("cpu")
DIGEST = bytes(range(16))


class Work:
    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait


class Group:
    """Delivers what was sent under a tag in the order of the receives.

    Attributes:
        exact: whether a receive must have just as much room as is sent, as over NCCL; else at least as much.
        posted: bytes of each receive under a tag.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.posted: dict[int, list[int]] = defaultdict(list)
        self._sent: dict[int, deque[Tensor]] = defaultdict(deque)
        self._receives: dict[int, deque[Tensor]] = defaultdict(deque)

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Work:
        (tensor,) = tensors
        self._sent[tag].append(tensor.clone())
        return Work(lambda: None)

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Work:
        (memory,) = tensors
        self.posted[tag].append(memory.numel())
        self._receives[tag].append(memory)
        return Work(lambda: self._deliver(memory, tag))

    def _deliver(self, memory: Tensor, tag: int) -> None:
        while any(waiting is memory for waiting in self._receives[tag]):
            assert self._sent[tag], f"a wait for what nobody sends, under tag {tag}"
            first, sent = self._receives[tag].popleft(), self._sent[tag].popleft()
            assert sent.numel() == first.numel() if self.exact else sent.numel() <= first.numel()
            first[: sent.numel()] = sent

    @property
    def at_rest(self) -> bool:
        """Whether all that was sent has been received."""
        return not any(self._sent.values())


class Watch:
    @contextmanager
    def waiting(self, peer: int, subject: object) -> Iterator[None]:
        yield


def edge(slots: int, payload: Group | None = None) -> tuple[GroupSender, GroupReceiver, Group]:
    """Both ends of an edge, and its group for heads; bodies go through ``payload`` if there is one."""
    control: Any = Group()
    spec = EdgeSpec(0, 1, "activation", 0, 1, slots, 1)
    lane = Lane(control, 1, 5, control if payload is None else cast(Any, payload), 1, CPU, CPU)
    watch: Any = Watch()
    return GroupSender(spec, DIGEST, lane, watch), GroupReceiver(spec, DIGEST, lane, watch), control


def messages(seed: int, count: int) -> list[list[Tensor]]:
    """Of any number of tensors of any sizes, empty ones too."""
    chance = random.Random(seed)
    tensors: list[Callable[[int], Tensor]] = [
        lambda n: torch.randn(n, 3).t(),
        lambda n: torch.randint(9, (n,)).expand(2, n),
        lambda n: torch.randn(2, n, 3, requires_grad=True),
        lambda n: torch.tensor(float(n), dtype=torch.float64),
        lambda n: torch.randn(2, 3, 2, n).contiguous(memory_format=torch.channels_last),
    ]
    numbers = [chance.choice([0, 1, 1, 2, 5, 32, 33, 80]) for _ in range(count)]
    return [[chance.choice(tensors)(chance.choice([0, 1, 7, 300])) for _ in range(number)] for number in numbers]


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("ahead", [True, False], ids=["all ahead", "heads ahead"])
def test_any_messages_arrive_whatever_the_slots(ahead: bool, slots: int) -> None:
    payload = None if ahead else Group(exact=True)
    sender, receiver, control = edge(slots, payload)
    chance = random.Random(slots)
    under_way: deque[tuple[int, list[Tensor]]] = deque()

    def receive() -> None:
        number, sent = under_way.popleft()
        received = receiver.receive(1, number)
        for got, expected in zip(received, sent, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert (got.requires_grad, got.is_leaf) == (expected.requires_grad, True)
            assert torch.equal(got, expected)

    for number, message in enumerate(messages(slots, 100)):
        sender.send(1, number, message)
        under_way.append((number, message))
        while under_way and (len(under_way) == slots or chance.random() < 0.5):
            receive()
    while under_way:
        receive()
    assert control.at_rest
    assert payload is None or payload.at_rest


def test_a_receive_has_room_for_the_largest_that_was_taken_when_it_was_posted() -> None:
    sender, receiver, control = edge(slots=2)
    sizes = [8, 100, 40, 300, 0, 300, 8, 8]
    for number, size in enumerate(sizes):
        sender.send(1, number, [torch.zeros(size, dtype=torch.uint8)])
        receiver.receive(1, number)
    assert control.posted[6] == [8, 100, 100, 300, 300, 300, 300, 300]  # behind messages 0, 1, ...
    assert control.posted[7] == [8, 100, 40, 300]  # they found room for 0, 0, 8 and 100
    assert (sender.buffers.nbytes, sender.buffers.grown) == (2 * 300, 2)


def test_over_nccl_nothing_is_posted_before_its_size_is_known() -> None:
    payload = Group(exact=True)
    sender, receiver, _ = edge(2, payload)
    for number, size in enumerate((8, 100, 40, 0, 300)):
        sender.send(1, number, [torch.zeros(size, dtype=torch.uint8)])
        assert sum(map(len, payload.posted.values())) == min(number, 3)
        receiver.receive(1, number)
    assert list(payload.posted.values()) == [[8, 100, 40, 300]]


def head_of(message: Sequence[Tensor], **changes: object) -> tuple[bytes, bytes]:
    """Header and table of a first message, with some fields of the header changed."""
    table, nbytes = pack_table(form_of(message))
    header = Header(DIGEST, 0, 1, "activation", len(message), 0, 1, 0, nbytes)
    return header._replace(**cast(Any, changes)).pack(), table


def received(head: bytes, body: Tensor, late: bytes = b"") -> tuple[Tensor, ...]:
    """What a receiver makes of a message."""
    _, receiver, control = edge(1)
    control.send([torch.frombuffer(bytearray(head), dtype=torch.uint8)], 0, 5)
    if late:
        control.send([torch.frombuffer(bytearray(late), dtype=torch.uint8)], 0, 7)
    control.send([body], 0, 7)
    return receiver.receive(1, 0)


TENSORS = [torch.arange(6.0).reshape(2, 3), torch.arange(4)]
BODY = torch.zeros(96, dtype=torch.uint8)
COUNT, BYTES = 34, 56  # where a header has them


def row(**changes: int) -> bytes:
    """The first row of the table of ``TENSORS``, changed."""
    _, table = head_of(TENSORS)
    names = ["dtype", "dimensions", "wanted", "code", "bits", "begin"]
    names += [f"size{i}" for i in range(8)] + [f"stride{i}" for i in range(8)]
    fields = dict(zip(names, RECORD.unpack(table[: RECORD.size]), strict=True))
    return RECORD.pack(*(fields | changes).values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": 99}, "unknown dtype 99"),
        ({"dtype": 1}, "unknown dtype 1"),  # with float32's code and bits
        ({"dimensions": 9}, "9 dimensions"),
        ({"bits": 0}, "elements of 0 bits"),
        ({"size0": -1}, "below 0"),
        ({"stride1": -1}, "below 0"),
        ({"size0": 1 << 62}, "larger than any memory"),
        ({"stride0": 1 << 62}, "larger than any memory"),
        ({"size0": 9}, "of 96"),
        ({"begin": 128}, "of 96"),
        ({"begin": 1 << 63}, "of 96"),
        ({"begin": 4}, "of 96"),
        ({"size0": 1 << 62, "stride0": 0}, "larger than any memory"),  # to torch, which counts elements
        ({"size2": 1}, "something where nothing may stand"),
        (
            {"wanted": 1, "dtype": 4, "code": 0, "bits": 64, "size0": 1},
            "wants a gradient of a tensor of dtype torch.int64",
        ),
    ],
)
def test_a_table_that_says_what_cannot_be_is_refused(changes: dict[str, int], named: str) -> None:
    header, table = head_of(TENSORS)
    with pytest.raises(MessageMismatch, match=named):
        received(header + row(**changes) + table[RECORD.size :], BODY)
    assert torch.equal(received(header + table, BODY)[1], torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensors": 1}, "got 96 bytes; needed 24"),
        ({"tensors": 3}, "0 bits"),  # a row of zeros
        ({"tensors": 65535}, "got 65535 tensors; needed at most 4096"),
        ({"nbytes": 95}, "of 95"),
        ({"nbytes": 97}, "got 97 bytes; needed 96"),
        ({"nbytes": 1 << 60}, f"got {1 << 60} bytes; needed 96"),
        ({"nbytes": 1 << 63}, f"got {1 << 63} bytes"),
    ],
)
def test_a_number_or_size_that_is_not_its_table_s_is_refused(changes: dict[str, int], named: str) -> None:
    header, table = head_of(TENSORS, **changes)
    with pytest.raises(MessageMismatch, match=named):
        received(header + table, BODY)


def test_what_no_memory_holds_is_refused_by_name() -> None:
    header, _ = head_of(TENSORS, tensors=1, nbytes=1 << 60)
    with pytest.raises(OutOfSharedMemory, match=f"got {1 << 60} bytes"):
        received(header + row(size0=1, size1=1 << 58), BODY)


def test_an_empty_tensor_behind_all_memory_is_refused() -> None:
    begin = 1 << 63
    header, _ = head_of(TENSORS, tensors=1, nbytes=begin)
    with pytest.raises(MessageMismatch, match=f"got {begin} bytes"):
        received(header + row(size0=0, begin=begin), BODY)


def test_what_fails_otherwise_is_not_told_as_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    header, table = head_of(TENSORS)
    monkeypatch.setattr(torch, "empty", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        received(header + table, BODY)


def test_a_lack_of_memory_keeps_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def full(*arguments: object, **options: object) -> Tensor:
        raise said

    header, table = head_of(TENSORS)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(OutOfSharedMemory, match="got 96 bytes") as caught:
        received(header + table, BODY)
    assert caught.value.__cause__ is said


def test_a_tensor_is_read_from_where_its_table_says() -> None:
    header, _ = head_of(TENSORS, tensors=1, nbytes=64 + 24)
    body = torch.cat([torch.zeros(64, dtype=torch.uint8), TENSORS[0].view(torch.uint8).reshape(-1)])
    assert torch.equal(received(header + row(begin=64), body)[0], TENSORS[0])


@pytest.mark.parametrize("change", [place for place in range(BYTES) if place not in (COUNT, COUNT + 1)])
def test_no_byte_of_a_header_may_be_another_one(change: int) -> None:
    header, table = head_of(TENSORS)
    spoiled = bytearray(header)
    spoiled[change] ^= 0x5A
    with pytest.raises(MessageMismatch, match="another message than comes next"):
        received(bytes(spoiled) + table, BODY)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 10))])
def test_random_heads_raise_nothing_but_named_errors(seed: int) -> None:
    chance = random.Random(seed)
    header, table = head_of(TENSORS)
    accepted = 0
    for _ in range(10_000):
        spoiled = bytearray(header + table)
        begin = chance.choice([COUNT, BYTES, SIZE])  # else it is not the message that comes next
        for _ in range(chance.randint(1, 4)):
            spoiled[chance.randrange(begin, len(spoiled))] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        if chance.random() < 0.1:
            del spoiled[chance.randrange(1, len(spoiled)) :]
        *_, count, _, _, _, nbytes = LAYOUT.unpack(spoiled[:SIZE].ljust(SIZE, b"\0"))
        late = bytes(RECORD.size * max(0, min(count, 4096) - 32))
        try:
            tensors = received(spoiled, torch.zeros(min(nbytes, 1 << 20), dtype=torch.uint8), late)
        except PipexError:
            continue
        accepted += 1
        for tensor in tensors:
            assert tensor.untyped_storage().nbytes() <= nbytes
            if tensor.numel() < 1 << 20:  # else it is expanded
                tensor.clone()  # reads it all
    assert 100 < accepted < 9_000
