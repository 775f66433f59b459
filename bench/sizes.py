"""Message sizes as nccl-tests writes them: ``-b 4K -e 64M -f 4`` is 4 KiB, 16 KiB, ... 64 MiB, and ``-i 4K`` in place
of ``-f 4`` is 4 KiB, 8 KiB, 12 KiB, ..."""

from __future__ import annotations

from pipex.errors import InputError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
MOST = 1000


def parse_size(text: str) -> int:
    """Bytes of a size such as ``512``, ``4K`` or ``64m``; the letters are powers of 1024.

    Raises:
        InputError: it is no size.
    """
    digits, letter = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not (digits.isascii() and digits.isdigit()) or letter not in _UNITS or int(digits) == 0:
        raise InputError("not a size", got=repr(text), needed="a whole number above 0, with K, M or G if wanted")
    return int(digits) * _UNITS[letter]


def format_size(nbytes: int) -> str:
    """The shortest text that ``parse_size`` reads as ``nbytes``."""
    letter = next(letter for letter in reversed(_UNITS) if nbytes % _UNITS[letter] == 0)
    return f"{nbytes // _UNITS[letter]}{letter}"


def size_range(first: int, last: int, factor: int = 1, step: int = 0) -> list[int]:
    """``first``, ``first`` × ``factor`` + ``step``, ... while at most ``last``.

    Raises:
        InputError: the range is empty, would not end, or has more than ``MOST`` sizes.
    """
    if first > last:
        raise InputError("the range of sizes is empty", got=f"{format_size(first)} to {format_size(last)}",
                         needed="-b at most -e")  # fmt: skip
    if factor < 2 and not step:
        raise InputError("the range of sizes would not end", got=f"-f {factor}", needed="a factor of at least 2")
    sizes = [first]
    while (size := sizes[-1] * factor + step) <= last:
        sizes.append(size)
        if len(sizes) > MOST:
            raise InputError("too many sizes", got=f"more than {MOST}", needed="a larger -i or a shorter range")
    return sizes
