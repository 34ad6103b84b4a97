"""How long a checkpoint holds a step, written while the training waits and beside it.

    python benchmarks/cpu_checkpoints.py [--d-model 512]
    torchrun --nproc-per-node 2 benchmarks/cpu_checkpoints.py --work FOLDER

A step is held while the trainer saves; the last checkpoint is not looked at. The time of all steps
says what the writing costs those beside it.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig
from blackmamba.model.size import parameters
from blackmamba.train import RunConfig, TrainConfig, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.origin import origin
from blackmamba.train.trainer import Trainer
from measure import arguments

_EVERY = 8


def main(
    repeats: int = 3,
    tiny: bool = False,
    work: Path | None = None,
    d_model: int = 512,
    steps: int = 33,
) -> None:
    """Print both ways; the first rank speaks. `work` is a folder that all ranks see."""
    if work is None:
        if "RANK" in os.environ:
            raise SystemExit("--work FOLDER: several processes need a folder that all of them see")
        with tempfile.TemporaryDirectory() as folder:
            main(repeats, tiny, Path(folder), d_model, steps)
        return
    speaks = os.environ.get("RANK", "0") == "0"
    d_model, steps = (16, 9) if tiny else (d_model, steps)
    model = ModelConfig(
        layers=("mamba", "moe") * 2, d_model=d_model, vocab_size=320, n_experts=8,
        d_expert=2 * d_model,
    )  # fmt: skip
    text = "corpus:bible"
    if tiny:
        work.mkdir(parents=True, exist_ok=True)
        text = str(work / "text.txt")
        Path(text).write_text("a b c\n" * 2000)
    found: dict[str, list[dict[str, float]]] = {"waits": [], "beside": []}
    for number in range(repeats):
        for way, cases in found.items():
            case = _measure(model, text, steps, way == "beside", work / f"{way}-{number}", speaks)
            cases.append(case)
    if not speaks:
        return
    count = parameters(model).total
    print(f"{count:,} parameters, a checkpoint every {_EVERY} of {steps} steps, {repeats} runs")
    facts: dict[str, Any] = {"parameters": count, "steps": steps, "repeats": repeats, "tiny": tiny}
    for way, cases in found.items():
        middle = {key: statistics.median(case[key] for case in cases) for key in cases[0]}
        print(
            f"  {way:<7} a step {middle['step_s']:.3f} s, held by a checkpoint for "
            f"{middle['held_s']:.3f} s; all steps {middle['all_s']:.2f} s"
        )
        facts[way] = middle
    print(
        json.dumps(
            {"benchmark": "cpu_checkpoints", "torch": torch.__version__, **origin(), **facts}
        )
    )


def _measure(
    model: ModelConfig, text: str, steps: int, is_async: bool, out: Path, speaks: bool
) -> dict[str, float]:
    """From the metrics of a run: each line says when its step was done."""
    train = TrainConfig(
        steps=steps, batch_size=4, seq_len=64, lr=1e-3, device="cpu", checkpoint_every=_EVERY,
        checkpoint_async=is_async, evaluate_seq_len=64, keep_checkpoints=1,
    )  # fmt: skip
    data = DataConfig(text=(text,), vocab_size=300, validation_fraction=0.001)
    held: list[float] = []
    save = Trainer._save

    def timed(self: Trainer) -> None:
        since = time.perf_counter()
        save(self)
        held.append(time.perf_counter() - since)

    Trainer._save = timed
    try:
        run(RunConfig(model=model, data=data, train=train), out)
    finally:
        Trainer._save = save
    if not speaks:
        return {}
    done = [row["seconds"] for row in read_metrics(out / "metrics.jsonl")][:-1]
    shutil.rmtree(out)
    return {
        "step_s": statistics.median(after - before for before, after in pairwise(done)),
        "held_s": statistics.median(held[:-1]),
        "all_s": done[-1] - done[0],
    }


if __name__ == "__main__":
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--work", type=Path, help="a folder that all ranks see")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--steps", type=int, default=33)
    main(**vars(parser.parse_args()))
