"""Starts functions on several ranks, as torchrun would, without importing torch anew for each."""

import multiprocessing
import os
import queue
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_PRELOADED = ["torch", "blackmamba.train", "blackmamba.train.parallel.spread",
              "blackmamba.train.parallel.checkpoint"]  # fmt: skip


def on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list:
    """What function(*args) gives on each rank; it is importable, all values can be pickled.

    Raises:
        AssertionError: a rank failed or was too slow; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # torchrun has one
    results = context.Queue()
    processes = [
        context.Process(
            target=_child, args=(rank, size, store.port, results, function, args), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < size:
            rank, is_good, value = results.get(timeout=timeout_s)
            assert is_good, f"rank {rank}:\n{value}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(found)} of {size} came to an end") from None
    finally:
        for process in processes:
            process.join(timeout=5 if len(found) == size else 0)
            process.kill()
    return [found[rank] for rank in range(size)]


def _child(
    rank: int, size: int, port: int, results: Any, function: Callable[..., Any], args: Any
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
