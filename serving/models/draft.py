"""A draft model for speculative decoding: a few layers of the target, trained to write like it.

It is a model folder that vLLM's `--speculative-config '{"method": "draft_model", ..}'` loads. A
line of the prompts is `{"messages": [..], "kind": ..}`; acceptance is also told by kind.

Leviathan et al. (2023) let a cheap model guess and the target check. Under greedy decoding a guess
is accepted when it is the target's own next token, so the acceptance rate is how often the two
agree on the target's text: it is measured here on prompts that were not trained on.

The draft keeps the target's tokenizer, embeddings and output matrix, its first layers and the last
one. Without training it almost never agrees with the target. Distillation (Hinton et al. 2015)
trains it on how probable each token was to the target, not only on which one the target chose, with
texts that the target wrote itself (Kim and Rush 2016), of the kind that will be served (Zhou et al.
2024, DistillSpec). The target's distribution is stored as its last hidden state, a vector of the
width: target and draft share the output matrix that turns it into a distribution.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from serving.models import making
from serving.models.making import MakerError
from serving.models.ngram_lookup import looked_up

ANSWER_TOKENS = 64  # of the target's, to each prompt
ANSWER_BATCH, BATCH = 64, 8
LEARNING_RATE, WARMUP = 2e-3, 0.1
OTHER_TOKENS = 2048  # of the vocabulary, besides those that the target wrote
LAYERS, EPOCHS, SEED = 3, 6, 0
MOST_HELD_OUT = 64  # a third of the prompts, but not more than these
WITHIN_TOKENS = (8, 16, 32, ANSWER_TOKENS)  # of an answer, over which acceptance is told apart
LOOKUP_GUESSES, LOOKUP_LEAST, LOOKUP_MOST = 3, 2, 4  # tokens guessed, and the n-gram's length


@dataclass(frozen=True)
class TargetAnswer:
    """The target's greedy answer to a prompt, and its last hidden states on both."""

    kind: str
    prompt: list[int]
    tokens: list[int]
    states: Any  # (tokens of prompt and answer but the last, width)

    @property
    def answer_states(self) -> Any:
        """The state before each token of the answer: (tokens, width)."""
        return self.states[len(self.prompt) - 1 :]


