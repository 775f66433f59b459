"""``pipex train``."""

from pipex.cli.train.command import add_arguments, run

__all__ = ["add_arguments", "run"]
