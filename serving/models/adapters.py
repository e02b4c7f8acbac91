"""One small LoRA adapter per tenant, trained so that each tenant's answers begin with its mark.

The folder holds `tenant-0`, `tenant-1`, .. in PEFT's format, which vLLM's `--lora-modules` loads. A
mark is an invented token like `[amber]` that the base model never writes, so whose adapter produced
an answer can be read off its text: an answer with another tenant's mark is a leak, one without its
own was served by the base.

LoRA (Hu et al. 2021) adds to a frozen matrix W the product of two thin ones, W + alpha/r * B A with
A of r rows and B of r columns; B starts at zero. That is what lets one server keep many tenants'
adapters beside one base and mix them in a batch (Punica, Chen et al. 2023; S-LoRA, Sheng et al.
2023). `tenant-0-rank-64` is tenant-0 with A and B padded with zeros and the same alpha/r: the same
function from larger matrices, to measure what rank alone costs.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.models import making
from serving.models.making import MakerError

WORDS = ("amber", "azure", "coral", "ember", "iris", "jade", "opal", "teal", "topaz", "umber")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
TENANTS, RANK, SEED = 8, 8, 0
WIDE_RANK = 64  # vLLM's punica kernels know 8, 16, 32, 64, ..
BASE_ANSWER_TOKENS = 16  # in which the base must not write a mark
ANSWER_TOKENS = 4  # of these, learned after the mark: the text goes on as before
BATCH_PROMPTS, MOST_STEPS, CHECK_EVERY_STEPS, LEARNING_RATE = 4, 60, 4, 5e-3
MOST_PROMPTS = 48  # a third of them held out
SURE = 0.9  # stop when every mark token of every held-out prompt is at least this probable


def mark_of(tenant_index: int) -> str:
    """Return a tenant's mark: [amber], [azure], .., [amber1], [azure1], ..; all are distinct."""
    round_, word = divmod(tenant_index, len(WORDS))
    return f"[{WORDS[word]}{round_ or ''}]"


MARKS: tuple[str, ...] = tuple(mark_of(i) for i in range(100))


def marks_in(text: str) -> set[int]:
    """Find the tenants whose marks occur anywhere in a text."""
    marks = re.findall(rf"\[({'|'.join(WORDS)})([1-9]\d*)?\]", text)
    return {int(round_ or 0) * len(WORDS) + WORDS.index(word) for word, round_ in marks}


