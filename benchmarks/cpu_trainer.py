"""What the trainer takes of a step on the CPU, beside the step itself.

The step itself: gradients of the batch, clipping, the optimizer. All else that `blackmamba train`
does from one step to the next counts as the trainer's: batches, norms by part, the experts' load,
outliers, averaged weights, metrics, loggers. Validation and checkpoints do not.

    python benchmarks/cpu_trainer.py [--repeats 60] [--only recipe everything]

Parts, each a run of `repeats` steps of the demo's recipe:
    recipe      as it is, but for log_every: 10 in place of 50
    everything  and with a moving average of the weights, outliers skipped, TensorBoard
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from blackmamba.train import RunConfig, load_recipe, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.mixed import MixedAdamW
from blackmamba.train.step import GradientsOfBatch
from measure import arguments, print_header, print_json, print_row

PARTS = ("recipe", "everything")
_WARM = 5  # steps that are left out


def main(repeats: int = 60, tiny: bool = False, only: Sequence[str] = PARTS) -> None:
    """Measure the parts that `only` names and print what they give."""
    print_header("The trainer beside the step, on the CPU")
    found: dict[str, object] = {"repeats": repeats, "tiny": tiny}
    for part in only:
        step, rest = measure(part, repeats, tiny)
        share = sum(rest) / (sum(step) + sum(rest))
        found[part] = {"step_s": statistics.median(step), "share": share}
        print_row(part, f"{100 * share:.2f} % of a step of {statistics.median(step):.3f} s")
    print_json("cpu_trainer", **found)


def measure(part: str, repeats: int, tiny: bool) -> tuple[list[float], list[float]]:
    """Seconds of each step itself, and of all else up to the next."""
    options: dict[str, Any] = {
        "steps": _WARM + repeats, "warmup_steps": 0, "evaluate_every": 0, "checkpoint_every": 0,
        "log_every": 10, "loggers": (),
    }  # fmt: skip
    if part == "everything":
        options |= {
            "ema_decay": 0.999, "spikes": "skip", "spike_window": 2, "spike_threshold": 1e6,
            "loggers": ("tensorboard",),
        }  # fmt: skip
    spent: list[float] = []
    originals = GradientsOfBatch.__call__, MixedAdamW.update, torch.optim.AdamW.step
    clip = torch.nn.utils.clip_grads_with_norm_

    def timed(call: Callable[..., Any], begins: bool) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - since
            spent.append(seconds) if begins else spent.append(spent.pop() + seconds)
            return result

        return inner

    GradientsOfBatch.__call__ = timed(originals[0], True)
    MixedAdamW.update = timed(originals[1], False)  # with native kernels; clips, too
    torch.optim.AdamW.step = timed(originals[2], False)
    torch.nn.utils.clip_grads_with_norm_ = timed(clip, False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = recipe(Path(folder), tiny)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, **options))
            run(config, Path(folder) / "run")
            rows = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    finally:
        GradientsOfBatch.__call__, MixedAdamW.update, torch.optim.AdamW.step = originals
        torch.nn.utils.clip_grads_with_norm_ = clip
    n_tokens = config.train.batch_size * config.train.seq_len
    whole = [n_tokens / row["tokens_per_s"] for row in rows]
    rest = [w - s for w, s in zip(whole, spent, strict=True)]
    return spent[_WARM:], rest[_WARM:]


def recipe(folder: Path, tiny: bool) -> RunConfig:
    """The demo's, or a toy one with this script for text."""
    if not tiny:
        return load_recipe("demo")
    (folder / "text").mkdir()
    for number in range(20):
        text = f"{number}\n" + Path(__file__).read_text(encoding="utf-8")
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    return load_recipe("tiny", [f"data.text=[{folder / 'text'}]", "data.vocab_size=300"])


if __name__ == "__main__":
    args = arguments(__doc__, PARTS, repeats=60).parse_args()
    main(args.repeats, args.tiny, args.only)
