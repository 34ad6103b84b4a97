"""`blackmamba tune`: measure on this GPU how kernels are best cut, and keep what was found."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from blackmamba.cli.common import DTYPES, filled
from blackmamba.cli.info import read_config
from blackmamba.config import ModelConfig
from blackmamba.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from blackmamba.model import BlackMamba
    from blackmamba.ops.gpu import tuning


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "tune",
        help="measure on this GPU how kernels are best cut, and keep it",
        description="Run the kernels of a model's layers (random weights, one layer of each kind) "
        "as in training, reading prompts and generating; time other ways to cut each into blocks "
        "and keep the fastest in ~/.cache/blackmamba/tuning, for every later process on this kind "
        "of GPU. Needless on an H100 or H200, where the defaults come from; takes a few minutes. "
        "Another cut adds numbers up in another order: results differ in their last bits.",
    )
    parser.add_argument(
        "model", type=filled, metavar="MODEL", nargs="?", help="a model folder or hub name"
    )
    parser.add_argument(
        "--preset", type=filled, help="a preset's name instead, such as blackmamba-1.5b"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row (default 2048)")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 2, 16, 64],
        help="that are generated at once (default: 1 2 16 64)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="default: bfloat16",
    )  # fmt: skip
    parser.add_argument("--forget", action="store_true", help="back to the defaults; no MODEL")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print and keep."""
    from blackmamba.ops import gpu
    from blackmamba.ops.gpu import tuning

    if args.forget:
        if args.model is not None or args.preset is not None:
            raise ConfigError("--forget takes neither MODEL nor --preset")
        print(f"{tuning.path()}: {'removed' if tuning.forget() else 'there was none'}")
        return 0
    for name, values in (("rows", args.rows), ("sequences", args.sequences)):
        if min(values) < 1:
            raise ConfigError(f"--{name} {min(values)}: must be at least 1")
    if args.length < 1:
        raise ConfigError(f"--length {args.length}: must be at least 1")
    config = read_config(args)
    if gpu.missing() is not None or gpu.interpreted():
        reason = gpu.missing() or "TRITON_INTERPRET=1 runs kernels on the CPU"
        raise BackendError(f"nothing to measure: {reason}")
    begin = time.perf_counter()
    session = measure(
        config, DTYPES[args.dtype], args.rows, args.length, args.sequences, tuning.Session()
    )
    kept = tuning.keep(session)
    better = [found for found in session.found.values() if found.chosen != found.default]
    print(
        f"{len(session.found)} kernels and sizes in {time.perf_counter() - begin:.0f} s, "
        f"{len(better)} faster than by default; kept in {kept}"
    )
    return 0


def measure(
    config: ModelConfig,
    dtype: torch.dtype,
    rows: list[int],
    length: int,
    sequences: list[int],
    session: "tuning.Session",
) -> "tuning.Session":
    """Let `session` see every kernel of the model at these sizes, and print what it finds.

    Args:
        config: of the model.
        dtype: of weights and activations.
        rows: of `length` tokens each, trained on or read at once.
        sequences: generated at once.
        session: not within `measuring`.
    """
    from blackmamba.ops.gpu import tuning

    session.on_measured = _show
    with tuning.measuring(session):
        for name, work in _workloads(config, dtype, rows, length, sequences):
            print(name, flush=True)
            work()
    return session


def _workloads(
    config: ModelConfig, dtype: torch.dtype, rows: list[int], length: int, sequences: list[int]
) -> Iterator[tuple[str, Callable[[], object]]]:
    from blackmamba.generate.captured import cannot_capture_any, warmup
    from blackmamba.model import BlackMamba

    # One layer of each kind has all the sizes. Parallel pairs and the like come along as they are.
    few = dataclasses.replace(config, layers=tuple(dict.fromkeys(config.layers)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = BlackMamba(few, device=device, dtype=dtype)
    for n in rows:
        ids = torch.randint(0, config.n_tokens, (n, length), device=device)
        yield f"training, {n} x {length}", functools.partial(_train, model, ids)
        yield f"prompts, {n} x {length}", functools.partial(_read, model, ids)
    for n in sequences if cannot_capture_any(few) is None else []:
        yield f"generation of {n}", functools.partial(warmup, model.eval(), [n])


def _train(model: "BlackMamba", ids: torch.Tensor) -> None:
    model.train().loss(ids, ids).backward()
    model.zero_grad()


def _read(model: "BlackMamba", ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model.eval()(ids)


def _show(found: "tuning.Measured") -> None:
    text = f"  {found.kernel}, {found.size}: {1e6 * found.default_s:,.1f} us"
    if found.chosen != found.default:
        text += f" -> {1e6 * found.chosen_s:,.1f} us with {found.chosen}"
    print(f"{text} ({found.n_candidates} tried)", flush=True)
