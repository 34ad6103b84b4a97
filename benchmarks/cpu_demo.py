"""A training step of the demo on the CPU: with native kernels, without, and of an older commit.

A step is the trainer's: loss, gradients, clipping, AdamW, of random tokens; the demo's model and
batch, products and weights in the dtypes that its recipe takes on this machine. Without native
kernels weights are float32 and AdamW is torch's. They take turns in one process; an older tree, in
float32 as the first had nothing else, runs in one of its own before and after.

    python benchmarks/cpu_demo.py [--repeats 9] [--tree FOLDER]

--tree: a checkout of another commit, such as `git worktree add /tmp/first ad4a2aa` makes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from blackmamba.model import BlackMamba
from blackmamba.ops.backend import forcing
from blackmamba.presets import presets
from blackmamba.train import TrainConfig, load_recipe
from blackmamba.train.folder import with_dtype
from blackmamba.train.memory import keep_freed_memory
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.start import DTYPES
from blackmamba.train.step import GradientsOfBatch, train_step
from measure import Call, arguments, milliseconds, print_header, print_json, print_row, timed

_OF_A_TREE = """
import dataclasses, json, sys, time, torch
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
import blackmamba
assert blackmamba.__file__.startswith(sys.path[1]), blackmamba.__file__  # not one that is installed
from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.train import load_recipe
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.trainer import train_step
fields, batch, length, repeats = json.loads(sys.argv[1])
torch.manual_seed(0)
model = BlackMamba(ModelConfig(**{**fields, "layers": tuple(fields["layers"])}))
model.train()
optimizer = build_optimizer(model, load_recipe("demo").train)
ids = torch.randint(0, fields["vocab_size"], (batch, length + 1))
times = []
for _ in range(repeats + 1):
    start = time.perf_counter()
    train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=1e-3, grad_clip=1.0)
    times.append(time.perf_counter() - start)
print(json.dumps(times[1:]))
"""
_OLD_FIELDS = ("layers", "d_model", "vocab_size", "d_state", "n_experts", "d_expert")


def main(repeats: int = 9, tiny: bool = False, tree: Path | None = None) -> None:
    """Measure and print what the native kernels give."""
    print_header("A training step of the demo on the CPU")
    keep_freed_memory(torch.device("cpu"))
    config = presets["tiny" if tiny else "demo"]
    recipe = with_dtype(load_recipe("demo"), None, torch.device("cpu"))
    batch, length = (2, 16) if tiny else (recipe.train.batch_size, recipe.train.seq_len)
    settings = recipe.train
    ids = torch.randint(0, config.vocab_size, (batch, length + 1))

    def training(settings: TrainConfig) -> Call:
        model = BlackMamba(config, compute_dtype=DTYPES[settings.dtype])
        model.train()
        masters = {}
        if settings.weights != "float32":
            masters = narrow_weights(model, DTYPES[settings.dtype])
        optimizer, gradients = build_optimizer(model, settings, masters), GradientsOfBatch(model)

        def step() -> None:
            train_step(
                model, optimizer, ids[:, :-1], ids[:, 1:],
                lr=1e-3, grad_clip=settings.grad_clip, gradients=gradients,
            )  # fmt: skip

        return step

    with forcing("reference"):
        plain = training(dataclasses.replace(settings, weights="float32"))

    def without() -> None:
        with forcing("torch"):
            plain()

    steps: dict[str, Call] = {"native": training(settings), "PyTorch": without}
    fields = {name: dataclasses.asdict(config)[name] for name in _OLD_FIELDS}
    old = [] if tree is None else _of_tree(tree, (fields, batch, length, repeats))
    times = timed(steps, repeats)
    if tree is not None:
        times[tree.name] = sorted(old + _of_tree(tree, (fields, batch, length, repeats)))
    speed = {name: batch * length / statistics.median(t) for name, t in times.items()}
    print_row(f"{batch} x {length} tokens, {settings.dtype}, {settings.weights}", *speed)
    print_row("tokens/s", *(f"{rate:,.0f}" for rate in speed.values()))
    ratios = {name: round(speed["native"] / rate, 2) for name, rate in speed.items()}
    print_row("native against it", *(f"x{ratio:.2f}" for ratio in ratios.values()))
    print_json(
        "cpu_demo",
        repeats=repeats,
        tiny=tiny,
        dtype=settings.dtype,
        weights=settings.weights,
        ratios=ratios,
        **{f"{name}_ms": milliseconds(t) for name, t in times.items()},
    )


def _of_tree(tree: Path, what: object) -> list[float]:
    """Seconds of each step in the package of another tree, after one to warm up."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    command = [sys.executable, "-c", _OF_A_TREE, json.dumps(what)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--tree", type=Path, help="a checkout of another commit")
    args = parser.parse_args()
    if args.tree is not None and not (args.tree / "src/blackmamba").is_dir():
        parser.error(f"--tree {args.tree}: has no src/blackmamba; it must be a checkout")
    torch.manual_seed(0)
    main(args.repeats, args.tiny, args.tree and args.tree.resolve())
