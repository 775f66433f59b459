"""What docs/hugging-face.md shows is what runs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from torch import Tensor

import pipex
from pipex.bench import torch_group
from pipex.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hugging-face.md").read_text()


def shown() -> dict[str, Any]:
    """What the page's Python defines."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/hugging-face.md", "exec"), names)
    return names


def batch(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 256, (8, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask = (torch.arange(12) < torch.tensor([12, 5, 9, 12, 3, 4, 12, 11])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}


def both(padded: bool) -> tuple[float, float | None]:
    page = shown()
    with torch_group.joined(pipex.current_world()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracing warns about itself
        by_torch = page["step_with_torch"](small_llama.model(), batch(padded))
    return page["step_with_pipex"](small_llama.model(), batch(padded)), by_torch


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.long), True])
def test_both_ways_run_and_pipex_has_the_loss_of_transformers(padded: bool) -> None:
    expected = small_llama.model()(**batch(padded)).loss.item()
    (first, nothing), (last, by_torch) = pipex.launch(both, 2, args=[padded])
    assert first == last == pytest.approx(expected, rel=1e-6)
    assert nothing is None
    if padded:  # the page says so
        assert abs(by_torch - expected) > 1e-4 * expected
    else:
        assert by_torch == pytest.approx(expected, rel=1e-6)


def test_commands_and_files_on_the_page_exist() -> None:
    assert set(re.findall(r"^    pipex (\w+)", PAGE, re.MULTILINE)) == {"profile", "plan", "train"}
    assert {"profile", "plan", "train"} <= set(COMMANDS)
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / link).resolve().exists(), link
