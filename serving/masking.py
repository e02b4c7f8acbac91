"""Recognizes secrets, so that none is recorded or shown."""

from __future__ import annotations

import os
import re

PATTERN = (
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glsa_\w{30,}"
    r"|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})\b|Bearer [\w.-]{20,}|PRIVATE KEY-----"
)
"""Tokens of Hugging Face, GitHub, Grafana, OpenAI and Amazon, and keys in their usual envelopes."""
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_NAMED = re.compile(r"(?i)((?:api[-_]?key|token|secret|password|passwd)[=:\s]+)[^\s&\"']+")
_PATTERN = re.compile(PATTERN)


def masked(text: str) -> str:
    """Replace every secret in a text by `***`: tokens, users in addresses, values named as such."""
    return _NAMED.sub(r"\1***", _IN_ADDRESS.sub("***", _PATTERN.sub("***", text)))


def recordable(text: str) -> str:
    """Return a text as it may be recorded: secrets are masked, and the home folder is `~`.

    The home folder may be `/`, or not known at all: then no path is shortened.
    """
    home = os.path.expanduser("~").rstrip("/")
    return masked(text.replace(f"{home}/", "~/") if home else text)


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a secret."""
    return masked(text) != text
