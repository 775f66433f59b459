"""Tensors through shared memory, between ranks that are threads here: the same code runs as between processes."""

from __future__ import annotations

import gc
import math
import os
import random
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import case
from threads_as_ranks import each
from torch import Tensor

from pipex.errors import ConfigMismatch, InputError, MessageMismatch, OutOfSharedMemory
from pipex.transport.header import DTYPES
from pipex.transport.host import HostLinks, HostRun, HostWorld
from pipex.transport.interface import Buffers, EdgeSpec, Receiver, Sender
from pipex.transport.staged import StagedSender

DIGEST = bytes(range(16))


@contextmanager
def joined(ranks: int) -> Iterator[list[HostWorld]]:
    run = HostRun.create(ranks)
    worlds = [run.join(rank, timeout=20) for rank in range(ranks)]
    try:
        yield worlds
    finally:
        each(worlds, HostWorld.close)


def edge_spec(*, slots: int = 2, alive: int = 2) -> EdgeSpec:
    return EdgeSpec(0, 1, "activation", 0, 1, slots, alive)


@contextmanager
def edge(*, slots: int = 2, alive: int = 2) -> Iterator[tuple[Sender, Receiver]]:
    spec = edge_spec(slots=slots, alive=alive)
    with joined(2) as worlds:
        links = each(worlds, lambda world: world.open([spec], DIGEST))
        yield links[0].senders[0, 1, "activation"], links[1].receivers[0, 1, "activation"]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    for shape in ((), (1,), (7,), (3, 5, 2), (0,), (4, 0, 3), (1, 1, 1, 1, 1, 1, 1, 3)):
        with case(shape):
            check_transfer(dtype, shape)


def check_transfer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    elements = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (elements,), dtype=torch.uint8)
    sent = raw.view(dtype).reshape(shape)
    with edge() as (sender, receiver):
        sender.send(1, 0, [sent])
        (received,) = receiver.receive(1, 0)
        assert received.dtype is dtype
        assert received.shape == sent.shape
        assert bits(received) == bits(sent)
        assert received.data_ptr() % 64 == 0 or elements == 0


@pytest.mark.parametrize("elements", [1, 1023, 65_536, 1_000_003])
def test_messages_arrive_in_order_and_whole_while_slots_are_reused(elements: int) -> None:
    with edge(slots=1, alive=1) as (sender, receiver), ThreadPoolExecutor(1) as other:
        messages = [(torch.arange(elements) + 1000 * m, torch.full((3,), m, dtype=torch.int32)) for m in range(12)]
        sending = other.submit(lambda: [sender.send(1, m, message) for m, message in enumerate(messages)])
        for m, message in enumerate(messages):
            received = receiver.receive(1, m)
            assert all(map(torch.equal, received, message))
        sending.result()


@pytest.mark.parametrize("nbytes", [(32 << 20) - 1, 32 << 20, (33 << 20) + 77])
def test_large_messages_arrive_whole_from_any_address(nbytes: int) -> None:
    """From 32 MiB on the copy goes past the caches, in blocks of 64 bytes and a rest."""
    numbers = torch.arange(nbytes + 3, dtype=torch.int32).mul_(-1640531527).view(torch.uint8)
    with edge() as (sender, receiver):
        for m, offset in enumerate((0, 1, 3)):
            sender.send(1, m, [numbers[offset : offset + nbytes]])
            assert torch.equal(receiver.receive(1, m)[0], numbers[offset : offset + nbytes])


def test_tensors_arrive_with_their_strides_and_as_torch_sees_them() -> None:
    base = torch.randn(6, 8, dtype=torch.complex64)
    sources = [
        base.t(),
        base[:, 1:5],
        base[1:, 2:],
        base.conj(),
        base.conj().imag,
        base.t().conj().imag,
        base[:1, :1].conj().imag,
        base[0, 0].expand(5, 4),
        base[:, :1].expand(6, 9),
        torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 0, 3).transpose(0, 2),
    ]
    with edge() as (sender, receiver):
        for turn in range(2):  # the second time their form is known
            sender.send(1, turn, sources)
            for sent, received in zip(sources, receiver.receive(1, turn), strict=True):
                assert torch.equal(sent, received)
                lazy = sent.is_conj() or sent.is_neg()
                assert received.stride() == (sent.resolve_conj().resolve_neg() if lazy else sent).stride()


def test_a_few_elements_out_of_many_are_packed() -> None:
    tokens = torch.randn(4, 100, 8)
    with edge() as (sender, receiver):
        sender.send(1, 0, [tokens[:, 0], tokens[:, ::2]])
        first, half = receiver.receive(1, 0)
        assert torch.equal(first, tokens[:, 0])
        assert first.is_contiguous()
        assert half.stride() == tokens[:, ::2].stride()
        assert sender.buffers.nbytes < tokens.nbytes * 1.2


