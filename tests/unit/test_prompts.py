"""Prompts of an exact number of tokens."""

import random
import resource
import shutil
from pathlib import Path

import pytest
from jinja2 import TemplateError

from labs import LABS
from loadtests import plan
from loadtests.prompts import CountTokens, Messages, Writer, _Frames, counter
from serving.models.catalog import BUNDLED, CACHE

MODEL = CACHE / "models" / BUNDLED


def words(messages: Messages) -> int:
    """A template of 5 tokens, one token a word."""
    return 5 + sum(len(m["content"].split()) for m in messages)


def pieces(messages: Messages) -> int:
    """A template of 5 tokens, one for every five letters of a word."""
    return 5 + sum(1 + len(w) // 6 for m in messages for w in m["content"].split())


def evens(messages: Messages) -> int:
    return 2 * words(messages)


@pytest.fixture(scope="module")
def bundled() -> CountTokens:
    if not (MODEL / "config.json").exists():
        pytest.skip("the bundled model is not converted yet (`make setup` does it)")
    return counter(str(MODEL))


def joined(messages: Messages) -> int:
    """No tokenizer that splits at spaces: now and then two words are one token."""
    return 5 + sum(len(m["content"]) // 4 + 1 for m in messages)


@pytest.mark.parametrize("count", [words, pieces, joined])
def test_length_is_exact(count: CountTokens) -> None:
    writer, rng = Writer(count), random.Random(0)
    asked = range(writer.least_tokens, 200)
    assert [count(writer.chat(tokens, rng)) for tokens in asked] == list(asked)


def without_system(messages: Messages) -> int:
    """A template such as Gemma 2's."""
    if messages[0]["role"] == "system":
        raise TemplateError("System role not supported")
    return words(messages)


def test_a_template_without_a_system_role_gets_no_system_message() -> None:
    writer, rng = Writer(without_system), random.Random(0)
    assert writer.least_tokens == 6  # 5 of the template, and 1 to say something
    first = writer.chat(30, rng)
    assert [message["role"] for message in first] == ["user"]
    turn = [*first, {"role": "assistant", "content": "so it is"}]
    again = writer.chat(60, rng, history=turn)
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert (words(first), words(again)) == (30, 60)
    assert writer.tokens_of("three words more") == 3
    assert len(writer.lead(12, rng).split()) == 12


def with_template(template: str, folder: Path) -> CountTokens:
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(template)
    return counter(str(folder))


@pytest.mark.parametrize(
    ("write", "text", "runs"),
    [
        ("<s>{0}\n{1}</s>", "plain (words), x > 3;", 0),
        ("<s>{0}\n{1}</s>{0}", "plain", 10),
        ("<s>{0}\n{1}</s>", "a </s> in it", 10),
        ("<s>{0}\n{1}</s>", "a space behind ", 10),
        ("<s>{0}\n{1!r}</s>", "it's", 10),  # repr changes the marks about a text with an apostrophe
    ],
)
def test_a_template_is_run_once_for_plain_texts_that_it_does_not_change(
    write: str, text: str, runs: int
) -> None:
    run: list[Messages] = []

    def render(messages: Messages) -> str:
        run.append(messages)
        return write.format(*(message["content"] for message in messages))

    frames = _Frames(render)
    chats = [
        [{"role": "system", "content": "Go on."}, {"role": "user", "content": f"{i} {text}"}]
        for i in range(11)
    ]
    rendered = [frames(chat) for chat in chats[:1]]
    run.clear()
    rendered += [frames(chat) for chat in chats[1:]]
    assert len(run) == runs
    assert rendered == [render(chat) for chat in chats]


@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize("times", ["2 * 10**6", "3 * 10**9"])
def test_a_template_that_writes_without_end_is_refused(times: str, tmp_path: Path) -> None:
    """The second would take 3 GB of memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match="chat template"):
        Writer(with_template(f"{{{{ 'x' * ({times}) }}}}", tmp_path / "endless"))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_templates_refusal_is_read_off_a_real_tokenizer(
    bundled: CountTokens, tmp_path: Path
) -> None:
    count = with_template(
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        tmp_path / "gemma-like",
    )
    written = Writer(count).chat(48, random.Random(0))
    assert [message["role"] for message in written] == ["user"]
    assert count(written) == 48
    assert Writer(bundled).chat(48, random.Random(0))[0]["role"] == "system"


def test_a_template_that_refuses_any_message_is_an_error() -> None:
    def refuse(_: Messages) -> int:
        raise TemplateError("this model answers no chats")

    with pytest.raises(TemplateError, match="answers no chats"):
        Writer(refuse)


@pytest.mark.parametrize(
    ("count", "tokens", "error"),
    [
        # 5 of the template, 1 of the system message, and 1 to say something
        (words, 6, r"prompt_tokens=6 .* 7 tokens"),
        (evens, 41, "41 tokens"),
    ],
)
def test_a_length_that_no_prompt_has_is_refused(
    count: CountTokens, tokens: int, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        Writer(count).chat(tokens, random.Random(0))


def request_file(count: CountTokens, lab: str, workload: str, home: Path) -> str:
    """SHA-256 of what a CPU run of a lab sends in its second repeat."""
    resolved = LABS[lab].at("cpu", quick=False)
    (sent,) = (w for w in resolved.workloads if w.name == workload)
    drawn = sent.requests(24, resolved.draw_seed(2), Writer(count))
    plan.write_requests(home / "requests.jsonl", drawn, "m")
    return plan.sent_sha256([home / "requests.jsonl"])


PINNED = {  # lab, workload -> what is sent, with words counted and with the bundled tokenizer
    ("continuous-batching", "exponential"): ("6b88bf65214b6b5e", "4c74baeca9e440d0"),
    ("prefix-caching", "share-90"): ("1cac383546614725", "d80b6d1744a06b2b"),
    ("prefix-caching", "chat"): ("0bf1f49d5e03c23a", "35c9a72e0b9bcbc9"),
}


@pytest.mark.parametrize(("lab", "workload"), PINNED)
def test_what_a_lab_sends_is_pinned_byte_for_byte(lab: str, workload: str, tmp_path: Path) -> None:
    assert request_file(words, lab, workload, tmp_path)[:16] == PINNED[lab, workload][0]


@pytest.mark.parametrize(("lab", "workload"), PINNED)
def test_and_with_the_bundled_tokenizer(
    bundled: CountTokens, lab: str, workload: str, tmp_path: Path
) -> None:
    assert request_file(bundled, lab, workload, tmp_path)[:16] == PINNED[lab, workload][1]


@pytest.mark.parametrize("extra", [0, 1, 2, 3, 10, 33, 100, 257, 1000])
def test_length_is_exact_under_the_bundled_tokenizer(bundled: CountTokens, extra: int) -> None:
    writer = Writer(bundled)
    tokens = writer.least_tokens + extra
    assert bundled(writer.chat(tokens, random.Random(extra))) == tokens


def test_a_lead_has_its_length_without_the_template() -> None:
    rng = random.Random(0)
    for tokens in (1, 2, 30, 200):
        assert len(Writer(words).lead(tokens, rng).split()) == tokens


def test_history_comes_first_and_counts() -> None:
    rng, writer = random.Random(0), Writer(words)
    before = [*writer.chat(20, rng), {"role": "assistant", "content": "Very well."}]
    found = writer.chat(40, rng, history=before)
    assert found[:-1] == before
    assert words(found) == 40
    with pytest.raises(ValueError, match="below the 23 tokens"):
        writer.chat(22, rng, history=before)


def test_a_long_prompt_is_not_tokenized_again_for_each_attempt() -> None:
    seen: list[int] = []

    def counted(messages: Messages) -> int:
        seen.append(words(messages))
        return seen[-1]

    writer, rng = Writer(counted), random.Random(0)
    lead = writer.lead(4000, rng)
    for _ in range(10):
        writer.chat(5000, rng, lead)
    assert sum(n > 1000 for n in seen) <= 1 + 1 + 10  # the lead made, begun with, each prompt whole
