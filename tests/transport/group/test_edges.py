"""Tensors over edges between processes: their bits, their order, and the check of what was announced."""

from __future__ import annotations

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
from pipex.transport.interface import EdgeKind, EdgeSpec, TensorForm, form_of

DIGEST = bytes(range(16))


def edge(source: int, destination: int, like: list[Tensor], kind: EdgeKind = "activation", slots: int = 4) -> EdgeSpec:
    return EdgeSpec(source, destination, kind, source, destination, slots, 1, form_of(like))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class Buffer(bytearray):
    """Memory of a tensor that can be asked whether the tensor's storage is still alive."""


def odd_tensors() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    of_each_dtype = [torch.randint(0, 2, (3, 5), generator=random).to(dtype) for dtype in DTYPES]
    floats = torch.randn(6, 8, 4, generator=random)
    complexes = torch.randn(4, 4, dtype=torch.complex64, generator=random)
    return [
        *of_each_dtype,
        torch.tensor(float("nan")),
        torch.empty(0, 7),
        torch.empty(3, 0, 2, dtype=torch.int64),
        floats.transpose(0, 2),
        floats[::2, 1::3],
        floats[0, :, 0],
        floats[0, 0].expand(5, 4),
        complexes.conj(),
        complexes.conj().imag,
        torch.randn(7, generator=random, requires_grad=True),
        torch.randn(1, 1, 1, 1, 1, 1, 1, 3, generator=random),
    ]


def test_every_dtype_and_layout_arrives_bit_for_bit(run: Callable[..., list[Any]]) -> None:
    tensors = odd_tensors()

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, tensors)], DIGEST)
        if world.rank == 0:
            links.senders[0, 1, "activation"].send(1, 0, tensors)
            links.flush()
            return
        received = links.receivers[0, 1, "activation"].receive(1, 0, form_of(tensors))
        for sent, got in zip(tensors, received, strict=True):
            assert (got.shape, got.dtype, got.requires_grad) == (sent.shape, sent.dtype, False)
            assert torch.equal(bits(got), bits(sent))

    run(body, 2)


def test_full_slots_in_both_directions_wait_for_nobody_and_keep_their_order(run: Callable[..., list[Any]]) -> None:
    # Each rank fills all slots of its edges, with more than a socket holds, before it receives anything.
    kinds: list[EdgeKind] = ["activation", "gradient"]
    like = [torch.empty(1 << 20), torch.empty(3, dtype=torch.int64)]
    specs = [edge(s, 1 - s, like, kind) for s in (0, 1) for kind in kinds]

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
                    got = links.receivers[peer, me, kind].receive(step, microbatch, form_of(like))
                    kept[kind, microbatch] = got
            for (kind, microbatch), got in kept.items():
                assert all(map(torch.equal, got, message(peer, kind, microbatch)))
            links.flush()

    run(body, 2)


def test_a_full_set_of_slots_arrives_without_being_asked_for(run: Callable[..., list[Any]]) -> None:
    like = [torch.empty(1 << 20), torch.empty(0, 3), torch.empty(5, dtype=torch.int16)]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, like)], DIGEST)
        for step in (1, 2):
            if world.rank == 0:
                for microbatch in range(4):
                    links.senders[0, 1, "activation"].send(step, microbatch, [t + microbatch for t in like])
                links.flush()  # more than sockets hold has left, and nobody has received
            world.exchange(b"")
            for microbatch in range(4 * world.rank):
                links.receivers[0, 1, "activation"].receive(step, microbatch, form_of(like))

    run(body, 2)


def test_a_message_that_the_edge_was_not_opened_for_is_refused_before_a_wait(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, [torch.zeros(4, 3)])], DIGEST)
        if world.rank == 1:
            with pytest.raises(InputError, match=r"got float32\[5, 3\]; needed at most float32\[4, 3\]"):
                links.receivers[0, 1, "activation"].receive(1, 0, (TensorForm((5, 3), torch.float32),))

    run(body, 2)


