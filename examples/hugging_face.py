"""Fine-tunes a Hugging Face model: `python hugging_face.py [DIRECTORY]`, or with `torchrun --nproc-per-node 2`. Started
once more it goes on from its checkpoint."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, get_linear_schedule_with_warmup

import pipex

# Rows of a tokenized data set: counting by threes, padded, without a loss where they are.
IDS = (torch.arange(80)[:, None] + 3 * torch.arange(16)) % 30 + 1
MASKS = (torch.arange(16) < 9 + torch.arange(80)[:, None] % 8).long()
DATA = [{"input_ids": i * m, "attention_mask": m, "labels": i.where(m > 0, -100)} for i, m in zip(IDS, MASKS)]


def train(directory: str, epochs: int = 12) -> float:
    world = pipex.current_world()
    torch.manual_seed(0)  # every rank builds the same model
    config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(config)  # or AutoModelForCausalLM.from_pretrained(...)
    train_set, held_out = DataLoader(DATA[:64], 8, shuffle=True, collate_fn=default_data_collator), DATA[64:]
    evaluated = default_data_collator(held_out)
    plan = pipex.build("zb-h1", world.ranks, microbatches=4)
    stages = pipex.split_model(model, plan, sample=evaluated)
    pipeline = pipex.Pipeline(stages, plan, "model", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), clip_norm=1.0)
    schedule = get_linear_schedule_with_warmup(pipeline.optimizer, 4, 4 * epochs)
    checkpoint = Path(directory, "checkpoint")
    if checkpoint.exists():
        pipeline.load(checkpoint, state={"schedule": schedule})
    for epoch in range(pipeline.steps // 4, epochs):
        torch.manual_seed(epoch)  # every rank draws the same batches, after a resume too
        for number, batch in enumerate(train_set, 1):
            pipeline.forward_backward(batch)
            if number % 2 == 0:  # gradients of two batches to an update
                pipeline.update()
                schedule.step()
        loss = pipeline.evaluate(evaluated)
        if world.rank == 0:
            print(f"epoch {epoch}: loss {loss:.4f}, learning rate {schedule.get_last_lr()[0]:.4f}")
        pipeline.save(checkpoint, state={"schedule": schedule})
    pipeline.save_pretrained(Path(directory, "model"))  # LlamaForCausalLM.from_pretrained reads it


if __name__ == "__main__":
    pipex.launch(train, ranks=2, args=sys.argv[1:] or ["fine-tuned"])
