"""`blackmamba eval`: scores on tasks of lm-evaluation-harness."""

import argparse
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from blackmamba.cli.common import (
    add_model_arguments,
    add_tokenizer_argument,
    filled_path,
    load_model,
    load_tokenizer,
)

if TYPE_CHECKING:
    from blackmamba.evaluate import Score


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "eval",
        help="score a model on benchmark tasks",
        description="Score a model on tasks of lm-evaluation-harness, with its prompts and metrics "
        "(pip install 'blackmamba[eval]').",
        epilog="Example: blackmamba eval runs/demo --tasks paper --data my-data/ --limit 200",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=["paper"], metavar="TASK",
        help='names that the harness knows, or "paper" (default): the eight of the paper',
    )  # fmt: skip
    parser.add_argument(
        "--data", type=filled_path, metavar="FOLDER",
        help="read a task's documents from FOLDER/TASK.jsonl where it is there; else download them",
    )  # fmt: skip
    parser.add_argument(
        "--include",
        type=filled_path,
        metavar="FOLDER",
        help="your own tasks, in the harness's YAML",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="no more documents of a task")
    parser.add_argument("--few-shot", type=int, metavar="K", help="examples before each question")
    parser.add_argument(
        "--max-length", type=int, default=0, metavar="N",
        help="cut contexts to N tokens, as models of a fixed context are scored (default: never)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N",
        help="tokens that are read together (default 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=filled_path, metavar="FILE", help="also write the scores as JSON"
    )
    add_tokenizer_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line for each score."""
    from blackmamba.evaluate import evaluate
    from blackmamba.files import write_text
    from blackmamba.train.origin import origin

    scores = evaluate(
        load_model(args),
        load_tokenizer(args),
        args.tasks,
        data=args.data,
        include=args.include,
        few_shot=args.few_shot,
        limit=args.limit,
        batch_tokens=args.batch_tokens,
        max_length=args.max_length,
        show_progress=args.verbose,
    )
    width = max(len(f"{s.task} {s.metric}") for s in scores) + 2
    for score in scores:
        error = "" if math.isnan(score.stderr) else f" +- {score.stderr:.4f}"
        name = f"{score.task} {score.metric}"
        print(f"{name:<{width}}{score.value:.4f}{error}  ({score.n_docs:,} documents)")
    accuracies = [s.value for s in scores if s.metric == "acc"]
    if len(accuracies) > 1:
        print(f"{'mean acc':<{width}}{sum(accuracies) / len(accuracies):.4f}")
    if args.out is not None:
        whole: dict[str, Any] = {**origin(), "model": args.model, "dtype": args.dtype}
        whole["scores"] = [_plain(score) for score in scores]
        write_text(args.out, json.dumps(whole, indent=2, allow_nan=False) + "\n")
    return 0


def _plain(score: "Score") -> dict[str, Any]:
    row = dataclasses.asdict(score)
    for key in ("value", "stderr"):  # JSON has no NaN
        row[key] = row[key] if math.isfinite(row[key]) else None
    return row
