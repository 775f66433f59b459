"""``pipex train --hf`` as a person runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
import torch.nn.functional as F
from commands import TORCHRUN, last_line, pipex
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from pipex.cli import hugging_face
from pipex.cli.train.data import Text, load_bytes
from pipex.errors import InputError
from pipex.state import Checkpoint

Run = Callable[..., tuple[str, str]]

BATCH = ["--context", "16", "--batch", "8", "--microbatches", "4", "--ranks", "2"]
WORDS = ["to", "be", "or", "not", "that", "is", "the", "question"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a text and configurations."""
    small_llama.config().save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain_training(model: LlamaForCausalLM, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """transformers and torch alone: sums over the tokens of four micro-batches, divided by the number of all tokens."""
    text = Text(load_bytes(["text.txt"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for step in range(steps):
        tokens = text.windows(step, 8, 16, seed=0)
        loss = torch.zeros(())
        for piece in tokens.chunk(4):
            following = F.pad(piece, (0, 1), value=-100)[:, 1:].flatten()
            logits = model(input_ids=piece, use_cache=False).logits
            part = F.cross_entropy(logits.flatten(0, 1), following, reduction="sum")
            part.backward()
            loss += part.detach()
        for parameter in model.parameters():
            parameter.grad /= tokens[:, 1:].numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss / tokens[:, 1:].numel()).item())
    return losses, model.state_dict()


def test_new_weights_are_trained_as_transformers_would_and_written_for_it(here: Run, files: Path) -> None:
    common = ["train", "text.txt", "--hf", "llama/config.json", *BATCH, "--steps", "4", "--check", "--json"]
    stdout, _ = here(*common, "--save-pretrained", "trained", "--trace", "trace.json")
    result = last_line(stdout)
    assert (result["identical"], result["schedule"], result["steps"]) == (True, "zb-h1", 4)
    losses, expected = plain_training(small_llama.model(), 4)
    assert [result["loss_first"], result["loss_last"]] == [losses[0], losses[-1]]
    found = LlamaForCausalLM.from_pretrained("trained").state_dict()
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    names = {row.get("name") for row in json.loads(Path("trace.json").read_text())["traceEvents"]}
    assert {"PP:0F0", "PP:1I3"} <= names


def test_training_goes_on_from_a_checkpoint_and_from_pretrained_files(here: Run, files: Path) -> None:
    common = ["train", "text.txt", "--hf", "llama", *BATCH, "--check", "--json"]
    here(*common, "--steps", "5", "--save", "whole", "--save-pretrained", "whole-model")
    here(*common, "--steps", "2", "--save", "part")
    stdout, _ = here(*common, "--schedule", "zbv", "--steps", "5", "--resume", "part", "--save", "part")
    assert last_line(stdout)["identical"] is True
    whole, part = (Checkpoint.open(files / name) for name in ("whole", "part"))
    found = part.load(whole.tensors)
    for name, tensor in whole.load(whole.tensors).items():
        assert tensor.equal(found[name]), name
    stdout, _ = here("train", "text.txt", "--hf", "whole-model", *BATCH, "--steps", "1", "--json")
    fresh = last_line(here(*common, "--steps", "1")[0])["loss_first"]
    assert last_line(stdout)["loss_first"] < fresh - 0.1, "the weights are not those of the files"


@pytest.mark.parametrize(
    ("schedule", "dropout", "tied"),
    [
        (
            "interleaved",
            {"embd_pdrop": 0.5},
            True,
        ),  # the model's own forward drops, between the embedding and the layers
        pytest.param(
            "dualpipe", {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}, True, marks=pytest.mark.long
        ),
        pytest.param("1f1b", {"embd_pdrop": 0.1}, False, marks=pytest.mark.long),
        ("pipedream", {}, False),  # each micro-batch's own mean
    ],
)
def test_dropout_ties_and_other_orders_have_the_bits_of_one_process(
    here: Run,
    files: Path,
    schedule: str,
    dropout: dict[str, float],
    tied: bool,
) -> None:
    drops = {name: 0.2 if name in dropout else 0.0 for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")}
    sizes: dict[str, Any] = {"vocab_size": 256, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16}
    GPT2Config(**sizes, **drops, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0).save_pretrained("gpt2")
    stdout, _ = here("train", "text.txt", "--hf", "gpt2", *BATCH, "--schedule", schedule, "--steps", "2", "--check",
                     "--json")  # fmt: skip
    assert last_line(stdout)["identical"] is True


def test_a_tokenizer_in_the_directory_makes_the_tokens_and_is_saved_with_the_model(here: Run, files: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["?", ".", ",", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained("words")
    small_llama.config(vocab_size=len(vocabulary)).save_pretrained("words")
    tokens = hugging_face.encoder("words")("to be, or what")
    assert tokens.tolist() == [vocabulary[word] for word in ("to", "be", ",", "or", "?")]
    stdout, _ = here(
        "train", "text.txt", "--hf", "words", *BATCH, "--steps", "25", "--json", "--save-pretrained", "out"
    )
    assert last_line(stdout)["loss_last"] < 1.0  # of 11 words, in one sentence; bytes would be refused
    again = AutoTokenizer.from_pretrained("out")
    assert again("to be")["input_ids"] == [vocabulary["to"], vocabulary["be"]]
    assert LlamaForCausalLM.from_pretrained("out").config.vocab_size == 11


def test_bytes_are_the_tokens_without_a_tokenizer() -> None:
    assert hugging_face.encoder("nowhere")("grün").tolist() == list("grün".encode())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--hf", "nothing"],
            "there is no model in nothing; got no file nothing; needed a directory with",
        ),
        (["--hf", "text.txt"], "transformers makes no causal language model of text.txt; got OSError"),
        (
            ["--hf", "t5"],
            "transformers makes no causal language model of t5; got ValueError: Unrecognized",
        ),
        (["--hf", "odd.json"], "multiple of the number of attention heads"),
        (
            ["--hf", "small"],
            "all of the text's bytes; got number 122; needed less than its vocab_size, 99",
        ),
        (["--hf", "broken"], "transformers makes no causal language model of broken"),
        (["--hf", "llama", "--context", "65"], "--context is out of range; got 65; needed at most 64"),
        (["--hf", "llama", "--width", "16", "--tied"], "--hf excludes --width, --tied"),
        (["--hf", "llama", "--ranks", "7"], "7 stages"),
        (["--save-pretrained", "there"], "--save-pretrained is of a Hugging Face model"),
        (["--hf", "llama", "--save-pretrained", "/proc/nowhere"], "cannot write --save-pretrained /proc/nowhere"),
        (["--hf", "llama", "--resume", "/nowhere"], "there is no checkpoint in /nowhere"),
    ],
)
def test_bad_input_is_one_line_before_any_rank_starts(
    here: Run,
    files: Path,
    arguments: list[str],
    message: str,
) -> None:
    T5Config().save_pretrained("t5")
    small_llama.config(vocab_size=99).save_pretrained("small")
    Path("odd.json").write_text(json.dumps(small_llama.config().to_dict() | {"hidden_size": 30}))
    small_llama.config().save_pretrained("broken")
    Path("broken/model.safetensors").write_bytes(b"not safetensors")
    Path("text.txt").write_text("the quiz. " * 20)
    _, stderr = here("train", "text.txt", "--steps", "1", *arguments, code=1)
    assert message in stderr
    assert "Traceback" not in stderr


def test_what_a_program_could_hide_in_is_not_read(files: Path) -> None:
    model = small_llama.model()
    model.config.save_pretrained("pickled")
    torch.save(model.state_dict(), "pickled/pytorch_model.bin")
    with pytest.raises(InputError, match="transformers makes no causal language model of pickled"):
        hugging_face.causal_model("pickled")
    (files / "code").mkdir()
    Path("code/config.json").write_text(
        '{"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}'
    )
    Path("code/code.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match="custom code"):
        hugging_face.causal_model("code")


def test_without_transformers_it_is_said_how_to_get_it_and_other_models_train(
    here: Run,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    _, stderr = here("train", "text.txt", "--hf", "llama", "--steps", "1", code=1)
    assert "Hugging Face models need transformers" in stderr
    assert "pip install '.[hf]'" in stderr
    sizes = ["--layers", "2", "--width", "16", "--heads", "2"]
    assert "loss" in here("train", "text.txt", *sizes, *BATCH, "--steps", "1")[0]


@pytest.mark.long
def test_ranks_of_torchrun_train_it_too(files: Path) -> None:
    stdout, _ = pipex("train", "text.txt", "--hf", "llama", *BATCH[:-2], "--steps", "2", "--check", "--json",
                      "--save-pretrained", "trained", command=TORCHRUN)  # fmt: skip
    assert last_line(stdout)["identical"] is True
    assert LlamaForCausalLM.from_pretrained("trained").config.vocab_size == 256
