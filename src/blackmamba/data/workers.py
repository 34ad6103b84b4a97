"""Worker processes that do blocks of work and give the results in order.

A server process without threads imports what the work needs once and forks the workers, each when
there is a first item for it: starting Python and importing torch in every one takes seconds each.
Each worker is fed by a pipe of its own and ends when that pipe does, so that none outlives a main
process that was killed.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

from blackmamba.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
_Worker = tuple[ForkServerProcess, Any]  # and our end of its pipe
_AHEAD = 2  # blocks that a worker has at once


@contextlib.contextmanager
def in_order(
    make: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...], n_workers: int
) -> Generator[Callable[[Iterable[T]], Iterator[R]]]:
    """A `map` over worker processes; the results come in the order of the items.

    Args:
        make: gives a worker, from `arguments`, what it does to an item; importable by name.
        arguments: are sent to each worker once.
        n_workers: at most; no more than items are started. 1 works in this process.
    Raises:
        DataError: a worker died.
    """
    if n_workers == 1:
        yield lambda items: map(make(*arguments), items)
        return
    context = multiprocessing.get_context("forkserver")  # a copy of us, with threads, may hang
    context.set_forkserver_preload([make.__module__])
    workers: list[_Worker] = []
    try:
        yield lambda items: _deal(
            workers, n_workers, partial(_start, context, make, arguments), items
        )
    finally:
        for _, pipe in workers:
            pipe.close()
        for process, _ in workers:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _start(context: ForkServerContext, *work: Any) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, *work), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _deal(
    workers: list[_Worker], n_workers: int, start: Callable[[], _Worker], items: Iterable[T]
) -> Iterator[R]:
    """Item i goes to worker i modulo their number."""
    waiting: collections.deque[int] = collections.deque()
    for number, item in enumerate(items):
        worker = number % n_workers
        if worker == len(workers):
            workers.append(start())
        if len(waiting) == _AHEAD * n_workers:
            yield _ask(workers[waiting.popleft()])
        _ask(workers[worker], item)
        waiting.append(worker)
    while waiting:
        yield _ask(workers[waiting.popleft()])


def _ask(worker: _Worker, *item: Any) -> Any:
    """Send an item, or without one receive a result."""
    process, pipe = worker
    try:
        return pipe.send(*item) if item else pipe.recv()
    except (EOFError, OSError):
        process.join(30)
        raise DataError(
            f"a worker process ended (status {process.exitcode}; -9: killed, perhaps for lack of "
            "memory); what is written is kept, run the same again to go on"
        ) from None


def _work(
    pipe: Connection, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many workers as cores
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:  # beside the work, so that neither side waits for the other to read
        try:
            while True:
                items.put((pipe.recv(),))
        except (EOFError, OSError):
            items.put(None)

    threading.Thread(target=receive, daemon=True).start()
    work = make(*arguments)
    while (item := items.get()) is not None:
        try:
            pipe.send(work(*item))
        except (BrokenPipeError, ConnectionError):
            return
