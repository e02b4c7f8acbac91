"""An EAGLE head for speculative decoding: one layer that goes on from the target's hidden states.

vLLM's `--speculative-config '{"method": "eagle", ..}'` loads it. Li et al. (2024, EAGLE) have the
draft see what the target thought, its last hidden state, beside the token that came of it: a layer
reads both and guesses the next hidden state, which the target's own output matrix turns into a
token. Each further guess is made from the one before. So a head is trained on its own guesses, too
(Li et al. 2025, EAGLE-3, "training-time test"), or it fails from the second position on.

It is trained as the draft model of `serving/models/draft.py` is, on the same answers and towards
the same distributions. All of it begins at random: the target's last layer would bring activations
a thousand times as large, which its last norm hides and no norm follows here. The layer lacks the
first norm, as vLLM's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.models import draft, making
from serving.models.draft import TargetAnswer

GUESSES = 2  # ahead, in training and in what is recorded of it
EPOCHS, LEARNING_RATE = 8, 2e-3  # four would take about as long as training the draft
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip


class Head:
    """The parts of a head: they share the target's embeddings and output matrix."""

    def __init__(self, model: Any) -> None:
        import torch
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama

        sizes = {name: getattr(model.config, name, None) for name in SIZES}
        self.config = LlamaConfig(
            **{name: size for name, size in sizes.items() if size is not None},
            num_hidden_layers=1,
            architectures=["LlamaForCausalLM"],
            tie_word_embeddings=True,
            attn_implementation="eager",
            dtype="bfloat16",
        )
        width = self.config.hidden_size
        model.requires_grad_(False)
        self.embeddings = model.get_input_embeddings()
        self.matrix = model.get_output_embeddings().weight
        self.rotary = modeling_llama.LlamaRotaryEmbedding(self.config).to(model.device)
        torch.manual_seed(draft.SEED)
        self.fc = torch.nn.Linear(2 * width, width, bias=False)
        self.layer = modeling_llama.LlamaDecoderLayer(self.config, 0)
        self.layer.input_layernorm = torch.nn.Identity()
        for part in self.trained:
            part.to(model.device)
            for matrix in (p for p in part.parameters() if p.dim() > 1):
                torch.nn.init.normal_(matrix, std=self.config.initializer_range)

    @property
    def trained(self) -> tuple[Any, ...]:
        return self.fc, self.layer

    def passes(self, batch: Sequence[TargetAnswer]) -> list[Any]:
        """Guess ahead from every token: of each guess, (texts, longest text - 1, width).

        The pair of a token and the target's state before it is at that state's place. A guess sees
        the pairs up to where its draft began, and the guesses of its own draft after them.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        texts = [torch.tensor(a.prompt + a.tokens) for a in batch]
        ids = pad_sequence(texts, batch_first=True)[:, 1:].to(self.matrix.device)
        in_bf16 = making.computing_type() == torch.bfloat16
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=in_bf16):
            tokens = self.embeddings(ids).float()
            hidden = pad_sequence([a.states.float() for a in batch], batch_first=True)
            inputs, guesses = list[Any](), list[Any]()
            for guess in range(GUESSES):
                inputs.append(self.fc(torch.cat([tokens, hidden], -1)))
                many = torch.cat(inputs, 1)
                places = torch.arange(ids.shape[1], device=ids.device).repeat(guess + 1)[None]
                out = self.layer(
                    many,
                    attention_mask=_mask(ids.shape[1], guess + 1).to(many),
                    position_embeddings=self.rotary(many, places),
                )[:, -ids.shape[1] :]
                guesses.append(out)
                hidden = torch.cat([hidden[:, :1], out[:, :-1].float()], 1)
        return guesses

    def guess(self, batch: Sequence[TargetAnswer]) -> tuple[Any, Any]:
        """Return the guessed states of all answers, and the target's there: (guesses, width)."""
        import torch

        guessed, of_target = list[Any](), list[Any]()
        for ahead, out in enumerate(self.passes(batch)):
            for row, answer in zip(out, batch, strict=True):
                first, last = len(answer.prompt) - 1 + ahead, len(answer.states) - 1
                guessed.append(row[first:last])
                of_target.append(answer.states[first + 1 :])
        return torch.cat(guessed), torch.cat(of_target)

    def accepted(self, held_out: Sequence[TargetAnswer], first: int) -> dict[str, list[float]]:
        """Compute the share of drafts accepted up to each position: by kind, and for `all`.

        A draft begins at each token of an answer's `first` ones that leaves room for it.
        """
        import torch

        right: dict[str, list[Any]] = {}
        for start in range(0, len(held_out), draft.BATCH):
            batch = held_out[start : start + draft.BATCH]
            with torch.no_grad():
                states = [guess.to(self.matrix.dtype) for guess in self.passes(batch)]
                tokens = [(hidden @ self.matrix.T).argmax(-1) for hidden in states]
            for row, answer in enumerate(batch):
                written = torch.tensor(answer.tokens[:first], device=self.matrix.device)
                drafts, began = len(written) - GUESSES, len(answer.prompt) - 1
                hits = torch.stack([
                    tokens[ahead][row, began + ahead :][:drafts] == written[1 + ahead :][:drafts]
                    for ahead in range(GUESSES)
                ])  # fmt: skip
                for group in (answer.kind, "all"):
                    right.setdefault(group, []).append(hits.cumprod(0))
        return {
            group: torch.cat(hits, 1).float().mean(1).tolist()
            for group, hits in sorted(right.items())
        }

    def save(self, out: Path) -> None:
        """Write what vLLM loads; it finds the embeddings to be the target's and shares them."""
        from safetensors.torch import save_file

        tensors = {f"layers.0.{name}": t for name, t in self.layer.state_dict().items()}
        tensors |= {"fc.weight": self.fc.weight, "embed_tokens.weight": self.embeddings.weight}
        weights = {name: t.detach().bfloat16().contiguous() for name, t in tensors.items()}
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(out)


