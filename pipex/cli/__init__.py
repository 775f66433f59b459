"""The ``pipex`` command. Sub-commands are imported when they run, so that ``pipex --help`` does not import torch."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from pipex.errors import PipexError

# name -> (module with add_arguments(parser) and run(options) -> exit code, one line of help)
COMMANDS = {
    "train": ("pipex.cli.train", "train a small language model through a pipeline of processes"),
    "schedules": ("pipex.cli.plans.schedules", "list the schedule families: time, memory, constraints, source"),
    "bubble": ("pipex.cli.plans.bubble", "compare all schedule families at one size"),
    "schedule": ("pipex.cli.plans.schedule", "build one family's plan, draw it and write it to a file"),
    "plan": ("pipex.cli.plans.plan", "search the best plan for given costs and memory"),
    "view": ("pipex.cli.plans.view", "show a plan from a file, in the terminal, a browser or Perfetto"),
    "profile": ("pipex.cli.profile", "measure what every layer of a model costs on this machine"),
    "layout": ("pipex.cli.layout", "say which rank holds which layers and tensors of a model under a plan"),
    "bench": ("pipex.cli.bench", "measure pipex beside its peers on this machine"),
    "tune": ("pipex.cli.tune", "measure which of Triton and torch multiplies faster on this GPU, and keep it"),
    "info": ("pipex.cli.info", "say what was built and what this machine can do"),
}

FAILED = 1
INTERRUPTED = 130


class Command(argparse.ArgumentParser):
    """Imports the module that declares its options when it is chosen, as the others' may import torch."""

    def __init__(self, *, module: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        importlib.import_module(self._module).add_arguments(self)
        return super().parse_known_args(args, namespace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    # numpy, which torch imports, would start threads that pipex never uses and that forbid forking the ranks.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")  # a report is worth more than its arrows in an ASCII terminal
    parser = argparse.ArgumentParser(
        prog="pipex", description="Pipeline parallelism for PyTorch with a split backward."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Command)
    for name, (module, text) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", module=module)
    options = parser.parse_args(arguments)
    if options.version:
        from pipex import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        code = int(importlib.import_module(COMMANDS[options.command][0]).run(options))
        sys.stdout.flush()
        return code
    except PipexError as error:
        print(f"pipex {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader has seen enough, as in `pipex info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return FAILED
    except (OSError, MemoryError, RuntimeError) as error:
        if not _out_of_space(error):
            raise
        print(f"pipex {options.command}: {str(error).splitlines()[0]}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"pipex {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _out_of_space(error: Exception) -> bool:
    """Whether a disk or the memory is full: for torch that is a RuntimeError of its allocator."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
