"""`blackmamba reproduce`: the paper's claims, checked at a scale, as one report."""

import argparse
import math
import shlex
import sys

from blackmamba.cli.common import filled, filled_path

PARTS = ("sizes", "ladder", "latency", "experts", "sinkhorn", "ablations", "better")
_SCALES = ("ci", "cpu-hour", "laptop", "gpu-minutes", "gpu-half-hour", "gpu", "toy")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "reproduce",
        help="check the paper's claims and write a report",
        description="Train and measure small networks and write one report with every figure of "
        "the paper that can be made at this scale. Runs that are in OUT already are not repeated.",
    )
    parser.add_argument(
        "--scale", choices=_SCALES, default="ci",
        help="ci: minutes on two cores (default); cpu-hour: tiny networks, many tokens; "
        "gpu-minutes, gpu-half-hour: on a GPU; laptop, gpu: hours; toy: seconds, to try it",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, type=filled_path, metavar="OUT", help="folder of everything"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts of the report"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text", action="append", default=[], type=filled, metavar="PATH",
        help="train on this; repeatable",
    )  # fmt: skip
    source.add_argument(
        "--prepared", action="append", default=[], type=filled, metavar="FOLDER",
        help="train on what `blackmamba data prepare` made; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="training runs at once, over all GPUs (default: one per core, or one per GPU if there "
        "are any; two per GPU hide starts and checkpoints)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S",
        help="stop training after S seconds, with status 124; the same command continues",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is being done and where the report is."""
    from blackmamba.analyse.reproduce import reproduce

    report = reproduce(
        args.out,
        args.scale,
        text=args.text or ("corpus:bible",),
        prepared=args.prepared,
        only=args.only,
        jobs=args.jobs,
        seconds=args.seconds,
        command=shlex.join(["blackmamba", *sys.argv[1:]]),
        tell=lambda line: print(line, flush=True),
    )
    print(f"report: {report}")
    return 0
