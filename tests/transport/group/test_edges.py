"""Tensors over edges between processes: their bits, their strides, their order, and what is posted ahead for them."""

from __future__ import annotations

import random
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.transport.group import GroupWorld
from pipex.transport.header import DTYPES
from pipex.transport.interface import Buffers, EdgeKind, EdgeSpec

DIGEST = bytes(range(16))


def edge(source: int, destination: int, kind: EdgeKind = "activation", slots: int = 4) -> EdgeSpec:
    return EdgeSpec(source, destination, kind, source, destination, slots, 1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class Buffer(bytearray):
    """Memory of a tensor that can be asked whether the tensor's storage is still alive."""


def odd_tensors() -> list[tuple[Tensor, tuple[int, ...]]]:
    """Tensors, and the strides that they must arrive with."""
    random = torch.Generator().manual_seed(1)
    of_each_dtype = [torch.randint(0, 2, (3, 5), generator=random).to(dtype) for dtype in DTYPES]
    floats = torch.randn(6, 8, 4, generator=random)
    complexes = torch.randn(4, 4, dtype=torch.complex64, generator=random)
    images = torch.randn(2, 3, 4, 5, generator=random).contiguous(memory_format=torch.channels_last)
    return [
        *((tensor, (5, 1)) for tensor in of_each_dtype),
        *((tensor.t(), (1, 5)) for tensor in of_each_dtype),
        (torch.tensor(float("nan")), ()),
        (torch.empty(0, 7), (7, 1)),
        (torch.empty(0, 7).t(), (1, 7)),
        (torch.empty(3, 0, 2, dtype=torch.int64), (2, 2, 1)),
        (images, (60, 1, 15, 3)),
        (floats.transpose(0, 2), (1, 4, 32)),
        (floats[:, :, 1:], (32, 4, 1)),
        (floats[::2, 1::3], (12, 4, 1)),  # packed: little of what it spans is its own
        (floats[0, :, 0], (1,)),
        (floats[0, 0].expand(5, 4), (0, 1)),
        (floats[0, 0, 0].expand(2, 3), (0, 0)),
        (complexes.conj(), (4, 1)),
        (complexes.conj().imag, (4, 1)),
        (torch.randn(1, 1, 1, 1, 1, 1, 1, 3, generator=random), (3, 3, 3, 3, 3, 3, 3, 1)),
    ]


def test_every_dtype_and_layout_arrives_bit_for_bit(run: Callable[..., list[Any]]) -> None:
    cases = odd_tensors()
    wanting = torch.randn(7, requires_grad=True)
    messages = [[tensor] for tensor, _ in cases]
    messages += [[tensor for tensor, _ in cases], [wanting, wanting.detach(), wanting * 2, (wanting > 0)], []]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1)], DIGEST)
        for step in (1, 2):  # in the second, everything finds a receive posted
            for microbatch, message in enumerate(messages):
                if world.rank == 0:
                    links.senders[0, 1, "activation"].send(step, microbatch, message)
                    continue
                received = links.receivers[0, 1, "activation"].receive(step, microbatch)
                assert len(received) == len(message)
                for sent, got in zip(message, received, strict=True):
                    assert (got.shape, got.dtype, got.is_leaf) == (sent.shape, sent.dtype, True)
                    assert got.requires_grad == sent.requires_grad
                    assert torch.equal(bits(got), bits(sent))
                    assert (got.is_conj(), got.is_neg()) == (False, False)
                if microbatch < len(cases):
                    assert received[0].stride() == cases[microbatch][1]
                elif received and len(received) == len(cases):
                    assert [got.stride() for got in received] == [strides for _, strides in cases]
            links.flush()

    run(body, 2)


def test_tensors_of_a_message_are_apart(run: Callable[..., list[Any]]) -> None:
    """None keeps another's memory, or that of a larger message, and a change of one in place is none of the other's."""
    sizes = [(100_000, 100_000), (10, 10), (10,), (150_000,)]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, slots=1)], DIGEST)
        if world.rank == 0:
            for microbatch, message in enumerate(sizes):
                links.senders[0, 1, "activation"].send(1, microbatch, [torch.ones(size) for size in message])
            links.flush()
            return
        messages = [links.receivers[0, 1, "activation"].receive(1, microbatch) for microbatch in range(len(sizes))]
        for tensor in (tensor for message in messages for tensor in message):
            assert tensor.untyped_storage().nbytes() < 2 * tensor.nbytes
        first, second = messages[0]
        weight = torch.ones(100_000, requires_grad=True)
        loss = (second * weight).sum()
        first.add_(1)
        loss.backward()
        assert torch.equal(second, torch.ones(100_000))

    run(body, 2)


