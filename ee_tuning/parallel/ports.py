"""Free ports of this machine, at which processes that start later will meet."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _COUNT, _TRIES = 1024, 12_000, 100


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 that is free, below those that the system assigns by itself.

    One of the system's own could be given to a connection of any program before the processes listen at it.
    """
    end = _first_assigned()
    for port in random.SystemRandom().sample(range(max(_LOWEST, end - _COUNT), end), _TRIES):
        if _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _first_assigned() -> int:
    try:
        first = int(_RANGE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 32768  # Linux's default
    return first if first >= _LOWEST + _TRIES else 32768
