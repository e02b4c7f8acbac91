"""A bundle made, carried, damaged, mended and unpacked, with a stand-in for what the labs need."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving import bundle
from serving.bundle import BundleError, BundleRequest
from serving.models import catalog
from serving.packaging.install import ROOT

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
# What a package does that names a further folder for Python to look in.
STAND_IN = {
    "stand_in.py": "WORKS = True\n",
    "stand_in_more/further.py": "FOUND = True\n",
    "stand_in.pth": "stand_in_more\n",
    "vllm/vllm-rs": "left out of a lean bundle",
    "vllm/third_party/deep_gemm/kernel.py": "left out, too",
}
CLI = "import sys, further, stand_in\nprint(sys.argv[1:], further.FOUND)\n"
MODULES = {"__main__.py": CLI, "__init__.py": "", "../__init__.py": "", "../../__init__.py": ""}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose command imports a package; uv has just installed that."""
    commands = tmp_path / "repository" / "labs" / "harness" / "cli"
    commands.mkdir(parents=True)
    for name, text in MODULES.items():
        (commands / name).write_text(text)
    git(tmp_path / "repository", "init", "-q")
    commit(tmp_path / "repository")

    def install_there(packages: bundle.Packages, python: str, site: Path) -> None:
        for name, text in STAND_IN.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)

    model = tmp_path / "model"
    model.mkdir()
    for name in (*catalog.TOKENIZER, "model.safetensors"):
        (model / name).write_text(name)
    monkeypatch.setattr(bundle, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(bundle, "ARCH", platform.machine())
    monkeypatch.setattr(bundle, "resolve", lambda *_: {"stand-in": "1.0", "vllm": "0.26.0"})
    monkeypatch.setattr(bundle, "install_there", install_there)
    monkeypatch.setattr("serving.models.catalog.bundled", lambda: model)
    return tmp_path


def git(repository: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    who += ["-c", "commit.gpgsign=false", "-c", f"core.hooksPath={os.devnull}"]
    subprocess.run(["git", "-C", str(repository), *who, *words], check=True)


def commit(repository: Path) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "all")


def make(home: Path, lean: bool = False) -> Path:
    """Make the bundle; return its folder."""
    have = {"pip": "0.1", **({"torch": "0.1"} if lean else {})}
    wanted = BundleRequest(HERE, have, "", part_bytes=400, lean=lean)
    bundle.bundle(wanted, home / "out", lambda line: None)
    return home / "out"


def unpack(out: Path, target: Path) -> tuple[int, str]:
    """As on the other machine: the script beside the parts, by a Python that knows nothing else."""
    command = [sys.executable, "-I", str(out / "unbundle.py"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def call_labs(lab: Path, *words: str) -> str:
    return subprocess.check_output(
        [lab / ".unbundled" / "bin" / "labs", *words], cwd=lab, text=True
    )


def test_a_bundle_arrives_whole(home: Path) -> None:
    programs = home / "repository" / ".tools" / "prometheus"
    programs.mkdir(parents=True)
    (programs / "prometheus").write_text("#!/bin/sh\necho prometheus\n")
    (programs / "prometheus").chmod(0o755)
    out, target = make(home), home / "the lab"
    assert {path.name for path in out.iterdir()} >= {"manifest.json", "unbundle.py"}
    code, said = unpack(out, target)
    assert (code, "pip 0.1 is " in said) == (0, True)  # another version, which is told and taken
    assert call_labs(target, "doctor") == "['doctor'] True\n"
    program = target / ".tools" / "prometheus" / "prometheus"
    assert subprocess.check_output([program], text=True) == "prometheus\n"
    model = target / ".cache" / "models" / catalog.BUNDLED
    assert (model / "model.safetensors").exists()
    assert not (target / ".unbundled" / "parts").exists()
    (target / "results").mkdir()
    assert unpack(out, target) == (0, "")  # it is in place
    commit_of = json.loads((target / ".unbundled" / "manifest.json").read_text())["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit_of)


def test_the_next_bundle_replaces_the_packages_and_keeps_what_is_the_readers(home: Path) -> None:
    lab, mine = home / "lab", home / "lab" / "results" / "mine"
    assert unpack(make(home), lab)[0] == 0
    mine.parent.mkdir()
    mine.touch()
    (lab / ".unbundled" / "site" / "old.py").touch()
    commands = home / "repository" / "labs" / "harness" / "cli"
    (commands / "__main__.py").write_text("print('new')\n")
    commit(home / "repository")
    assert unpack(make(home), lab)[0] == 0
    assert mine.exists()
    assert not (lab / ".unbundled" / "site" / "old.py").exists()
    assert call_labs(lab) == "new\n"


def test_a_lean_bundle_lacks_what_it_names(home: Path) -> None:
    out = make(home, lean=True)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"expected": {}}))  # no torch here
    assert unpack(out, home / "lab")[0] == 0
    site, carried = home / "lab" / ".unbundled" / "site", home / "lab" / ".cache" / "models"
    assert not (site / "vllm" / "vllm-rs").exists()
    assert not (site / "vllm" / "third_party" / "deep_gemm").exists()
    assert (site / "stand_in.py").exists()
    assert {p.name for p in carried.rglob("*") if p.is_file()} == {*catalog.TOKENIZER}


def test_parts_may_come_one_by_one_and_a_damaged_one_is_named(home: Path) -> None:
    out, lab, sent = make(home), home / "lab", home / "sent"
    parts = sorted(out.glob("lab.tar.*"))
    assert len(parts) > 2
    sent.mkdir()
    for name in ("unbundle.py", "manifest.json"):
        shutil.copyfile(out / name, sent / name)
    for part in parts[:-1]:
        shutil.copyfile(part, sent / part.name)
        code, said = unpack(sent, lab)
        assert code == 75
        assert f"of {len(parts)} parts" in said
        assert part.name not in said.split("come: ")[1]
        (sent / part.name).unlink()
    assert not (lab / "labs").exists()
    damaged = bytearray(parts[-1].read_bytes())
    damaged[7] ^= 1
    (sent / parts[-1].name).write_bytes(damaged)
    code, said = unpack(sent, lab)
    assert (code, f"{parts[-1].name} is damaged: copy" in said) == (1, True)
    shutil.copyfile(parts[-1], sent / parts[-1].name)
    assert unpack(sent, lab)[0] == 0
    assert (lab / "labs").exists()


def test_an_unpacking_that_was_killed_is_done_again(home: Path) -> None:
    out, lab = make(home), home / "lab"
    assert unpack(out, lab)[0] == 0
    (lab / ".unbundled" / "manifest.json").unlink()  # written last
    shutil.rmtree(lab / "labs")
    assert unpack(out, lab)[0] == 0
    assert (lab / "labs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"python": "3.10"}, "for 3.10: run this"),
        ({"machine": "abacus"}, "for abacus"),
        ({"expected": {"no-such": "2"}}, "no-such 2 is missing: make it again"),
        ({"expected": {"torch": "0.1"}}, "torch 0.1 is "),
        ({"parts": [{"name": "../part", "bytes": 1, "sha256": "0"}]}, "copy that file again"),
        ({"parts": 1}, "copy that file again"),
    ],
)
def test_another_machine_than_it_was_made_for_and_a_damaged_manifest_are_refused(
    home: Path, change: dict[str, object], said: str
) -> None:
    out = make(home)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, **change}))
    code, answer = unpack(out, home / "lab")
    assert (code, said in answer, answer.count("\n")) == (1, True, 1)
    assert not (home / "lab" / "labs").exists()


