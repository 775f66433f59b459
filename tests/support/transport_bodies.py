"""What two ranks do to find out whether tensors cross device memory as they should, on a GPU and on the simulator.

Each body runs on both ranks at once and asserts what must hold; its docstring says what would show if it did not.
"""

from __future__ import annotations

import random
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import Machine, machine_of
from small_pipeline import data, pipeline
from torch import Tensor

import pipex
from pipex.errors import InputError, MessageMismatch
from pipex.transport.device import DeviceReceiver, DeviceSender, DeviceWorld
from pipex.transport.header import DTYPES, as_sent
from pipex.transport.interface import EdgeKind, EdgeSpec, TensorForm

DIGEST = bytes(range(16))
SECONDS = 15.0  # that a stress may take
SCRIBBLE = 10**9
Ends = list[tuple[DeviceSender, DeviceReceiver]]


@contextmanager
def edges(
    world: DeviceWorld, count: int = 1, slots: int = 1, alive: int = 1, warm: int = 1 << 15,
    kind: EdgeKind = "activation",
) -> Iterator[Ends]:  # fmt: skip
    """So many edges to the other rank, of this kind, and from it, all open at once; nothing else is. Messages of up to
    ``warm`` bytes go from device to device: the first ones, through host memory, have gone already."""
    specs = []
    for i in range(count):
        specs.append(EdgeSpec(2 * i, 2 * i + 1, kind, 0, 1, slots, alive))
        specs.append(EdgeSpec(2 * i + 1, 2 * i, "gradient", 1, 0, slots, alive))
    links = world.open(specs, DIGEST)
    ends = list(zip(links.senders.values(), links.receivers.values(), strict=True))
    for message in range(2 if warm else 0):
        for sender, receiver in ends:
            sender.send(0, message, [torch.zeros(warm, dtype=torch.uint8, device=world.device)])
            receiver.receive(0, message)
    yield ends  # type: ignore[misc]
    links.flush()
    world.exchange(b"")  # all that was sent has arrived: what is on its way through host memory goes with its sender
    links.close()


def edges_lie_in_device_memory(world: DeviceWorld, gpu: Machine) -> None:
    """Else the driver lacks something: the assertion tells the reason that ``open`` gave."""
    with edges(world) as ((sender, receiver),):
        assert world.staged is None, world.staged
        sender.send(1, 0, [torch.full((2, 3), 2.0 + world.rank, device=world.device)])
        assert receiver.receive(1, 0)[0].sum().item() == 6 * (3 - world.rank)


def payloads_of_every_dtype_and_size_arrive(world: DeviceWorld, gpu: Machine) -> None:
    """Wrong bytes mean a wrong offset: of an IPC handle into an allocation that holds several, or of a slot."""
    sizes = [0, 1, 2, 127, 513, (1 << 20) - 1, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, gpu.scale.largest]
    forms = [(dense((3, 5, 2), dtype),) for dtype in DTYPES]
    forms += [(dense((size,), torch.uint8),) for size in sizes if size <= gpu.scale.largest]
    forms += [(dense((), torch.float32), dense((4, 0, 3), torch.int16), dense((7,), torch.float64))]
    wrong: list[tuple[str, Tensor]] = []
    with edges(world, len(forms), warm=0) as ends:
        for message in range(4):  # of two slots: each is used again
            for place, (form, (sender, receiver)) in enumerate(zip(forms, ends, strict=True)):
                numbers = [100 * place + 10 * tensor + 2 * message for tensor in range(len(form))]
                sender.send(1, message, [
                    payload(one, number + world.rank, world.device) for one, number in zip(form, numbers, strict=True)
                ])  # fmt: skip
                received = receiver.receive(1, message)
                for one, tensor, number in zip(form, received, numbers, strict=True):
                    assert (tensor.shape, tensor.dtype, tensor.device) == (one.shape, one.dtype, world.device)
                    expected = payload(one, number + 1 - world.rank, world.device)
                    wrong.append((f"{one}, message {message}", (as_bytes(tensor) != as_bytes(expected)).sum()))
                del received, tensor
    assert {what: int(count) for what, count in wrong if count} == {}