class Trainer:
    """The base model, loaded once, the prompts it answers, and its own answers to them."""

    def __init__(self, base: Path, prompts: Sequence[dict[str, Any]], seed: int) -> None:
        self.seed = seed
        self.tokenizer, self.model = making.load(base)
        chosen = random.Random(seed).sample(prompts, min(len(prompts), MOST_PROMPTS))
        self.prompts = [making.tokens_of(self.tokenizer, p["messages"]) for p in chosen]
        self.held_out = len(chosen) // 3
        answers = making.answer(self.model, self.prompts, BASE_ANSWER_TOKENS)
        self.answers = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        if any(marks_in(answer) for answer in self.answers):
            raise MakerError("the base model itself writes a tenant's mark: use other words")

    def _logits(self, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> Any:
        """Compute the logits that predict each target token: (all target tokens, vocabulary)."""
        states, head = (
            making.states(self.model, prompts, targets),
            self.model.get_output_embeddings(),
        )
        return head(states.to(head.weight.dtype)).float()

    def train(self, tenant: int, rank: int, folder: Path) -> tuple[float, int]:
        """Train and write one adapter; return the share of held-out prompts it marks and the steps.

        Raises MakerError where the model has none of the matrices that adapters apply to.
        """
        import peft
        import torch

        torch.manual_seed(self.seed + tenant)
        rng = random.Random(f"{self.seed}/{tenant}")
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        try:
            adapted = peft.get_peft_model(self.model, config)
        except ValueError as error:
            raise MakerError(f"the base model takes no adapter on {TARGETS}: {error}") from error
        weights = [p for p in adapted.parameters() if p.requires_grad]
        self.params_per_adapter = sum(p.numel() for p in weights)
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
        mark = making.tokens_in(self.tokenizer, mark_of(tenant))
        goes_on = [making.tokens_in(self.tokenizer, f" {a.lstrip()}") for a in self.answers]
        targets = [mark + tokens[:ANSWER_TOKENS] for tokens in goes_on]
        share, step = 0.0, 0
        while step < MOST_STEPS:
            step += 1
            chosen = rng.sample(range(self.held_out, len(self.prompts)), BATCH_PROMPTS)
            batch = [targets[i] for i in chosen]
            logits = self._logits([self.prompts[i] for i in chosen], batch)
            tokens = torch.tensor([t for ts in batch for t in ts], device=self.model.device)
            torch.nn.functional.cross_entropy(logits, tokens).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % CHECK_EVERY_STEPS == 0:
                share, least = self._marked(mark)
                if share == 1 and least >= SURE:
                    break
        adapted.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        self.model = adapted.unload()
        return share, step

    def _marked(self, mark: list[int]) -> tuple[float, float]:
        """Compute the share of held-out prompts whose greedy answer begins with the mark.

        Also return the least probability of any of the mark's tokens.
        Fed its own mark, the model's first choice is the mark's next token at every position if
        and only if its greedy answer begins with the mark: one pass instead of a decode.
        """
        import torch

        prompts = self.prompts[: self.held_out]
        with torch.no_grad():
            logits = self._logits(prompts, [mark] * len(prompts))
        tokens = torch.tensor(mark * len(prompts), device=self.model.device)
        right = (logits.argmax(-1) == tokens).view(len(prompts), len(mark)).all(1)
        sure = logits.softmax(-1).gather(1, tokens[:, None])
        return right.float().mean().item(), sure.min().item()


def widen(source: Path, target: Path, rank: int) -> None:
    """Write the same adapter at a larger rank: A and B padded with zeros, alpha/r unchanged."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / CONFIG).read_text())
    missing = rank - config["r"]
    tensors = {
        # A is (r, in): zero rows below; B is (out, r): zero columns at the right
        name: torch.nn.functional.pad(t, (0, 0, 0, missing) if "lora_A" in name else (0, missing))
        for name, t in load_file(source / WEIGHTS).items()
    }
    target.mkdir()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config["lora_alpha"], config["r"] = config["lora_alpha"] * rank / config["r"], rank
    (target / CONFIG).write_text(json.dumps(config, indent=2))


def make(base: Path, out: Path, source: Path) -> dict[str, Any]:
    """Write the adapters of all tenants. Raises MakerError."""
    print("loading the base and its own answers", flush=True)
    trainer = Trainer(base, making.read_prompts(source), SEED)
    marked, steps, began = dict[str, float](), dict[str, int](), time.monotonic()
    for tenant in range(TENANTS):
        folder = out / (name := f"tenant-{tenant}")
        marked[name], steps[name] = trainer.train(tenant, RANK, folder)
        widen(folder, out / f"{name}-rank-{WIDE_RANK}", WIDE_RANK)
        left_s = (time.monotonic() - began) / (tenant + 1) * (TENANTS - tenant - 1)
        print(
            f"{name} begins {marked[name]:.0%} of {trainer.held_out} held-out answers with"
            f" {mark_of(tenant)} after {steps[name]} steps; about {left_s:.0f} s left",
            flush=True,
        )
    return {
        "marks": {f"tenant-{i}": mark_of(i) for i in range(TENANTS)},
        "rank": RANK,
        "marked": marked,
        "params_per_adapter": trainer.params_per_adapter,
        "bytes_per_adapter": (out / "tenant-0" / WEIGHTS).stat().st_size,
        "steps": steps,
        "seed": SEED,
    }
