"""Generation on the CPU from random weights: decoding and reading a prompt, ours and transformers'.

Decoding is held against the bandwidth of memory: at least the active weights are read once a token
(of the experts of a layer, those that `batch` tokens are expected to choose). A prompt is held
against the bfloat16 product rate: 2 operations a token for every active parameter, the lookup of
the embedding left out, the head only for the last token. Both limits are timed in turn with what
they limit.

    python benchmarks/cpu_generation.py [--repeats 5] [--only bf16 int8 int4 mamba-130m ...]

Parts:
    bf16        blackmamba-1.5b in bfloat16, against transformers' JambaForCausalLM of that shape
    int8, int4  the same model with all large matrices quantised, against bfloat16
    mamba-130m, mamba-370m
                dense Mamba in bfloat16, against transformers' MambaForCausalLM
    steady      allocations and memory of 2,000 steps of the demo model; with --steps also of
                blackmamba-1.5b
"""

import dataclasses
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from blackmamba import quantize
from blackmamba.config import ModelConfig
from blackmamba.generate.decoder import Decoder, cannot_decode
from blackmamba.model import BlackMamba, State
from blackmamba.model.moe import MoE
from blackmamba.model.size import parameters
from blackmamba.ops import native
from blackmamba.ops.native.pages import want_huge_pages
from blackmamba.presets import presets
from measure import (
    PRODUCT,
    READ_BYTES,
    TINY_PRODUCT,
    Call,
    Probe,
    arguments,
    milliseconds,
    print_header,
    print_json,
    print_row,
    product,
    reading,
    resident_bytes,
    timed,
)
from peers import PeerDecoder, jamba_peer, mamba_peer, transformers_version

PARTS = ("bf16", "int8", "int4", "mamba-130m", "mamba-370m", "steady")
MAMBA = {
    "mamba-130m": ModelConfig(
        layers=("mamba",) * 24, d_model=768, vocab_size=50_280, final_norm="rms_norm"
    ),
    "mamba-370m": ModelConfig(
        layers=("mamba",) * 48, d_model=1024, vocab_size=50_280, final_norm="rms_norm"
    ),
}
OURS = "ours, bf16"


@dataclasses.dataclass(frozen=True)
class Run:
    """What all parts share: how often, and how large."""

    repeats: int
    tiny: bool

    @property
    def prompt(self) -> int:
        return 8 if self.tiny else 512

    @property
    def product_shape(self) -> tuple[int, int, int]:
        return TINY_PRODUCT if self.tiny else PRODUCT

    def steps(self, batch: int) -> int:
        """Tokens of each row in one timed call."""
        return 2 if self.tiny else 16 if batch == 1 else 4


@torch.inference_mode()
def main(repeats: int = 5, tiny: bool = False, only: Sequence[str] = PARTS, steps: int = 0) -> None:
    """Measure the parts that `only` names and print what they give."""
    run, config = Run(repeats, tiny), presets["tiny" if tiny else "blackmamba-1.5b"]
    print_header("Generation on the CPU, random weights")
    if not transformers_version():
        print("transformers is not installed, so there are no ratios: pip install '.[bench]'\n")
    found: dict[str, object] = {}
    if {"bf16", "int8", "int4"} & set(only):
        found |= paper_model(run, config, only)
    for name in MAMBA:
        if name in only:
            found[name] = dense_model(run, name)
    if "steady" in only:
        count = 20 if tiny else 2000
        found["steady, demo"] = steady("demo", random_model(presets["demo"], torch.float32), count)
        if steps:
            model = random_model(config, torch.bfloat16)
            found["steady, 1.5b"] = steady("blackmamba-1.5b", model, steps)
    print_json(
        "cpu_generation", repeats=repeats, tiny=tiny, transformers=transformers_version(), **found
    )


# ---- parts ----------------------------------------------------------------------------------


def paper_model(run: Run, config: ModelConfig, only: Sequence[str]) -> dict[str, object]:
    """The parts about the paper's model, with at most two models in memory."""
    found: dict[str, object] = {}
    base = random_model(config, torch.bfloat16)
    if "bf16" in only:
        peer = jamba_peer(config, torch.bfloat16)
        found["bf16"] = generation(run, {OURS: base}, {"transformers Jamba": peer})
        del peer
    for name, bits in (("int8", 8), ("int4", 4)):
        if name in only:
            small = quantize(base, bits, what="all")
            found[name] = generation(run, {f"ours, {name}": small, OURS: base}, {})
            del small
    return found