class Progress:
    """Prints how much of a stage is done, and about how long the rest takes."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def show(self, stage: str, done: int, total: int) -> None:
        """Print one line; `done` is at least 1."""
        left_s = (time.monotonic() - self.began) / done * (total - done)
        print(f"{stage}: {done} of {total}; about {left_s:.0f} s left", flush=True)


def answers(tokenizer: Any, model: Any, prompts: Sequence[dict[str, Any]]) -> list[TargetAnswer]:
    """Let the target answer all prompts; those of similar length share a batch.

    It goes on after its end token, as a server does that is asked to ignore it.
    """
    import torch

    rows = [(p["kind"], making.tokens_of(tokenizer, p["messages"])) for p in prompts]
    rows.sort(key=lambda row: len(row[1]))
    written, last, progress = list[TargetAnswer](), list[Any](), Progress()
    hook = model.base_model.norm.register_forward_hook(lambda *a: last.append(a[2]))
    for start in range(0, len(rows), ANSWER_BATCH):
        kinds, batch = zip(*rows[start : start + ANSWER_BATCH], strict=True)
        tokens = making.answer(model, batch, ANSWER_TOKENS, eos_token_id=-1).tolist()
        states, longest = torch.cat(last, dim=1), max(map(len, batch))
        last.clear()
        unpadded = [row[longest - len(p) :] for row, p in zip(states, batch, strict=True)]
        written += map(TargetAnswer, kinds, batch, tokens, unpadded)
        progress.show("prompts answered by the target", len(written), len(rows))
    hook.remove()
    return written


def prune(model: Any, layers: int) -> None:
    """Keep the first `layers` - 1 layers and the last one, with embeddings and output matrix."""
    keep(model, [*range(layers - 1), len(model.base_model.layers) - 1])


def keep(model: Any, places: Sequence[int]) -> None:
    """Keep the layers at these places, with embeddings and output matrix."""
    import torch

    config, body = model.config, model.base_model
    body.layers = torch.nn.ModuleList(body.layers[i] for i in places)
    for place, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = place  # its place in the KV cache
    config.num_hidden_layers = len(places)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in places]


def states(model: Any, batch: Sequence[TargetAnswer]) -> Any:
    """Compute the draft's last hidden states on the target's answers: (all tokens, width)."""
    return making.states(model, [a.prompt for a in batch], [a.tokens for a in batch])


def acceptance(
    model: Any, held_out: Sequence[TargetAnswer], first: int = ANSWER_TOKENS
) -> dict[str, float]:
    """Compute how often the draft's first guess is the target's token: by kind, and for `all`.

    Only the `first` tokens of each answer count: answers begin more predictably than they go on.
    """
    import torch

    right, matrix = dict[str, list[bool]](), model.get_output_embeddings().weight
    for start in range(0, len(held_out), BATCH):
        batch = [replace(a, tokens=a.tokens[:first]) for a in held_out[start : start + BATCH]]
        with torch.no_grad():
            guesses = (states(model, batch).to(matrix.dtype) @ matrix.T).argmax(-1).tolist()
        tokens = [(a.kind, token) for a in batch for token in a.tokens]
        for (kind, token), guess in zip(tokens, guesses, strict=True):
            for group in {kind, "all"}:
                right.setdefault(group, []).append(token == guess)
    return {group: sum(hits) / len(hits) for group, hits in sorted(right.items())}


class Lookup(TypedDict):
    """How copying from the context did on answers of one kind; both are shares from 0 to 1."""

    found: float  # of steps in which there was something to copy
    accepted: float | None  # of guesses that were checked; None where nothing was ever found


def lookup(held_out: Sequence[TargetAnswer], first: int = ANSWER_TOKENS) -> dict[str, Lookup]:
    """Decode the answers' `first` tokens again, with lookup, and tell by kind how it did.

    The first token of an answer comes with its prompt, and nothing is looked up for it. Guesses are
    checked up to the first wrong one; the share of these that is right is the probability that a
    forecast draws from.
    """
    right, checked, steps_with_guesses, steps = (Counter[str]() for _ in range(4))
    for answer in held_out:
        tokens, written = answer.tokens[:first], 1
        while written < len(tokens):
            context = [*answer.prompt, *tokens[:written]]
            guesses = looked_up(context, LOOKUP_GUESSES, LOOKUP_LEAST, LOOKUP_MOST)
            agreed = [g == t for g, t in zip(guesses, tokens[written:], strict=False)]
            accepted = agreed.index(False) if False in agreed else len(agreed)
            steps[answer.kind] += 1
            steps_with_guesses[answer.kind] += bool(guesses)
            right[answer.kind] += accepted
            checked[answer.kind] += min(accepted + 1, len(agreed))
            written += accepted + 1
    return {
        kind: Lookup(
            found=steps_with_guesses[kind] / n,
            accepted=right[kind] / checked[kind] if checked[kind] else None,
        )
        for kind, n in sorted(steps.items())
    }


def parts(model: Any) -> tuple[Any, ...]:
    """Return what is trained of a model: the layers and the last norm; freeze the rest."""
    model.requires_grad_(False)
    return model.base_model.layers, model.base_model.norm


def fit(
    trained: Sequence[Any],
    texts: Sequence[TargetAnswer],
    loss: Callable[[Sequence[TargetAnswer]], Any],
    epochs: int,
    learning_rate: float,
    seed: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    batch: int = BATCH,
) -> int:
    """Train modules, in float32, on texts; return the steps taken.

    `loss` computes that of a batch and its gradients.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(seed)
    weights = [p.requires_grad_() for part in trained for p in part.float().parameters()]
    steps = epochs * -(-len(texts) // batch)
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=WARMUP
    )
    for epoch in range(epochs):
        order = rng.sample(texts, len(texts))
        for start in range(0, len(order), batch):
            loss(order[start : start + batch])
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        after_epoch(epoch + 1)
    return steps


