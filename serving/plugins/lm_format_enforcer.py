"""Lets lm-format-enforcer find two classes, which it imports from where they were before.

lm-format-enforcer 0.11.3, the version that vLLM 0.26 to 0.32 require, takes `MistralTokenizer` from
a module that vLLM has no more, and `PreTrainedTokenizerBase` from one that transformers 5 keeps for
other names alone. Both classes are elsewhere in the same packages. Without them vLLM's own backend
of that name fails at its first import, although all that it needs the classes for is to ask what
kind of tokenizer it has. Where mistral-common is not installed, as with a lean bundle
(`serving/bundle.py`), there is no `MistralTokenizer` anywhere, and no tokenizer is of that kind: an
empty class then answers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

NAME = "lm-format-enforcer"  # of `--structured-outputs-config`
AS_OTHERS = {"LMFE_STRICT_JSON_FIELD_ORDER": "1", "LMFE_MAX_CONSECUTIVE_WHITESPACES": "1"}
"""Its own environment variables, by which it takes about what vLLM's other backends take: keys in
the schema's order, and little white space. With none it would take none within strings either."""
MOVED = {  # class -> the module that it is imported from, and the one that has it
    "MistralTokenizer": ("vllm.transformers_utils.tokenizer", "vllm.tokenizers.mistral"),
    "PreTrainedTokenizerBase": (
        "transformers.tokenization_utils",
        "transformers.tokenization_utils_base",
    ),
}


def offer_moved_classes() -> None:
    """Answer an import of each class from its former module, where that does not have it.

    vLLM calls this in each of its processes (`serving/plugins/metadata`), the study of masks before
    it times the backends. A module that is no more is stood in for; it imports the one that has
    the class when it is asked for it, and has an empty class where that one cannot be imported.
    """
    for name, (former, present) in MOVED.items():
        if former in sys.modules or importlib.util.find_spec(former):
            module = importlib.import_module(former)
            if not hasattr(module, name):
                setattr(module, name, getattr(importlib.import_module(present), name))
        else:
            sys.modules[former] = _stand_in(former, name, present)


def _stand_in(former: str, name: str, present: str) -> ModuleType:
    """Make a module of one class, which it imports when it is asked for it.

    Where the class's own module lacks what it imports, nothing can be an instance of it: the class
    is then an empty one.
    """
    empty = type(name, (), {})

    def moved(wanted: str) -> Any:
        if wanted != name:
            raise AttributeError(f"{former} is no more, and only its {name} is offered here")
        try:
            return getattr(importlib.import_module(present), name)
        except ImportError:
            return empty

    module = ModuleType(former, "Stands for a module that is no more.")
    vars(module)["__getattr__"] = moved
    return module
