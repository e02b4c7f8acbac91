"""Recognizes secrets, so that none is recorded or shown."""

from __future__ import annotations

import os
import re

from serving.plugins import guard

PATTERN = (
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glsa_\w{30,}"
    r"|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})\b|Bearer [\w.-]{20,}|PRIVATE KEY-----"
)
"""Tokens of Hugging Face, GitHub, Grafana, OpenAI and Amazon, and keys in their usual envelopes."""
MARKS = (
    "hf_",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glsa_",
    "sk-",
    "AKIA",
    "Bearer ",
    "PRIVATE KEY-----",
)
"""All that `PATTERN` finds holds one of them, and these are found in a fraction of the time."""
_IN_ADDRESS = r"(?<=://)[^/@\s]+(?=@)"
_SURE = r"(?:api[-_]?key|secret|password|(?<!/etc/)passwd|passphrase)"
_LIKELY = r"(?:token|(?<![a-z])key)"  # which also name what is none: a count, <s>
_OPENS = r"[\[({]*\\*[\"']?"
_IS = rf"\\*[\"']?\s*[=:]\s*{_OPENS}"  # api_key=.., "api_key": "..", \"api_key\": [\"..
_SAID = rf"\\*[\"']?=\s*{_OPENS}|\\*[\"']\s*:\s*{_OPENS}|:(?=\S){_OPENS}"  # not as prose has it
_PLAIN = r"(?!-?[\d.]+(?![^\s&\"',;)\]}])|<)"  # neither a number alone nor a <place>
_THEN = r"[\"']?\s+(?!-)[\"']?"  # --api-key ..
_FLAG = rf"(?<![\w-])--?[\w.-]*(?:{_SURE}{_THEN}|{_LIKELY}{_THEN}{_PLAIN})"
_NAMED = (
    rf"(?P<name>(?i:{_SURE}{_IS}|token:\s+{_PLAIN}|{_LIKELY}(?:{_SAID}){_PLAIN}|{_FLAG}))"
    r"(?:(?<=\")[^\"]+|(?<=')[^']+|[^\s&\"']+)"
)
SECRETS = f"(?:{PATTERN}|{_IN_ADDRESS})|{_NAMED}"
"""All that `masked` replaces; the group `name` is what stays before a value."""
KEEPS_NAME = r"\g<name>***"
_SECRETS = re.compile(SECRETS)
LEAST_KEY = 6  # characters; a shorter key, such as EMPTY, is a word that texts may hold


def masked(text: str) -> str:
    """Replace every secret in a text by `***`: tokens, users in addresses, values named as such."""
    return _SECRETS.sub(KEEPS_NAME, text)


def without_key(text: str) -> str:
    """Replace the key that this process sends to servers, which may send it back, by `***`."""
    key = guard.key()
    return text.replace(key, "***") if len(key) >= LEAST_KEY else text


def tellable(text: str) -> str:
    """Return what a server or a log says as it may be recorded and shown: without secrets."""
    return masked(without_key(text))


def recordable(text: str) -> str:
    """Return a text as it may be recorded: secrets are masked, and the home folder is `~`.

    The home folder may be `/`, or not known at all: then no path is shortened.
    """
    home = os.path.expanduser("~").rstrip("/")
    return masked(text.replace(f"{home}/", "~/") if home else text)


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a secret."""
    return masked(text) != text
