"""Write the files of what trials send side by side, in processes that end with this one.

Threads would not help, as most of the work is Python's own; and this process has threads by then,
so that it must not be forked. Each process loads the tokenizer, which takes seconds: where that is
not made up for, the files are written here, one after another.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from labs.harness.running.side_process import guarded, last_line
from labs.harness.spec import Lab, LabError
from loadtests.prompts import Writer
from loadtests.workload import Workload
from loadtests.writing import Done, Order, write
from serving.processes.process import Process

START_S = 3.0  # of a process, until its tokenizer is loaded
Written = Callable[[Order], None]


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processes_for(files_s: Sequence[float], cores: int) -> int:
    """Choose how many processes write files that take one core so long; 1: this one alone."""
    count = min(cores, len(files_s))
    return count if START_S + _side_by_side_s(files_s, count) < sum(files_s) else 1


def takes_s(files_s: Sequence[float], cores: int) -> float:
    """Estimate how long it takes to write files that take one core so long, in seconds."""
    count = processes_for(files_s, cores)
    return sum(files_s) if count == 1 else START_S + _side_by_side_s(files_s, count)


def lab_takes_s(lab: Lab, cores: int) -> float:
    """Estimate how long it takes to write what a lab sends in its own repeats, in seconds."""
    repeats = range(1, lab.repeats + 1)
    orders = [order_of(lab, w, r, model="", path=Path()) for w in lab.workloads for r in repeats]
    return takes_s([order.takes_s for order in orders], cores)


def _side_by_side_s(files_s: Sequence[float], count: int) -> float:
    """Return the least that it can take: a file is written by one process."""
    return max(sum(files_s) / count, *files_s) if count else 0.0


def order_of(lab: Lab, workload: Workload, repeat: int, model: str, path: Path) -> Order:
    """Order the file of what all variants are sent in a repeat, to a model of this name."""
    return Order(
        workload=workload,
        requests=lab.requests_of(workload),
        seed=lab.draw_seed(repeat),
        model=model,
        path=path,
    )


def write_files(orders: Sequence[Order], writer: Writer, model: Path, written: Written) -> None:
    """Write a file for each order, and call `written` with each that is there.

    The tokenizer of the folder `model` is the writer's. Raises LabError where a workload cannot be
    written, and OSError.
    """
    files_s = [order.takes_s for order in orders]
    count = processes_for(files_s, usable_cores())
    if count == 1:
        for order in orders:
            with _refusals(order):
                write(order, writer)
            written(order)
        return
    longest_first = [orders[n] for n in sorted(range(len(orders)), key=lambda n: -files_s[n])]
    with contextlib.ExitStack() as stack:
        argv = (sys.executable, "-m", "loadtests.writing", str(model))
        processes = [stack.enter_context(guarded("writer", argv)) for _ in range(count)]
        for order, done in _take_turns(processes, longest_first):
            with _refusals(order):
                if done.refused is not None:
                    raise ValueError(done.refused)
                if done.errno is not None:
                    raise OSError(done.errno, os.strerror(done.errno), done.filename)
            written(order)


@contextlib.contextmanager
def _refusals(order: Order) -> Iterator[None]:
    """Name the workload that cannot be written."""
    try:
        yield
    except ValueError as error:
        raise LabError(f"workload {order.workload.name}: {error}") from error


def _take_turns(
    processes: Sequence[Process], orders: Sequence[Order]
) -> Iterator[tuple[Order, Done]]:
    """Give each process an order as soon as it has none; yield what became of each order."""
    waiting = iter(orders)
    with selectors.DefaultSelector() as selector:

        def give_next(process: Process) -> None:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its line is missing
                if order := next(waiting, None):
                    selector.register(process.stdout, selectors.EVENT_READ, (process, order))
                    process.stdin.write(order.model_dump_json() + "\n")
                else:
                    process.stdin.close()  # so that all end at one time

        for process in processes:
            give_next(process)
        while selector.get_map():
            for key, _ in selector.select():
                process, order = key.data
                selector.unregister(process.stdout)
                if not (line := process.stdout.readline()):
                    process.wait()
                    raise LabError(f"the prompts could not be written: {last_line(process)}")
                yield order, Done.model_validate_json(line)
                give_next(process)
