"""Generation by the paper's models on one GPU, with random weights: decoding and prefill.

Decoding is greedy. "steps" are tokens a second of the steps alone, "generate" those of a whole call
that reads a prompt and writes new tokens, text aside. The limit is the time to read once what a
step must: the weights of all but the experts, those of the experts that so many tokens choose among
at random, and the state, read and written. Prefill is measured against the rate of a large product,
by the FLOPs that are needed (`prompt_flops`). Beside ours, where transformers is installed, its
Jamba in that shape; with mamba_ssm's and causal_conv1d's kernels where those are, too.

    python benchmarks/gpu_generation.py [--preset blackmamba-1.5b] [--batches 1 4 16 64 256]
    python benchmarks/gpu_generation.py --profile [--prompts 8x2048 1x2048]

The second prints where the time of a recorded prompt goes, and nothing else.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import blackmamba
from blackmamba.config import ModelConfig
from blackmamba.generate import prefill
from blackmamba.generate.captured import CapturedDecoder, plain_weights
from blackmamba.generate.prefill import read_piece
from blackmamba.model import BlackMamba, State
from blackmamba.model.size import prompt_flops
from blackmamba.presets import presets
from blackmamba.train.origin import origin
from gpu_measure import DEVICE, limits, machine
from gpu_training import CLASSES, HAS_KERNELS, kernel_class
from peers import PeerDecoder, jamba_peer, transformers_version


def main(
    preset: str = "blackmamba-1.5b",
    batches: Sequence[int] = (1, 4, 16, 64, 256),
    contexts: Sequence[int] = (1024, 100_000),
    prefills: Sequence[int] = (2048, 16384, 131072, 262144),
    prompt_length: int = 128,
    new: int = 128,
    steps: int = 200,
    tiny: bool = False,
    peer: bool = True,
) -> None:
    """Print a table of decoding, one of contexts and one of prefill."""
    config = presets[preset]
    limit = limits(tiny)
    model = BlackMamba(config, device=DEVICE, dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}
    print(f"{preset}: {limit.bytes_s / 1e9:,.0f} GB/s, {limit.flops_s / 1e12:,.0f} TFLOP/s")
    print(f"{'batch':>8}{'steps':>12}{'limit':>12}{'ratio':>8}{'generate':>12}   tokens/s")
    with torch.inference_mode():
        for b in batches:
            rate = decode_rate(model, torch.randint(0, config.n_tokens, (b, prompt_length)), steps)
            bound = b * limit.bytes_s / step_bytes(model, b)
            prompts = [
                [(7 * i + j) % config.n_tokens for j in range(prompt_length)] for i in range(b)
            ]
            blackmamba.generate(model, prompts, max_new_tokens=4)
            seconds = clock(lambda p=prompts: blackmamba.generate(model, p, max_new_tokens=new), 3)
            found[f"decode {b}"], found[f"generate {b}"] = rate, b * new / seconds
            whole = found[f"generate {b}"]
            print(f"{b:>8}{rate:>12,.0f}{bound:>12,.0f}{rate / bound:>8.0%}{whole:>12,.0f}")
        for length in contexts:
            ids = torch.randint(0, config.n_tokens, (1, length))
            found[f"after {length}"] = decode_rate(model, ids, steps)
            print(f"batch 1 after {length:>8,} tokens{found[f'after {length}']:>12,.0f} tokens/s")
        for b, length in [(8, prefills[0]), *((1, length) for length in prefills)]:
            ids = torch.randint(0, config.n_tokens, (b, length), device=DEVICE)
            torch.cuda.reset_peak_memory_stats()
            seconds = clock(lambda ids=ids: read(model, ids), 3)
            rate = ids.numel() / seconds
            flops = prompt_flops(config, length) / length
            found[f"prefill {b} x {length}"] = rate
            found[f"prefill {b} x {length}, of the product's rate"] = rate * flops / limit.flops_s
            share, peak = rate * flops / limit.flops_s, torch.cuda.max_memory_allocated() / 1e9
            print(
                f"prefill {b} x {length:>8,}{rate:>12,.0f} tokens/s{share:>7.0%} "
                f"of the product's rate, {peak:.1f} GB"
            )
    theirs: dict[str, float] = {}
    if peer and transformers_version():
        del model
        try:
            theirs = peer_rates(config, batches, prefills[0], prompt_length)
        except torch.OutOfMemoryError:
            print("transformers' Jamba: out of memory")
        for name, rate in theirs.items():
            ratio = f", ours is {found[name] / rate:,.1f} times as fast" if name in found else ""
            print(f"transformers {transformers_version()}, Jamba: {name}: {rate:,.0f}/s{ratio}")
    facts = {"preset": preset, **machine(), **origin()}
    print(json.dumps({"benchmark": "gpu_generation", **facts, **found, "peer": theirs}))


def peer_rates(
    config: ModelConfig, batches: Sequence[int], prefill: int, prompt_length: int, steps: int = 8
) -> dict[str, float]:
    """Tokens a second of transformers' Jamba: decoding, and reading one prompt."""
    model = jamba_peer(config, torch.bfloat16, HAS_KERNELS).to(DEVICE)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for b in batches:
            ids = torch.randint(0, config.n_tokens, (b, prompt_length), device=DEVICE)
            decoder = PeerDecoder(model, ids)

            def run(decoder: PeerDecoder = decoder, ids: torch.Tensor = ids[:, 0]) -> None:
                for _ in range(steps):
                    ids = decoder.step(ids).argmax(1)

            found[f"decode {b}"] = b * steps / clock(run, 3)
        ids = torch.randint(0, config.n_tokens, (1, prefill), device=DEVICE)
        found[f"prefill 1 x {prefill}"] = prefill / clock(lambda: PeerDecoder(model, ids), 1)
    return found


