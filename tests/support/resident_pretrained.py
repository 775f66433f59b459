"""How a rank's memory grows when it loads and saves its stages of a pretrained model: ``python resident_pretrained.py``
prints it as JSON, for 4 ranks: at most, over its own stages', in all, by the load, and until after the save.

In a process of its own, as ``resident.py``.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import host_world
import torch
import transformers
from hf_zoo import Example
from resident import RANKS, peak, resident
from torch import Tensor

import pipex

FAMILY = "mixtral"
"""Its experts are converted on the way."""


def grown(directory: str) -> tuple[float, float, float]:
    sample = Example(FAMILY).batch(Example(FAMILY).model(), 0, rows=2)
    plan = pipex.build("1f1b", RANKS, 4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the parent before
    before = resident()
    model = pipex.empty_model(directory)
    stages = pipex.split_model(model, plan, sample=sample, verify=False)
    pipeline = pipex.Pipeline(stages, plan, loss, optimizer=torch.optim.SGD)
    del model, stages
    gc.collect()
    made = peak()
    Path("/proc/self/clear_refs").write_text("5")
    there = resident()
    pipeline.load_pretrained(directory)
    own = sum(p.nbytes for stage in pipeline.local_stages for p in stage.parameters())
    loaded = (peak() - there) / own
    pipeline.save_pretrained(f"{directory}/saved")
    return (max(made, peak()) - before) / own, loaded, (peak() - there) / own


def loss(output: Any, target: Tensor) -> Tensor:
    raise AssertionError("nothing runs here")


def main() -> None:
    torch.set_num_threads(1)  # before anything runs: ranks are forked
    transformers.utils.logging.disable_progress_bar()
    config: Any = Example(FAMILY).model().config
    config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers = 768, 64, 512, 16
    with tempfile.TemporaryDirectory() as directory:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="100MB")
        print(json.dumps(host_world.launch(grown, RANKS, args=(directory,))))


if __name__ == "__main__":
    main()
