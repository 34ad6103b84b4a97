"""How fast the ladder's small networks train on one GPU: alone, and several processes at once.

The four networks of docs/paper.md and the better recipe at its rungs, random tokens, weights and
text; a step is the trainer's, recorded as a graph but for the optimizer, the host one step ahead.
Networks so small do not fill a card: "kernels" is the time that a step's kernels run, the rest of
"ms" are gaps between them or the host, whose own time is "host". In a crowd each process trains
another of the networks, from one moment to another, and what counts is all their tokens together.

    python benchmarks/gpu_ladder.py [--rungs 256x8 384x12 640x16] [--batches 32 16 64]
    python benchmarks/gpu_ladder.py --seconds 95       # no row is begun later
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import torch

from blackmamba.analyse import ablations
from blackmamba.analyse.architectures import NAMES, four_architectures
from blackmamba.model import BlackMamba
from blackmamba.model.size import parameters, training_flops_per_token
from blackmamba.train import TrainConfig, train_step
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.origin import origin
from blackmamba.train.step import CapturedGradients, GradientsOfBatch
from gpu_measure import DEVICE, machine
from gpu_training import kernel_classes

NETWORKS = (*NAMES, ablations.BETTER)
WARM = 4  # steps before those that count
_barriers: dict[int, Any] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network to be trained for a while."""

    network: str
    rung: tuple[int, int]
    batch: int
    length: int = 512
    vocab_size: int = 4096
    seconds: float = 1.5
    """That count; 0: it is only made ready."""
    crowd: int = 1
    """Processes that begin together."""
    profile: bool = False


def main(
    repeats: int = 1,
    tiny: bool = False,
    rungs: Sequence[tuple[int, int]] = ((256, 8), (384, 12), (640, 16)),
    batches: Sequence[int] = (32, 16, 64),
    crowds: Sequence[int] = (3, 6),
    seconds: float = 95.0,
) -> None:
    """Print a row for each network alone and for each crowd; `repeats` stretches what counts."""
    began = time.monotonic()
    shape: dict[str, Any] = {"seconds": 1.5 * repeats}
    if tiny:
        rungs, batches, crowds = ((32, 1),), (2,), (2,)
        shape = {"length": 16, "vocab_size": 64, "seconds": 1e-3}
    facts = machine()
    print("gpu_ladder: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"  {'rung':<8}{'batch':>5} {'network':<17}{'ms':>8}{'kernels':>9}{'number':>8}"
          f"{'host':>7}{'tokens/s':>11}{'TFLOP/s':>9}")  # fmt: skip
    found: list[dict[str, Any]] = []
    with _pool(max(crowds), (1, *crowds), tiny) as pool:
        if not tiny:  # compiled once, side by side
            ready = [Case(n, r, min(batches), seconds=0) for r in rungs for n in NETWORKS]
            list(pool.map(_train, ready))
            print(f"  compiled after {time.monotonic() - began:.0f} s", flush=True)
        for batch, rung in itertools.product(batches, rungs):
            looked_into = DEVICE.type == "cuda" and batch == batches[0]
            for network in NETWORKS:
                case = Case(network, rung, batch, profile=looked_into, **shape)
                found += _rows(pool, [case], began + seconds)
            for k in crowds:
                crowd = [Case(NETWORKS[i % 5], rung, batch, crowd=k, **shape) for i in range(k)]
                found += _rows(pool, crowd, began + seconds)
    record = {"benchmark": "gpu_ladder", **facts, **origin(), "tiny": tiny, "cases": found}
    print(json.dumps(record))


def _pool(workers: int, crowds: Sequence[int], in_threads: bool) -> Executor:
    """Processes that stay, so that each starts but once."""
    if in_threads:
        return ThreadPoolExecutor(workers, "", _begin, ({k: threading.Barrier(k) for k in crowds},))
    context = multiprocessing.get_context("spawn")
    barriers = {k: context.Barrier(k) for k in crowds}
    return ProcessPoolExecutor(workers, context, _begin, (barriers,))


def _begin(barriers: dict[int, Any]) -> None:
    _barriers.update(barriers)


