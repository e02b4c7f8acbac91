"""A fake vLLM: the same API and metric names, a known latency law, and a record of what it sent.

It stands in for the engine so that a lab runs end to end in seconds, and it is the truth that a
client's clock is held against: `time.monotonic()` is system-wide on Linux, so its stamps and those
of a client on the same machine can be subtracted. Linux only, 127.0.0.1 only.

The law is continuous batching, simulated. A step serves every running sequence, at most
`--max-num-seqs`; others wait, first come first served, for a step to end. A step lasts

    step_s + step_per_seq_s * batch + prefill_per_token_s * (prompt tokens it prefills)

times a factor that varies as a machine's speed does (`Noise`, off by default), and ends with one
chunk of `--tokens-per-chunk` tokens for each sequence, or with its first token
for one whose prompt is now prefilled. Steps follow each other on an absolute schedule, so lateness
never adds up. As in vLLM

- a step has a budget of `--max-num-batched-tokens`: running sequences take theirs first, a prompt
  that does not fit in what is left comes in pieces (`--no-enable-chunked-prefill`: it waits);
- a prompt's full blocks stay in a prefix cache, apart for every adapter and `cache_salt`, and are
  not prefilled again (`--no-enable-prefix-caching` turns that off);
- when the KV cache is full, the last sequence is preempted: it waits and is prefilled anew. The
  blocks of `--kv-cache-memory-bytes` follow from the model's config.json and the cache's type;
- with `--speculative-config` each sequence drafts in every step after its first, and each drafted
  token is accepted with `--acceptance`, as long as all before it were. Drafting takes no time;
- a chat's tokens are those of the served model's tokenizer, where its folder has one, else words;
- beyond `--max-num-queued-reqs` requests, or prompts of `--max-num-queued-tokens` before their
  first token, a request gets a 503, is counted and leaves no line in the log;
- with `--scheduling-policy priority` the lowest `priority` of those that wait is served first;
- a request for several answers (`n`) is as many requests, each with a line in the log;
- a batch holds at most `--max-loras` adapters, and others wait for a slot. An adapter's answers
  begin with what its folder's `mark.txt` says, as if it had been trained to.

With `--programmed` there is no scheduler: chunk i of a request is due `ttft_s + i * gap_s` after
its arrival, and `stall_s` later from the middle one on, from the body's own

    "truth": {"ttft_s": 0.1, "gap_s": 0.01, "tokens_per_chunk": 1, "stall_s": 0}

`--log` gets one JSON line a request: `index` (its X-Request-Id, else its number), `model`,
`received` (when it was parsed), `scheduled`, `n_in`, `n_cached`, `n_out`, `finish` (stop, length,
abort, error),
`stream`, `chunks` as [[time, tokens], ...] (stamped just before the write; of a request that does
not stream, when its tokens were ready), and beside each chunk `due` (when the law wanted it),
`batch` and `prefilled` (of its step). Lines appear as requests end and all are there once the
process has ended, except after SIGKILL; what was under way then ends as "abort". Shapes and
buckets are those of vLLM 0.32.

A module for each part, which imports only those above it:

    connection    HTTP/1.1, as much as clients use
    alarm         calls back at absolute times
    law           how long a step lasts, and how many drafted tokens it accepts
    request       a completion under way: what was asked and what was sent
    answers       vLLM's answers, streamed and whole
    metrics       vLLM's counters, gauges and histograms
    kv_cache      its blocks, and the prefixes that stay in them
    scheduler     continuous batching, or each request by its own program
    request_log   the record of what was sent
    engine        what holds them together
    api           vLLM's routes, and requests read from JSON
    options       the command line

Start it with `python -m tests.fake.engine` from the root of the checkout; `--help` lists its
options.
"""
