"""Configurations of which only the files are there."""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from pipex.hugging_face import read_configuration  # noqa: E402


def test_numbers_that_json_has_none_for_are_read(tmp_path: Path) -> None:
    written = transformers.Mamba2Config()
    written.save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert list(read_configuration(tmp_path).time_step_limit) == list(written.time_step_limit)