def test_full_slots_in_both_directions_wait_for_nobody_and_keep_their_order(run: Callable[..., list[Any]]) -> None:
    # Each rank fills all slots of its edges, with more than a socket holds, before it receives anything.
    kinds: list[EdgeKind] = ["activation", "gradient"]
    specs = [edge(s, 1 - s, kind) for s in (0, 1) for kind in kinds]

    def message(source: int, kind: EdgeKind, microbatch: int) -> list[Tensor]:
        number = 100 * source + 10 * kinds.index(kind) + microbatch
        return [torch.full((1 << 20,), float(number)), torch.full((3,), number)]

    def body(world: GroupWorld) -> None:
        links, me, peer = world.open(specs, DIGEST), world.rank, 1 - world.rank
        for step in (1, 2):
            for microbatch in range(4):
                for kind in kinds:
                    links.senders[me, peer, kind].send(step, microbatch, message(me, kind, microbatch))
            kept = {}
            for kind in reversed(kinds):
                for microbatch in range(4):
                    kept[kind, microbatch] = links.receivers[peer, me, kind].receive(step, microbatch)
            for (kind, microbatch), got in kept.items():
                assert all(map(torch.equal, got, message(peer, kind, microbatch)))
            links.flush()

    run(body, 2)


def test_a_full_set_of_slots_arrives_without_being_asked_for(run: Callable[..., list[Any]]) -> None:
    like = [torch.empty(1 << 20), torch.empty(0, 3), torch.empty(5, dtype=torch.int16)]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1)], DIGEST)
        for step in (1, 2, 3):
            if world.rank == 0:
                for microbatch in range(4):
                    message = like[: 3 - microbatch % 2]  # none larger than the first
                    links.senders[0, 1, "activation"].send(step, microbatch, message)
                if step > 1:
                    links.flush()  # more than sockets hold has left, and nobody has received
            if step > 1:
                world.exchange(b"")
            for microbatch in range(4 * world.rank):
                links.receivers[0, 1, "activation"].receive(step, microbatch)

    run(body, 2)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_messages_grow_and_shrink_and_differ_in_everything(run: Callable[..., list[Any]], slots: int) -> None:
    """As many as it takes for every slot to be used with each room, late tables (over 32 tensors) included."""
    chance = random.Random(slots)
    sizes = [chance.choice([0, 1, 5, 1000, 70_000, 100 * (number + 1)]) for number in range(12 * slots)]
    counts = [chance.choice([0, 1, 1, 2, 3, 33, 70]) for _ in sizes]

    def message(number: int) -> list[Tensor]:
        count, size = counts[number], sizes[number]
        tensors = [torch.arange(size + 3 * index) * (number + 1) + index for index in range(count)]
        return [t.float().requires_grad_(index % 2 == 0) if index % 3 else t.to(torch.int16) + number
                for index, t in enumerate(tensors)]  # fmt: skip

    def body(world: GroupWorld) -> Buffers | None:
        links = world.open([edge(0, 1, slots=slots)], DIGEST)
        for number in range(len(sizes)):
            if world.rank == 0:
                links.senders[0, 1, "activation"].send(1 + number // 7, number % 7, message(number))
                if number % 5 == 4:
                    links.flush()
                continue
            received, sent = links.receivers[0, 1, "activation"].receive(1 + number // 7, number % 7), message(number)
            assert [(t.dtype, t.requires_grad) for t in received] == [(t.dtype, t.requires_grad) for t in sent]
            assert all(map(torch.equal, received, sent))
        links.flush()
        return links.senders[0, 1, "activation"].buffers if world.rank == 0 else None

    def nbytes(number: int) -> int:
        end = 0
        for tensor in message(number):
            end = (end + 63) // 64 * 64 + tensor.nbytes
        return end

    bodies = [nbytes(number) for number in range(len(sizes))]
    largest = [max(bodies[:number]) for number in range(1, len(bodies))]
    grown = sum(0 < before < now for before, now in zip(largest, bodies[1:], strict=True))
    assert run(body, 2)[0] == Buffers(slots * max(bodies), grown)


def test_what_cannot_cross_is_refused_before_anything_is_sent(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1)], DIGEST)
        if world.rank == 1:
            assert torch.equal(links.receivers[0, 1, "activation"].receive(1, 0)[0], torch.ones(2, 3))
            return
        sender = links.senders[0, 1, "activation"]
        with pytest.raises(InputError, match="got a tensor on meta; needed one on cpu"):
            sender.send(1, 0, [torch.zeros(2, 3, device="meta")])
        with pytest.raises(InputError, match="too many dimensions; got 9"):
            sender.send(1, 0, [torch.zeros(1), torch.zeros([1] * 9)])
        with pytest.raises(InputError, match="float8_e4m3fnuz cannot go between stages"):
            sender.send(1, 0, [torch.zeros(2, dtype=torch.float8_e4m3fnuz)])
        with pytest.raises(InputError, match="too many tensors; got 4097; needed at most 4096"):
            sender.send(1, 0, [torch.zeros(1)] * 4097)
        sender.send(1, 0, [torch.ones(2, 3)])
        links.flush()

    run(body, 2)