def test_whether_a_gradient_is_wanted_travels_along() -> None:
    weight = torch.randn(3, requires_grad=True)
    message = [weight * 2, torch.randn(3), torch.arange(3), (weight * 2).detach().requires_grad_()]
    with edge() as (sender, receiver):
        for turn in range(2):
            sender.send(1, turn, message)
            received = receiver.receive(1, turn)
            assert [t.requires_grad for t in received] == [True, False, False, True]
            assert all(t.is_leaf and t.grad_fn is None for t in received)
            assert all(map(torch.equal, received, message))


def test_messages_may_be_of_any_number_of_tensors_and_any_size() -> None:
    chance = random.Random(0)
    kept: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []
    with edge(slots=2, alive=3) as (sender, receiver):
        for m in range(300):
            sent = [torch.randn(chance.choice((0, 1, 3, 100, 5000)), chance.choice((1, 2, 7))) for _ in range(m % 6)]
            sender.send(1, m, sent)
            kept.append((receiver.receive(1, m), sent))
            while len(kept) > chance.randint(0, 5):
                received, wanted = kept.pop(chance.randrange(len(kept)))
                assert [t.shape for t in received] == [t.shape for t in wanted]
                assert all(map(torch.equal, received, wanted))


def test_buffers_grow_with_the_largest_message_and_no_more() -> None:
    with edge(slots=1, alive=1) as (sender, receiver):

        def exchange(elements: int) -> tuple[int, int]:
            tensor = torch.full((elements,), float(elements))
            sender.send(1, 0, [tensor])
            assert torch.equal(receiver.receive(1, 0)[0], tensor)
            return sender.buffers.nbytes, sender.buffers.grown

        assert sender.buffers == Buffers(0, 0)
        first, grown = exchange(1000)
        assert 4000 <= first <= 4000 + 1024
        assert grown == 0
        assert exchange(10) == (first, 0)
        larger, grown = exchange(1001)
        assert larger == first + first // 2  # so that ever longer messages do not make new memory each time
        assert grown == 1
        assert exchange(1400) == (larger, 1)
        assert exchange(10_000)[1] == 2
        settled = [exchange(elements) for elements in (3, 10_000, 500, 10_000) * 50]
        assert len(set(settled)) == 1


@pytest.fixture
def much(tmp_path: Path) -> Tensor:
    """4 TiB that take none."""
    (tmp_path / "sparse").touch()
    return torch.from_file(str(tmp_path / "sparse"), shared=True, size=1 << 42, dtype=torch.uint8)


def test_a_message_that_no_memory_holds_leaves_the_edge_as_it_was(much: Tensor) -> None:
    with edge() as (sender, receiver):
        for m in range(8):  # more often than there are slots
            before = sender.buffers
            with pytest.raises(OutOfSharedMemory, match=r"got \d+ bytes available; needed 43980"):
                sender.send(1, m, [much])
            assert sender.buffers == before
            sender.send(1, m, [torch.full((10,), float(m))])
            assert receiver.receive(1, m)[0].tolist() == [m] * 10
        assert sender.buffers.grown == 0
        assert sender.buffers.nbytes < 1000


def test_where_half_more_is_too_much_just_enough_is_made() -> None:
    """The kernel's own limit on the size of a file, which a memfd is, stands in for a machine without free memory."""
    with edge(slots=2, alive=1) as (sender, receiver):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        held = []
        try:
            for m, (elements, limit) in enumerate([(1 << 18, before[0]), (300_000, 5 << 18), (10, 1 << 20)]):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                sender.send(1, m, [torch.full((elements,), float(m))])
                held.append(receiver.receive(1, m)[0])  # so that each goes through another slot
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert [(t.numel(), t.unique().item()) for t in held] == [(1 << 18, 0), (300_000, 1), (10, 2)]
        assert sender.buffers.grown == 1
        assert sender.buffers.nbytes < 4 * (1 << 18) + 4 * 300_000 + 2000


def test_a_full_plan_of_slots_never_waits() -> None:
    with edge(slots=5, alive=1) as (sender, receiver):
        sent = [torch.randn(1000) for _ in range(5)]
        for m, tensor in enumerate(sent):
            sender.send(1, m, [tensor])  # nobody receives: a wait would end in a time-out
        for m, tensor in enumerate(sent):
            assert torch.equal(receiver.receive(1, m)[0], tensor)


