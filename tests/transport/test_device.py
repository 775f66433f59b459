"""Tensors through device memory, on the simulated driver; ranks are threads here, or processes where they differ."""

from __future__ import annotations

import gc
import math
import os
import random
import re
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import device_world
import pytest
import simulated_cuda as sim
import torch
from simulated_cuda import Simulator
from threads_as_ranks import each
from torch import Tensor

from pipex.errors import InputError, MessageMismatch, NativeUnavailable
from pipex.transport import device
from pipex.transport.device import DeviceReceiver, DeviceSender, DeviceWorld
from pipex.transport.header import DTYPES, as_sent
from pipex.transport.host import HostRun
from pipex.transport.interface import EdgeSpec

DIGEST = bytes(range(16))
CPU = torch.device("cpu")


def spec_of(slots: int = 2, alive: int = 2) -> EdgeSpec:
    return EdgeSpec(0, 1, "activation", 0, 1, slots, alive)


class Gpus:
    """Two ranks in this process, on one simulated GPU."""

    def __init__(self, library: Path) -> None:
        self.simulator = Simulator(library)
        run = HostRun.create(2)
        self.worlds = [device.join(run, rank, CPU, timeout=20, library=str(library)) for rank in range(2)]
        run.close()

    @contextmanager
    def edge(self, *first: Tensor, slots: int = 2, alive: int = 2) -> Iterator[tuple[DeviceSender, DeviceReceiver]]:
        """Through ``first``, a message in step 0, the edge has grown: no larger one goes through host memory."""
        spec = spec_of(slots, alive)
        links = each(self.worlds, lambda world: world.open([spec], DIGEST))
        sender, receiver = links[0].senders[0, 1, "activation"], links[1].receivers[0, 1, "activation"]
        assert isinstance(sender, DeviceSender)
        assert isinstance(receiver, DeviceReceiver)
        if first:
            sender.send(0, 0, first)
            receiver.receive(0, 0)
            assert sender._ring.fits(sender._forms.of(first)[0], 0)
        yield sender, receiver

    def close(self) -> None:
        if self.worlds:
            each(self.worlds, DeviceWorld.close)


@pytest.fixture
def gpus(simulated_cuda: Path, tmp_path: Path) -> Iterator[Gpus]:
    gpus = Gpus(sim.fresh_copy(simulated_cuda, tmp_path))
    yield gpus
    gpus.close()
    gc.collect()
    try:
        assert gpus.simulator.mappings == 0
        assert gpus.simulator.violations == []
    finally:
        gpus.simulator.stop()


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(gpus: Gpus, dtype: torch.dtype) -> None:
    """Through host memory, through device memory, and copied out of it since another one is kept."""
    sent = []
    for shape in [(), (7,), (3, 5, 2), (0,), (4, 0, 3), (1, 1, 1, 1, 1, 1, 1, 3)]:
        elements = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (elements,), dtype=torch.uint8)
        sent.append(raw.view(dtype).reshape(shape))
    with gpus.edge(alive=1) as (sender, receiver):
        kept = []
        for m in range(3):
            sender.send(1, m, sent)
            kept.append(receiver.receive(1, m))
            for tensor, received in zip(sent, kept[-1], strict=True):
                assert received.dtype is dtype
                assert received.shape == tensor.shape
                assert received.stride() == tensor.stride()
                assert bits(received) == bits(tensor)
            del kept[: m % 2], tensor, received  # so that the second one is one too many, and the third is not
        assert receiver._ring.lent == 1


def test_strides_arrive_and_what_is_lazily_negated_arrives_as_torch_sees_it(gpus: Gpus) -> None:
    base, image = torch.randn(6, 8, dtype=torch.complex64), torch.randn(2, 3, 4, 4)
    sources = [
        base.t(), base[::2, 1::3], base.conj(), base.conj().imag, base[:1, :1].conj().imag, base[:1].expand(5, 8),
        image.to(memory_format=torch.channels_last), image.permute(3, 1, 0, 2), torch.ones(()).expand(3, 4),
    ]  # fmt: skip
    with gpus.edge(alive=1) as (sender, receiver):
        kept = []
        for m in range(3):
            sender.send(1, m, sources)
            kept.append(receiver.receive(1, m))
            for sent, received in zip(sources, kept[-1], strict=True):
                assert torch.equal(sent, received)
                assert received.stride() == as_sent(sent).stride()
            del kept[: m % 2], sent, received


