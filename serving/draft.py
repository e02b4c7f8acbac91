"""A draft model for speculative decoding: a few layers of the target, taught to write like it.

`python -m serving.draft TARGET_FOLDER OUT_FOLDER PROMPTS_JSONL` writes a model folder that vLLM's
`--speculative-config '{"method": "draft_model", ..}'` loads. A line of the prompts is
`{"messages": [..]}`, with an optional `"kind"` by which acceptance is also told apart.

Leviathan et al. (2023) let a cheap model guess and the target check. Under greedy decoding a guess
is accepted when it is the target's own next token, so the acceptance rate is how often the two
agree on the target's text: it is measured here on prompts that were not trained on.

The draft keeps the target's tokenizer, embeddings and output matrix, its first layers and the last
one. Cut out like that it agrees with the target nearly never. Distillation (Hinton et al. 2015)
teaches it: not which token the target chose but how probable it found each one, on texts that the
target wrote itself (Kim and Rush 2016), of the kind that will be served (Zhou et al. 2024,
DistillSpec). The target's distribution is kept as its last hidden state, a vector of the width:
target and draft share the output matrix that turns it into one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import making
from serving.making import MakerError

ANSWER_TOKENS = 64  # of the target's, to each prompt
ANSWER_BATCH, BATCH = 64, 8
LEARNING_RATE, WARMUP = 2e-3, 0.1
OTHER_TOKENS = 2048  # of the vocabulary, besides those that the target wrote
LEAST_PROMPTS, MOST_HELD_OUT = 12, 64  # a third held out, but not more than these


@dataclass(frozen=True)
class Answer:
    """The target's greedy answer, and its last hidden state before each of the tokens."""

    kind: str
    prompt: list[int]
    tokens: list[int]
    states: Any  # (tokens, width)


class Clock:
    """Says what is done, and about how long the rest of this stage takes."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def say(self, what: str, done: int, of: int) -> None:
        left_s = (time.monotonic() - self.began) / done * (of - done)
        print(f"{what}: {done} of {of}; about {left_s:.0f} s left", flush=True)


def answers(tokenizer: Any, model: Any, prompts: Sequence[dict[str, Any]]) -> list[Answer]:
    """What the target writes. It goes on after its end token, as a server told to ignore it does.

    Prompts of about one length share a batch.
    """
    import torch

    rows = [(p.get("kind", "text"), making.tokens_of(tokenizer, p["messages"])) for p in prompts]
    rows.sort(key=lambda row: len(row[1]))
    found, last, clock = list[Answer](), list[Any](), Clock()
    hook = model.base_model.norm.register_forward_hook(lambda *a: last.append(a[2][:, -1]))
    for start in range(0, len(rows), ANSWER_BATCH):
        kinds, batch = zip(*rows[start : start + ANSWER_BATCH], strict=True)
        written = making.answer(model, batch, ANSWER_TOKENS, eos_token_id=-1).tolist()
        states = torch.stack(last, dim=1)
        last.clear()
        found += map(Answer, kinds, batch, written, states)
        clock.say("prompts answered by the target", len(found), len(rows))
    hook.remove()
    return found


def prune(model: Any, layers: int) -> None:
    """Keep the first layers and the last one. Embeddings and output matrix stay as they are."""
    import torch

    config, body = model.config, model.base_model
    kept = [*range(layers - 1), len(body.layers) - 1]
    body.layers = torch.nn.ModuleList(body.layers[i] for i in kept)
    for place, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = place  # its place in the KV cache
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def states(model: Any, batch: Sequence[Answer]) -> Any:
    return making.states(model, [a.prompt for a in batch], [a.tokens for a in batch])


def acceptance(model: Any, held_out: Sequence[Answer]) -> dict[str, float]:
    """The share of the target's tokens that the draft's first guess is: by kind, and of all."""
    import torch

    right, matrix = dict[str, list[bool]](), model.get_output_embeddings().weight
    for start in range(0, len(held_out), BATCH):
        batch = held_out[start : start + BATCH]
        with torch.no_grad():
            guesses = (states(model, batch).to(matrix.dtype) @ matrix.T).argmax(-1).tolist()
        tokens = [(a.kind, token) for a in batch for token in a.tokens]
        for (kind, token), guess in zip(tokens, guesses, strict=True):
            for group in {kind, "all"}:
                right.setdefault(group, []).append(token == guess)
    return {group: sum(found) / len(found) for group, found in sorted(right.items())}


def distil(
    model: Any, taught: Sequence[Answer], held_out: Sequence[Answer], epochs: int, seed: int
) -> int:
    """Train the layers towards the target's distribution (forward KL); returns the steps taken.

    The vocabulary would cost more than the layers: the distribution is taken over the tokens that
    the target wrote and, anew at each step, a sample of the others (Jean et al. 2015).
    """
    import torch

    torch.manual_seed(seed)
    rng, clock, matrix = random.Random(seed), Clock(), model.get_output_embeddings().weight
    model.requires_grad_(False)
    parts = (model.base_model.layers, model.base_model.norm)
    weights = [p.requires_grad_() for part in parts for p in part.float().parameters()]
    steps = epochs * -(-len(taught) // BATCH)
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=WARMUP
    )
    written = torch.tensor([token for answer in taught for token in answer.tokens])
    for epoch in range(epochs):
        order = rng.sample(taught, len(taught))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            others = torch.randint(len(matrix), (OTHER_TOKENS,))
            rows = matrix[torch.cat([written, others]).unique().to(matrix.device)]
            wanted = torch.cat([a.states for a in batch]) @ rows.T
            guessed = states(model, batch).to(rows.dtype) @ rows.T
            torch.nn.functional.kl_div(
                guessed.float().log_softmax(-1),
                wanted.float().log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            ).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        share = acceptance(model, held_out)["all"]
        clock.say(f"{share:.0%} of held-out tokens guessed; epochs", epoch + 1, epochs)
    return steps


def make(target: Path, out: Path, prompts: Path, layers: int, epochs: int, seed: int) -> None:
    """The draft's folder, complete or absent."""
    with making.folder(out) as half:
        of = making.read_config(target).get("num_hidden_layers", 0)
        if not 0 < layers < of:
            raise MakerError(f"--layers {layers} is not fewer than the target's {of}, or none")
        chats, began = making.read_prompts(prompts, LEAST_PROMPTS), time.monotonic()
        print("loading the target", flush=True)
        tokenizer, model = making.load(target)
        texts = answers(tokenizer, model, chats)
        random.Random(seed).shuffle(texts)
        cut = min(len(texts) // 3, MOST_HELD_OUT)
        held_out, taught = texts[:cut], texts[cut:]
        prune(model, layers)
        untrained = acceptance(model, held_out)["all"]
        print(f"cut out and untrained, it guesses {untrained:.0%} of held-out tokens", flush=True)
        steps = distil(model, taught, held_out, epochs, seed)
        model = model.bfloat16()
        by_kind = acceptance(model, held_out)
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        about = {
            "acceptance": by_kind.pop("all"),
            "acceptance_by_kind": by_kind,
            "acceptance_untrained": untrained,
            "layers": layers,
            "params": model.num_parameters(),
            "steps": steps,
            "trained_on_tokens": sum(len(a.tokens) for a in taught),
            "seconds": round(time.monotonic() - began, 1),
            "seed": seed,
        }
        (half / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{about['acceptance']:.0%} of held-out tokens are guessed", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.draft", description=__doc__)
    for name in ("target", "out", "prompts"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="0: cut out, and not trained")
    parser.add_argument("--seed", type=int, default=0)
    making.run(make, parser, argv)


if __name__ == "__main__":
    main()
