"""`blackmamba generate`: continue prompts."""

import argparse
import sys
import time

from blackmamba.cli.common import (
    add_model_arguments,
    add_tokenizer_argument,
    filled,
    load_model,
    load_tokenizer,
    read_text,
)
from blackmamba.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts. The text of a single prompt is printed as it is generated, "
        "several are printed one after another at the end.",
    )
    add_model_arguments(parser)
    add_tokenizer_argument(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", action="append", default=[], help="text to continue; repeatable"
    )
    prompts.add_argument(
        "--prompt-file", action="append", default=[], type=filled,
        help="a text file to continue; repeatable",
    )  # fmt: skip
    prompts.add_argument(
        "--chat",
        metavar="TEXT",
        help="let a model that was trained on conversations answer TEXT; with the word "
        "`interactive`, answer line by line",
    )
    prompts.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=200, help="default 200")
    sampling.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)"
    )
    sampling.add_argument("--top-k", type=int, default=0, help="0: off (default)")
    sampling.add_argument("--top-p", type=float, default=0.95, help="1: off (default 0.95)")
    sampling.add_argument("--min-p", type=float, default=0.0, help="0: off (default)")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="1: off (default)")
    sampling.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sampling.add_argument(
        "--stop", action="append", default=[], help="text to stop before; repeatable"
    )
    parser.add_argument("--no-stats", action="store_true", help="do not print the speed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    from blackmamba.generate import generate_text

    if args.chat is not None:
        return _chat(args)
    if args.system is not None:
        raise ConfigError("--system is of a conversation: give --chat TEXT too")
    prompts = [*args.prompt, *(read_text(path) for path in args.prompt_file)]
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT or --prompt-file FILE")
    model = load_model(args)
    tokenizer = load_tokenizer(args)
    alone = len(prompts) == 1
    unseen = prompts[0]  # shown when it is known that nothing is wrong with it

    def show(_row: int, piece: str) -> None:
        nonlocal unseen
        print(unseen + piece, end="", flush=True)
        unseen = ""

    started = time.perf_counter()
    texts = generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        on_text=show if alone else None,
    )
    seconds = time.perf_counter() - started
    if alone:
        print(unseen)
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n{'-' * 20}")
    if not args.no_stats:
        n_new = sum(len(tokenizer.encode(text)) for text in texts)
        print(
            f"[about {n_new} tokens in {seconds:.1f} s: {n_new / seconds:.0f} tokens/s]",
            file=sys.stderr,
        )
    return 0


def _chat(args: argparse.Namespace) -> int:
    """Answer one text, or each line that comes in, all that was said before in mind."""
    from blackmamba.data.chat import Message, check_template
    from blackmamba.generate.sampling import SamplingConfig
    from blackmamba.generate.text import continue_ids

    if args.prompt or args.prompt_file:
        raise ConfigError("--chat is another way than --prompt and --prompt-file: give one of them")
    tokenizer = load_tokenizer(args)
    template = check_template(tokenizer, args.model)
    model = load_model(args)
    sampling = SamplingConfig(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip
    messages = [] if args.system is None else [Message("system", args.system)]

    def answer(text: str) -> None:
        messages.append(Message("user", text))
        (reply,) = continue_ids(
            model,
            tokenizer,
            [template.prompt(tokenizer, messages)],
            args.max_new_tokens,
            sampling,
            stop=args.stop,
            on_text=lambda _row, piece: print(piece, end="", flush=True),
        )
        print()
        messages.append(Message("assistant", reply))

    if args.chat != "interactive":
        answer(args.chat)
        return 0
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            print()
            return 0
        answer(line.strip())
