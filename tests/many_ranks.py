"""Starts functions on several ranks, as torchrun would, without importing torch anew for each.

A rank tells how far it is by `say`. Where nothing more is heard of the ranks, the test fails with
what each said last and with the stacks of its threads.
"""

import faulthandler
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOADED = ["torch", "blackmamba.train", "blackmamba.train.parallel.spread",
              "blackmamba.train.parallel.checkpoint", "torch._dynamo"]  # fmt: skip
# The last one is what torch imports for its first optimizer.
_POLL_S, _DUMP_S = 0.5, 30.0
_clock = time.monotonic
_logger = logging.getLogger(__name__)
_told: Callable[[str], None] | None = None  # of a rank


def say(place: str) -> None:
    """Let the test know how far this rank is; nothing where there is no rank."""
    if _told is not None:
        _told(place)


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120,
    said: Callable[[int, str], None] | None = None,
    may_die: Collection[int] = (),
) -> list:
    """What function(*args) gives on each rank; it is importable, all values can be pickled.

    Args:
        size: how many ranks.
        function, args: what they do.
        timeout_s: so long may all of them be silent; see `say`.
        said: is told what which rank says.
        may_die: ranks whose result is None if they end without one.
    Raises:
        AssertionError: a rank failed, died or was too slow; names it, with its traceback.
    """
    context = _forkserver()
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # torchrun has one
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / str(rank) for rank in range(size)]
        readers: dict[Any, int] = {}
        processes: list[Any] = []
        for rank, stack in enumerate(stacks):
            reader, writer = context.Pipe(duplex=False)
            options = (rank, size, store.port, writer, stack, function, args)
            processes.append(context.Process(target=_child, args=options, daemon=True))
            processes[-1].start()
            writer.close()
            readers[reader] = rank
        found: dict[int, Any] = {}
        places = ["has not begun"] * size
        begun = heard = _clock()
        try:
            while readers:
                for reader in connection.wait(list(readers), _POLL_S):
                    rank, heard = readers[reader], _clock()
                    try:
                        kind, value = reader.recv()
                    except EOFError:
                        processes[rank].join()
                        if rank in may_die:
                            found[rank] = None
                            del readers[reader]
                            continue
                        status = processes[rank].exitcode
                        message = f"rank {rank} ended with status {status}: {places[rank]}"
                        stack = stacks[rank].read_text() if stacks[rank].exists() else ""
                        raise AssertionError(f"{message}\n{stack}".rstrip()) from None
                    if kind == "said":
                        places[rank] = value
                        _logger.info("%.1f s: rank %d: %s", heard - begun, rank, value)
                        if said is not None:
                            said(rank, value)
                        continue
                    assert kind == "good", f"rank {rank}:\n{value}"
                    found[rank] = value
                    del readers[reader]
                if readers and _clock() - heard > timeout_s:
                    reports = _reports(sorted(readers.values()), places, processes, stacks)
                    raise AssertionError(f"no word for {timeout_s:g} s\n{reports}")
        finally:
            for process in processes:
                process.join(timeout=5 if len(found) == size else 0)
                process.kill()
    return [found[rank] for rank in range(size)]


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) gives in a process of its own, which is no rank; or its exit status.

    Raises:
        AssertionError: it failed; with its traceback.
    """
    context = _forkserver()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_lone, args=(writer, function, args), daemon=True)
    process.start()
    writer.close()
    try:
        kind, value = reader.recv()
    except EOFError:
        process.join()
        return process.exitcode
    process.join()
    assert kind == "good", value
    return value


def _lone(results: connection.Connection, function: Callable[..., Any], args: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    try:
        results.send(("good", function(*args)))
    except BaseException:
        results.send(("bad", traceback.format_exc()))


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _reports(
    ranks: Sequence[int], places: Sequence[str], processes: Sequence[Any], stacks: Sequence[Path]
) -> str:
    """What each of these ranks said last, and where its threads are."""
    ranks = [rank for rank in ranks if stacks[rank].exists()]  # others know no signal yet
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    end = time.monotonic() + _DUMP_S
    while time.monotonic() < end and not all(_is_whole(stacks[rank]) for rank in ranks):
        time.sleep(0.05)
    known = {rank: stacks[rank].read_text() for rank in ranks}
    return "\n".join(
        f"rank {rank}: {place}\n{known[rank]}" for rank, place in enumerate(places) if rank in known
    )


def _is_whole(stack: Path) -> bool:
    """The thread that was interrupted comes last."""
    _, current, frames = stack.read_text().partition("Current thread")
    return bool(current) and frames.count("\n") > 1


def _child(
    rank: int,
    size: int,
    port: int,
    results: connection.Connection,
    stack: Path,
    function: Callable[..., Any],
    args: Any,
) -> None:
    global _told

    def told(place: str) -> None:
        results.send(("said", place))

    _told = told
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    with stack.with_suffix(".tmp").open("w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        faulthandler.enable(file)
        stack.with_suffix(".tmp").rename(stack)  # from here on the signal is known
        say("begins")
        try:
            results.send(("good", function(*args)))
        except BaseException:
            results.send(("bad", traceback.format_exc()))