Guess = Callable[[Sequence[TargetAnswer]], tuple[Any, Any]]
"""Computes a batch's hidden states of what guesses, and the target's there: (guesses, width)."""


def towards_target(matrix: Any, texts: Sequence[TargetAnswer], guess: Guess) -> Callable[..., None]:
    """Return the loss towards the target's distribution (forward KL) over batches of these texts.

    `matrix` is the output matrix that both share: (vocabulary, width). The whole vocabulary would
    cost more than the layers. So the distribution covers the tokens that the texts hold and, drawn
    again at each step, a sample of the other tokens (Jean et al. 2015).
    """
    import torch

    written = torch.tensor([token for answer in texts for token in answer.tokens])

    def loss(batch: Sequence[TargetAnswer]) -> None:
        sampled = torch.randint(len(matrix), (OTHER_TOKENS,))
        rows = matrix[torch.cat([written, sampled]).unique().to(matrix.device)]
        drafted, of_target = ((hidden.to(rows.dtype) @ rows.T).float() for hidden in guess(batch))
        torch.nn.functional.kl_div(
            drafted.log_softmax(-1),
            of_target.log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        ).backward()

    return loss


def by_layers(model: Any) -> Guess:
    """Return how a draft of the target's own layers guesses the next tokens."""
    import torch

    return lambda batch: (states(model, batch), torch.cat([a.answer_states for a in batch]))


def taught_and_held_out(
    tokenizer: Any, model: Any, source: Path
) -> tuple[list[TargetAnswer], list[TargetAnswer]]:
    """Let the target answer the prompts of a file, and part the answers, always in the same way."""
    texts = answers(tokenizer, model, making.read_prompts(source))
    random.Random(SEED).shuffle(texts)
    cut = min(len(texts) // 3, MOST_HELD_OUT)
    return texts[cut:], texts[:cut]


def make(base: Path, out: Path, source: Path) -> dict[str, Any]:
    """Write the draft of a target. Raises MakerError where that has too few layers."""
    target_layers = making.read_config(base).get("num_hidden_layers", 0)
    if target_layers <= LAYERS:
        raise MakerError(
            f"{base.name} has {target_layers} layers, and its draft would have {LAYERS}: give a"
            " model with more"
        )
    print("loading the target", flush=True)
    tokenizer, model = making.load(base)
    taught, held_out = taught_and_held_out(tokenizer, model, source)
    prune(model, LAYERS)
    untrained = acceptance(model, held_out)["all"]
    print(f"before training it guesses {untrained:.0%} of the held-out tokens", flush=True)
    progress = Progress()

    def show(epoch: int) -> None:
        share = acceptance(model, held_out)["all"]
        progress.show(f"{share:.0%} of held-out tokens guessed; epochs", epoch, EPOCHS)

    loss = towards_target(model.get_output_embeddings().weight, taught, by_layers(model))
    steps = fit(parts(model), taught, loss, EPOCHS, LEARNING_RATE, SEED, show)
    model = model.bfloat16()
    within = {n: acceptance(model, held_out, n) for n in WITHIN_TOKENS}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "acceptance": within[ANSWER_TOKENS]["all"],
        "acceptance_within": within,
        "lookup_within": {n: lookup(held_out, n) for n in WITHIN_TOKENS},
        "acceptance_untrained": untrained,
        "layers": LAYERS,
        "params": model.num_parameters(),
        "steps": steps,
        "trained_on_tokens": sum(len(a.tokens) for a in taught),
        "seed": SEED,
    }
