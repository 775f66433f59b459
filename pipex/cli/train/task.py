"""What ``pipex train`` trains: pipex's own transformer on bytes, or a Hugging Face model on its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipex.cli import hugging_face
from pipex.cli.train.data import Text, load_bytes
from pipex.cli.train.options import Options
from pipex.models.transformer import ModelConfig, Transformer, next_token_loss
from pipex.partition import Stage, split_model
from pipex.plan import Plan


class Task(ABC):
    """A model, its loss and its batches, and the plan by which it is trained; the same on every rank.

    Attributes:
        loss_fn: as of ``pipex.Pipeline``.
        extra: tokens of a window beyond the context.
    """

    loss_fn: Any
    extra: int

    def __init__(self, options: Options, plan: Plan, text: Text) -> None:
        self.options, self.plan, self._text = options, plan, text
        self._windows(0)  # what is wrong with the text is said before anything begins

    @abstractmethod
    def stages(self, *, verify: bool = True) -> list[Stage]:
        """The model in stages; new weights are those that the seed gives.

        Args:
            verify: whether a model that is cut by its own forward is compared with itself unsplit.
        """

    @abstractmethod
    def batch(self, step: int) -> tuple[Any, ...]:
        """The arguments of ``Pipeline.step``, which makes step ``step + 1``."""

    def _windows(self, step: int) -> Tensor:
        options = self.options
        return self._text.windows(step, options.batch, options.context + self.extra, options.seed)


class OwnModel(Task):
    """``pipex.models.transformer`` on bytes: each target is the byte that comes next."""

    loss_fn = staticmethod(next_token_loss)
    extra = 1

    def stages(self, *, verify: bool = True) -> list[Stage]:
        options = self.options
        torch.manual_seed(options.seed)
        config = ModelConfig(width=options.width, heads=options.heads, layers=options.layers, context=options.context,
                             dropout=options.dropout, tied=options.tied)  # fmt: skip
        return split_model(Transformer(config), self.plan)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        windows = self._windows(step)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class HuggingFaceModel(Task):
    """The model of ``--hf`` on its tokens, with its own loss: the labels are the tokens, which it shifts by itself."""

    extra = 0

    def __init__(self, options: Options, plan: Plan, text: Text) -> None:
        super().__init__(options, plan, text)
        # Where weights change within a step each micro-batch needs its mean; they all have as many tokens here.
        self.loss_fn = loss_of_output if plan.asynchronous else "model"

    def stages(self, *, verify: bool = True) -> list[Stage]:
        assert self.options.hf is not None
        torch.manual_seed(self.options.seed)
        model = hugging_face.causal_model(self.options.hf)
        return split_model(model, self.plan, sample=self.sample(), verify=verify)

    def batch(self, step: int) -> tuple[Any, ...]:
        windows = self._windows(step)
        batch = {"input_ids": windows, "labels": windows}
        return (batch,) if self.loss_fn == "model" else (batch, windows)

    def sample(self) -> Mapping[str, Tensor]:
        """The first micro-batch."""
        size = -(-self.options.batch // self.options.microbatches)
        return {name: tensor[:size] for name, tensor in self.batch(0)[0].items()}


def loss_of_output(output: Any, _: Tensor) -> Tensor:
    """The mean loss of a micro-batch, as the model returns it."""
    loss: Tensor = output.loss
    return loss


def task_of(options: Options, plan: Plan) -> Task:
    """What the options say.

    Raises:
        InputError: a file cannot be read, or does not fit the model.
    """
    text = load_bytes(options.paths)
    if options.hf is None:
        return OwnModel(options, plan, Text(text))
    tokens = hugging_face.encoder(options.hf)(text.decode(errors="ignore"))  # the library's end may be within a letter
    hugging_face.check_tokens(options.hf, tokens, options.context)
    return HuggingFaceModel(options, plan, Text(tokens))
