"""Two hosts on one machine: network namespaces of their own, joined by a cable."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "cable"


@dataclass(frozen=True)
class Host:
    """``command`` goes before what is to run there."""

    command: tuple[str, ...]
    address: str


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Raises OSError where this process may not make network namespaces."""
    names = [f"pipex-{os.getpid()}-{number}" for number in range(2)]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", INTERFACE, "netns", names[1])
        hosts = []
        for number, name in enumerate(names):
            address = f"10.213.7.{number + 1}"
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
            hosts.append(Host(("ip", "netns", "exec", name), address))
        yield hosts[0], hosts[1]
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