def test_a_checkout_is_not_overwritten(home: Path) -> None:
    code, said = unpack(make(home), home / "repository")
    assert (code, "Git checkout" in said) == (1, True)


# --- what is asked ------------------------------------------------------------------------------


def test_a_part_leaves_room_for_the_checkout_that_travels_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("ignored\n")
    for name in ("labs/tracked", "results/tracked", "ignored"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(2_500_000))
    commit(tmp_path)
    (tmp_path / "untracked").write_bytes(bytes(2_500_000))
    assert bundle.fitting("64M") == 56_000_000
    with pytest.raises(BundleError, match=r"no room .* 8 MB\. ") as refusal:
        bundle.fitting("7M")
    leave_out, bring_back = re.findall("`git (.+?)`", str(refusal.value))
    git(tmp_path, *shlex.split(leave_out))
    assert bundle.fitting("64M") == 58_000_000
    git(tmp_path, *shlex.split(bring_back))
    assert (tmp_path / "results" / "tracked").exists()


def test_have_is_what_pip_prints(tmp_path: Path) -> None:
    path = tmp_path / "have.txt"
    path.write_text(
        "Package           Version      Editable project location\n"
        "----------------- ------------ -------------------------\n"
        "huggingface_hub   1.33.0\n"
        "inference-lab     0.1.0        /somewhere\n"
        "torch==2.11.0+cu130\n"
        "-e git+ssh://x\n"
    )
    assert bundle.read_have(path) == {
        "huggingface-hub": "1.33.0",
        "inference-lab": "0.1.0",
        "torch": "2.11.0+cu130",
    }
    path.write_text("nothing here\n")
    with pytest.raises(BundleError, match="names no package"):
        bundle.read_have(path)
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.read_have(tmp_path / "none")


