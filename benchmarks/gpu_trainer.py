"""What the trainer takes of a step on a GPU: `blackmamba train` beside the step alone, in one run.

The trainer's tokens a second are those of its metrics, the median over steps after the first few,
with the experts' load recorded as often as the recipes do. The step alone is that of
gpu_training.py. Weights are random; validation and checkpoints do not count.

    python benchmarks/gpu_trainer.py [--preset blackmamba-1.5b] [--rows 16] [--steps 60]
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import torch

from blackmamba.data import DataConfig
from blackmamba.presets import presets
from blackmamba.train import Progress, RunConfig, TrainConfig, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.origin import origin
from gpu_measure import DEVICE, machine
from gpu_training import measure

_WARM = 8  # steps that are left out


class _Enough(KeyboardInterrupt):
    """Ends a run without its checkpoint, which is no part of a step."""


class _Stop(Progress):
    def __init__(self, after: int):
        self._after = after

    def on_step(self, row: dict[str, object]) -> None:
        """Called at the end of each step."""
        if row["step"] == self._after:
            raise _Enough


def main(
    preset: str = "blackmamba-1.5b",
    rows: int = 16,
    length: int = 2048,
    steps: int = 60,
    recompute: str = "cheap",
    tiny: bool = False,
) -> None:
    """Print both rates and the trainer's share."""
    if tiny:
        preset, rows, length, steps = "tiny", 2, 16, 12
    with_trainer = _trainer(preset, rows, length, steps, recompute)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    alone = measure(preset, rows, length, "master", recompute, "float32", False, 10, False)
    share = 1 - with_trainer / alone["tokens_s"]
    print(
        f"{preset}, {rows} rows of {length}: {with_trainer:,.0f} tokens/s in the trainer, "
        f"{alone['tokens_s']:,.0f} of the step alone: the trainer takes {share:.2%}"
    )
    found = {"preset": preset, "rows": rows, "length": length, "recompute": recompute, "tiny": tiny}
    found |= {"trainer_tokens_s": with_trainer, "step_tokens_s": alone["tokens_s"], "share": share}
    print(json.dumps({"benchmark": "gpu_trainer", **machine(), **origin(), **found}))


def _trainer(preset: str, rows: int, length: int, steps: int, recompute: str) -> float:
    """Median tokens a second of the trainer's own metrics."""
    model = dataclasses.replace(presets[preset], unused_vocab=0)
    train = TrainConfig(
        steps=steps + 1, batch_size=rows, seq_len=length, lr=1e-4, warmup_steps=10,
        dtype="bfloat16", weights="master", recompute=recompute, log_every=50,
    )  # fmt: skip
    data = DataConfig(text=("corpus:python-stdlib",), vocab_size=min(1024, model.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with contextlib.suppress(_Enough):
            run(RunConfig(model=model, data=data, train=train), out, progress=_Stop(steps))
        found = [row["tokens_per_s"] for row in read_metrics(out / "metrics.jsonl")]
    return statistics.median(found[_WARM:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recompute", default="cheap")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args()
    main(args.preset, args.rows, args.length, args.steps, args.recompute, args.tiny)