def test_the_senders_tensor_may_be_overwritten_at_once() -> None:
    tensor = torch.randn(100)
    with edge() as (sender, receiver):
        before = tensor.clone()
        sender.send(1, 0, [tensor])
        tensor.zero_()
        assert torch.equal(receiver.receive(1, 0)[0], before)


@pytest.mark.parametrize("alive", [1, 3])
def test_a_tensor_saved_by_autograd_is_not_overwritten_when_slots_are_reused(alive: int) -> None:
    weight = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    sent = [torch.randn(64, 64, dtype=torch.float64) for _ in range(40)]
    with edge(slots=2, alive=alive) as (sender, receiver):
        losses = []
        for m, tensor in enumerate(sent):
            sender.send(1, m, [tensor])
            (received,) = receiver.receive(1, m)
            if m % 10 == 0:  # more of them than `alive`: the rest must be copied out of the slots
                losses.append((received @ weight).sum())  # the only reference left is autograd's
            del received
        for m, loss in zip(range(0, 40, 10), losses, strict=True):
            (gradient,) = torch.autograd.grad(loss, weight)
            expected = sent[m].sum(0).unsqueeze(1).expand(64, 64)
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_view_keeps_the_whole_message() -> None:
    with edge(slots=1, alive=2) as (sender, receiver):
        sender.send(1, 0, [torch.arange(100)])
        view = receiver.receive(1, 0)[0][10:20].view(5, 2)
        for m in range(1, 20):
            sender.send(1, m, [torch.full((100,), -m)])
            receiver.receive(1, m)
        assert view.flatten().tolist() == list(range(10, 20))


def test_received_tensors_outlive_the_world_and_may_die_on_any_thread() -> None:
    with edge() as (sender, receiver):
        sender.send(1, 0, [torch.arange(1000)])
        held = [receiver.receive(1, 0)[0]]
        del sender, receiver
    gc.collect()
    assert torch.equal(held[0], torch.arange(1000))
    dying = threading.Thread(target=held.clear)
    dying.start()
    dying.join()


def test_slots_are_lent_and_come_back() -> None:
    with edge(slots=2, alive=2) as (sender, receiver):
        kept = []
        for m in range(4):
            sender.send(1, m, [torch.zeros(8)])
            kept.append(receiver.receive(1, m)[0])
        distinct = {tensor.data_ptr() for tensor in kept}
        assert len(distinct) == 4
        ring = receiver._ring  # type: ignore[attr-defined]
        assert ring.lent == 2  # the plan's `alive`; the others are copies, so that slots stay free for the sender
        kept.clear()
        assert ring.lent == 0


@pytest.mark.parametrize(("step", "microbatch", "named"), [(2, 0, "micro-batch 0 of step 2"), (1, 1, "micro-batch 1")])
def test_another_message_than_comes_next_is_named_at_the_receiver(step: int, microbatch: int, named: str) -> None:
    with edge() as (sender, receiver):
        sender.send(step, microbatch, [torch.zeros(2, 3)])
        for _ in range(2):  # the message stays where it is
            with pytest.raises(MessageMismatch, match=f"got {named}.*needed micro-batch 0 of step 1"):
                receiver.receive(1, 0)


def test_what_cannot_cross_is_refused_before_anything_is_sent() -> None:
    with edge() as (sender, receiver):
        with pytest.raises(InputError, match="on meta; needed one on cpu"):
            sender.send(1, 0, [torch.zeros(2, 3, device="meta")])
        with pytest.raises(InputError, match="too many dimensions; got 9"):
            sender.send(1, 0, [torch.zeros(1), torch.zeros([1] * 9)])
        with pytest.raises(InputError, match="float8_e4m3fnuz cannot go between stages"):
            sender.send(1, 0, [torch.zeros(2, dtype=torch.float8_e4m3fnuz)])
        with pytest.raises(InputError, match="too many tensors; got 4097; needed at most 4096"):
            sender.send(1, 0, [torch.zeros(1)] * 4097)
        sender.send(1, 0, [torch.ones(2, 3)])
        assert receiver.receive(1, 0)[0].sum() == 6