def test_a_sender_keeps_the_messages_of_its_slots_alive_and_no_more(run: Callable[..., list[Any]]) -> None:
    like = [torch.empty(1000)]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, like, slots=2)], DIGEST)
        if world.rank == 1:
            for microbatch in range(9):
                (got,) = links.receivers[0, 1, "activation"].receive(1, microbatch, form_of(like))
                assert torch.equal(got, torch.full((1000,), float(microbatch)))
            world.exchange(b"")
            return
        buffers, alive = [], []
        for microbatch in range(9):
            buffer = Buffer(array("f", [microbatch] * 1000).tobytes())
            buffers.append(weakref.ref(buffer))
            links.senders[0, 1, "activation"].send(1, microbatch, [torch.frombuffer(buffer, dtype=torch.float32)])
            del buffer
            alive.append([number for number, reference in enumerate(buffers) if reference() is not None])
        assert alive == [[0], *([number - 1, number] for number in range(1, 9))]
        world.exchange(b"")
        links.flush()
        assert [reference() for reference in buffers] == [None] * 9

    run(body, 2)


@pytest.mark.parametrize(
    ("change", "got", "needed"),
    [
        ({"tensors": [torch.zeros(2, 3)]}, "float32[2, 3] (24 bytes)", "float32[4, 3] (48 bytes)"),
        ({"tensors": [torch.zeros(1000, 3)]}, "float32[1000, 3]", "float32[4, 3]"),
        ({"tensors": [torch.zeros(4, 3, dtype=torch.float64)]}, "float64[4, 3]", "float32[4, 3]"),
        ({"tensors": [torch.zeros(4, 3, dtype=torch.int32)]}, "int32[4, 3]", "float32[4, 3]"),
        ({"tensors": [torch.zeros(0, 3)]}, "float32[0, 3] (0 bytes)", "float32[4, 3]"),
        ({"step": 2}, "step 2", "step 1"),
        ({"microbatch": 7}, "micro-batch 7", "micro-batch 0"),
        ({"digest": b"\xff" * 16}, "plan ffffffff", "plan 00010203"),
    ],
)
def test_another_tensor_than_announced_is_named_at_the_receiver(
    start: Callable[..., Any], change: dict[str, Any], got: str, needed: str
) -> None:
    like = [torch.zeros(4, 3)]

    def body(world: GroupWorld) -> None:
        sends = world.rank == 0
        links = world.open([edge(0, 1, like)], DIGEST)
        if sends:
            links.senders[0, 1, "activation"]._digest = change.get("digest", DIGEST)  # type: ignore[attr-defined]
            message = change.get("tensors", like)
            links.senders[0, 1, "activation"].send(change.get("step", 1), change.get("microbatch", 0), message)
            links.flush()
        else:
            links.receivers[0, 1, "activation"].receive(1, 0, form_of(like))

    sender, receiver = start(body, 2).outcomes()
    assert (receiver.error, receiver.exit_code) == ("MessageMismatch", 0)
    assert "stage 1 (rank 1) received from stage 0 (rank 0)" in receiver.text
    got_part, needed_part = receiver.text.split("; needed ")
    assert got in got_part
    assert needed in needed_part
    assert (sender.error, sender.exit_code, sender.place[0]) == ("PeerFailed", 0, 1)
    assert "MessageMismatch: stage 1 (rank 1)" in sender.text


def test_a_wrong_number_of_tensors_is_named_at_the_sender(start: Callable[..., Any]) -> None:
    like = [torch.zeros(2), torch.zeros(3)]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, like)], DIGEST)
        if world.rank == 0:
            links.senders[0, 1, "activation"].send(1, 0, like[:1])
        else:
            links.receivers[0, 1, "activation"].receive(1, 0, form_of(like))

    sender, receiver = start(body, 2).outcomes()
    assert (sender.error, receiver.error) == ("MessageMismatch", "PeerFailed")
    assert "got 1; needed 2" in sender.text


@pytest.mark.parametrize("rows", [3, 1, 0])
def test_a_smaller_last_microbatch_may_be_announced_at_the_receive(run: Callable[..., list[Any]], rows: int) -> None:
    like = [torch.zeros(4, 3)]

    def body(world: GroupWorld) -> None:
        links = world.open([edge(0, 1, like)], DIGEST)
        for step in (1, 2):
            for microbatch, size in enumerate((4, 4, rows)):
                sent = torch.full((size, 3), float(10 * step + microbatch))
                if world.rank == 0:
                    links.senders[0, 1, "activation"].send(step, microbatch, [sent])
                else:
                    (got,) = links.receivers[0, 1, "activation"].receive(step, microbatch, form_of([sent]))
                    assert torch.equal(got, sent)
        links.flush()

    run(body, 2)
