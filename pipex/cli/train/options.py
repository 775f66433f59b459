"""The options of ``pipex train``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipex.cli.plans.files import read_plan
from pipex.errors import InputError
from pipex.plan.chain import check_stages


@dataclass(frozen=True)
class Options:
    """What to train and how; field names are the command's long options."""

    paths: tuple[str, ...] = ()
    hf: str | None = None
    ranks: int = 4
    schedule: str = "zb-h1"
    chunks: int | None = None
    plan: str | None = None
    microbatches: int = 8
    steps: int = 200
    batch: int = 32
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 8
    dropout: float = 0.0
    tied: bool = False
    lr: float = 3e-3
    clip: float | None = None
    seed: int = 0
    timeout: float = 300.0
    device: str = "cpu"
    save: str | None = None
    save_pretrained: str | None = None
    resume: str | None = None
    trace: str | None = None
    check: bool = False
    json: bool = False

    def check_values(self) -> None:
        """Raises InputError for a number out of range."""
        for name in ("ranks", "chunks", "microbatches", "steps", "batch", "context", "width", "heads", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} is out of range", got=value, needed="at least 1")
        for name in ("lr", "clip", "timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name} is out of range", got=value, needed="a number above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError("--seed is out of range", got=self.seed, needed="0 to 2⁶³-1")
        if self.hf is None:
            check_stages(self.layers + 2, self.ranks)  # the blocks, an embedding and a head
            if self.save_pretrained is not None:
                raise InputError("--save-pretrained is of a Hugging Face model", got="no --hf", fix="use --save")
        if self.batch < self.microbatches:
            raise InputError(
                "the batch is too small for the plan",
                got=f"--batch {self.batch} for --microbatches {self.microbatches}", needed="at least one sample each",
                fix="raise --batch or lower --microbatches",
            )  # fmt: skip

    def check_outputs(self) -> None:
        """Raises InputError if what the run is to write could not be written, before it has run for nothing."""
        if self.trace is not None:
            with _writing("--trace", self.trace), open(self.trace, "a"):
                pass
        for option, directory in (("--save", self.save), ("--save-pretrained", self.save_pretrained)):
            if directory is not None:
                with _writing(option, directory):
                    Path(directory).mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=directory):
                        pass


@contextmanager
def _writing(option: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {option} {path}", got=error.strerror, fix="choose another place") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("paths", nargs="*", help="text files to train on (none: the Python library's own sources)")
    add = _Adder(parser)
    add("hf", "train this Hugging Face model: a directory with config.json, weights (none: new ones) and tokenizer "
        "(none: bytes), or the path of a config.json; nothing is downloaded", metavar="PATH")  # fmt: skip
    add("ranks", "processes (under torchrun: as many as it starts)")
    add("schedule", "family of the plan; `pipex schedules` lists them")
    add("chunks", "stages per rank, where the family has a choice", kind=int)
    add("plan", "run the plan of this file instead, with its ranks and micro-batches", metavar="FILE")
    add("microbatches", "micro-batches per step")
    add("steps", "optimizer steps, counted from the start of training, also after --resume")
    add("batch", "sequences per step")
    add("context", "bytes, or tokens of a tokenizer, per sequence")
    add("width", "width of the model")
    add("heads", "attention heads")
    add("layers", "transformer blocks")
    add("dropout", "dropout probability")
    add("tied", "tie the output head to the token embedding")
    add("lr", "learning rate of AdamW")
    add("clip", "largest norm of the gradient; 1 by default, where the plan updates at the end of a step", kind=float)
    add("seed", "seed of the initial weights, the batches and dropout")
    add("timeout", "seconds without progress after which a rank counts as stalled")
    add("device", "cpu, or cuda: a GPU for each rank, by turns where there are fewer")
    add("save", "directory for a checkpoint at the end, or at Ctrl-C", metavar="DIR")
    add("save_pretrained", "directory for the model of --hf at the end, as from_pretrained reads it", metavar="DIR")
    add("resume", "directory of the checkpoint to go on from", metavar="DIR")
    add("trace", "write a Chrome trace of the last steps", metavar="FILE")
    add("check", "train once more in one process and compare bit for bit")
    add("json", "print one JSON object as the last line on stdout")


_OF_THE_PLAN = ("ranks", "schedule", "chunks", "microbatches")
_OF_THE_MODEL = ("width", "heads", "layers", "dropout", "tied")
_SAID_ELSEWHERE = {"plan": _OF_THE_PLAN, "hf": _OF_THE_MODEL}
"""Options whose values stand in the file of another one."""


class _Adder:
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._defaults = {field.name: field.default for field in dataclasses.fields(Options)}

    def __call__(self, name: str, text: str, metavar: str | None = None, kind: type | None = None) -> None:
        default = shown = self._defaults[name]
        option = f"--{name.replace('_', '-')}"
        if any(name in names for names in _SAID_ELSEWHERE.values()):
            # Left out of the namespace unless given, so that the other option can exclude it.
            default = argparse.SUPPRESS
            text = text if shown is None or isinstance(shown, bool) else f"{text} (default: {shown})"
        if isinstance(shown, bool):
            self._parser.add_argument(option, action="store_true", default=default, help=text)
        else:
            kind = kind or (str if shown is None else type(shown))
            hint = metavar or {int: "N", float: "X", str: "NAME"}[kind]
            self._parser.add_argument(option, type=kind, default=default, metavar=hint, help=text)


def read(namespace: argparse.Namespace) -> Options:
    """The parsed options; ranks and micro-batches are those of ``--plan`` where it is given.

    Raises:
        InputError: a value is out of range, or the plan cannot be used.
    """
    fields = [field.name for field in dataclasses.fields(Options)]
    values = {name: getattr(namespace, name) for name in fields if hasattr(namespace, name)}
    options = Options(**{**values, "paths": tuple(values["paths"])})
    for source, names in _SAID_ELSEWHERE.items():
        if values[source] is not None and (given := [f"--{name}" for name in names if name in values]):
            fix = f"the {'plan' if source == 'plan' else 'model'}'s file says these; leave them out"
            raise InputError(f"--{source} excludes {', '.join(given)}", fix=fix)
    if options.plan is not None:
        plan = read_plan(options.plan)
        options = dataclasses.replace(options, ranks=plan.placement.ranks, microbatches=plan.microbatches)
    options.check_values()
    return options
