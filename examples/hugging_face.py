"""Fine-tunes a Hugging Face model: `python hugging_face.py [DIRECTORY]`, or with `torchrun --nproc-per-node 2`. Started
once more it goes on from its checkpoint."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, get_linear_schedule_with_warmup

import pipex


def rows(count: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """As a tokenized data set gives them: counting by threes, padded, without a loss where they are."""
    found = []
    for number in range(count):
        mask = torch.arange(length) < 9 + number % 8
        ids = (number + 3 * torch.arange(length)) % 30 + 1
        found.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.where(mask, -100)})
    return found


def train(directory: str, epochs: int = 6) -> float:
    world = pipex.current_world()
    torch.manual_seed(0)  # every rank builds the same model
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=4))
    train_set = DataLoader(rows(64), batch_size=8, shuffle=True, collate_fn=default_data_collator)
    held_out = default_data_collator(rows(80)[64:])
    plan = pipex.build("zb-h1", world.ranks, microbatches=4)
    stages = pipex.split_model(model, plan, sample=held_out)
    pipeline = pipex.Pipeline(stages, plan, "model", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), clip_norm=1.0)
    schedule = get_linear_schedule_with_warmup(pipeline.optimizer, 4, 4 * epochs)
    checkpoint = Path(directory, "checkpoint")
    if checkpoint.exists():
        pipeline.load(checkpoint, state={"schedule": schedule})
    for epoch in range(pipeline.steps // 4, epochs):
        torch.manual_seed(epoch)  # every rank draws the same order, after a resume too
        for number, batch in enumerate(train_set, 1):
            pipeline.forward_backward(batch)
            if number % 2 == 0:  # the gradients of two batches to an update
                pipeline.update()
                schedule.step()
        loss = pipeline.evaluate(held_out)
        if world.rank == 0:
            print(f"epoch {epoch}: loss {loss:.4f}, learning rate {schedule.get_last_lr()[0]:.4f}")
        pipeline.save(checkpoint, state={"schedule": schedule})
    pipeline.save_pretrained(Path(directory, "model"))  # for LlamaForCausalLM.from_pretrained
    return pipeline.evaluate(held_out)


if __name__ == "__main__":
    pipex.launch(train, ranks=2, args=sys.argv[1:] or ["fine-tuned"])
