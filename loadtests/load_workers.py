"""Lets load processes on other machines take part in a run: where, and who may.

Locust's own messages are neither encrypted nor signed, so whoever reaches its master's port could
send it records. Where other machines take part, the sockets of ZeroMQ that carry the messages speak
CurveZMQ (https://rfc.zeromq.org/spec/26): only those who hold the run's key know the public key of
the master, without which nothing passes, in either direction, and all that passes is encrypted.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

KEY = "LABS_KEY"
"""The variable with the key: a command line could be read by all."""
LEAST_KEY_CHARACTERS = 16
HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
LOOPBACK, EVERY_ADDRESS = "127.0.0.1", "0.0.0.0"


@dataclass(frozen=True)
class LoadWorkers:
    """How many load processes on other machines a run waits for, where, and with which key."""

    count: int
    host: str  # the address of this machine that the master listens on
    port: int
    key: str
    drawn: bool = True  # for this run: else its reader knows it

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def invitation(self) -> str:
        """What to call on the other machines."""
        port, here, first = self.port, self.address, ""
        if self.host == EVERY_ADDRESS:
            here = f"<an address of this machine>:{port}"
        elif self.host == LOOPBACK:
            first = f"\n  ssh -N -L {port}:{here} <this machine>"
        workers = "1 load worker" if self.count == 1 else f"{self.count} load workers"
        key = self.key if self.drawn else "the one that was given to this run"
        return (
            f"This run waits for {workers}. On another machine, with the same commit, call:"
            f"{first}\n  make load-worker MASTER={here}\nIt asks for the key: {key}"
        )


def address_of(text: str) -> tuple[str, int]:
    """Split `host:port`. Raises ValueError with a sentence that says what it should be."""
    host, _, port = text.rpartition(":")
    if not HOST.fullmatch(host) or not re.fullmatch(r"[0-9]{1,5}", port):
        port = "0"
    if not 0 < int(port) < 65536:
        raise ValueError(
            f"{text!r} is not an address such as 10.0.0.5:5557, that is an IPv4 address or a name,"
            " and a port"
        )
    return host, int(port)


def require_key(key: str) -> str:
    """Return the key if it is long enough. Raises ValueError."""
    if len(key) < LEAST_KEY_CHARACTERS:
        raise ValueError(
            f"KEY has {len(key)} characters, and at least {LEAST_KEY_CHARACTERS} are needed: the"
            " run shows one that was drawn for it"
        )
    return key


@functools.cache
def secret_of(key: str) -> bytes:
    """Derive the master's secret key: slowly (0.1 s), so that a reader's key is hard to guess."""
    return hashlib.scrypt(key.encode(), salt=b"load-workers", n=2**14, r=8, p=1, dklen=32)


def encrypt(socket: zmq.Socket[bytes], key: str) -> None:
    """Set up a socket that has no address yet: the master's (ROUTER), or a load process's."""
    of_master = z85.encode(secret_of(key))
    if socket.type == zmq.ROUTER:
        socket.curve_server = True
        socket.curve_secretkey = of_master
    else:
        socket.curve_serverkey = zmq.curve_public(of_master)
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def is_taken_in(host: str, port: int, key: str, timeout_s: float) -> bool:
    """Whether a master listens there that has this key."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        encrypt(socket, key)
        with socket.get_monitor_socket() as events:
            socket.connect(f"tcp://{host}:{port}")
            deadline = time.monotonic() + timeout_s
            while events.poll(max(0, round(1000 * (deadline - time.monotonic())))):
                event = recv_monitor_message(events)["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return True
                if event in (zmq.EVENT_DISCONNECTED, *FAILED):
                    break
            socket.disable_monitor()
    return False


def code_sha256() -> str:
    """Hash the modules that send load, which must be the same on every machine."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