def dense_model(run: Run, name: str) -> dict[str, object]:
    """Dense Mamba, by us and by transformers."""
    config = MAMBA[name]
    if run.tiny:
        config = dataclasses.replace(config, layers=("mamba",), d_model=32, vocab_size=64)
    peer = mamba_peer(config, torch.bfloat16)
    ours = random_model(config, torch.bfloat16)
    title = f"ours, {name}, bf16"
    return generation(run, {title: ours}, {f"transformers {name}": peer})


def generation(
    run: Run, ours: Mapping[str, BlackMamba], peers: Mapping[str, object]
) -> dict[str, object]:
    """Decode at batch 1 and 16 and read a prompt; the first of `ours` is what the rest is for."""
    first = next(iter(ours))
    peers = {name: peer for name, peer in peers.items() if peer is not None}
    vocab_size = ours[first].config.vocab_size
    found: dict[str, object] = {}
    for name, model in ours.items():
        reason = cannot_decode(model)
        print(f"{name} decodes {'in place' if reason is None else f'by model.step: {reason}'}")
    for batch in (1, 16):
        prompt = torch.randint(0, vocab_size, (batch, 8))
        ids = torch.randint(0, vocab_size, (run.steps(batch), batch))
        calls = {
            name: _decoding(stepper(model, model.prefill(prompt, logits="none")[1]), ids)
            for name, model in ours.items()
        }
        calls |= {n: _decoding(PeerDecoder(peer, prompt).step, ids) for n, peer in peers.items()}
        limit = reading(1 << 20 if run.tiny else READ_BYTES)
        needed = {n: len(ids) * active_bytes(model, batch) for n, model in ours.items()}
        found[f"decode {batch}"] = compared(
            f"decode, batch {batch}", calls, ids.numel(), limit, needed, run.repeats
        )
    prompt = torch.randint(0, vocab_size, (1, run.prompt))

    def reads(model: BlackMamba) -> Call:
        return lambda: model.prefill(prompt, logits="last")

    calls = {name: reads(model) for name, model in ours.items()}
    calls |= {name: _prompt_reading(peer, prompt) for name, peer in peers.items()}
    limit = product(torch.bfloat16, run.product_shape)
    needed = {name: prompt_flops(model.config, run.prompt) for name, model in ours.items()}
    found["prefill"] = compared(
        f"prompt of {run.prompt}", calls, run.prompt, limit, needed, run.repeats
    )
    print()
    return found


def compared(
    title: str,
    calls: Mapping[str, Call],
    tokens: int,
    limit: Probe,
    needed: Mapping[str, float],
    repeats: int,
) -> dict[str, object]:
    """Time the calls in turn with the limit, and print speeds, shares and ratios.

    Args:
        title: of the rows.
        calls: by contender, ours first.
        tokens: that each call reads.
        limit: what bounds our calls.
        needed: of the limit's unit, by contender, what a call cannot do without.
    """
    times = timed({**calls, "limit": limit.call}, repeats)
    speed = {name: tokens / statistics.median(times[name]) for name in calls}
    rate = limit.rate(times["limit"])
    first = next(iter(calls))
    found: dict[str, object] = {
        "limit_rate_G": round(rate / 1e9, 2),
        "limit_by": limit.how,
        "tokens_s": {name: round(s, 2) for name, s in speed.items()},
        "ms": {name: milliseconds(times[name]) for name in calls},
        "ratio": {name: round(speed[first] / s, 2) for name, s in speed.items()},
        "share": {},
    }
    for name in calls:
        cells = [f"{speed[name]:,.1f} tokens/s"]
        if name in needed:
            share = needed[name] / (rate * statistics.median(times[name]))
            found["share"][name] = round(share, 4)  # pyright: ignore[reportIndexIssue]
            cells.append(f"{share:.1%} of {speed[name] / share:,.0f}")
        else:
            cells.append("")
        if name != first:
            cells.append(f"ratio {speed[first] / speed[name]:.2f}")
        print_row(f"{title}: {name}", *cells, width=20)
    print_row(f"{title}: limit", f"{rate / 1e9:,.1f} G/s", f"  ({limit.how})", width=20)
    return found