NOT_DENSE = {
    "layout torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "layout torch.sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "layout torch._mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2)]),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("got", NOT_DENSE)
def test_what_is_not_dense_is_refused_on_its_way_over_host_memory_too(got: str) -> None:
    tensor = NOT_DENSE[got]()
    with edge() as (sender, receiver):
        if got in ("layout torch.sparse_coo", "layout torch._mkldnn"):  # a dense one of its shape and strides first
            sender.send(1, 0, [torch.zeros(9).as_strided((3, 3), tensor.stride())])
            assert not receiver.receive(1, 0)[0].any()
        for end in (sender, StagedSender(sender)):
            for message in ([tensor], [torch.ones(3), tensor]):
                with pytest.raises(InputError, match=f"got {got}; needed torch.strided"):
                    end.send(1, 0, message)
        StagedSender(sender).send(1, 0, [torch.ones(2, 3)])
        assert receiver.receive(1, 0)[0].sum() == 6


def test_ranks_with_different_edges_or_plans_are_told_both_values() -> None:
    def open_differently(world: HostWorld) -> HostLinks:
        return world.open([edge_spec(slots=3 + world.rank)], DIGEST)

    with joined(2) as worlds, pytest.raises(ConfigMismatch, match=r"4 slots.*3 slots"):
        each(worlds, open_differently)
    with joined(2) as worlds, pytest.raises(ConfigMismatch, match=r"plan 0101.*plan 0000"):
        each(worlds, lambda world: world.open([], bytes([world.rank] * 16)))
    with joined(2) as worlds, pytest.raises(ConfigMismatch, match="no such edge"):
        each(worlds, lambda world: world.open([edge_spec()] * (1 - world.rank), DIGEST))


def test_edges_of_every_kind_open_together() -> None:
    specs = [
        EdgeSpec(0, 1, "activation", 0, 1, 1, 1),
        EdgeSpec(1, 0, "gradient", 1, 0, 1, 1),
        EdgeSpec(0, 2, "tied", 0, 1, 1, 1),
    ]
    with joined(2) as worlds:
        first, second = each(worlds, lambda world: world.open(specs, DIGEST))
        assert set(first.senders) == {(0, 1, "activation"), (0, 2, "tied")}
        assert set(first.receivers) == {(1, 0, "gradient")}
        assert set(second.senders) == {(1, 0, "gradient")}
        assert set(second.receivers) == {(0, 1, "activation"), (0, 2, "tied")}
        for links in (first, second):
            for key, sender in links.senders.items():
                sent = torch.randn(4)
                sender.send(1, 0, [sent])
                receivers = first.receivers if key in first.receivers else second.receivers
                assert torch.equal(receivers[key].receive(1, 0)[0], sent)
        for links in (first, second):
            links.flush()
            links.close()
            links.close()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_exchange_gathers_payloads_of_any_length_in_rank_order(ranks: int) -> None:
    lengths = [0, 1, 65_536, 65_537, 200_001, 131_072, 0]
    with joined(ranks) as worlds:
        for turn in range(len(lengths)):
            payloads = [os.urandom(lengths[(turn + 2 * rank) % len(lengths)]) for rank in range(ranks)]
            assert each(worlds, lambda world, p=payloads: world.exchange(p[world.rank])) == [payloads] * ranks


def test_a_rank_can_be_joined_once_only_and_must_exist() -> None:
    run = HostRun.create(2)
    run.join(0)
    with pytest.raises(InputError, match="rank 0 of this run is taken"):
        run.join(0)
    with pytest.raises(InputError, match="got 2; needed 0 to 1"):
        run.join(2)
    with pytest.raises(InputError, match="a time-out is out of range"):
        run.join(1, timeout=0)


def held() -> tuple[int, int, int]:
    """Descriptors, those of shared memory among them, and threads of this process."""
    gc.collect()
    descriptors = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    return len(descriptors), sum("memfd:pipex" in name for name in descriptors), len(os.listdir("/proc/self/task"))


def test_a_flush_closes_the_descriptors_of_what_was_mapped_and_no_others() -> None:
    with joined(2) as worlds:
        links = each(worlds, lambda world: world.open([edge_spec(slots=4)], DIGEST))
        sender, receiver = links[0].senders[0, 1, "activation"], links[1].receivers[0, 1, "activation"]
        _, before, _ = held()
        for m in range(4):
            sender.send(1, m, [torch.full((3,), float(m))])
        kept = [receiver.receive(1, m) for m in range(3)]
        links[0].flush()
        assert held()[1] == before + 1
        kept.append(receiver.receive(1, 3))
        links[0].flush()
        assert held()[1] == before
        assert [tensor.tolist() for (tensor,) in kept] == [[m] * 3 for m in range(4)]


@pytest.mark.timing  # no other process may come or go
def test_a_run_leaves_no_descriptor_thread_or_name_behind() -> None:
    before, names = held(), os.listdir("/dev/shm")
    for _ in range(3):
        with edge() as (sender, receiver):
            for m in range(2):  # the second one finds that the memory of the first was mapped
                sender.send(1, m, [torch.zeros(2, 3)])
                receiver.receive(1, m)
            assert os.listdir("/dev/shm") == names
            _, shared, _ = held()
            assert shared == before[1] + 1  # the control page; the rings' descriptors are closed once all are open
        assert held() == before
        assert os.listdir("/dev/shm") == names
