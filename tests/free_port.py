"""A port for a server or a rendezvous that is to be started in a moment."""

import random
import socket

EPHEMERAL = 32_768
"""From here on the system gives ports to connections, which could take one before it is used."""


def free_port() -> int:
    """A port on the loopback address that nobody listens at, and that no connection is given by itself."""
    chosen = random.SystemRandom()
    while True:
        port = chosen.randrange(20_000, EPHEMERAL)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
