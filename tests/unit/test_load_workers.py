"""What is asked of a run that other machines send load for, before anything starts."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from labs import LABS
from labs.lab import LabError
from labs.running.resolve import RunRequest, load_workers_of
from loadtests import generator, load_workers
from loadtests.load_workers import LoadWorkers
from serving.ports import free_port

KEY = "k" * load_workers.LEAST_KEY_CHARACTERS
ASKED = RunRequest(LABS["continuous-batching"], endpoint="http://127.0.0.1:1", load_workers=2)


def test_a_key_is_drawn_and_the_master_stays_on_loopback() -> None:
    one, another = load_workers_of(ASKED), load_workers_of(ASKED)
    assert one
    assert another
    assert one.host == "127.0.0.1"
    assert one.key != another.key
    assert len(one.key) >= load_workers.LEAST_KEY_CHARACTERS
    assert f"MASTER={one.address} KEY={one.key}" in one.invitation
    assert "ssh -N -L" in one.invitation


def test_a_readers_key_is_not_shown() -> None:
    found = load_workers_of(replace(ASKED, key=KEY, listen=f"0.0.0.0:{free_port()}"))
    assert found
    assert found.key == KEY
    assert KEY not in found.invitation + repr(replace(ASKED, key=KEY))
    assert "<an address of this machine>" in found.invitation


def test_a_run_by_itself_waits_for_nobody() -> None:
    assert load_workers_of(replace(ASKED, load_workers=0)) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"load_workers": 0, "listen": "127.0.0.1:5557"}, "say how many with LOAD_WORKERS="),
        ({"endpoint": ""}, "Give the address of a running one with ENDPOINT="),
        ({"listen": "5557"}, r"'5557' is not an address such as 10.0.0.5:5557"),
        ({"listen": "127.0.0.1:0"}, "is not an address"),
        ({"listen": "127.0.0.1:99999"}, "is not an address"),
        ({"listen": "192.0.2.1:5557"}, "give LISTEN= an address of this machine"),
        ({"listen": "no.such.host.invalid:5557"}, "nothing can listen at no.such.host.invalid"),
        ({"key": "short"}, "KEY has 5 characters, and at least 16 are needed"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(LabError, match=says):
        load_workers_of(replace(ASKED, **changes))  # type: ignore[arg-type]


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LabError, match="a free port"):
            load_workers_of(replace(ASKED, listen=address))


def test_the_key_is_in_no_command_line() -> None:
    elsewhere = LoadWorkers(2, "10.0.0.5", 5557, KEY)
    command = generator.argv(4, 9111, 1, 1, elsewhere)
    assert KEY not in " ".join(command)
    assert command[command.index("--master-bind-host") + 1] == "10.0.0.5"
    assert command[command.index("--master-host") + 1] == "10.0.0.5"  # its own processes join there
    assert command[command.index("-u") + 1] == "12"  # each of three has all four users
    assert KEY not in " ".join(generator.worker_argv("10.0.0.5", 5557))


def test_without_load_workers_everything_stays_on_loopback() -> None:
    command = generator.argv(4, 9111, 5557)
    assert command[command.index("--master-bind-host") + 1] == "127.0.0.1"
    assert "--lab-load-workers" not in command