def _mask(pairs: int, passes: int) -> Any:
    """Return 0 for what a pair of a pass sees of each pass, else -inf: (1, 1, all, all)."""
    import torch

    places = torch.arange(pairs)
    back = places[:, None] - places  # how far a pair lies behind the one that looks
    rows = []
    for looks in range(passes):
        sees = [back >= looks]  # of what the target wrote
        for guess in range(1, passes):
            sees.append((back == looks - guess) & (guess <= looks))
        rows.append(torch.cat(sees, 1))
    return torch.where(torch.cat(rows), 0.0, float("-inf"))[None, None]


def share_right(accepted: Sequence[float]) -> float:
    """Return the share of the guesses that are checked, each up to the first wrong one."""
    return sum(accepted) / (1 + sum(accepted[:-1]))


def make(base: Path, out: Path, source: Path) -> dict[str, Any]:
    """Write the head of a target. Raises MakerError."""
    making.require_dense(base, making.read_config(base))
    print("loading the target", flush=True)
    tokenizer, model = making.load(base)
    taught, held_out = draft.taught_and_held_out(tokenizer, model, source)
    head, progress = Head(model), draft.Progress()

    def show(epoch: int) -> None:
        shares = head.accepted(held_out, draft.ANSWER_TOKENS)["all"]
        told = ", ".join(f"{share:.0%}" for share in shares)
        progress.show(f"{told} of held-out drafts accepted so far; epochs", epoch, EPOCHS)

    untrained = head.accepted(held_out, draft.ANSWER_TOKENS)["all"]
    loss = draft.towards_target(head.matrix, taught, head.guess)
    steps = draft.fit(head.trained, taught, loss, EPOCHS, LEARNING_RATE, draft.SEED, show)
    head.save(out)
    within = {n: head.accepted(held_out, n) for n in draft.WITHIN_TOKENS}
    return {
        "acceptance": within[draft.ANSWER_TOKENS]["all"][0],
        "acceptance_untrained": untrained[0],
        "accepted_by_position": within,
        "acceptance_within": {
            n: {kind: share_right(shares) for kind, shares in by_kind.items()}
            for n, by_kind in within.items()
        },
        "layers": 1,
        "params": sum(p.numel() for part in head.trained for p in part.parameters()),
        "steps": steps,
        "trained_on_tokens": sum(len(a.tokens) for a in taught),
        "seed": draft.SEED,
    }