def test_sizes_and_pythons() -> None:
    assert [bundle.part_size(s) for s in ("500", "60M", "2G")] == [500, 60_000_000, 2_000_000_000]
    for wrong in ("0", "60MB", "-1", "1.5G", ""):
        with pytest.raises(BundleError, match="is not a size"):
            bundle.part_size(wrong)
    for old in ("3.10", "2.7", "three"):
        with pytest.raises(BundleError, match="the lab needs 3"):
            BundleRequest(old, {}, "", 1).check()
    with pytest.raises(BundleError, match="needs HAVE="):
        BundleRequest("3.12", {}, "", 1, lean=True).check()


def test_what_the_other_machine_has_is_shown_to_the_resolver_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its torch is fixed; its other packages and the lock's are preferred, not fixed."""
    seen: dict[str, str] = {}

    def uv(*words: str) -> None:
        pinned = Path(words[words.index("--output-file") + 1])
        seen["of the tests"] = (tmp_path / "tests.in").read_text()
        seen["fixed"] = Path(words[words.index("--constraint") + 1]).read_text()
        seen["preferred"] = pinned.read_text()
        seen["wheels"] = "\n".join(
            path.name for path in Path(words[words.index("--find-links") + 1]).iterdir()
        )
        found = "locust==9\ntorch==2.11.0+cu130\ntransformers==6.0.0\ntorchcodec==1\n"
        pinned.write_text(found)

    monkeypatch.setattr(bundle, "uv", uv)
    have = {"torch": "2.11.0+cu130", "transformers": "5.17.0"}
    carried = bundle.resolve(BundleRequest("3.12", have, "0.25.0", 1, lean=True), tmp_path)
    makefile = (ROOT / "Makefile").read_text()
    assert ("pytest-xdist" in seen["of the tests"].split()) == ("--dist loadfile" in makefile)
    assert seen["fixed"].split() == ["torch==2.11.0+cu130", "vllm==0.25.0"]
    # a wheel for any platform would lose to the index's own
    assert f"transformers-5.17.0-cp312-cp312-manylinux_2_31_{bundle.ARCH}.whl" in seen["wheels"]
    assert "flashinfer_python-" in seen["wheels"]
    assert {"torch==2.11.0+cu130", "transformers==5.17.0"} <= set(seen["preferred"].split())
    assert carried == {"locust": "9", "transformers": "6.0.0"}


def test_a_file_of_the_lock_is_asked_for_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "LOCK", tmp_path / "cuda.txt")
    bundle.LOCK.write_text("locust==9 \\\n    --hash=sha256:1\nsix==1 \\\n    --hash=sha256:2\n")
    monkeypatch.setattr(bundle, "uv", lambda *words: None)
    bundle.install_there({"locust": "9", "six": "2"}, "3.12", tmp_path / "site")
    asked = (tmp_path / "site.txt").read_text()
    assert asked == "locust==9 \\\n    --hash=sha256:1\nsix==2\n"
