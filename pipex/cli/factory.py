"""``MODULE:FACTORY`` on the command line: a function of the user's that makes what a command works on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from pipex.errors import InputError


def find_factory(text: str) -> Callable[[], Any]:
    """The function.

    Raises:
        InputError: there is none.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise InputError("no factory", got=repr(text), needed="MODULE:FACTORY, such as my_model:profiled")
    sys.path.insert(0, "")  # the working directory, as `python -m` has it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise InputError(
            f"there is no module {module_name}", got=repr(text), needed="a module that Python can import from here"
        ) from None
    factory: Any = getattr(module, name, None)
    if not callable(factory):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise InputError(f"{module_name} has no function {name}", got=repr(text), needed=f"one of {', '.join(known)}")
    found: Callable[[], Any] = factory
    return found
