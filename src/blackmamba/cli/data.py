"""`blackmamba data`: text of any size to token shards, and a look at what is in them."""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blackmamba.cli.common import filled, filled_path
from blackmamba.errors import ConfigError, DataError

if TYPE_CHECKING:
    from blackmamba.data.build import Done

_MAX_WORKERS = 16  # as many as one reader of packed text can feed: docs/data.md


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command and its own ones."""
    parser = commands.add_parser(
        "data",
        help="turn text of any size into token shards, inspect them, check them",
        description="Turn text of any size into token shards, inspect them, check them.",
        epilog="Example: blackmamba data prepare --text texts/ --vocab-size 8192 --out prepared",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_prepare(actions)
    join = actions.add_parser("join", help="make the index of a whole whose parts are finished")
    join.add_argument(
        "folder", type=filled_path, metavar="FOLDER", help="holds part-00000-of-..., ..."
    )
    join.set_defaults(run=run_join)
    inspect = actions.add_parser("inspect", help="print counts, sources and a few documents")
    inspect.add_argument("folder", type=filled_path, metavar="FOLDER", help="a prepared folder")
    inspect.add_argument("--samples", type=int, default=3, help="documents to show (default 3)")
    inspect.add_argument("--seed", type=int, default=0, help="of which ones (default 0)")
    inspect.set_defaults(run=run_inspect)
    verify = actions.add_parser("verify", help="read everything and check it against the index")
    verify.add_argument("folder", type=filled_path, metavar="FOLDER", help="a folder of shards")
    verify.set_defaults(run=run_verify)


def _add_prepare(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = actions.add_parser(
        "prepare",
        help="turn text into token shards",
        description="Turn text into token shards. If it is stopped, the same command continues "
        "where it was and produces the same files.",
    )
    prepare.add_argument(
        "--text",
        action="append",
        required=True,
        type=filled,
        metavar="SOURCE",
        help="a file (.jsonl, .parquet, else plain text; .gz .bz2 .xz .zst are unpacked), "
        "a folder, a URL of either (s3://..., needs fsspec and the storage's package), "
        "dataset:NAME?split=train (needs datasets) or corpus:bible; repeatable",
    )
    prepare.add_argument("--out", required=True, type=filled_path, metavar="FOLDER")
    prepare.add_argument(
        "--field", default="text", help="what rows call their text (default: text)"
    )
    prepare.add_argument(
        "--tokenizer",
        default="train",
        type=filled,
        metavar="PATH_OR_NAME",
        help="a tokenizer.json, a folder with one or a hub name; default: train one on a sample",
    )
    prepare.add_argument(
        "--vocab-size", type=int, default=4096, help="size of a trained tokenizer (default 4096)"
    )
    prepare.add_argument(
        "--sample-mb",
        type=float,
        default=64.0,
        help="million characters to train it on (default 64)",
    )
    prepare.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        help="share of documents held out (default 0.01)",
    )
    prepare.add_argument(
        "--split-seed", type=int, default=0, help="another seed holds out others (default 0)"
    )
    prepare.add_argument(
        "--shard-mb", type=float, default=256.0, help="megabytes of ids in a shard (default 256)"
    )
    prepare.add_argument("--workers", type=int, help="processes (default: one a core, 16 at most)")
    prepare.add_argument(
        "--part", metavar="I/N", help="prepare share I (from 0) of N; then `data join`"
    )
    prepare.set_defaults(run=run_prepare)


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare with a line of progress and print the counts."""
    from blackmamba.data import prepare_shards
    from blackmamba.data.config import ShardConfig

    part, n_parts = _part(args.part)
    config = ShardConfig(
        text=tuple(args.text),
        field=args.field,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        sample_mb=args.sample_mb,
        validation_fraction=args.validation_fraction,
        split_seed=args.split_seed,
        shard_mb=args.shard_mb,
        part=part,
        n_parts=n_parts,
    )
    n_workers = args.workers
    if n_workers is None:
        n_workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    with _Progress() as progress:
        index = prepare_shards(config, args.out, n_workers=n_workers, on_progress=progress.show)
    _print_counts(args.out / config.part_folder)
    if n_parts > 1:
        print(
            f"part {index.part} of {n_parts}; when all are there: blackmamba data join {args.out}"
        )
    return 0


def run_join(args: argparse.Namespace) -> int:
    """Join parts and print the counts."""
    from blackmamba.data.build import join_parts

    join_parts(args.folder)
    _print_counts(args.folder)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print counts and some documents, drawn evenly from all tokens."""
    import numpy as np

    from blackmamba.data import open_prepared

    if args.samples < 0:
        raise ConfigError(f"--samples {args.samples}: must be at least 0")
    _print_counts(args.folder)
    data = open_prepared(args.folder)
    tokens, eot = data.train.tokens, data.tokenizer.eot_id
    random = np.random.default_rng(args.seed)
    for place in random.integers(len(tokens), size=args.samples):
        around = np.asarray(tokens[max(place - 2000, 0) : place + 2000])
        starts = np.flatnonzero(around == eot)
        begin = int(starts[starts <= min(place, 2000)].max(initial=0))
        end = int(starts[starts > min(place, 2000)].min(initial=len(around)))
        text = data.tokenizer.decode([int(i) for i in around[begin:end] if i != eot])
        print(f"--- around token {place:,}:")
        print(text[:500] + ("..." if len(text) > 500 else ""))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check everything; one line a damaged file."""
    from blackmamba.data.shards import verify

    problems = verify(args.folder)
    if problems:
        raise DataError("; ".join(problems))
    _print_counts(args.folder)
    print("every shard is what was written")
    return 0


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    part, slash, n_parts = text.partition("/")
    if not (slash and part.isdecimal() and n_parts.isdecimal()):
        raise ConfigError(f"--part {text}: must look like 0/4, the first of four")
    return int(part), int(n_parts)


def _print_counts(folder: Path) -> None:
    from blackmamba.data import open_prepared

    data = open_prepared(folder)
    dtype = data.index.dtype
    print(f"{folder}: {data.tokenizer.n_tokens:,} different tokens, ids in {dtype}")
    for name, split in (("train", data.train), ("validation", data.validation)):
        print(
            f"  {name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, "
            f"{split.n_bytes:,} bytes of text"
            + (f" ({split.n_bytes / split.n_tokens:.2f} a token)" if split.n_tokens else "")
        )


class _Progress:
    """The speed of encoding: a line of rich's on a terminal; elsewhere one line at the end."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console

        self._text = ""
        self._status = Console(stderr=True).status("reading the text")
        self._status.start()
        return self

    def show(self, done: "Done") -> None:
        """Before the first block, when the clock starts, and after each."""
        if not done.n_documents:
            self._began = time.monotonic()
            return
        seconds = time.monotonic() - self._began
        self._text = (
            f"{done.n_bytes / 1e6:,.1f} MB of text, {done.n_tokens:,} tokens in {seconds:.1f} s: "
            f"{done.n_bytes / 1e6 / seconds:.1f} MB/s"
        )
        self._status.update(self._text)

    def __exit__(self, *_: object) -> None:
        self._status.stop()
        if self._text:
            print(self._text)
