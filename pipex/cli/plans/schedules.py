"""``pipex schedules``: the families, from the facts that stand in their modules."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import textwrap

from pipex.cli.plans.sizes import add_json
from pipex.plan import FAMILIES, options_of

FACTS = ("Time", "Memory", "Constraints", "Source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="families to show (none: all)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    for name in options.names:
        options_of(name)  # refuses an unknown one
    rows = [facts(name) for name in options.names or FAMILIES]
    if options.json:
        print(json.dumps({"schedules": rows}))
        return 0
    width = min(120, shutil.get_terminal_size().columns)
    for row in rows:
        print(f"{row['family']}: {row['summary']}")
        for name in ("options", *map(str.lower, FACTS)):
            print(textwrap.fill(row[name], width, initial_indent=f"    {name:13}", subsequent_indent=" " * 17))
        print()
    return 0


def facts(name: str) -> dict[str, str]:
    """What the docstring of a family's module says: its first line, then its blocks of facts."""
    module = inspect.getmodule(FAMILIES[name])
    text = inspect.cleandoc((module and module.__doc__) or "")  # python -OO leaves no docstring, and so no facts
    title, _, rest = text.partition("\n")
    found = {
        "family": name,
        "summary": title.partition(": ")[2],
        "options": ", ".join(options_of(name)) or "none",
    }
    for fact in FACTS:
        block = re.search(rf"^{fact} +(.*(?:\n {{12}}.*)*)", rest, re.MULTILINE)
        found[fact.lower()] = " ".join(block.group(1).split()) if block else ""
    return found
