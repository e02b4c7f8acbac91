"""The writer of prompts for the model that is served."""

from __future__ import annotations

from jinja2 import TemplateError

from loadtests.prompts import Writer
from serving.models import catalog


def writer_of(model: catalog.Model) -> Writer:
    """Load the model's tokenizer. Raises ModelError where it is damaged or has no chat template."""
    try:
        return Writer.of(str(model.path))
    except TemplateError as error:
        raise catalog.ModelError(
            f"the chat template of {model.name} refuses a user's message ({error}): give a model"
            " that answers chats with MODEL="
        ) from error
    except Exception as error:  # tokenizers raises nothing more special
        raise catalog.ModelError(
            f"the tokenizer in {model.path} cannot be read ({str(error).strip()[:200]}): download"
            " the model again, or give another with MODEL="
        ) from error
