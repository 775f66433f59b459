"""The loop of a fine-tuning: padded prompts, the mean over answered tokens, accumulation: `python fine_tuning.py`."""

import torch
from torch import Tensor, nn

import pipex
from pipex.runtime.update import Parameters

PAD, IGNORED, WORDS = 0, -100, 32


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 64), nn.Embedding(16, 64)

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        return (self.words(ids) + self.places(places)) * mask[..., None]


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Keyword arguments of the first stage, and labels: what comes after each word, of the answers only."""
    ids = (torch.randint(1, WORDS, (8, 1)) + 3 * torch.arange(12)) % (WORDS - 1) + 1
    prompt, length = torch.randint(1, 6, (8, 1)), torch.randint(7, 13, (8, 1))
    place = torch.arange(12)
    labels = torch.where((place >= prompt) & (place < length - 1), ids.roll(-1, 1), IGNORED)
    ids = torch.where(place < length, ids, PAD)
    return {"ids": ids, "mask": (ids != PAD).float(), "places": place[None]}, labels  # places are not cut: one row


def answered(output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses and their number: gradients are those of the mean over all calls before an update."""
    losses = nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return losses, (labels != IGNORED).sum()


def optimizer(parameters: Parameters) -> torch.optim.Optimizer:
    decayed = [p for name, p in parameters.named if name.endswith("weight")]
    others = [p for name, p in parameters.named if not name.endswith("weight")]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2)


def train() -> float:
    world = pipex.current_world()
    torch.manual_seed(0)  # every rank builds the same model and draws the same batches
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)]
    stages = pipex.split_model(nn.Sequential(Embed(), *blocks, nn.Linear(64, WORDS)), world.ranks)
    plan = pipex.build("zb-h1", world.ranks, microbatches=4)
    pipeline = pipex.Pipeline(stages, plan, answered, optimizer=optimizer, clip_norm=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(pipeline.optimizer, 1.0, 0.1, total_iters=60)
    for step in range(1, 61):
        for _ in range(2):
            loss = pipeline.forward_backward(*batch())
        made = pipeline.update(skip_nonfinite=True)
        schedule.step()
        if world.rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}, gradient norm {pipeline.gradient_norm:.3f}, updated: {made}")
    return loss


if __name__ == "__main__":
    pipex.launch(train, ranks=2)
