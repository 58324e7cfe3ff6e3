"""Ports at which processes meet that start later."""

import socket
from pathlib import Path

import pytest

from ee_tuning.parallel import ports


def test_a_port_is_none_that_the_system_gives_to_connections():
    """A rendezvous that fails now and then, since any program's connection got its port meanwhile."""
    port = ports.free_port()
    assert 1024 <= port < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    """Two servers of one machine that choose the same."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "_first_assigned", lambda: taken + 2)
        monkeypatch.setattr(ports, "_COUNT", 3)
        monkeypatch.setattr(ports, "_TRIES", 3)
        assert not ports._is_free(taken)
        assert ports.free_port() != taken