# ---- where a prompt's time goes --------------------------------------------------------------


def profile(preset: str, prompts: Sequence[str], tiny: bool = False) -> None:
    """Print it for each of `prompts`, such as "8x2048"."""
    config = presets[preset]
    model = BlackMamba(config, device=DEVICE, dtype=torch.bfloat16).eval()
    rate = limits(tiny).flops_s
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name in prompts:
            b, length = map(int, name.split("x"))
            ids = torch.randint(0, config.n_tokens, (b, length), device=DEVICE)
            found[name] = _profile_prompt(model, ids, rate)
    print(f"{'prompt':>10}{'clock':>9}{'in a row':>9}{'host':>8}{'kernels':>9}{'launches':>9}"
          f"{'gaps':>8}   ms{'rate':>11}")  # fmt: skip
    for name, ms in found.items():
        print(
            f"{name:>10}{ms['clock']:>9.2f}{ms['in a row']:>9.2f}{ms['host']:>8.2f}"
            f"{ms['kernels']:>9.2f}{ms['launches']:>9.0f}{ms['gaps']:>8.2f}{ms['share']:>13.1%}"
        )
        print(" " * 10 + ", ".join(f"{k} {v:.2f}" for k, v in ms.items() if k not in _HEAD))
    facts = {"preset": preset, **machine(), **origin()}
    print(json.dumps({"benchmark": "gpu_generation", "tiny": tiny, **facts, "profile": found}))


_HEAD = ("clock", "in a row", "host", "kernels", "launches", "gaps", "share")


