"""Who holds what: a plan's order says when, a layout where. Data without tensors, the same on every rank."""

from pipex.layout.blueprint import Blueprint, Held
from pipex.layout.layout import Layout, Tie, ranges_of, ties_of

__all__ = ["Blueprint", "Held", "Layout", "Tie", "ranges_of", "ties_of"]