def dense(shape: tuple[int, ...], dtype: torch.dtype) -> TensorForm:
    return TensorForm(shape, dtype, torch.empty(shape, device="meta").stride())


def payload(form: TensorForm, number: int, device: torch.device) -> Tensor:
    """Bytes that tell the number and their place."""
    places = torch.arange(form.nbytes, dtype=torch.int32, device=device)
    values = (places * 31 + places // 251 + number * 17) % (2 if form.dtype is torch.bool else 251)
    return values.to(torch.uint8).view(form.dtype).reshape(form.shape)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def stress(world: DeviceWorld, gpu: Machine, streams: Sequence[Any]) -> str:
    """Messages both ways, as fast as they go. A rank sends, receives and looks at what it received on streams that
    change, all of them busy for random times; it keeps some tensors, and spoils each before it lets it go."""
    sizes = (4096, 1, 16, 1000)  # words
    chance = random.Random(world.rank)
    kept: list[tuple[Tensor, Any]] = []
    done = copied = 0
    begin = time.monotonic()

    def drop(stray: int) -> None:
        tensor, stream = kept.pop(stray)
        with gpu.on(stream):
            gpu.stamp(tensor, SCRIBBLE)

    # No activations: where these need no gradient torch copies them, at once on the simulated driver.
    with edges(world, slots=gpu.scale.window, alive=3, kind="gradient") as ((sender, receiver),):
        for message in range(gpu.scale.messages):
            if message % 1000 == 0:
                elapsed = world.exchange(str(time.monotonic() - begin).encode())
                if max(map(float, elapsed)) > SECONDS:
                    break
            words = sizes[message * 3 // 2 % len(sizes)]
            away, here, reader = (streams[message // turn % len(streams)] for turn in (1, 2, 3))
            with gpu.on(away):
                source = torch.empty(words, dtype=torch.int64, device=world.device)
                gpu.sleep(chance.uniform(0, 2e-5))
                gpu.stamp(source, 2 * message + world.rank)
                sender.send(1, message, [source])
                del source
            with gpu.on(here):
                lent = receiver._ring.lent
                (received,) = receiver.receive(1, message)
                if receiver._ring.lent == lent:
                    copied += 1
                    gpu.outlive(received)
                gpu.sleep(chance.uniform(0, 2e-5))
            if reader is not here:
                gpu.follow(reader, here)
            with gpu.on(reader):
                gpu.check(received, 2 * message + 1 - world.rank)
            if reader is not here:
                gpu.follow(here, reader)  # the slot goes back on the stream that it was received on
            kept.append((received, here))
            del received
            while len(kept) > chance.randint(0, 5):
                drop(chance.randrange(len(kept)))
            done += 1
        while kept:
            drop(0)
        wrong = gpu.mismatches()
    assert wrong == 0, f"{wrong} wrong words in {done} messages"
    assert 0 < copied < done, "messages were always lent, or never"
    assert done >= gpu.scale.messages // 20, "too few messages to say anything"
    return f"{done} messages, {copied} of them copied out"


def messages_on_the_default_stream_are_neither_stale_nor_torn(world: DeviceWorld, gpu: Machine) -> str:
    """Wrong words mean that a wait on the legacy stream does not hold what comes after it, or that data and flag, or
    release and reuse, changed places."""
    return stress(world, gpu, [None])


def messages_on_a_side_stream_are_neither_stale_nor_torn(world: DeviceWorld, gpu: Machine) -> str:
    """As before, with nothing that the legacy stream would order by itself."""
    return stress(world, gpu, [gpu.stream()])


def messages_are_right_while_streams_change(world: DeviceWorld, gpu: Machine) -> str:
    """Wrong words mean that a message waits, or is given back, on another stream than the one it was received on."""
    return stress(world, gpu, [gpu.stream(), gpu.stream(), gpu.stream()])


def tensors_that_autograd_saved_stay_right(world: DeviceWorld, gpu: Machine) -> None:
    """A wrong gradient means that a slot was filled again while a graph still held it."""

    def values(message: int, rank: int) -> Tensor:  # whole numbers: every sum is exact
        places = torch.arange(64 * 64, device=world.device)
        return ((places * 7 + 3 * message + rank) % 17).double().reshape(64, 64)

    weight = torch.ones(64, 64, dtype=torch.float64, device=world.device, requires_grad=True)
    losses, wrong = [], []
    with edges(world, slots=2, alive=2) as ((sender, receiver),):
        for message in range(60):
            sender.send(1, message, [values(message, world.rank)])
            (received,) = receiver.receive(1, message)
            if message % 5 == 0:  # more of them than may be lent
                losses.append((received @ weight).sum())
            del received
        assert receiver._ring.lent <= 2
        for message, loss in zip(range(0, 60, 5), losses, strict=True):
            (gradient,) = torch.autograd.grad(loss, weight)
            expected = values(message, 1 - world.rank).sum(0).unsqueeze(1).expand(64, 64)
            wrong.append((gradient != expected).sum())
        losses.clear()
        del loss
        assert receiver._ring.lent == 0
    assert [int(count) for count in wrong] == [0] * 12


def a_captured_stream_is_refused_and_the_edge_still_works(world: DeviceWorld, gpu: Machine) -> None:
    """Else a graph would hold the counters of one message for ever."""
    with edges(world) as ((sender, receiver),):
        source = torch.full((2, 3), 1.0 + world.rank, device=world.device)
        with gpu.capture():
            with pytest.raises(InputError, match="while a CUDA graph is being captured"):
                sender.send(1, 0, [source])
            with pytest.raises(InputError, match="while a CUDA graph is being captured"):
                receiver.receive(1, 0)
        sender.send(1, 0, [source])
        assert receiver.receive(1, 0)[0].sum().item() == 6 * (2 - world.rank)


def a_graph_can_be_captured_while_a_message_is_under_way(world: DeviceWorld, gpu: Machine) -> None:
    """Else the rescue thread's questions to the driver spoil the graph, and end the run."""
    stream = gpu.stream()
    with edges(world) as ((sender, receiver),):
        source = torch.full((2, 3), 1.0 + world.rank, device=world.device)
        gpu.synchronize()
        with gpu.on(stream):
            gpu.hold(2.0)
            sender.send(1, 0, [source])
        with gpu.capture():
            time.sleep(0.15)  # the thread looks every 20 ms
        assert not gpu.is_done(stream), "nothing was under way"
        assert receiver.receive(1, 0)[0].sum().item() == 6 * (2 - world.rank)
        world.exchange(b"")


def another_message_than_comes_next_is_named_at_the_receiver(world: DeviceWorld, gpu: Machine) -> None:
    """Else the receiver computes with a tensor that nobody meant for it."""
    ones = torch.ones(2, 3, device=world.device)
    with edges(world, 2) as ((sender, receiver), (wrong_sender, wrong_receiver)):
        for message in range(2):  # the first one goes through host memory
            sender.send(1, message, [ones])
            assert receiver.receive(1, message)[0].sum().item() == 6
        for end in (sender, wrong_sender):
            end.send(1, 5, [ones])
        for end in (receiver, wrong_receiver):
            with pytest.raises(MessageMismatch, match=re.escape("got micro-batch 5 of step 1")):
                end.receive(1, 6)
        assert receiver.receive(1, 5)[0].sum().item() == 6


def messages_may_be_of_any_size_and_strides(world: DeviceWorld, gpu: Machine) -> None:
    """Wrong numbers mean that a slot was left or grown while something was in it."""
    chance, kept, wrong = random.Random(7), [], []
    with edges(world, slots=2, alive=2, warm=0) as ((sender, receiver),):
        for message in range(100):
            rows, width = chance.choice((0, 1, 5, 40)), chance.choice((1, 8, 700))
            values = (torch.arange(rows * width, device=world.device) % 250 + message + world.rank).float()
            sent = [values.view(width, rows).t(), values.view(rows, width)[:, :1].expand(rows, 3)][: message % 3]
            sender.send(1, message, sent)
            received = receiver.receive(1, message)
            assert [(t.shape, t.stride()) for t in received] == [(t.shape, as_sent(t).stride()) for t in sent]
            assert all(t.device == world.device for t in received)
            kept.append([(r, s + (1 - 2 * world.rank)) for r, s in zip(received, sent, strict=True)])
            del received
            while len(kept) > chance.randint(0, 4):
                wrong += [(r != s).sum() for r, s in kept.pop(chance.randrange(len(kept)))]
        assert world.staged is None
        assert 0 < sender.buffers.grown < 10
    assert sum(int(count) for count in wrong) == 0


def edges_opened_and_closed_again_leave_no_memory(world: DeviceWorld, gpu: Machine) -> None:
    """Less and less free memory means that a mapping or an allocation outlives its edge."""
    free = []
    for message in range(20):
        with edges(world, 2, slots=2, warm=0) as ((sender, receiver), _):
            sender.send(1, message, [torch.full((1 << 20,), message, dtype=torch.uint8, device=world.device)])
            assert (receiver.receive(1, message)[0] == message).all()
            gpu.synchronize()
            world.exchange(b"")  # both have opened theirs
            free.append(gpu.free_memory())
            world.exchange(b"")  # and both have looked
    assert max(free[1:]) - min(free[1:]) <= 2 << 20, free


def tensors_go_over_host_memory_where_device_memory_cannot_be_shared(world: DeviceWorld, gpu: Machine) -> None:
    """Else a machine without CUDA IPC would get wrong numbers instead of slow ones."""
    missing, world._missing = world._missing, "that is what the test wants"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with edges(world) as ((sender, receiver),):
            assert world.staged is not None
            for message in range(5):
                sender.send(1, message, [torch.full((2, 3), 1.0 + world.rank, device=world.device)])
                (received,) = receiver.receive(1, message)
                assert (received.device, received.sum().item()) == (world.device, 6 * (2 - world.rank))
    world._missing = missing


def steps_of_a_pipeline_leave_no_memory(world: DeviceWorld, gpu: Machine) -> None:
    """More and more allocated memory means that sent tensors or slots are kept."""
    pipe = pipeline("zb-h1", world.ranks, exact=None)
    seen = []
    for step in range(gpu.scale.steps):
        pipe.step(*data(step % 4))
        seen.append(gpu.allocated())
    pipe.close()
    assert len(set(seen[20:])) == 1, seen


Body = Callable[[DeviceWorld, Machine], "str | None"]
"""Returns what is worth a note."""

BODIES: dict[str, Body] = {
    body.__name__: body
    for body in (
        edges_lie_in_device_memory,
        payloads_of_every_dtype_and_size_arrive,
        messages_on_the_default_stream_are_neither_stale_nor_torn,
        messages_on_a_side_stream_are_neither_stale_nor_torn,
        messages_are_right_while_streams_change,
        tensors_that_autograd_saved_stay_right,
        a_captured_stream_is_refused_and_the_edge_still_works,
        another_message_than_comes_next_is_named_at_the_receiver,
        messages_may_be_of_any_size_and_strides,
        edges_opened_and_closed_again_leave_no_memory,
        steps_of_a_pipeline_leave_no_memory,
        tensors_go_over_host_memory_where_device_memory_cannot_be_shared,
        a_graph_can_be_captured_while_a_message_is_under_way,
    )
}


def run_bodies(names: Sequence[str], notes: str, library: str | None) -> list[str]:
    """Runs some bodies one after the other, and notes in a file for each rank how many seconds each took and what it
    said, or how it failed. Returns how the driver was misused, which only the simulator sees."""
    world: Any = pipex.current_world()
    gpu = machine_of(world, library)
    for name in names:
        begin = time.monotonic()
        try:
            said = BODIES[name](world, gpu)
        except BaseException:
            Path(notes, f"{name}.{world.rank}.failed").write_text(traceback.format_exc())
            raise
        Path(notes, f"{name}.{world.rank}").write_text(f"{time.monotonic() - begin:.3f} s{f', {said}' if said else ''}")
        world.exchange(b"")
    return gpu.misuses()
