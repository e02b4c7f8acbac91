"""Writes the files of what trials send, in this process or in one that takes orders.

`python -m loadtests.writing MODEL_FOLDER` loads the folder's tokenizer, reads an order from each
line of its standard input, and prints a line for each that is done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from loadtests import plan
from loadtests.prompts import Writer
from loadtests.workload import Workload

TOKENS_PER_S = 2e6  # of prompts that one core of a server's CPU writes, word by word (`pieces.py`)
REQUEST_TOKENS = 250  # that are written in the time that each request takes beside its prompt


class Order(BaseModel, frozen=True, extra="forbid"):
    """A file that is to be written: the first requests of a workload for one repeat."""

    workload: Workload
    requests: int
    seed: int
    model: str  # by the name that the engine serves it
    path: Path

    @property
    def takes_s(self) -> float:
        """Estimate how long one core takes to write it.

        Measured: 0.3 ms for a prompt of 128 tokens, 1.2 ms for 2,048 and 5 ms for 8,000. It is less
        where long prompts share most of their text, and more with a tokenizer that is not asked for
        words.
        """
        lengths = self.workload.lengths(self.requests, self.seed)[:: self.workload.copies]
        return sum(prompt + REQUEST_TOKENS for prompt, _ in lengths) / TOKENS_PER_S


class Done(BaseModel, frozen=True, extra="forbid"):
    """What became of an order: nothing is said of a file that was written."""

    refused: str | None = None  # the workload cannot be written, and why
    errno: int | None = None  # of the operating system
    filename: str | None = None


def write(order: Order, writer: Writer) -> None:
    """Write a file. Raises ValueError where the workload cannot be written, and OSError."""
    requests = order.workload.requests(order.requests, order.seed, writer)
    plan.write_requests(order.path, requests, order.model)


def take_orders(orders: Iterable[str], writer: Writer) -> Iterable[Done]:
    """Write the file of each order in turn, and say what became of it."""
    for line in orders:
        try:
            write(Order.model_validate_json(line), writer)
        except ValueError as error:
            yield Done(refused=str(error))
        except OSError as error:
            yield Done(errno=error.errno, filename=error.filename and str(error.filename))
        else:
            yield Done()


if __name__ == "__main__":
    for done in take_orders(sys.stdin, Writer.of(sys.argv[1])):
        print(done.model_dump_json(), flush=True)
