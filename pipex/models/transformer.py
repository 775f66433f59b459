"""A decoder-only transformer: what ``pipex train`` trains and the benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipex.errors import InputError

INIT_STD = 0.02  # of all weights, as in GPT-2


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a ``Transformer``.

    Attributes:
        width: features per position; a multiple of ``heads``.
        layers: number of blocks.
        context: longest sequence, in tokens.
        vocabulary: number of different tokens; 256 for bytes.
        dropout: probability, after the embedding and before each residual addition.
        tied: the output head uses the token embedding's weight.

    Raises:
        InputError: a size is not positive, width is no multiple of heads, or dropout is not in [0, 1).
    """

    width: int
    heads: int
    layers: int
    context: int
    vocabulary: int = 256
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "context", "vocabulary"):
            if getattr(self, name) < 1:
                raise InputError(f"the model's {name} is too small", got=getattr(self, name), needed="at least 1")
        if self.width % self.heads:
            raise InputError(
                "the model's width cannot be divided among its heads",
                got=f"width {self.width}, {self.heads} heads",
                needed="a width that is a multiple of the heads",
                fix=f"try width {self.width - self.width % self.heads + self.heads}",
            )
        if not 0 <= self.dropout < 1:
            raise InputError("the model's dropout is no probability", got=self.dropout, needed="at least 0, below 1")


class Embedding(nn.Module):
    """Token embedding plus learned position embedding: int64 [B, T] -> [B, T, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """
        Raises:
            InputError: the sequence is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.position.num_embeddings:
            raise InputError("the sequence is too long", got=length, needed=f"at most {self.position.num_embeddings}")
        positions = torch.arange(length, device=tokens.device)
        embedded: Tensor = self.dropout(self.token(tokens) + self.position(positions))
        return embedded


class Attention(nn.Module):
    """Causal self-attention: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        # [B, T, 3 × width] -> three of [B, heads, T, width / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with GELU between them: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class Head(nn.Module):
    """Final norm and projection: [B, T, width] -> logits [B, T, vocabulary]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.projection(self.norm(x))
        return logits


class Transformer(nn.Module):
    """Decoder-only transformer: int64 tokens [B, T] -> logits [B, T, vocabulary].

    Its weights are drawn from torch's global generator, so ``torch.manual_seed`` before it decides them.
    """

    pipeline_layers = ("embed", "blocks", "head")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if config.tied:
            self.head.projection.weight = self.embed.token.weight
        self._initialise(config)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def _initialise(self, config: ModelConfig) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # Each block adds twice to the residual stream; scaled so, it does not grow with depth (GPT-2).
                adds = name.endswith(("attn.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=INIT_STD / (2 * config.layers) ** 0.5 if adds else INIT_STD)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats: logits [B, T, vocabulary], int64 targets [B, T] -> scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