def steady(name: str, model: BlackMamba, count: int) -> dict[str, object]:
    """What decoding at batch 1 allocates, and the process's memory, over `count` steps."""
    ids = torch.randint(0, model.config.vocab_size, (count, 1))
    _, state = model.prefill(ids[:8].T, logits="none")
    step = stepper(model, state)
    step(ids[0]), step(ids[1])
    before, scratch = resident_bytes(), _scratch_allocations()
    for row in ids.unbind():
        step(row)
    grown = resident_bytes() - before
    found: dict[str, object] = {
        "in_place": cannot_decode(model) is None,
        "steps": count,
        "tensor_allocations_in_10_steps": allocations(step, ids[:10]),
        "kernel_scratch_allocations": _scratch_allocations() - scratch,
        "resident_MB": round(before / 1e6, 2),
        "grown_MB": round(grown / 1e6, 2),
    }
    print(f"{name}, {count} steps after the first two:")
    for key, value in found.items():
        print_row(f"  {key.replace('_', ' ')}", str(value))
    print()
    return found


def allocations(step: Callable[[Tensor], object], ids: Tensor) -> int:
    """How often torch takes memory in a step for each row of `ids`, by its profiler."""
    rows = list(ids.unbind())
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as record:
        for row in rows:
            step(row)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sum(e.get("name") == "[memory]" and e["args"]["Bytes"] > 0 for e in events)


# ---- models and what they cannot do without -------------------------------------------------


@torch.no_grad()
def random_model(config: ModelConfig, dtype: torch.dtype) -> BlackMamba:
    """Random weights without the wait: one layer of each kind is drawn, the others are copies."""
    kinds = tuple(dict.fromkeys(config.layers))
    drawn = BlackMamba(dataclasses.replace(config, layers=kinds), dtype=dtype).state_dict()
    model = BlackMamba(config, device="meta", dtype=dtype).to_empty(device="cpu").eval()
    want_huge_pages(model.parameters())  # as `load` does
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(kinds.index(config.layers[int(parts[1])]))
        parameter.copy_(drawn[".".join(parts)])
    return model


def stepper(model: BlackMamba, state: State) -> Callable[[Tensor], Tensor]:
    """Ids (b,) to logits (b, v), as the engine does it: in place where that can be."""
    if cannot_decode(model) is None:
        return Decoder(model, state).step
    memory = [state]

    def step(ids: Tensor) -> Tensor:
        logits, memory[0] = model.step(ids, memory[0])
        return logits

    return step


def active_bytes(model: BlackMamba, batch: int) -> float:
    """Bytes of weights that a step must read: of e experts, as many as `batch` tokens meet.

    A tied embedding is read as the head; the rows that ids look up are left out.
    """
    share: dict[int, float] = {}
    if model.head is not None:
        share |= {id(t): 0.0 for t in _tensors(model.embedding)}
    for layer in model.modules():
        if isinstance(layer, MoE):
            e = len(layer.router.weight)
            met = 1 - (1 - 1 / e) ** batch
            for part in (layer.fc1, layer.fc2, layer.fc1_bias, layer.fc2_bias):
                share |= {id(t): met for t in _tensors(part)}
    return sum(t.nbytes * share.get(id(t), 1.0) for t in _tensors(model))


def prompt_flops(config: ModelConfig, length: int) -> float:
    """2 for every active parameter of each token; the head's once, the lookup's never."""
    head = config.vocab_size * config.d_model
    tables = head if config.tie_embeddings else 2 * head
    return 2 * ((parameters(config).active - tables) * length + head)


def _tensors(part: torch.nn.Module | Tensor | None) -> list[Tensor]:
    if part is None or isinstance(part, Tensor):
        return [] if part is None else [part]
    return list(itertools.chain(part.parameters(), part.buffers()))


def _decoding(step: Callable[[Tensor], Tensor], ids: Tensor) -> Call:
    rows = list(ids.unbind())

    def run() -> None:
        for row in rows:
            step(row)

    return run


def _prompt_reading(peer: object, prompt: Tensor) -> Call:
    return lambda: PeerDecoder(peer, prompt)


def _scratch_allocations() -> int:
    """How often the kernels' own memory grew so far; 0 without kernels."""
    return 0 if native.missing() else native.extension().scratch_allocations()


if __name__ == "__main__":
    parser = arguments(__doc__, PARTS)
    parser.add_argument(
        "--steps", type=int, default=0, help="steady: so many of blackmamba-1.5b too (default 0)"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    main(args.repeats, args.tiny, args.only, args.steps)
