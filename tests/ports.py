"""Ports for servers that a test starts."""

from __future__ import annotations

import random
import socket

_FIRST, _END = 10000, 20000
"""Below those of Slurm jobs, which begin at 20000, and those that the kernel gives to outgoing connections: a port of
these that was found free is often another's before it is used."""


def free_ports(count: int = 1) -> int:
    """The first of so many ports in a row that nothing listens on."""
    draw = random.SystemRandom()  # tests seed the other one
    while True:
        first = draw.randrange(_FIRST, _END - count)
        for port in range(first, first + count):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        else:
            return first
