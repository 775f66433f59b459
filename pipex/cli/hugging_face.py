"""Causal language models of Hugging Face on the command line: read from a directory or a configuration, never
downloaded. The only place where the command imports transformers, which need not be installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import InputError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def causal_model(path: str) -> nn.Module:
    """The model in a directory that ``save_pretrained`` wrote, in training mode; of a ``config.json``, or a directory
    with nothing else, one with new weights, drawn from torch's generator.

    Raises:
        InputError: transformers is not installed, or makes no causal language model of it.
    """
    transformers = _transformers()
    config = _config(path)
    auto = transformers.AutoModelForCausalLM
    with _named(path):
        if Path(path).is_dir() and any(next(Path(path).glob(pattern), None) for pattern in _WEIGHTS):
            # Of safetensors only: the other format is a program that is run.
            model = auto.from_pretrained(path, config=config, local_files_only=True, use_safetensors=True)
        else:
            model = auto.from_config(config)
    trained: nn.Module = model.train()
    return trained


def encoder(path: str) -> Callable[[str], Tensor]:
    """What makes the model's tokens of a text, int32 [tokens]: its tokenizer where the directory has one, else the
    text's bytes in UTF-8.

    Raises:
        InputError: the tokenizer cannot be read.
    """
    if not _has_tokenizer(path):
        return lambda text: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).int()
    tokenizer = _tokenizer(path)
    # Not verbose: it is longer than what a model takes at once, and cut later.
    return lambda text: torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).int()


def vocabulary(path: str) -> int:
    """How many tokens the model knows."""
    known: int = _config(path).get_text_config().vocab_size
    return known


def check_tokens(path: str, tokens: Tensor, context: int) -> None:
    """Raises InputError if the model does not know one of the tokens, or so many at once."""
    config = _config(path).get_text_config()
    known, longest = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if int(tokens.max()) >= known:
        raise InputError(
            f"the model in {path} does not know all of the text's {'tokens' if _has_tokenizer(path) else 'bytes'}",
            got=f"number {int(tokens.max())}", needed=f"less than its vocab_size, {known}",
            fix="save its tokenizer beside it, or raise vocab_size",
        )  # fmt: skip
    if longest is not None and context > longest:
        raise InputError("--context is out of range", got=context,
                         needed=f"at most {longest}, the model's max_position_embeddings")  # fmt: skip


def copy_tokenizer(path: str, directory: str) -> None:
    """Saves the model's tokenizer, where it has one, beside a model that was trained with it."""
    if _has_tokenizer(path):
        _tokenizer(path).save_pretrained(directory)


def _has_tokenizer(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in _TOKENIZER)


def _tokenizer(path: str) -> Any:
    auto = _transformers().AutoTokenizer
    with _named(path):
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _config(path: str) -> Any:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(
            f"there is no model in {path}", got=f"no file {file}", needed="a directory with a config.json, or its path",
            fix="save the model there with save_pretrained; nothing is downloaded",
        )  # fmt: skip
    auto = _transformers().AutoConfig
    with _named(path):
        return auto.from_pretrained(file, local_files_only=True, trust_remote_code=False)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """What transformers does not like about the files, in one line. Its errors have no common base, and are as many as
    its models."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())  # the first line alone may be without what is wrong
        raise InputError(f"transformers makes no causal language model of {path}",
                         got=f"{type(error).__name__}: {said[:300]}") from error  # fmt: skip


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise InputError(
            "Hugging Face models need transformers", got="no module of that name", needed="transformers 5 or newer",
            fix="pip install '.[hf]', or pip install transformers",
        ) from None  # fmt: skip
    transformers.utils.logging.disable_progress_bar()  # of a millisecond each, on every rank
    return transformers
