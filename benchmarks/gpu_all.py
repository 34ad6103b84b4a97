"""Everything that is measured on one GPU, in one call, and a short table of it at the end.

Each part is a process of its own, whose output goes to a file; what it found is read from its last
line. A part that fails or outlasts its time leaves its row empty and does not end the run.

    python benchmarks/gpu_all.py [--logs runs/gpu] [--only tests scan training ...] [--seconds 400]
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUIET = ("-p", "no:cacheprovider", "-p", "no:benchmark")  # pytest-benchmark warns beside xdist
SANITIZED = (
    *(f"tests/ops/test_gpu_{name}.py" for name in (
        "selective_scan", "causal_conv1d", "expert_mlp", "norm_and_loss", "sinkhorn"
    )), "tests/ops/test_projected.py", "tests/ops/test_few_products.py",
    "tests/gpu/test_selective_scan.py", "tests/gpu/test_expert_products.py",
)  # fmt: skip
CHECKED = (
    "(chunks and 48) or test_documents or (optional and bias) or (sort and 600 and 8)"
    " or (silu and bfloat16 and 37 and few_tokens) or (as_near_as_plain and gate-silu and 37)"
    " or (as_the_plan_says and paper and 700) or (keeps_a_wide)"
    " or (float64 and cuda and documents and 40) or (parts_of_wider and cuda)"
    " or (shared_out and 64) or (gated and True and 392) or (placed and True and 392)"
    " or (and_gradient and 392) or (the_forward_pass_in_equal_shares and 128 and documents)"
    " or (by_matrix_units and 333 and documents) or (test_experts and None)"
    " or (norms_and_convolves and None) or (test_keeps and None)"
    " or (float64 and True and 136 and 33) or (float64 and 131 and int64)"
)
"""One test or two of each kernel: every one takes seconds in there."""
Found = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A process to run."""

    command: Sequence[str]
    """Of Python's arguments; or a program with its arguments, if the first is not a script."""
    most_s: int
    environment: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


