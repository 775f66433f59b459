"""Reading the files of a pretrained model, as ``pipex.state.pretrained`` and transformers write them.

They may come from anybody: names lead to no file outside of the directory's own entries, nothing waits for a pipe, and
nothing is executed; a ``*.bin`` is a pickle, and so is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.reading import open_file, read_file
from pipex.state.files import first_few
from pipex.state.manifest import shown
from pipex.state.serialize import DTYPES

LARGEST_INDEX = 64 << 20
"""Bytes of an index; 18,000 tensors of a mixture of experts take 2 MiB."""

_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


class PretrainedFiles:
    """The tensors in the files of one model or adapter.

    Attributes:
        forms: of all of them by name, on the meta device.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        """Reads the index, and of each file which tensors are in it.

        Raises:
            CheckpointError: there are none, they are pickles, or one is missing or damaged; named.
        """
        self.directory = directory
        self.forms: dict[str, Tensor] = {}
        self._file_of: dict[str, str] = {}
        index = _index(directory, stem)
        for file in dict.fromkeys(index.values()) if index is not None else [f"{stem}.safetensors"]:
            for name, form in self._forms_in(file).items():
                if name in self.forms:
                    raise self._damaged(
                        file, f"{shown(name)}, which {self._file_of[name]} holds too", "a name for each"
                    )
                self.forms[name], self._file_of[name] = form, file
        if index is not None and (lost := [n for n, file in index.items() if self._file_of.get(n) != file]):
            raise self._damaged(index[lost[0]], f"no {first_few(lost)}", "what the index says")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of these names, on the CPU, in memory of their own.

        Raises:
            CheckpointError: a file cannot be read any more, or has changed.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, here in by_file.items():
            # Opened anew each time, so that no more of the file stays mapped than is read at once.
            found |= self._with(file, lambda opened, here=here: {n: opened.get_tensor(n).clone() for n in here})
            for name in here:
                form = self.forms[name]
                if (found[name].shape, found[name].dtype) != (form.shape, form.dtype):
                    raise self._damaged(file, f"another {name} than before", "files into which nothing is saved")
        return found

    def _forms_in(self, file: str) -> dict[str, Tensor]:
        def forms(opened: Any) -> dict[str, Tensor]:
            found = {}
            for name in opened.keys():  # noqa: SIM118  # of safe_open, which is no mapping
                part = opened.get_slice(name)
                if (dtype := part.get_dtype()) not in _DTYPE_OF:
                    raise self._damaged(file, f"{shown(name)} of the type {dtype}", f"one of {', '.join(_DTYPE_OF)}")
                found[name] = torch.empty(part.get_shape(), dtype=_DTYPE_OF[dtype], device="meta")
            return found

        return self._with(file, forms)

    def _with(self, file: str, use: Any) -> dict[str, Tensor]:
        try:
            with (
                open_file(self.directory / file) as source,
                safe_open(f"/proc/self/fd/{source.fileno()}", framework="pt") as opened,
            ):
                found: dict[str, Tensor] = use(opened)
                return found
        except CheckpointError:
            raise
        except OSError as error:
            raise self._damaged(file, str(error.strerror or error), "a file that can be read") from error
        except Exception as error:  # the package has no one error for what it finds in a file, nor has torch
            raise self._damaged(file, f"{type(error).__name__}: {error}", "a readable safetensors file") from error

    def _damaged(self, file: str, got: str, needed: str) -> CheckpointError:
        return CheckpointError(f"{self.directory / file} is damaged", got=got, needed=needed, fix="use another copy")


def _index(directory: Path, stem: str) -> Mapping[str, str] | None:
    """The file of each tensor by name; None where one file holds all."""
    with suppress(OSError):  # as transformers does, which looks for this one first
        open_file(directory / f"{stem}.safetensors").close()
        return None
    path = directory / f"{stem}.safetensors.index.json"
    try:
        content = json.loads(read_file(path, LARGEST_INDEX))
        places = content["weight_map"]
        if not places or not all(isinstance(file, str) for file in places.values()):
            raise ValueError("no file names in weight_map")
        for file in places.values():
            if "/" in file or not file.endswith(".safetensors"):
                raise ValueError(f"a file {shown(file)}, which is no *.safetensors of the directory")
    except FileNotFoundError:
        raise _none(directory, stem) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        got = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} cannot be read as the index of a model", got=got,
            needed='{"weight_map": {"tensor": "file.safetensors", ...}}', fix="use another copy",
        ) from error  # fmt: skip
    found: Mapping[str, str] = places
    return found


def _none(directory: Path, stem: str) -> CheckpointError:
    found: list[str] = []
    with suppress(OSError):
        found = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    return CheckpointError(
        f"there is no {stem}.safetensors in {directory}, and no index of several",
        got=f"{first_few(pickles)}, which can run code when read" if pickles else first_few(found) or "nothing",
        needed="safetensors files as save_pretrained writes them",
        fix="read them by transformers once, and save the model" if pickles else "check the path (no download)",
    )
