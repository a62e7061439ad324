"""Ports that are kept for a server until it listens."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from megatron_pr2.rollout.sglang.child_process import reserved_port

_IP_LOCAL_PORT_RANGE = 51  # Linux 6.3; socket has no name for it


def connect_from(port: int, server: socket.socket) -> int:
    """Connects with a port that the kernel must choose from one; errno, 0 if it was given."""
    with socket.socket() as client:
        try:
            client.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, struct.pack("=HH", port, port))
        except OSError:
            pytest.skip("this kernel has no IP_LOCAL_PORT_RANGE")
        return client.connect_ex(server.getsockname())


def test_nobody_else_is_given_a_reserved_port() -> None:
    with reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use") as caught:
            other.bind(("127.0.0.1", port))
        assert caught.value.errno == errno.EADDRINUSE
        # As uvicorn, SGLang's own check of a port and the router listen, one after the other.
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)) as server:
                assert server.getsockname()[1] == port
    with reserved_port("::1") as port, socket.create_server(("::1", port), family=socket.AF_INET6):
        pass


def test_outgoing_connections_do_not_take_a_reserved_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with reserved_port() as port:
            assert connect_from(port, server) == errno.EADDRNOTAVAIL
        assert connect_from(port, server) == 0