def _rows(pool: Executor, cases: Sequence[Case], end: float) -> list[dict[str, Any]]:
    """Run one case or a crowd of them, if there is time, and print its row."""
    if time.monotonic() > end:
        return []
    case, k = cases[0], len(cases)
    try:
        ones = list(pool.map(_train, cases))
    except (torch.OutOfMemoryError, threading.BrokenBarrierError):
        print(f"  {_rung(case):<8}{case.batch:>5}  out of memory", flush=True)
        return []
    row: dict[str, Any] = {"rung": _rung(case), "batch": case.batch, "crowd": k}
    row |= {"tokens_s": round(sum(one["tokens_s"] for one in ones))}
    row |= {"tflop_s": round(sum(one["tflop_s"] for one in ones), 1)}
    name = case.network if k == 1 else f"{k} processes"
    cells = f"{'':>8}{'':>9}{'':>8}{'':>7}"
    if k == 1:
        own = ones[0]
        row |= {key: own[key] for key in own if key not in row}
        kernels = f"{own.get('kernels_ms', ''):>9}{own.get('kernels', ''):>8}"
        cells = f"{own['ms']:>8.2f}{kernels}{own['host_ms']:>7.2f}"
    else:  # what each needs in there for a step
        row["each_ms"] = {f"{i} {one['network']}": one["ms"] for i, one in enumerate(ones)}
    print(
        f"  {_rung(case):<8}{case.batch:>5} {name:<17}{cells}"
        f"{row['tokens_s']:>11,}{row['tflop_s']:>9.1f}",
        flush=True,
    )
    return [row]


def _rung(case: Case) -> str:
    return f"{case.rung[0]}x{case.rung[1]}"


def _train(case: Case) -> dict[str, Any]:
    """In a process of the pool: train a network for a while."""
    stepper = Stepper(case)
    for _ in range(WARM):
        stepper.step()
    stepper.wait()
    if case.seconds == 0:
        return {}
    _barriers[case.crowd].wait(60)  # one may have had no memory
    steps, began, waited = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < case.seconds:
        stepper.step()
        waiting = time.perf_counter()
        stepper.wait_for_last()
        waited += time.perf_counter() - waiting
        steps += 1
    stepper.wait()
    took = time.perf_counter() - began
    tokens_s = steps * case.batch * case.length / took
    config, ms = stepper.model.config, 1e3 * took / steps
    found: dict[str, Any] = {
        "network": case.network, "active": parameters(config).active,
        "ms": round(ms, 2), "host_ms": round(1e3 * (took - waited) / steps, 2),
        "tokens_s": tokens_s,
        "tflop_s": training_flops_per_token(config, case.length) * tokens_s / 1e12,
    }  # fmt: skip
    if case.profile:
        classes, kernels = kernel_classes(stepper.step)
        found["kernels_ms"] = round(sum(classes.values()), 2)
        found["kernels"] = sum(number for _, _, number in kernels)
        found["classes"] = {name: round(ms, 2) for name, ms in classes.items() if ms >= 0.005}
    return found


class Stepper:
    """A network and what one step of training it is."""

    def __init__(self, case: Case):
        """Made as the trainer makes it."""
        four = four_architectures(*case.rung, case.vocab_size)
        is_better = case.network == ablations.BETTER
        paper = four["blackmamba"]
        config = ablations.better(paper) if is_better else four[case.network]
        settings = TrainConfig(
            steps=1000, batch_size=case.batch, seq_len=case.length, lr=1e-3, dtype="bfloat16",
            weights="master", **ablations.optimizer_of(case.network),
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = BlackMamba(config, device=DEVICE, compute_dtype=torch.bfloat16).train()
        masters = narrow_weights(self.model, torch.bfloat16)
        self._optimizer = build_optimizer(self.model, settings, masters)
        is_captured = DEVICE.type == "cuda"
        self._gradients = (CapturedGradients if is_captured else GradientsOfBatch)(self.model)
        ids = torch.randint(0, config.n_tokens, (case.batch, case.length + 1), device=DEVICE)
        self._batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self._outcomes: list[Any] = []

    def step(self) -> None:
        """Start one."""
        inputs, labels = self._batch
        self._outcomes.append(
            train_step(
                self.model, self._optimizer, inputs, labels, lr=1e-3, grad_clip=1.0,
                gradients=self._gradients,
            )
        )  # fmt: skip

    def wait_for_last(self) -> None:
        """Until the step before the newest is done, as the trainer does."""
        while len(self._outcomes) > 1:
            float(self._outcomes.pop(0).loss)

    def wait(self) -> None:
        """Until all are done."""
        while self._outcomes:
            float(self._outcomes.pop(0).loss)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes; a core for each
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="times 1.5 s for each row")
    parser.add_argument("--rungs", nargs="+", default=["256x8", "384x12", "640x16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 16, 64])
    parser.add_argument("--crowds", nargs="+", type=int, default=[3, 6])
    parser.add_argument("--seconds", type=float, default=95.0, help="begin no row after so many")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args()
    sizes = [rung.split("x") for rung in args.rungs]
    pairs = [(int(width), int(depth)) for width, depth in sizes]
    main(args.repeats, args.tiny, pairs, args.batches, args.crowds, args.seconds)