def test_whether_a_gradient_is_wanted_arrives(gpus: Gpus) -> None:
    wanted = [
        torch.ones(3, requires_grad=True),
        torch.ones(3),
        torch.ones(2, dtype=torch.complex64, requires_grad=True),
    ]
    with gpus.edge(alive=1) as (sender, receiver):
        kept = []
        for m in range(3):
            sender.send(1, m, wanted)
            kept.append(receiver.receive(1, m))
            assert [t.requires_grad for t in kept[-1]] == [True, False, True]
            assert all(t.is_leaf for t in kept[-1])
            del kept[: m % 2]


def test_messages_of_any_number_of_tensors_of_any_size_arrive_while_others_are_kept(gpus: Gpus) -> None:
    """Ever larger ones and smaller ones between them; nothing kept changes when the edge grows."""
    chance = random.Random(0)
    gpus.simulator.set("poison", 1)
    messages = [
        [torch.randn(chance.randint(0, 40 * m), dtype=torch.float64) for _ in range(chance.randint(0, 4))]
        for m in range(60)
    ]
    with gpus.edge(alive=2) as (sender, receiver):
        kept = []
        for m, message in enumerate(messages):
            sender.send(1, m, message)
            kept.append((receiver.receive(1, m), message))
            if m % 3 == 0:
                del kept[chance.randrange(len(kept))]
        for received, message in kept:
            assert len(received) == len(message)
            assert all(map(torch.equal, received, message))
        assert len(kept) == 40
        assert 2 < sender.buffers.grown < 12
        largest = max(sum(-(-t.nbytes // 64) * 64 for t in message) for message in messages)
        assert sender.buffers.nbytes > 4 * largest
        del received, message
        kept.clear()


@pytest.mark.parametrize("elements", [1, 1023, 1_000_003])
def test_messages_arrive_in_order_and_whole_while_slots_are_reused(gpus: Gpus, elements: int) -> None:
    gpus.simulator.set("delay", 300)
    gpus.simulator.set("poison", 1)
    with gpus.edge(slots=1, alive=1) as (sender, receiver), ThreadPoolExecutor(1) as other:
        messages = [(torch.arange(elements) + 1000 * m, torch.full((3,), m, dtype=torch.int32)) for m in range(12)]
        sending = other.submit(lambda: [sender.send(1, m, message) for m, message in enumerate(messages)])
        for m, message in enumerate(messages):
            received = receiver.receive(1, m)
            assert all(map(torch.equal, received, message))
        sending.result()


@pytest.mark.parametrize("grown", [True, False])
def test_a_full_plan_of_slots_never_waits(gpus: Gpus, grown: bool) -> None:
    with gpus.edge(*[torch.zeros(1000)] * grown, slots=5, alive=1) as (sender, receiver):
        sent = [torch.randn(1000) for _ in range(5)]
        for m, tensor in enumerate(sent):
            sender.send(1, m, [tensor])  # nobody receives: a wait would end in a time-out
        for m, tensor in enumerate(sent):
            assert torch.equal(receiver.receive(1, m)[0], tensor)


def test_a_source_is_kept_until_it_has_been_copied(gpus: Gpus) -> None:
    with gpus.edge(torch.zeros(1 << 16)) as (sender, receiver):
        gpus.simulator.set("delay", 200_000)  # µs, at most, before each eighth of a copy
        dying = []
        for m in range(2):
            tensor = torch.full((1 << 16,), float(m), requires_grad=True)
            dying.append(weakref.ref(tensor))
            sender.send(1, m, [tensor])
            del tensor
        assert dying[1]() is not None
        gpus.worlds[0].flush()
        gpus.simulator.set("delay", 0)
        assert [reference() for reference in dying] == [None, None]
        for m in range(2):
            assert torch.equal(receiver.receive(1, m)[0], torch.full((1 << 16,), float(m)))


def test_what_requires_no_grad_may_be_written_to_at_once(gpus: Gpus) -> None:
    with gpus.edge(torch.zeros(1 << 16)) as (sender, receiver):
        gpus.simulator.set("delay", 100_000)
        tensor = torch.ones(1 << 16)
        sender.send(1, 0, [tensor])
        tensor.fill_(2)
        gpus.worlds[0].flush()
        gpus.simulator.set("delay", 0)
        assert torch.equal(receiver.receive(1, 0)[0], torch.ones(1 << 16))


def test_what_was_copied_is_let_go_at_later_sends(gpus: Gpus) -> None:
    with gpus.edge(torch.zeros(2, 3), slots=8) as (sender, receiver):
        first = torch.zeros(2, 3, requires_grad=True)
        dying = weakref.ref(first)
        sender.send(1, 0, [first])
        del first
        receiver.receive(1, 0)
        deadline = time.monotonic() + 20
        for m in range(1, 1000):
            sender.send(1, m, [torch.zeros(2, 3, requires_grad=True)])
            receiver.receive(1, m)
            if dying() is None:
                break
        assert dying() is None
        assert time.monotonic() < deadline


@pytest.mark.parametrize("alive", [1, 3])
def test_a_tensor_saved_by_autograd_is_not_overwritten_when_slots_are_reused(gpus: Gpus, alive: int) -> None:
    weight = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    sent = [torch.randn(64, 64, dtype=torch.float64) for _ in range(40)]
    gpus.simulator.set("poison", 1)
    with gpus.edge(sent[0], slots=2, alive=alive) as (sender, receiver):
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
        assert receiver._ring.lent <= alive
        losses.clear()
        del loss
        assert receiver._ring.lent == 0


@pytest.mark.parametrize("grown", [True, False])
def test_received_tensors_outlive_the_world(gpus: Gpus, grown: bool) -> None:
    with gpus.edge(*[torch.arange(1000)] * grown) as (sender, receiver):
        sender.send(1, 0, [torch.arange(1000)])
        view = receiver.receive(1, 0)[0][10:20].view(5, 2)
    del sender, receiver
    gpus.close()
    gpus.worlds.clear()
    gc.collect()
    assert view.flatten().tolist() == list(range(10, 20))


@pytest.mark.parametrize("grown", [True, False])
@pytest.mark.parametrize(("step", "microbatch"), [(2, 0), (1, 1)])
def test_another_message_than_comes_next_is_named_at_the_receiver(
    gpus: Gpus, step: int, microbatch: int, grown: bool
) -> None:
    with gpus.edge(*[torch.zeros(2, 3)] * grown) as (sender, receiver):
        sender.send(step, microbatch, [torch.zeros(2, 3)])
        for _ in range(2):
            with pytest.raises(MessageMismatch, match=f"got micro-batch {microbatch} of step {step}, ") as caught:
                receiver.receive(1, 0)
            assert "needed micro-batch 0 of step 1, activation 0→1, " in str(caught.value)


def test_tensors_that_cannot_cross_are_refused_before_anything_is_sent(gpus: Gpus) -> None:
    with gpus.edge() as (sender, receiver):
        with pytest.raises(InputError, match="is in memory of cpu; got a tensor on meta; needed one on cpu"):
            sender.send(1, 0, [torch.zeros(2, 3, device="meta")])
        with pytest.raises(InputError, match="too many dimensions; got 9"):
            sender.send(1, 0, [torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1)])
        sender.send(1, 0, [torch.ones(2, 3)])
        assert receiver.receive(1, 0)[0].sum() == 6


def test_ranks_with_different_edges_are_told_both_values(simulated_cuda: Path) -> None:
    def open_differently(world: DeviceWorld) -> None:
        world.open([spec_of(slots=3 + world.rank)], DIGEST)

    with device_world.start([open_differently] * 2, simulated_cuda) as forked:
        outcomes = [forked.outcome(rank) for rank in range(2)]
    assert "ConfigMismatch" in {outcome["error"] for outcome in outcomes}
    for outcome in outcomes:
        assert {"3 slots", "4 slots"} <= set(re.findall(r"\d slots", outcome["text"])), outcome


def test_edges_are_opened_anew_and_the_old_memory_is_freed(gpus: Gpus) -> None:
    for elements in (1, 1000, 100_000):
        links = each(gpus.worlds, lambda world: world.open([spec_of()], DIGEST))
        assert gpus.simulator.mappings == 4  # two allocations, mapped by each other's rank
        for m in range(2):
            links[0].senders[0, 1, "activation"].send(1, m, [torch.arange(elements)])
            assert torch.equal(links[1].receivers[0, 1, "activation"].receive(1, m)[0], torch.arange(elements))
        assert gpus.simulator.mappings == 6  # and the payloads
        for link in links:
            link.close()
            link.close()
        assert gpus.simulator.mappings == 3  # the peer's are unmapped; the own ones wait until all have done so


def test_edges_of_every_kind_open_together(gpus: Gpus) -> None:
    specs = [
        EdgeSpec(0, 1, "activation", 0, 1, 1, 1), EdgeSpec(1, 0, "gradient", 1, 0, 1, 1),
        EdgeSpec(0, 2, "tied", 0, 1, 1, 1),
    ]  # fmt: skip
    first, second = each(gpus.worlds, lambda world: world.open(specs, DIGEST))
    assert set(first.senders) == {(0, 1, "activation"), (0, 2, "tied")}
    assert set(second.senders) == {(1, 0, "gradient")}
    for links in (first, second):
        for key, sender in links.senders.items():
            sent = torch.randn(4)
            sender.send(1, 0, [sent])
            receivers = first.receivers if key in first.receivers else second.receivers
            assert torch.equal(receivers[key].receive(1, 0)[0], sent)


def test_a_flush_closes_the_descriptors_of_what_was_mapped(gpus: Gpus) -> None:
    def shared() -> int:
        names = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
        return sum("memfd:pipex" in name for name in names)

    links = each(gpus.worlds, lambda world: world.open([spec_of()], DIGEST))
    before = shared()
    for m in range(2):
        links[0].senders[0, 1, "activation"].send(1, m, [torch.ones(3)])
    assert shared() == before + 2
    for m in range(2):
        links[1].receivers[0, 1, "activation"].receive(1, m)
    links[0].flush()
    assert shared() == before
    each(links, lambda each: each.close())


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(NativeUnavailable, match="the CUDA driver cannot be loaded"):
        device.join(HostRun.create(1), 0, CPU, library="no such library")


@pytest.mark.timing  # no other process may come or go
def test_a_run_leaves_no_descriptor_thread_or_name_behind(simulated_cuda: Path, tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before, names = held(), os.listdir("/dev/shm")
    for _ in range(3):
        gpus = Gpus(sim.fresh_copy(simulated_cuda, tmp_path))
        with gpus.edge(torch.zeros(2, 3)) as (sender, receiver):
            for m in range(50):
                sender.send(1, m, [torch.zeros(2 + 7 * m % 50, 3)])
                receiver.receive(1, m)
        gpus.close()
        gpus.simulator.stop()
        del gpus, sender, receiver
        assert held() == before
        assert os.listdir("/dev/shm") == names


def talk(world: DeviceWorld) -> list[float]:
    """Sends there and back; what both ranks got."""
    specs = [EdgeSpec(0, 1, "activation", 0, 1, 1, 1), EdgeSpec(1, 0, "gradient", 1, 0, 1, 1)]
    links = world.open(specs, DIGEST)
    (sender,), (receiver,) = links.senders.values(), links.receivers.values()
    sums = []
    for m in range(5):
        sender.send(1, m, [torch.full((2, 3), float(m + world.rank))])
        sums.append(receiver.receive(1, m)[0].sum().item())
    links.flush()
    return sums


LACKS = {
    "no 64-bit stream memory operations": "attribute:122=0",
    "shares no address space with the host": "attribute:41=0",
    "a stream that waits is not freed by another one": "queues=1,shared=1",
    r"GPU 0 exports no memory to other processes; got cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED": (
        "fail:cuIpcGetMemHandle=801"
    ),
    "cannot map the device memory of rank": "fail:cuIpcOpenMemHandle_v2=205",
}


@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("why", LACKS)
def test_what_one_rank_lacks_makes_all_go_over_host_memory(simulated_cuda: Path, why: str, lacking: int) -> None:
    settings = [LACKS[why] if rank == lacking else "" for rank in range(2)]
    with device_world.start([talk] * 2, simulated_cuda, settings) as forked:
        outcomes = [forked.outcome(rank) for rank in range(2)]
    seen: list[dict[str, Any]] = [outcome.get("result", outcome) for outcome in outcomes]
    assert [rank["result"] for rank in seen] == [[6.0 * (m + 1 - rank) for m in range(5)] for rank in range(2)], seen
    assert seen[0]["staged"] == seen[1]["staged"]
    assert why.partition("; got")[0] in seen[0]["staged"]
    assert f"rank {lacking}" in seen[0]["staged"]
    assert seen[0]["warnings"] == [f"tensors between ranks go over host memory, which is slower: {seen[0]['staged']}"]
    assert seen[1]["warnings"] == []  # one is enough
    assert [rank["mappings"] for rank in seen] == [0, 0]


def test_one_hardware_queue_by_the_environment_is_warned_of_once(
    simulated_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with device_world.start([talk] * 2, simulated_cuda) as forked:
        warned = [forked.outcome(rank)["result"]["warnings"] for rank in range(2)]
    assert len(warned[0]) == 1
    assert "CUDA_DEVICE_MAX_CONNECTIONS is 1" in warned[0][0]
    assert warned[1] == []


def test_too_little_device_memory_for_larger_messages_leaves_them_in_the_hosts(simulated_cuda: Path) -> None:
    with device_world.start([talk] * 2, simulated_cuda, ["", "fail:cuMemAlloc_v2=2@3"]) as forked:
        outcomes = [forked.outcome(rank) for rank in range(2)]
    seen: list[dict[str, Any]] = [outcome.get("result", outcome) for outcome in outcomes]
    assert [rank["result"] for rank in seen] == [[6.0 * (m + 1 - rank) for m in range(5)] for rank in range(2)], seen
    assert [rank["staged"] for rank in seen] == [None, None]
    assert seen[0]["warnings"] == []
    (warning,) = seen[1]["warnings"]  # not at every message
    assert warning.startswith(f"messages of this size go over host memory on the {spec_of(1, 1)}, which is slower: ")
    assert "OutOfDeviceMemory" not in warning
    assert "needed 2097152 bytes" in warning


def test_what_found_no_memory_in_the_receiver_goes_on_through_the_host_and_larger_ones_may_again(gpus: Gpus) -> None:
    gpus.simulator.set("poison", 1)
    with gpus.edge(torch.zeros(10)) as (sender, receiver):
        nbytes = sender.buffers.nbytes
        gpus.simulator.set("fail:cuMemAlloc_v2", sim.OUT_OF_MEMORY)
        kept = []
        for m, elements in enumerate([1000, 10, 1000, 999]):
            sent = torch.randn(elements)
            sender.send(1, m, [sent])
            if m == 0:
                with pytest.warns(RuntimeWarning, match=r"needed \d+ bytes"):
                    kept.append((receiver.receive(1, m)[0], sent))
            else:
                kept.append((receiver.receive(1, m)[0], sent))
            del kept[:-1]
            assert torch.equal(*kept[0])
        assert sender.buffers.grown == 0
        assert sender.buffers.nbytes > nbytes  # of the host's slots
        gpus.simulator.set("fail:cuMemAlloc_v2", "2@1000")
        for m, elements in enumerate([1000, 1001, 1001], 4):
            fits = sender._ring.fits(sender._forms.of([torch.zeros(elements)])[0], 0)
            assert fits == (m == 6)
            sender.send(1, m, [torch.full((elements,), float(m))])
            assert torch.equal(receiver.receive(1, m)[0], torch.full((elements,), float(m)))
        assert sender.buffers.grown == 1
        kept.clear()


def test_what_torch_keeps_for_later_is_taken_before_growth_is_given_up(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors here: none is given."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpus.simulator.set("fail:cuMemAlloc_v2", "2@1000"))
    with gpus.edge() as (sender, receiver):
        gpus.simulator.set("fail:cuMemAlloc_v2", sim.OUT_OF_MEMORY)
        for m in range(2):
            sent = torch.randn(100)
            sender.send(1, m, [sent])
            assert torch.equal(receiver.receive(1, m)[0], sent)
            assert sender._ring.fits(sender._forms.of([sent])[0], 0)


def test_too_little_device_memory_to_open_an_edge_is_a_named_error_on_every_rank(simulated_cuda: Path) -> None:
    with device_world.start([talk] * 2, simulated_cuda, ["", "fail:cuMemAlloc_v2=2@1"]) as forked:
        other, owner = (forked.outcome(rank) for rank in range(2))
    assert owner["error"] == "OutOfDeviceMemory"
    assert "needed" in owner["text"]
    assert (other["error"], other["rank"]) == ("PeerFailed", 1)
    assert "OutOfDeviceMemory" in other["text"]
