"""The processes of a run: who this one is, and what they tell each other outside of the model.

torchrun starts the processes and names them in the environment. Without it there is one, which has
no process group and waits for nobody.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from blackmamba.errors import BlackMambaError, ConfigError, PeerError, TrainingError
from blackmamba.train.parallel.watch import Watch

T = TypeVar("T")

_POLL_S = 0.05


@dataclasses.dataclass
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    node_size: int = 1
    """Ranks on each machine."""
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None
    """What all can read and write; None: there is no process group."""
    watch: Watch | None = None
    is_restart: bool = False
    """torchrun has started the ranks again after one of them failed."""
    _shared: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_group(self) -> bool:
        """Whether there is a process group, be it of one."""
        return self.store is not None

    def at(self, place: str) -> None:
        """This rank has come so far; see `Watch`."""
        if self.watch is not None:
            self.watch.at(place)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_told(self, number: float) -> list[float]:
        """What every rank gives here, in their order; all call it."""
        told = torch.zeros(self.size, dtype=torch.float64)
        told[self.rank] = number
        return self.sum_(told).tolist()

    def first(self, make: Callable[[], T]) -> T:
        """What the first rank makes; the others wait for it, however long it takes.

        Args:
            make: called on the first rank alone; gives what JSON holds.
        Raises:
            PeerError: on the others, where it raised an error of ours.
        """
        if self.store is None or self.size == 1:
            return make()
        key = f"shared/{self._shared}"
        self._shared += 1
        if self.is_first:
            try:
                value = make()
            except BlackMambaError as error:
                self.store.set(key, json.dumps({"error": type(error).__name__}))
                raise
            self.store.set(key, json.dumps({"value": value}))
            return value
        while not self.store.check([key]):
            time.sleep(_POLL_S)
        told: dict[str, Any] = json.loads(self.store.get(key))
        if "error" in told:
            raise PeerError(f"rank 0 failed with {told['error']}")
        return told["value"]

    def first_then_all(self, make: Callable[[], T]) -> T:
        """`make` on every rank, but nowhere before the first rank is done with it.

        Raises:
            PeerError: on the others, where it failed on the first.
        """
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if made else make()

    def together(self, make: Callable[[], T]) -> T:
        """`make` on every rank; all of them fail if one does.

        Raises:
            PeerError: it failed on another rank, which raises its own error.
        """
        failed = torch.zeros(1)
        try:
            value = make()
        except BlackMambaError:
            failed += 1
            self.sum_(failed)
            raise
        self.sum_(failed)
        if failed:
            raise PeerError("another rank failed")
        return value


@contextlib.contextmanager
def join(device: torch.device, timeout_s: float) -> Generator[Ranks]:
    """Be one of the ranks that torchrun has started, or the only process.

    Args:
        device: "cuda" for the GPU of this rank, or "cpu".
        timeout_s: how long ranks wait for each other.
    Raises:
        ConfigError: there are more ranks than GPUs on this machine.
        TrainingError: contact with another rank was lost; names it.
        PeerError: the same, and that rank has said why it left.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(device=device)
        return
    environment = os.environ
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local = int(environment.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank} is number {local + 1} on its machine, which has "
                f"{torch.cuda.device_count()} GPUs; start at most one process for each"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    # The watch is to notice first, as it knows more.
    timeout = datetime.timedelta(seconds=1.2 * timeout_s + 30)
    shared, watched = (next(dist.rendezvous("env://", timeout=timeout))[0] for _ in range(2))
    attempt = _agreed_attempt(shared, rank, size)
    store = dist.PrefixStore(attempt, shared)
    watch = Watch(dist.PrefixStore(f"{attempt}/watch", watched), rank, size, timeout_s)
    ranks = Ranks(
        rank=rank,
        size=size,
        node_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        device=device,
        store=store,
        watch=watch,
        is_restart=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0,
    )
    is_good = False
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        yield ranks
        is_good = True
    except BlackMambaError:
        store.set("failed", str(rank))
        raise
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        with _patience():
            missing = watch.missing()
            if store.check(["failed"]):
                raise PeerError("another rank failed") from None
        raise TrainingError(f"rank {rank} lost contact: {missing}") from None
    finally:
        watch.close()
        if dist.is_initialized() and (is_good or device.type == "cpu"):
            dist.destroy_process_group()  # of GPUs it would wait for ranks that are gone


def _agreed_attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name that the ranks which run now have in common, and no earlier ones had.

    torchrun keeps the store when it starts ranks anew, with all that the ranks before have left in
    it. So each rank shows a word that it has just made up; the first answers to every word that
    it sees, old ones too, until all who live have heard the answer.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"blackmamba/word/{rank}", word)
        while not store.check([f"blackmamba/answer/{word}"]):
            time.sleep(_POLL_S)
        attempt = store.get(f"blackmamba/answer/{word}").decode()
        store.set(f"{attempt}/heard/{rank}", "")
        return attempt
    attempt = f"blackmamba/{word}"
    waiting = set(range(1, size))
    while waiting:
        for other in tuple(waiting):
            if store.check([f"{attempt}/heard/{other}"]):
                waiting.remove(other)
            elif store.check([f"blackmamba/word/{other}"]):
                heard = store.get(f"blackmamba/word/{other}").decode()
                store.set(f"blackmamba/answer/{heard}", attempt)
        time.sleep(_POLL_S)
    return attempt


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed, not what it was to carry; gloo has no class for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextlib.contextmanager
def _patience() -> Generator[None]:
    """Let torchrun, which asks all ranks to end when one does, wait until we know which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_first() -> bool:
    """Whether this process is the one that speaks, by what torchrun says of it."""
    return os.environ.get("RANK", "0") == "0"
