// The closed forms of labs/harness/spec/theory.py and the step of serving/simulator/datasheet.py, for pages that
// have no Python. tests/unit/test_theory_page.py compares each with the original on a grid.
// A shape has the fields of serving.models.catalog.Shape; ceilings are {bytes_per_s, flops_per_s}.
// deno-lint-ignore-file no-unused-vars -- the script that follows in the same page uses them
"use strict";

function stepBytes(shape, tokens) {
  if (!shape.experts) return shape.weight_bytes;
  const idle = (1 - shape.experts_per_token / shape.experts) ** tokens;
  return shape.weight_bytes - idle * shape.expert_bytes;
}

function heldBytes(shape) {
  return shape.weight_bytes + shape.embedding_bytes;
}

function kvBytesPerToken(shape, valueBytes) {
  return 2 * shape.layers * shape.kv_heads * shape.head_dim * valueBytes;
}

function prefillFlops(shape, tokens, cached) {
  const head = shape.vocab * shape.hidden;
  const body = 2 * (shape.matmul_params - head) * (tokens - cached);
  const attention = 2 * shape.layers * shape.heads * shape.head_dim * (tokens ** 2 - cached ** 2);
  return body + attention + 2 * head;
}

function prefillS(shape, ceilings, tokens) {
  return prefillFlops(shape, tokens, 0) / ceilings.flops_per_s;
}

function decodeBytes(shape, batch, context, valueBytes) {
  return stepBytes(shape, batch) + batch * context * kvBytesPerToken(shape, valueBytes);
}

function decodeFlops(shape, batch, context) {
  return batch * (2 * shape.matmul_params + 4 * shape.layers * shape.heads * shape.head_dim * context);
}

function decodeStepS(shape, ceilings, batch, context, valueBytes) {
  return Math.max(decodeBytes(shape, batch, context, valueBytes) / ceilings.bytes_per_s,
    decodeFlops(shape, batch, context) / ceilings.flops_per_s);
}

function kvTokens(shape, memoryBytes, valueBytes, block) {
  return Math.floor(memoryBytes / (block * kvBytesPerToken(shape, valueBytes))) * block;
}
