"""What times attention for a lab, with a step split at a shorter context and fewer times."""

from __future__ import annotations

from serving.hardware import attention

if __name__ == "__main__":
    attention.SPLIT_TOKENS, attention.SPLIT_PASSES = 512, 3
    attention.main()
