"""Compute how long one engine step takes, as a function of what is scheduled in it.

A step carries decoding requests (one token each, or a few where drafts are verified) and pieces of
prompts. Its time is put together from four parts that `serving/simulator/profiled_step.py` measures
on the serving device before any engine exists:

- `linear`: all layers' matrix products, norms and activations over the step's tokens. It holds the
  fixed cost of launching some hundreds of operations, the reading of the weights, and the
  arithmetic at the shapes in use, which a roofline takes apart and this does not.
- `head`: the output head over the rows that are sampled: one a request, and one a guess.
- `attention_pair_s`: a query token attending to a key, in prefill (compute).
- `attention_read_s`: a cached token read by a decoding request, in all layers (bandwidth).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field

from serving.hardware.reference_step import ReferenceStep

MOST_VERIFIED = 8
"""Tokens of a piece that attention reads the cache for as it does for one: guesses, mostly."""
MASKED_IN_TURN = 128
"""vLLM 0.32 fills the masks of up to so many sequences one after another."""


def mask_threads(sequences: int, processors: int) -> int:
    """Count the threads that fill the masks of so many sequences.

    Source: `StructuredOutputManager` of vllm/v1/structured_output/__init__.py.
    """
    return 1 if sequences <= MASKED_IN_TURN else max(1, min(processors // 2, 8))


class Masking(BaseModel, frozen=True, extra="forbid"):
    """Seconds that an engine takes over an answer's structure, on the host.

    `compile_s` passes before a request can be scheduled; `mask_s` is filling the mask of one
    sequence for one token, while the device computes the step.
    """

    compile_s: float
    mask_s: float
    processors: int  # of the host


class AttentionTimes(BaseModel, frozen=True, extra="forbid"):
    """Seconds that attention takes in all layers, at the sizes at which its kernels were timed."""

    batches: tuple[int, ...]  # requests that decode together
    contexts: tuple[int, ...]  # tokens of each, the new one included
    decode_s: tuple[tuple[float, ...], ...]  # by batch, then by context
    requests_each: float = 1.0  # a request counts as so many of the tables'
    lengths: tuple[int, ...]  # tokens of a prompt
    prefill_s: tuple[float, ...]

    def times(self, factor: float) -> AttentionTimes:
        """Return the times where everything takes `factor` times as long."""
        return self.model_copy(
            update={
                "decode_s": tuple(tuple(factor * s for s in row) for row in self.decode_s),
                "prefill_s": tuple(factor * s for s in self.prefill_s),
            }
        )

    def seconds(self, pieces: Sequence[Piece]) -> float:
        """Add up a step's attention: of all that decode together, and of each piece of a prompt.

        A few tokens, as where guesses are verified, read as much of the cache as one does.
        """
        contexts = [context + 1 for tokens, context in pieces if tokens <= MOST_VERIFIED]
        launch_s = self.prefill_s[0]  # one launch serves a step
        computing_s = 0.0
        if len(contexts) < len(pieces):
            prompts = (piece for piece in pieces if piece.tokens > MOST_VERIFIED)
            computing_s = sum(map(self._computing_s, prompts))
        if not contexts:
            return launch_s + computing_s
        return self._decode_s(len(contexts), sum(contexts) / len(contexts)) + computing_s

    def _decode_s(self, requests: int, context_tokens: float) -> float:
        batch = requests * self.requests_each
        above = min(max(bisect_right(self.batches, batch), 1), len(self.batches) - 1)
        rows = self.decode_s[above - 1 : above + 1]
        around = [_at(context_tokens, self.contexts, row) for row in rows]
        return _at(batch, self.batches[above - 1 : above + 1], around)

    def _computing_s(self, piece: Piece) -> float:
        """Compute a piece's time beside the launch: the whole prompt's so far, less what was done.

        Query tokens attend to what is cached and to those before them, a trapezium of pairs, which
        is the difference of two triangles. It takes at least as long as reading what is cached.
        """
        end = piece.context_tokens + piece.tokens
        done_s = self._whole_s(piece.context_tokens) if piece.context_tokens else self.prefill_s[0]
        read_s = self._decode_s(1, end) - self.decode_s[0][0]
        return max(read_s, self._whole_s(end) - done_s)

    def _whole_s(self, tokens: int) -> float:
        last = self.lengths[-1]
        if tokens > last:
            return self.prefill_s[-1] * (tokens / last) ** 2
        return _at(tokens, self.lengths, self.prefill_s)


class StepTimes(BaseModel, frozen=True, extra="forbid"):
    """The measured parts of a step. Sizes ascend, and each has its seconds at the same place."""

    tokens: tuple[int, ...]
    linear_s: tuple[float, ...]
    rows: tuple[int, ...]
    head_s: tuple[float, ...]
    attention_pair_s: float = 0.0
    attention_read_s: float = 0.0
    # in the place of these two, where kernels were timed
    attention: Annotated[AttentionTimes | None, Field(exclude_if=lambda times: times is None)] = (
        None
    )
    scheduling_s: float = 0.0  # of the engine itself, around the model's forward pass
    wander: float = 1.0  # the middle time of a part over its least, as the machine's speed wandered
    # the machine itself, timed in turn with the parts; None on a GPU and in older runs
    reference: Annotated[ReferenceStep | None, Field(exclude_if=lambda step: step is None)] = None

    def times(self, factor: float) -> StepTimes:
        """Return the step times of a machine on which everything takes `factor` times as long."""
        return StepTimes(
            tokens=self.tokens,
            linear_s=tuple(factor * s for s in self.linear_s),
            rows=self.rows,
            head_s=tuple(factor * s for s in self.head_s),
            attention_pair_s=factor * self.attention_pair_s,
            attention_read_s=factor * self.attention_read_s,
            attention=self.attention.times(factor) if self.attention else None,
            scheduling_s=factor * self.scheduling_s,
            wander=self.wander,
            reference=self.reference,
        )

    def factor_over(self, other: StepTimes) -> float | None:
        """Tell how many times as long as there everything takes here; None where parts differ."""
        factor = self.linear_s[0] / other.linear_s[0]
        near = other.times(factor)._all_s
        alike = len(near) == len(self._all_s) and all(map(math.isclose, near, self._all_s))
        return factor if alike else None

    @property
    def _all_s(self) -> list[float]:
        parts = [self.attention_pair_s, self.attention_read_s, self.scheduling_s]
        if self.attention:
            parts += chain(self.attention.prefill_s, *self.attention.decode_s)
        return [*self.linear_s, *self.head_s, *parts]

    def seconds(self, step: Step) -> float:
        """Add up the seconds of a step; 0 for an empty one.

        Between measured sizes the time is interpolated, beyond the largest extrapolated.
        """
        if not step.pieces:
            return 0.0
        attention_s = (
            self.attention.seconds(step.pieces)
            if self.attention
            else sum(map(self._attention_s, step.pieces))
        )
        tokens = sum([tokens for tokens, _ in step.pieces])
        return (
            _at(tokens, self.tokens, self.linear_s)
            + _at(step.rows, self.rows, self.head_s)
            + attention_s
            + self.scheduling_s
        )

    def _attention_s(self, piece: Piece) -> float:
        """Compute the attention of a piece: reading what is cached or computing, the longer.

        A few tokens, as where guesses are verified, read as much of the cache as one does.
        """
        read_s = piece.context_tokens * self.attention_read_s
        if piece.tokens == 1:
            return read_s
        pairs = piece.tokens * (piece.context_tokens + (piece.tokens + 1) / 2)
        return max(read_s, pairs * self.attention_pair_s)

    def request_s(
        self, batch: int, prompt_tokens: int, output_tokens: float, cached_tokens: int = 0
    ) -> float:
        """Compute how long a request lasts where `batch` of its kind are always in flight.

        Each of its tokens takes a step in which all decode, and meanwhile everybody's prompt is
        prefilled once, but for `cached_tokens`. The context is the prompt and half of the output,
        its mean over a request's life.
        """
        context = int(prompt_tokens + output_tokens / 2)
        step_s = self.seconds(Step([Piece(1, context)] * batch, batch))
        prompt_s = self.seconds(Step([Piece(prompt_tokens - cached_tokens, cached_tokens)], 1))
        return output_tokens * step_s + batch * prompt_s


class Piece(NamedTuple):
    """A request's share of a step: `tokens` new ones after `context_tokens` in the cache."""

    tokens: int
    context_tokens: int


@dataclass(frozen=True)
class Step:
    """Describes what the engine computes in one step."""

    pieces: Sequence[Piece]
    rows: int  # positions with logits: of a prompt's last piece one, of an earlier one none


def _at(size: float, sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Interpolate the seconds at a size; beyond the largest, follow the last slope."""
    if size <= sizes[0] or len(sizes) < 2:
        return seconds[0]
    below = min(bisect_right(sizes, size), len(sizes) - 1) - 1
    slope = (seconds[below + 1] - seconds[below]) / (sizes[below + 1] - sizes[below])
    return slope * (size - sizes[below]) + seconds[below]