def sanitizer(tool: str) -> Part:
    """The kernels' small tests under a tool of compute-sanitizer."""
    tests = [sys.executable, "-m", "pytest", "-v", *QUIET, *SANITIZED, "-k", CHECKED]
    command = ["compute-sanitizer", "--tool", tool, *tests, "--timeout", "0"]
    return Part(command, 200, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


TESTS = (
    "tests/gpu", *(f"tests/ops/test_gpu_{name}.py" for name in (
        "activate", "backend", "causal_conv1d", "cuda", "expert_mlp", "norm_and_loss",
        "selective_scan", "sinkhorn", "tuning",
    )), *(f"tests/ops/test_{name}.py" for name in (
        "adamw", "few_products", "mamba_mixer", "projected", "prompt_norm", "rotary",
        "router_logits",
    )), *(f"tests/generate/test_{name}.py" for name in ("captured", "prefill", "prompt")),
    "tests/train/test_run.py::test_a_gpu_learns_the_same",
)  # fmt: skip
PARTS = {
    "tests": Part(
        (
            sys.executable, "-m", "pytest", "-v", "-n", "12", "--dist", "loadgroup",
            "--durations", "9", *QUIET, *TESTS,
        ), 300,
    ),
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
    "scan": Part(("benchmarks/gpu_scan.py",), 60),
    "experts": Part(("benchmarks/gpu_experts.py",), 90),
    "training": Part(
        (
            "benchmarks/gpu_training.py", "--rows", "16", "--recompute", "none", "cheap",
            "--repeats", "8", "--profile", "--no-peer",
        ), 90,
    ),
    "training-2.8b": Part(
        (
            "benchmarks/gpu_training.py", "--preset", "blackmamba-2.8b", "--rows", "8", "16",
            "--recompute", "none", "cheap", "--repeats", "5", "--no-peer",
        ), 80,
    ),
    "generation": Part(("benchmarks/gpu_generation.py", "--no-peer"), 120),
    "generation-2.8b": Part(
        (
            "benchmarks/gpu_generation.py", "--preset", "blackmamba-2.8b", "--batches", "1", "4",
            "16", "64", "--contexts", "--prefills", "2048", "--no-peer",
        ), 60,
    ),
}  # fmt: skip
TOGETHER = ("tests", "memcheck", "racecheck")
"""Parts in which nothing is timed: they run side by side."""


def main(logs: Path, only: Sequence[str], seconds: float) -> None:
    """Run the parts, print the table."""
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    chosen = [name for name in PARTS if name in only]
    begun = time.monotonic()
    running = [(name, start(name, logs)) for name in chosen if name in TOGETHER]
    for name, process in running:
        finish(name, process, begun, end)
    for name in chosen:
        if name not in TOGETHER:
            begun = time.monotonic()
            finish(name, start(name, logs), begun, end)
    found = {name: read(logs / f"{name}.log") for name in chosen}
    print_table(found, {name: logs / f"{name}.log" for name in chosen})


def start(name: str, logs: Path) -> subprocess.Popen[bytes]:
    """Begin a part."""
    part = PARTS[name]
    command = list(part.command)
    if command[0].endswith(".py"):
        command.insert(0, sys.executable)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | part.environment | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with (logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def finish(name: str, process: subprocess.Popen[bytes], begun: float, end: float) -> None:
    """Wait for a part, within its time since it has begun and what is left of all."""
    try:
        process.wait(max(1.0, min(begun + PARTS[name].most_s, end) - time.monotonic()))
        how = f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
        how = "out of time"
    print(f"{name}: {how}, {time.monotonic() - begun:.0f} s", flush=True)


def read(log: Path) -> dict[str, Any]:
    """What a benchmark's last line says; nothing if it did not come so far."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1] == "{"]
    try:
        return json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}


# ---- the table --------------------------------------------------------------------------------


def print_table(found: Found, logs: dict[str, Path]) -> None:
    """A line for each thing asked of the kernels: what was found, and what was asked."""
    for name in TOGETHER:
        if name in logs:
            print_outcome(name, logs[name].read_text(errors="replace"))
    print_scan(found.get("scan", {}))
    print_experts(found.get("experts", {}))
    for name in ("training", "training-2.8b"):
        for case in found.get(name, {}).get("cases", ()):
            rate, mfu, peak = case["tokens_s"], case["mfu"], case["peak_gb"]
            least, fits = (0.42, "") if "2.8b" in name else (0.4, " and 153,000/s; 45 GB")
            line(
                f"{name}, {case['rows']} rows, recompute {case['recompute']}",
                f"{rate:,.0f}/s, {mfu:.1%}, {peak:.1f} GB", f"{least:.0%}{fits}",
                mfu >= least and (not fits or (rate >= 153_000 and peak < 45)),
            )  # fmt: skip
    print_generation(
        "1.5b", found.get("generation", {}), {"generate 1": 1500, "generate 64": 40_000}
    )
    print_generation("2.8b", found.get("generation-2.8b", {}), {"generate 1": 950})


def line(title: str, found: str, asked: str = "", met: bool | None = None) -> None:
    """One line; `met` is not said of what nothing is asked of."""
    verdict = "" if met is None else "met" if met else "NOT met"
    print(f"{title:<44}{found:<44} {asked:<26}{verdict}".rstrip(), flush=True)


def print_outcome(name: str, text: str) -> None:
    """Of tests, or of tests under a sanitizer."""
    counts = re.findall(r"(?m)^=* ?((?:\d+ \w+,? ?)+) in [\d.]+s", text)
    errors = re.findall(r"SUMMARY: (.*)", text)
    passed = _all_passed(counts, errors) and (name == "tests" or bool(errors))
    line(name, "; ".join([*counts, *errors]) or "no end", "no failure", passed)
    for failed in dict.fromkeys(re.findall(r"(?m)^FAILED (\S+)", text)):
        print(f"    {failed}")


def _all_passed(counts: list[str], errors: list[str]) -> bool:
    """Whether there was an end, and a good one."""
    clean = all(re.match(r"0 (errors|hazards)", text) for text in errors)
    return bool(counts) and clean and not re.search("failed|error", " ".join(counts))


def print_scan(found: dict[str, Any]) -> None:
    """Forward and backward pass, beside the peer's times and the limit."""
    for shape in ("(8, 2048, 2304)", "(1, 32768, 2304)"):
        if (numbers := found.get(f"scan {shape}")) is None:
            continue
        limits = [max(limit.values()) for limit in numbers["limits_ms"]]
        parts = (
            ("forward", numbers["ms"][:1], numbers["peer_ms"][:1], limits[:1]),
            ("both", numbers["ms"], numbers["peer_ms"], limits),
        )
        for what, ms, peer, least in parts:
            ratio, share = sum(peer) / sum(ms), sum(least) / sum(ms)
            times = " + ".join(f"{each:.3f}" for each in ms)
            line(f"scan {shape}, {what}", f"{times} ms, {ratio:.2f} x {numbers['peer']}",
                 "2 x the peer", ratio >= 2)  # fmt: skip
            line("  of the limit", f"{share:.0%}", "40 %", share >= 0.4)


def print_experts(found: dict[str, Any]) -> None:
    """Beside torch's, and scattermoe's where it is installed."""
    for preset in ("blackmamba-1.5b", "blackmamba-2.8b"):
        times = {w: found[f"{preset}, {w}"] for w in CONTENDERS if f"{preset}, {w}" in found}
        if not times:
            continue
        share = found[f"{preset}, ours, of limit"]
        cells = " / ".join(f"{ms:.3f}" for ms in times.values())
        first = min(times, key=lambda who: times[who]) == "ours"
        line(f"experts {preset}: ours / torch's", f"{cells} ms, {share:.1%}", "65 %, ahead",
             share >= 0.65 and first)  # fmt: skip


CONTENDERS = ("ours", "PyTorch, grouped", "PyTorch, compiled", "scattermoe")


def print_generation(preset: str, found: dict[str, Any], asked: dict[str, float]) -> None:
    """Tokens a second of each case."""
    for name, rate in found.items():
        if not isinstance(rate, float):
            continue
        if name.endswith("rate"):
            least = 0.55 if "8 x 2048" in name else None
            line(f"{preset} {name}"[:43], f"{rate:.0%}", "55 %" if least else "",
                 rate >= least if least else None)  # fmt: skip
            continue
        least = asked.get(name)
        line(f"{preset} {name}", f"{rate:,.0f}/s", f"{least:,.0f}" if least else "",
             rate >= least if least else None)  # fmt: skip
    if "after 1024" in found:
        ratio = found["after 100000"] / found["after 1024"]
        line(f"{preset} after 100,000 / 1,024 tokens", f"{ratio:.3f}", "0.97", ratio >= 0.97)
    if "prefill 1 x 262144" in found:
        lengths = (2048, 16384, 131072, 262144)
        rates = [found[f"prefill 1 x {length}"] for length in lengths]
        off = off_a_line(
            lengths, [length / rate for length, rate in zip(lengths, rates, strict=True)]
        )
        line(f"{preset} prefill, times off a line in length", f"{off:.0%}", "10 %", off <= 0.1)
        spread = max(rates) / min(rates) - 1
        beyond = max(rates[1:]) / min(rates[1:]) - 1
        line(f"{preset} prefill, spread of rates", f"{spread:.0%}; from 16,384 on {beyond:.0%}",
             "10 %", spread <= 0.1)  # fmt: skip


def off_a_line(lengths: Sequence[float], times: Sequence[float]) -> float:
    """The most that a time differs from a + b length, as a share of it; a and b are those whose
    squares of such shares are least."""
    rows = [(1 / t, n / t) for n, t in zip(lengths, times, strict=True)]
    one, both, two = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    first, second = sum(r[0] for r in rows), sum(r[1] for r in rows)
    determinant = one * two - both * both
    a, b = (first * two - second * both) / determinant, (second * one - first * both) / determinant
    return max(abs((a + b * n) / t - 1) for n, t in zip(lengths, times, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logs", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=460, help="most for all parts together")
    options = parser.parse_args()
    main(options.logs, options.only, options.seconds)
