"""Messages of torch.distributed by way of host memory: here of CPU tensors, staged as if they were a GPU's."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipex import launch
from pipex.bench import torch_group, torch_staging
from pipex.runtime.worlds import current_world


def talk() -> list[str]:
    """On each of two ranks: what came from the other one in all the ways that torch.distributed.pipelining has."""
    world = current_world()
    torch_staging._must_be_staged = lambda tensor: True
    own, other = torch.full((3,), float(world.rank + 1)), 1 - world.rank
    received = [torch.zeros(3, requires_grad=True) for _ in range(3)]  # as a stage's buffers
    objects: list[object] = [None]
    with torch_group.joined(world):
        with torch_staging.over_host_memory():
            sending = dist.isend(own.requires_grad_(), other)  # as a stage's output
            own.data.mul_(10)  # what is sent is the copy of before
            receiving = dist.irecv(received[0], other)
            waited_for = received[0].tolist()
            for work in (sending, receiving):
                assert work is not None
                work.wait()
            mixed = [dist.P2POp(dist.irecv, received[1], other), dist.P2POp(dist.isend, own.detach(), other)]
            for work in dist.batch_isend_irecv(mixed):
                work.wait()
            if world.rank == 0:
                dist.send(own.detach(), 1)
                dist.send_object_list(["a form"], 1, use_batch=True)
            else:
                dist.recv(received[2], 0)
                dist.recv_object_list(objects, 0, use_batch=True)
        staged = dist.ProcessGroup.send.__name__
    return [*map(str, (waited_for, *(tensor.tolist() for tensor in received), objects[0])), staged]


def test_all_messages_arrive_when_they_are_waited_for() -> None:
    zero, one = launch(talk, 2)
    assert one == ["[0.0, 0.0, 0.0]", "[1.0, 1.0, 1.0]", "[10.0, 10.0, 10.0]", "[10.0, 10.0, 10.0]", "a form", "send"]
    assert zero == ["[0.0, 0.0, 0.0]", "[2.0, 2.0, 2.0]", "[20.0, 20.0, 20.0]", "[0.0, 0.0, 0.0]", "None", "send"]
