"""Batches for Hugging Face models, and what plain torch loses on them: all padded, with labels that are ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LONGEST, POSITIONS = 96, 14, 64
PAD, IMAGE, START, STOP = 0, 95, 94, 93  # ids
IMAGE_SIZE, CLASSES = 16, 5

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What a batch is, and what is lost.

    Attributes:
        batch: (model, random numbers, rows) -> arguments of the model's forward.
        losses: (what forward returned, batch) -> sum of the losses, and their number.
    """

    batch: Callable[[nn.Module, torch.Generator, int], Batch]
    losses: Callable[[Any, Batch], tuple[Tensor, Tensor]]


# ---- batches ----


def text(generator: torch.Generator, rows: int, *, left: bool = False) -> Batch:
    """Ids with their mask, as long as the longest row; the others are padded, on the right or on the left."""
    lengths = torch.randint(4, LONGEST + 1, (rows,), generator=generator)
    lengths[0] = max(int(lengths.max()) - 1, 3)  # not all are of one length, and the padding differs by micro-batch
    longest = int(lengths.max())
    ids = torch.randint(3, STOP, (rows, longest), generator=generator)
    places = torch.arange(longest).expand(rows, -1)
    mask = (places >= longest - lengths[:, None] if left else places < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def prompts_ignored(batch: Batch, generator: torch.Generator) -> Tensor:
    """Labels: the ids, without padding and without a prompt that has another length in every row."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompts = torch.randint(0, 4, (ids.shape[0], 1), generator=generator)
    return ids.masked_fill((mask == 0) | (mask.cumsum(1) <= prompts), -100)


def causal_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    batch = text(generator, rows)
    return {**batch, "labels": prompts_ignored(batch, generator)}


def masked_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    batch = text(generator, rows)
    ids = batch["input_ids"]
    asked = torch.rand(ids.shape, generator=generator) < 0.4
    asked[:, 0] = True  # at least one in every row
    return {**batch, "labels": ids.masked_fill(~asked | (batch["attention_mask"] == 0), -100)}


def seq2seq_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    """The model makes the decoder's inputs out of the labels."""
    return {**text(generator, rows), "labels": causal_batch(model, generator, rows)["labels"]}


def image_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels[1] = -100
    return {"pixel_values": torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator), "labels": labels}


def audio_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    frames = 2 * model.config.max_source_positions
    labels = causal_batch(model, generator, rows)["labels"]
    return {"input_features": torch.randn(rows, model.config.num_mel_bins, frames, generator=generator),
            "labels": labels}  # fmt: skip


def vision_text_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    """Every row begins with the places of one image."""
    batch = text(generator, rows)
    vision = model.config.vision_config
    places = (vision.image_size // vision.patch_size) ** 2
    image = torch.full((rows, places), IMAGE)
    labels = prompts_ignored(batch, generator)
    return {
        "input_ids": torch.cat([image, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(image), batch["attention_mask"]], 1),
        "pixel_values": torch.randn(rows, 3, vision.image_size, vision.image_size, generator=generator),
        "labels": torch.cat([torch.full_like(image, -100), labels], 1),
    }


def qwen_vision_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    """Its images are rows of patches, all images after one another, with a table of their sizes."""
    batch = text(generator, rows)
    vision = model.config.vision_config
    side = 2 * vision.spatial_merge_size
    places = (side // vision.spatial_merge_size) ** 2
    image = torch.tensor([START, *[IMAGE] * places, STOP]).expand(rows, -1)
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    labels = prompts_ignored(batch, generator)
    ids = torch.cat([image, batch["input_ids"]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones_like(image), batch["attention_mask"]], 1),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(rows * side * side, size, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]]).repeat(rows, 1),
        "labels": torch.cat([torch.full_like(image, -100), labels], 1),
    }


def sequence_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels[1] = -100
    return {**text(generator, rows), "labels": labels}


def token_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    batch = text(generator, rows)
    labels = torch.randint(0, CLASSES, batch["input_ids"].shape, generator=generator)
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def answer_batch(model: nn.Module, generator: torch.Generator, rows: int) -> Batch:
    batch = text(generator, rows)
    start = torch.randint(0, 3, (rows,), generator=generator)
    return {**batch, "start_positions": start, "end_positions": start + 1}


# ---- losses, as plain torch has them ----


def entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float().reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(logits, labels.reshape(-1), ignore_index=-100, reduction="sum")
    return loss, (labels != -100).sum()


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


def causal_losses(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    return entropy(output.logits, shifted(batch["labels"]))


def plain_losses(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    return entropy(output.logits, batch["labels"])


def own_causal_losses(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """More than the tokens' cross-entropy is in it: as often as there are tokens."""
    count = (shifted(batch["labels"]) != -100).sum()
    return output.loss * count, count


def answer_losses(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    count = torch.tensor(len(batch["input_ids"]))
    return output.loss * count, count


CAUSAL = Kind(causal_batch, causal_losses)
CAUSAL_AND_MORE = Kind(causal_batch, own_causal_losses)
MASKED = Kind(masked_batch, plain_losses)
SEQ2SEQ = Kind(seq2seq_batch, plain_losses)
IMAGES = Kind(image_batch, plain_losses)
AUDIO = Kind(audio_batch, plain_losses)
SEQUENCES = Kind(sequence_batch, plain_losses)
TOKENS = Kind(token_batch, plain_losses)
ANSWERS = Kind(answer_batch, answer_losses)
VISION = Kind(vision_text_batch, causal_losses)
QWEN_VISION = Kind(qwen_vision_batch, causal_losses)
