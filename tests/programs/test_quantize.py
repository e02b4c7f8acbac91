"""Refusals, calibration samples, locks, and tools' environments, with pip and the tools faked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from serving.models import quantize
from serving.models.making import MakerError
from serving.models.quantize import METHODS, Tool, environment, make, windows
from serving.packaging import install

TOOLS = {method.tool.name: method.tool for method in METHODS.values()}
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"weights")
    words = Tokenizer(models.WordLevel({"a": 1, "b": 2, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text("of the base")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a " * 300 + "\n \n" + "b " * 300)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one tool's lock; what uv is asked for goes to uv.log, and works."""
    monkeypatch.setattr(quantize, "ROOT", tmp_path)
    monkeypatch.setenv("LABS_PLATFORM", "cpu")
    (tmp_path / "serving" / "locks").mkdir(parents=True)
    write_lock("2.0")
    TOOL.torch_lock.write_text("torch==2.0+cpu \\\n    --hash=sha256:1\n")

    def make_venv(home: Path, *_: object) -> None:
        python = install.venv_python(home)
        python.parent.mkdir(parents=True)
        python.symlink_to("/bin/sh")

    def uv(home: Path, _: object, *arguments: str) -> bool:
        with (tmp_path / "uv.log").open("a") as log:
            log.write(" ".join(arguments) + "\n")
        return True

    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "uv", uv)
    return tmp_path


TOOL = METHODS["w8a8"].tool


def write_lock(torch: str) -> None:
    pins = [f"{name}==1.0" for name in install.TORCH_NEEDS]
    pins += [f"torch=={torch}", "llmcompressor==1.5"]
    TOOL.lock.write_text("".join(f"{pin} \\\n    --hash=sha256:0\n" for pin in pins))


# --- what is refused ----------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_a_tool_is_set_up(
    base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "environment", pytest.fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Disk", (), {"free": 1}))
    with pytest.raises(MakerError, match="GB free"):
        make(base, base.parent, "w8a8-rtn", text)
    (base / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {}}))
    with pytest.raises(MakerError, match="quantized"):
        make(base, base.parent, "w8a8", text)


def test_samples_are_equally_long_and_cover_the_text() -> None:
    for count in (256, 300, 6000, 100_000):
        samples = windows(range(count), 64)
        assert {len(s) for s in samples} == {256}
        assert len(samples) == 64
        assert samples[0][0] == 0
        assert samples[-1][-1] == count - 1
    assert len({token for sample in windows(range(16384), 64) for token in sample}) == 16384


def test_passages_follow_each_other_in_the_samples(base: Path, text: Path) -> None:
    samples = quantize.read_samples(base, text, 64)
    assert samples[0] == [1] * 256
    assert samples[-1] == [2] * 256
    assert quantize.read_samples(base, text, 64) == samples


@pytest.mark.parametrize(("widths", "size"), [((576, 1536), 64), ((2048, 8192), 128)])
def test_groups_divide_the_widths(widths: tuple[int, int], size: int) -> None:
    config = dict(zip(("hidden_size", "intermediate_size"), widths, strict=True))
    assert quantize.group_size(config) == size


def test_weights_are_copied_where_a_file_system_has_no_links(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    weights = quantize.with_older_config(base, CONFIG, tmp_path / "older") / "model.safetensors"
    assert weights.read_bytes() == b"weights"
    assert not weights.is_symlink()


def test_transformers_4_gets_the_keys_it_reads(base: Path, tmp_path: Path) -> None:
    folder = quantize.with_older_config(base, CONFIG, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 1e5
    assert config["torch_dtype"] == "bfloat16"
    assert not {"rope_parameters", "rope_scaling", "dtype"} & config.keys()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    scaled = {**CONFIG, "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4}}
    folder = quantize.with_older_config(base, scaled, tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4}


# --- locks and environments ---------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_lock_has_the_tool_and_the_platforms_torch(tool: Tool) -> None:
    cpu = install.pin(install.entries(tool.torch_lock)["torch"])
    assert cpu == f"torch=={tool.pinned('torch')}+cpu"
    assert set(install.TORCH_NEEDS) <= set(install.entries(tool.lock))
    assert tool.pinned(tool.package)
    assert tool.script.exists()


def test_an_environment_is_made_once_and_again_when_its_lock_changes(root: Path) -> None:
    python = environment(TOOL)
    first, torch, rest = (root / "uv.log").read_text().splitlines()
    assert python == root / ".tools" / "quantize-llm-compressor" / ".venv" / "bin" / "python"
    assert "--require-hashes" in first
    assert "torch==2.0+cpu" in torch
    assert {"--no-deps", "--require-hashes", "--no-build-isolation"} <= set(rest.split())
    environment(TOOL)
    assert len((root / "uv.log").read_text().splitlines()) == 3
    write_lock("2.1")
    environment(TOOL)
    assert len((root / "uv.log").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("fails", "reason"), [("torch", "torch's build for the cpu"), ("setuptools", "uv could not")]
)
def test_a_set_up_that_fails_leaves_nothing_and_says_how_to_mend_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, fails: str, reason: str
) -> None:
    def uv(home: Path, _: object, *arguments: str, index: str = "") -> bool:
        (home / ".venv" / "install.log").write_text("no")
        return f"{fails}==" not in f"{arguments} {(home / '.venv' / 'locked.txt').read_text()}"

    monkeypatch.setattr(install, "uv", uv)
    with pytest.raises(MakerError, match=f"again: {reason}"):
        environment(TOOL)
    assert not TOOL.home.exists()


def test_an_interrupted_set_up_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "uv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        environment(TOOL)
    assert not TOOL.home.exists()


# --- the job ------------------------------------------------------------------------------------


def fake_tool(root: Path, script: str) -> None:
    """Shell instead of Python: `sh -I SCRIPT JOB` would not start, so a wrapper drops the flag."""
    python = install.venv_python(TOOL.home)
    python.unlink()
    python.write_text(f'#!/bin/sh\nout=$(sed \'s/.*"out": "\\([^"]*\\)".*/\\1/\' "$3")\n{script}\n')
    python.chmod(0o755)


def test_the_folder_appears_complete(
    root: Path, base: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(TOOL)
    layers = 'for i in 1 2 3 1 2; do echo "($i/3): Calibrating"; sleep 0.5; done'
    fake_tool(root, f'mkdir "$out"; {layers}; echo 12345 > "$out/x.safetensors"')
    (out := root / "small").mkdir()
    about = make(base, out, "w4a16-gptq", text)
    assert about.pop("seconds") >= 0
    assert about == {
        "method": "w4a16-gptq",
        "tool": "llm-compressor",
        "tool_version": "1.5",
        "calibration": "text.txt",
        "samples": [64, 256],
        "bits": 4,
        "group_size": 64,
        "bytes": 6,
    }
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == "of the base"
    assert not (out / "work").exists()
    told = capsys.readouterr().out
    assert "layer 1/3\nlayer 2/3\nlayer 3/3\nlayer 1/3\nlayer 2/3\n" in told


def test_a_tool_that_fails_has_the_last_word(root: Path, base: Path, text: Path) -> None:
    environment(TOOL)
    fake_tool(root, 'mkdir "$out"; echo "out of memory" >&2; exit 3')
    (out := root / "small").mkdir()
    with pytest.raises(MakerError, match="code 3: out of memory"):
        make(base, out, "w8a8", text)
