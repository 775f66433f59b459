"""A model of your own in a pipeline: `python own_model.py`, or `torchrun --nproc-per-node 2 own_model.py`."""

import torch
from torch import nn

import pipex


class Model(nn.Module):
    pipeline_layers = ("inlet", "blocks", "outlet")  # its layers, in the order in which forward applies them

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, 64)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
        self.outlet = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outlet(self.blocks(self.inlet(x)))


def train() -> float:
    world = pipex.current_world()
    torch.manual_seed(0)  # every rank builds the same model and draws the same batches
    stages = pipex.split_model(Model(), world.ranks)
    plan = pipex.build("zb-h1", world.ranks, microbatches=8)
    pipeline = pipex.Pipeline(stages, plan, nn.functional.mse_loss, optimizer=torch.optim.AdamW, clip_norm=1.0)
    for step in range(1, 101):
        x = torch.randn(64, 8)
        loss = pipeline.step(x, x[:, :1] * x[:, 1:2])
        if world.rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}")
    return loss


if __name__ == "__main__":
    pipex.launch(train, ranks=2)
