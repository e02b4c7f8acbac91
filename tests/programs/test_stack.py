"""The containers' file, and what is said where there are no containers; none is started here."""

from __future__ import annotations

import re
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards import boards, prometheus, push, stack
from dashboards.panels import DATASOURCE
from dashboards.stack import Stack, StackError
from serving.processes.ports import PortTaken, free_port

HERE = stack.COMPOSE.parent
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(stack.COMPOSE.read_text())["services"]


def docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A docker that notes what it is asked and answers by this shell script."""
    program, log = folder / "docker", folder / "asked"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "HOME", tmp_path / "prometheus")
    monkeypatch.setattr(stack, "PASSWORD_FILE", tmp_path / "password")
    monkeypatch.delenv("GRAFANA_PASSWORD", raising=False)


def test_images_are_pinned() -> None:
    for service in SERVICES.values():
        tag, _, digest = service["image"].partition(":")[2].partition("@sha256:")
        assert tag[0] in "v0123456789"
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert SERVICES["grafana"]["image"].partition(":")[2].startswith("13.")


def test_no_container_has_more_rights_than_it_needs() -> None:
    for service in SERVICES.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "cap_add" not in service
        assert not service.get("privileged")


def test_everything_listens_on_loopback_and_no_password_is_a_default() -> None:
    assert {s["network_mode"] for s in SERVICES.values()} == {"host"}
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert grafana["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"  # it starts without internet
    assert any("listen-address=127.0.0.1:" in c for c in SERVICES["prometheus"]["command"])
    assert grafana["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")


def test_what_is_provisioned_is_what_is_committed() -> None:
    mounts = dict(v.split(":")[:2] for v in SERVICES["grafana"]["volumes"])
    assert (HERE / "grafana").samefile(boards.FOLDER)
    assert mounts["./provisioning"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(
        (HERE / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    assert (source["uid"], source["type"]) == (DATASOURCE.uid, DATASOURCE.type_val)
    (provider,) = yaml.safe_load((HERE / "provisioning" / "dashboards" / "lab.yml").read_text())[
        "providers"
    ]
    assert provider["folderUid"] == push.FOLDER_UID
    assert provider["options"]["path"] == mounts["./grafana"]


def test_a_password_is_made_once_for_its_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stack.password()
    assert len(made) >= 20
    assert stack.password() == made
    assert stat.S_IMODE(stack.PASSWORD_FILE.stat().st_mode) == 0o600
    monkeypatch.setenv("GRAFANA_PASSWORD", "mine")
    assert stack.password() == "mine"
    assert stack.PASSWORD_FILE.read_text() == made


def test_a_password_file_that_was_left_empty_is_no_password() -> None:
    stack.PASSWORD_FILE.touch()
    assert len(stack.password()) >= 20
    assert stat.S_IMODE(stack.PASSWORD_FILE.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('[ "$1" = info ]', "no compose plugin"),
        ('[ "$1" != info ]', "daemon"),
        ('[ "$1" != info ] || echo "[name=seccomp,profile=builtin name=rootless]"', "is rootless"),
        ('case "$*" in *up*) echo "no space" >&2; exit 1;; esac', ": no space"),
    ],
)
def test_what_docker_lacks_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    docker(tmp_path, monkeypatch, script)
    with pytest.raises(StackError, match=says):
        Stack(free_port(), free_port()).start()


def test_what_came_up_only_half_is_taken_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Prometheus would keep the data to itself, and labs would not record into it."""
    log = docker(tmp_path, monkeypatch, 'case "$*" in *logs*) echo "the disk is full";; esac')
    with pytest.raises(StackError, match=": the disk is full"):
        Stack(free_port(), free_port()).start()
    assert log.read_text().splitlines()[-1].endswith(" down")
    assert prometheus.watching() is None


def test_a_process_of_the_same_number_is_not_taken_for_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where docker runs in a virtual machine; `make stop` would end it."""
    with subprocess.Popen(["sleep", "60"]) as other:
        answers = f'case "$1" in inspect) echo {other.pid};; *) echo a-container;; esac'
        log = docker(tmp_path, monkeypatch, answers)
        with pytest.raises(StackError, match="virtual machine"):
            Stack(free_port(), free_port()).start()
        assert log.read_text().splitlines()[-1].endswith(" down")
        assert prometheus.watching() is None
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("place", [0, 1])
def test_a_taken_port_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    log = docker(tmp_path, monkeypatch, ":")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [free_port(), free_port()]
        ports[place] = taken.getsockname()[1]
        setting = ("GRAFANA_PORT", "PROMETHEUS_PORT")[place]
        with pytest.raises(PortTaken, match=f"with {setting}="):
            Stack(ports[0], ports[1]).start()
    assert " up " not in log.read_text()


def test_without_docker_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match="not installed"):
        Stack(3000, 9090).start()


def test_labs_record_into_the_containers_prometheus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "prometheus"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nread nothing\n")
    program.chmod(0o755)
    contained = subprocess.Popen([str(program)], stdin=subprocess.PIPE)
    answers = f'case "$1" in inspect) echo {contained.pid};; *) echo a-container;; esac'
    log = docker(tmp_path, monkeypatch, answers)
    Stack(3000, 9091).start()
    watch = prometheus.watching()
    assert watch is not None
    assert watch.url == "http://127.0.0.1:9091"
    assert (prometheus.HOME / "prometheus.yml").exists()
    assert "up --detach --wait" in log.read_text()
    with pytest.raises(StackError, match="make stop"):
        Stack(3000, 9091).start()
    Stack(3000, 9091).stop()
    assert prometheus.watching() is None
    assert contained.poll() is not None
    assert "down" in log.read_text().splitlines()[-1]