def test_as_many_tensors_as_may_be_arrive(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1)], DIGEST)
        if world.rank == 0:
            links.senders[0, 1, "activation"].send(1, 0, [torch.full((2,), n) for n in range(4096)])
            links.flush()
            return
        received = links.receivers[0, 1, "activation"].receive(1, 0)
        assert torch.equal(torch.stack(received)[:, 1], torch.arange(4096))

    run(body, 2)


def test_a_sender_keeps_the_messages_of_its_slots_alive_and_no_more(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, slots=2)], DIGEST)
        if world.rank == 1:
            for microbatch in range(9):
                (got,) = links.receivers[0, 1, "activation"].receive(1, microbatch)
                assert torch.equal(got, torch.full((1000,), float(microbatch)))
            world.exchange(b"")
            return
        buffers, alive = [], []
        for microbatch in range(9):
            buffer = Buffer(array("f", [microbatch] * 1000).tobytes())
            buffers.append(weakref.ref(buffer))
            tensor = torch.frombuffer(buffer, dtype=torch.float32).requires_grad_()  # without it would be a copy
            links.senders[0, 1, "activation"].send(1, microbatch, [tensor])
            del buffer, tensor
            alive.append([number for number, reference in enumerate(buffers) if reference() is not None])
        assert alive == [[0], *([number - 1, number] for number in range(1, 9))]
        world.exchange(b"")
        links.flush()
        assert [reference() for reference in buffers] == [None] * 9

    run(body, 2)


@pytest.mark.parametrize(
    ("change", "got", "needed"),
    [
        ({"step": 2}, "micro-batch 0 of step 2", "micro-batch 0 of step 1"),
        ({"microbatch": 7}, "micro-batch 7 of step 1", "micro-batch 0 of step 1"),
        ({"digest": b"\xff" * 16}, "plan ffffffff", "plan 00010203"),
    ],
)
def test_another_message_than_comes_next_is_named_at_the_receiver(
    start: Callable[..., Any], change: dict[str, Any], got: str, needed: str
) -> None:
    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1)], DIGEST)
        if world.rank == 0:
            links.senders[0, 1, "activation"]._digest = change.get("digest", DIGEST)  # type: ignore[attr-defined]
            links.senders[0, 1, "activation"].send(
                change.get("step", 1), change.get("microbatch", 0), [torch.zeros(4, 3)]
            )
            links.flush()
        else:
            links.receivers[0, 1, "activation"].receive(1, 0)

    sender, receiver = start(body, 2).outcomes()
    assert (receiver.error, receiver.exit_code) == ("MessageMismatch", 0)
    assert "stage 1 (rank 1) received from stage 0 (rank 0) another message than comes next" in receiver.text
    got_part, needed_part = receiver.text.split("; needed ")
    assert got in got_part
    assert needed in needed_part
    assert (sender.error, sender.exit_code, sender.place[0]) == ("PeerFailed", 0, 1)
    assert "MessageMismatch: stage 1 (rank 1)" in sender.text
