"""Time of prompts and tokens by length of context."""

from pathlib import Path

import torch

from blackmamba.analyse import figures
from blackmamba.analyse.architectures import NAMES
from blackmamba.analyse.lab import Lab, section
from blackmamba.analyse.latency import latencies
from blackmamba.analyse.report import Section, Table
from blackmamba.model import BlackMamba


def latency(lab: Lab) -> Section:
    """Time of prompts and tokens by length of context."""
    scale, tables, pictures, words = lab.scale, list[Table](), list[tuple[str, Path]](), ""
    wide = torch.bfloat16 if lab.device.type == "cuda" else torch.float32
    models: dict[str, BlackMamba] = {}
    for name in NAMES:
        config = lab.network(name, scale.latency)
        models[name] = BlackMamba(config, device=lab.device, dtype=wide).eval()
    for batch_size in scale.batch_sizes:
        lab.tell(f"latency at batch {batch_size}")
        rows = latencies(models, scale.contexts, batch_size=batch_size)
        picture = lab.out / f"latency-{batch_size}.png"
        figures.draw_latency(picture, rows)
        pictures.append((f"Batch {batch_size}, {lab.device.type}", picture))
        cells = tuple(
            (
                f"{r.name}",
                f"{r.context:,}",
                f"{r.prompt_s:.4f}",
                f"{r.token_ms:.3f}",
                f"{r.state_bytes:,}",
            )
            for r in rows
        )
        head = ("network", "context", "prompt, s", "token, ms", "memory, bytes")
        tables.append(Table(f"latency-{batch_size}", head, cells))
        if not words:
            first = {r.name: r.token_ms for r in rows if r.context == scale.contexts[0]}
            last = {r.name: r.token_ms for r in rows if r.context == scale.contexts[-1]}
            words = "; ".join(f"{n} {last[n] / first[n]:.2f} times" for n in first)
    return section(
        "latency",
        finding=f"A token after {scale.contexts[-1]:,} tokens of context against one after "
        f"{scale.contexts[0]:,}: {words}. Each network by the fastest way that this program "
        "has for it; attention has no native or recorded steps, so compare the slopes.",
        tables=tuple(tables),
        pictures=tuple(pictures),
    )
