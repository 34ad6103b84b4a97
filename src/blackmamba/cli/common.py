"""What several sub-commands share: naming a model, a device, a dtype and a tokenizer."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blackmamba.checkpoint.released import TOKENIZER, TOKENIZER_SIZE
from blackmamba.errors import ConfigError

if TYPE_CHECKING:
    from blackmamba.data import Tokenizer
    from blackmamba.model import BlackMamba

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def filled(text: str) -> str:
    """An argument's type: the name of a file, folder or model.

    An empty one, such as a shell variable that was never set, would mean the current folder, or
    that the option was not given.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def filled_path(text: str) -> Path:
    """The same as a path."""
    return Path(filled(text))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --device, --dtype and --expert-activation."""
    parser.add_argument(
        "model",
        type=filled,
        metavar="MODEL",
        help="a model folder (ours or the released format), a run folder, or a hub name",
    )
    parser.add_argument(
        "--adapter",
        type=filled,
        metavar="DIR",
        help="an adapter of this model: its folder, or its run's",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--expert-activation",
        choices=("silu", "gelu"),
        help="override what the folder says (released folders: gelu)",
    )


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """--tokenizer."""
    parser.add_argument(
        "--tokenizer",
        type=filled,
        metavar="PATH_OR_NAME",
        help="a tokenizer.json, a folder with one, or a hub name; default: the model folder's own, "
        f"or {TOKENIZER} for a folder without one",
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not usable on this machine ({reason})") from None
    return device


def load_model(args: argparse.Namespace) -> "BlackMamba":
    """The model that `add_model_arguments` named, in evaluation mode."""
    from blackmamba.checkpoint import load

    return load(
        args.model,
        device=pick_device(args.device),
        dtype=DTYPES[args.dtype],
        expert_activation=args.expert_activation,
        adapter=getattr(args, "adapter", None),  # `doctor` has a model and no such argument
    )


def load_tokenizer(args: argparse.Namespace) -> "Tokenizer":
    """The tokenizer that was named, or the model folder's own, or that of the released models.

    Raises:
        ConfigError: the folder has none, and the model's vocabulary is not the released models'.
        DataError: it cannot be read.
    """
    from blackmamba.checkpoint import load_config, load_tokenizer
    from blackmamba.checkpoint.adapter import add_chat
    from blackmamba.data import Tokenizer

    if args.tokenizer:
        return Tokenizer.load(args.tokenizer)
    own = load_tokenizer(args.model)
    if own is None and (size := load_config(args.model).vocab_size) < TOKENIZER_SIZE:
        raise ConfigError(
            f"{args.model}: has no tokenizer.json; give --tokenizer, one of at most {size} tokens"
        )
    found = own if own is not None else Tokenizer.load(TOKENIZER)
    if getattr(args, "adapter", None):
        add_chat(found, args.adapter)
    return found


def check_out(out: Path, source: str, what: str) -> None:
    """Refuse to write a model over the one that it is made from, or where a file lies.

    It is asked before the work, which for a large model takes minutes.

    Args:
        out: the folder to write.
        source: the model's folder, its run's folder or its hub name.
        what: what is done to the model, for the message.
    Raises:
        ConfigError: they are the same folder, or `out` is a file.
    """
    from blackmamba.checkpoint.load import find_folder

    if out.resolve() in (Path(source).resolve(), find_folder(source).resolve()):
        raise ConfigError(f"{out}: holds the model to {what}; name another folder to write")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: a file; a model is written into a folder")


def read_text(path: str) -> str:
    """A whole UTF-8 text file.

    Raises:
        ConfigError: it is missing or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
