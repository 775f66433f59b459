"""torch.distributed.pipelining with pipex's backward: `torchrun --nproc-per-node 2 drop_in.py`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

import pipex


def train() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every rank builds the same model
    modules = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2 * ranks)]
    mine = [rank, 2 * ranks - 1 - rank]  # a V: the first rank has the first stage and the last
    stages = [PipelineStage(modules[index], index, 2 * ranks, torch.device("cpu")) for index in mine]
    schedule = ScheduleZBVZeroBubble(stages, n_microbatches=4 * ranks, loss_fn=nn.functional.mse_loss)
    parameters = [p for index in mine for p in modules[index].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    pipex.drop_in()  # from here on the backward is pipex's

    x = torch.randn(16 * ranks, 64)
    arguments, target = ((x,), torch.tanh(x)) if rank == 0 else ((), None)
    for step in range(1, 101):
        losses: list[torch.Tensor] = []
        schedule.step(*arguments, target=target, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        if losses and step % 20 == 0:
            print(f"step {step}: loss {torch.stack(losses).mean():.4f}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()
