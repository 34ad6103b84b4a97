"""`blackmamba info`: what a model is made of and what it costs."""

import argparse
import json
import math
from collections import Counter
from typing import Any

import torch

from blackmamba.cli.common import DTYPES, filled
from blackmamba.config import ModelConfig, QuantizationConfig, to_mapping
from blackmamba.errors import ConfigError
from blackmamba.model.size import Count, flops_per_token, layer_parameters, parameters, state_bytes

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "info",
        help="layers, parameters, memory and arithmetic of a model",
        description="Print a model's layers, its parameters (all, and those one token uses), its "
        "memory at each dtype, the bytes it remembers per sequence, and its FLOPs per token. "
        "Reads no weights.",
    )
    parser.add_argument(
        "model", type=filled, metavar="MODEL", nargs="?", help="a model folder or hub name"
    )
    parser.add_argument(
        "--preset", type=filled, help="a preset's name instead, such as blackmamba-2.8b"
    )
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens read before (default 2048)"
    )
    parser.add_argument(
        "--state-after",
        type=int,
        nargs="+",
        metavar="N",
        help="also build the model (random weights), generate so many tokens, measure its memory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    config = read_config(args)
    if args.context < 0:
        raise ConfigError(f"--context {args.context}: must be 0 or more")
    if min(args.state_after or [1]) < 1:
        raise ConfigError(f"--state-after {args.state_after}: each must be 1 or more")
    name = args.model or args.preset
    facts = collect(config, args.context, _quantization(args))
    if args.state_after:
        facts["measured_state_bytes"] = measure_state(config, args.state_after)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(name, facts)
    return 0


def collect(
    config: ModelConfig, context: int, quantization: QuantizationConfig | None = None
) -> dict[str, Any]:
    """All figures as plain data.

    Args:
        config: the model.
        context: tokens read before, for attention's memory and arithmetic.
        quantization: how its weights are stored.
    """
    total = parameters(config)
    kinds: dict[str, Count] = {}
    for text, spec in zip(config.layers, config.layer_specs, strict=True):
        kinds[text] = kinds.get(text, Count(0, 0)) + layer_parameters(config, spec)
    layers = Counter(config.layers)
    shared = total.total - sum(c.total for c in kinds.values())
    stored: dict[str, Any] = {}
    if quantization is not None:
        stored["quantization"] = to_mapping(quantization) | measure_quantized(config, quantization)
    return {
        "config": to_mapping(config),
        "layers": {
            text: {"count": layers[text], "total": c.total, "active": c.active}
            for text, c in kinds.items()
        },
        "embedding_norm_and_head": shared,
        "total_parameters": total.total,
        "active_parameters": total.active,
        "weight_bytes": {name: total.total * size for name, size in _DTYPE_BYTES.items()},
        "context": context,
        "state_bytes_per_sequence": {
            name: state_bytes(config, context, size) for name, size in _DTYPE_BYTES.items()
        },
        "forward_flops_per_token": flops_per_token(config, context),
        **stored,
    }


def measure_quantized(config: ModelConfig, quantization: QuantizationConfig) -> dict[str, Any]:
    """How many weights are quantised and the bytes of them and, by dtype, of the rest."""
    from blackmamba.model import BlackMamba, QuantizedStorage

    model = BlackMamba(config, device="meta", quantization=quantization)
    stored = [m.stored() for m in model.modules() if isinstance(m, QuantizedStorage)]
    weights, size = sum(math.prod(w.shape) for w in stored), sum(w.nbytes for w in stored)
    rest = sum(p.numel() for p in model.parameters())
    return {
        "weights": weights,
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        "other_parameters": rest,
        "all_weight_bytes": {name: size + rest * each for name, each in _DTYPE_BYTES.items()},
    }


@torch.inference_mode()
def measure_state(config: ModelConfig, after: list[int]) -> dict[str, int]:
    """Bytes of one sequence's memory after generating so many tokens, measured on a built model.

    Args:
        config: the model; its weights are random, which changes no size.
        after: numbers of tokens, each at least 1.
    """
    from blackmamba.model import BlackMamba

    model = BlackMamba(config, dtype=DTYPES["float32"]).eval()
    state = model.initial_state(1)
    next_ids = torch.zeros(1, dtype=torch.int64)
    sizes: dict[str, int] = {}
    for n in range(1, max(after) + 1):
        logits, state = model.step(next_ids, state)
        next_ids = logits.argmax(dim=-1)
        if n in after:
            sizes[str(n)] = state.nbytes
    return sizes


def read_config(args: argparse.Namespace) -> ModelConfig:
    """Of MODEL or --preset; just one of them is given.

    Raises:
        ConfigError: both or neither, or no such preset.
    """
    if (args.model is None) == (args.preset is None):
        raise ConfigError("give either a MODEL or --preset NAME")
    if args.preset is not None:
        from blackmamba.presets import presets

        return presets[args.preset]
    from blackmamba.checkpoint import load_config

    return load_config(args.model)


def _quantization(args: argparse.Namespace) -> QuantizationConfig | None:
    if args.preset is not None:
        return None
    from blackmamba.checkpoint import load_quantization

    return load_quantization(args.model)


def _show(name: str, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    config = facts["config"]
    table = Table(title=name, title_justify="left")
    for column, justify in (("part", "left"), ("layers", "right"), ("parameters", "right")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType] # both are valid
    table.add_column("active per token", justify="right")
    for text, row in facts["layers"].items():
        table.add_row(text, str(row["count"]), f"{row['total']:,}", f"{row['active']:,}")
    shared = f"{facts['embedding_norm_and_head']:,}"
    table.add_row("embedding, final norm, head", "", shared, shared)
    table.add_section()
    total, active = facts["total_parameters"], facts["active_parameters"]
    table.add_row("all", str(len(config["layers"])), f"{total:,}", f"{active:,}")
    console.print(table)

    console.print(
        f"width {config['d_model']}, vocabulary {config['vocab_size']:,}", highlight=False
    )
    if any("moe" in text for text in facts["layers"]):
        console.print(_experts(config), highlight=False)
    stored = facts.get("quantization")
    if stored is not None:
        parts = "experts" if stored["what"] == "experts" else "all large matrices"
        console.print(
            f"quantised: {parts} to {stored['bits']} bits, groups of {stored['group_size']}; "
            f"{stored['weights']:,} weights in {_bytes(stored['bytes'])}, "
            f"{stored['bits_per_weight']:.2f} bits each",
            highlight=False,
        )
    weight_bytes = facts["weight_bytes"] if stored is None else stored["all_weight_bytes"]
    sizes = ", ".join(f"{k} {_bytes(v)}" for k, v in weight_bytes.items())
    console.print(
        f"weights{'' if stored is None else ' with the rest in'}: {sizes}", highlight=False
    )
    states = ", ".join(f"{k} {_bytes(v)}" for k, v in facts["state_bytes_per_sequence"].items())
    console.print(
        f"memory per sequence after {facts['context']:,} tokens: {states}", highlight=False
    )
    flops = facts["forward_flops_per_token"]
    console.print(
        f"forward FLOPs per token: {flops:,} ({flops / 1e9:.3f} GFLOP); training takes 3 times it",
        highlight=False,
    )
    for n, size in facts.get("measured_state_bytes", {}).items():
        console.print(
            f"measured memory per sequence after {int(n):,} generated tokens: {size:,} bytes",
            highlight=False,
        )


def _experts(config: dict[str, Any]) -> str:
    shared = f", beside one of {config['d_shared_expert']}" * bool(config["d_shared_expert"])
    return (
        f"experts {config['d_expert']} wide, {config['experts_per_token']} for each token{shared}; "
        f"router {config['router']}{' with a selection bias' * config['selection_bias']}"
    )


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"
