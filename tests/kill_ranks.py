"""Kills random ranks of a run at random moments; what comes out is the run that nobody touched.

    python tests/kill_ranks.py --kills 20 --out FOLDER

torchrun starts two ranks of a small run that cuts parameters and experts, and starts them again
after each kill -9. Then the losses of all steps are compared with those of an uninterrupted run,
and the token log: what every rank read for the step that counts, the last one of its number.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANKS = 2

# One rank; it writes down its process and every batch that it reads.
CHILD = """
import json, os, sys
from pathlib import Path
import torch
from blackmamba.data import WindowSampler
from blackmamba.train import load_recipe, run
torch.set_num_threads(1)
recipe, out, logs = sys.argv[1:]
rank = int(os.environ["RANK"])
(Path(logs) / f"pid-{rank}").write_text(str(os.getpid()))
log = (Path(logs) / f"tokens-{rank}.jsonl").open("a", buffering=1)
read = WindowSampler.batch

def batch(self, step, rank=0, world_size=1):
    found = read(self, step, rank, world_size)
    windows = self.windows(step, rank, world_size)
    ids = found.input_ids.tolist()
    log.write(json.dumps({"step": step + 1, "windows": windows, "ids": ids}) + "\\n")
    return found

WindowSampler.batch = batch
run(load_recipe(recipe), out, resume=True)
"""
RECIPE = {
    "model": {
        "layers": ["mamba", "moe"], "d_model": 16, "vocab_size": 300, "d_state": 4,
        "n_experts": 4, "d_expert": 16,
    },
    "data": {"vocab_size": 300, "validation_fraction": 0.1},
    "train": {
        "batch_size": 4, "accumulate": 1, "seq_len": 16, "lr": 0.01, "warmup_steps": 3,
        "log_every": 4, "evaluate_seq_len": 64, "device": "cpu", "checkpoint_every": 5,
    },
    "parallel": {"shard": "full", "expert": 2, "timeout_s": 120},
}  # fmt: skip


def torchrun(recipe: Path, out: Path, logs: Path, restarts: int) -> subprocess.Popen[bytes]:
    """Start the ranks of a run."""
    logs.mkdir(parents=True)
    child = logs / "child.py"
    child.write_text(CHILD)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS),
        "--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint",
        "127.0.0.1:0", str(child), str(recipe), str(out), str(logs),
    ]  # fmt: skip
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps_done(out: Path) -> int:
    """Lines of metrics so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(
    process: subprocess.Popen[bytes], out: Path, logs: Path, kills: int, steps: int, seed: int
) -> list[tuple[int, int]]:
    """Kill a rank so many times while the run goes on; (rank, step) of each."""
    chance = random.Random(seed)
    killed: list[tuple[int, int]] = []
    dead: set[int] = set()
    for number in range(kills):
        # Each a little later in the run than the one before, somewhere within or between steps.
        wanted = steps * number // (kills + 1) + chance.randrange(max(1, steps // (kills + 1)))
        rank = chance.randrange(RANKS)
        pid = logs / f"pid-{rank}"
        while True:
            assert process.poll() is None, "torchrun gave up"
            alive = pid.exists() and (text := pid.read_text()) and int(text) not in dead
            if alive and steps_done(out) >= wanted:
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        victim = int(pid.read_text())
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it was on its way out
        dead.add(victim)
        killed.append((rank, steps_done(out)))
    return killed


def losses(out: Path) -> list[float]:
    """Of all steps."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def tokens_read(logs: Path) -> dict[int, list[Any]]:
    """By step: what the ranks, in order, read for it the last time."""
    read: dict[int, list[Any]] = {}
    for rank in range(RANKS):
        last: dict[int, Any] = {}
        for line in (logs / f"tokens-{rank}.jsonl").read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            last[entry["step"]] = entry
        for step, entry in last.items():
            read.setdefault(step, []).append([entry["windows"], entry["ids"]])
    return read


def main(text: Path, folder: Path, *, kills: int, steps: int, seed: int) -> list[tuple[int, int]]:
    """Run it once undisturbed and once with kills; raises AssertionError where they differ."""
    config = json.loads(json.dumps(RECIPE))
    config["data"]["text"] = [str(text)]
    config["train"]["steps"] = steps
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(config))  # JSON is YAML
    whole = torchrun(recipe, folder / "whole", folder / "whole-logs", 0)
    assert whole.wait() == 0

    process = torchrun(recipe, folder / "killed", folder / "killed-logs", kills + 1)
    out, logs = folder / "killed", folder / "killed-logs"
    try:
        killed = kill_at_random(process, out, logs, kills, steps, seed)
        assert process.wait() == 0, "torchrun gave up"
    finally:
        process.kill()
    assert losses(out) == losses(folder / "whole")
    mine, theirs = tokens_read(logs), tokens_read(folder / "whole-logs")
    assert sorted(mine) == list(range(1, steps + 1))
    assert mine == theirs
    windows = [tuple(w) for step in mine.values() for part in step for w in part[0]]
    assert len(windows) == len(set(windows)), "a window was read twice"
    for name in ("model/model.safetensors",):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()
    return killed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    done = main(args.text, args.out, kills=args.kills, steps=args.steps, seed=args.seed)
    where = ", ".join(f"rank {rank} after step {step}" for rank, step in done)
    sys.stdout.write(f"{len(done)} kills ({where}): losses, tokens and model are the same\n")