def _profile_prompt(model: BlackMamba, ids: torch.Tensor, rate: float) -> dict[str, float]:
    """Milliseconds of a prompt: by the clock; of one of several that follow each other; of the host
    until all is launched; of all kernels; between them."""
    run = lambda: read_piece(model, ids, None, None)  # noqa: E731
    ms = {
        "clock": 1e3 * clock(run, 9),
        "in a row": 1e2 * clock(lambda: [run() for _ in range(10)], 3),
    }
    ms["host"] = 1e3 * _host(run)
    launches = _launches(run)
    busy = [(name, (end - begin) / 1e3) for name, begin, end in launches]
    flops = prompt_flops(model.config, ids.shape[1]) / ids.shape[1]
    if model in prefill._KEPT:
        graph = next(reversed(prefill._KEPT[model]._kept.values()))._graph
        assert graph is not None
        replay = graph.replay
        ms["graph"] = 1e3 * clock(replay, 9)
        ms["graph in a row"] = 1e2 * clock(lambda: [replay() for _ in range(10)], 3)
        ms["graph's launch"] = 1e3 * _host(replay)
        ms["walk"] = 1e3 * _host(lambda: plain_weights(model))
    ms |= {
        "kernels": sum(t for _, t in busy),
        "launches": len(busy),
        "gaps": sum(max(0.0, b[1] - a[2]) for a, b in itertools.pairwise(launches)) / 1e3,
        "share": ids.numel() * flops / rate / ms["clock"] * 1e3,
    }
    print(f"== {ids.shape[0]}x{ids.shape[1]}: by class")
    for each, _ in (*CLASSES, ("other", "")):
        times = [t for name, t in busy if kernel_class(name) == each]
        if times:
            print(f"  {each:<20}{sum(times):>9.3f} ms{len(times):>6} x")
    print("  by kernel")
    kernels: dict[str, list[float]] = {}
    for name, t in busy:
        kernels.setdefault(name, []).append(t)
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        each_us = 1e3 * statistics.mean(times)
        print(f"  {sum(times):>9.3f} ms{len(times):>6} x{each_us:>9.1f} us  {name[:80]}")
    print("  in order, from the middle on: the pause before each, and its time")
    middle = len(launches) // 2
    for (_, _, last), (name, begin, end) in itertools.pairwise(launches[middle : middle + 61]):
        print(f"  {begin - last:>9.2f}{end - begin:>9.2f} us  {name[:80]}")
    return ms


def _host(run: Callable[[], object]) -> float:
    """Median seconds until all of it is launched."""
    times: list[float] = []
    for _ in range(9):
        _wait()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _launches(run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, begin and end in microseconds of all that the device does in one call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    if DEVICE.type != "cuda":
        run()
        return []
    with profiled(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        run()
        _wait()
    return sorted(
        (
            (event.name, event.time_range.start, event.time_range.end)
            for event in found.events() or ()
            if event.device_type == DeviceType.CUDA
        ),
        key=lambda launch: launch[1],
    )


def read(model: BlackMamba, ids: torch.Tensor, most: int = 16384) -> State:
    """A prefill, of many tokens piece by piece: memory does not grow with the rows."""
    state = None
    for part in ids.split(max(1, most // len(ids)), dim=1):
        _, state = read_piece(model, part, state, None)
    assert state is not None
    return state


def decode_rate(model: BlackMamba, ids: torch.Tensor, steps: int) -> float:
    """Tokens a second of greedy steps after prompts (b, l). No two are alike: sequences that were
    would all choose the same experts."""
    decoder = CapturedDecoder(model, read(model, ids))
    batch = len(ids)
    decoder.step(ids[:, 0].contiguous())

    def run() -> None:
        for _ in range(steps):
            decoder.step(None)

    return batch * steps / clock(run, 3)


def step_bytes(model: BlackMamba, batch: int) -> float:
    """What a step must read and write: each weight once, of the experts those chosen."""
    config = model.config
    experts = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if ".feed_forward.fc" in name
    )
    whole = sum(p.numel() * p.element_size() for p in model.parameters()) - experts
    chosen = 1 - (1 - 1 / config.n_experts) ** batch
    return whole + experts * chosen + 2 * model.initial_state(1).nbytes * batch


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def clock(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after two to warm up, each waited for."""
    times: list[float] = []
    for i in range(repeats + 2):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 100_000])
    parser.add_argument("--prefills", nargs="+", type=int, default=[2048, 16384, 131072, 262144])
    parser.add_argument("--profile", action="store_true", help="only where a prompt's time goes")
    parser.add_argument("--prompts", nargs="+", default=["8x2048", "1x2048"], help="to profile")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="ours alone")
    options = parser.parse_args()
    if options.profile:
        profile(options.preset, options.prompts, options.tiny)
    else:
        main(
            options.preset, options.batches, options.contexts, options.prefills,
            tiny=options.tiny, peer=options.peer,
        )  # fmt: skip
