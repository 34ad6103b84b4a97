"""The pictures: one style for all of them. Only this file of the room imports matplotlib."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from blackmamba.analyse.experts import LayerUse
from blackmamba.analyse.latency import Latency
from blackmamba.analyse.runs import Curve
from blackmamba.analyse.sinkhorn import Convergence
from blackmamba.files import atomic_file

COLOURS = {
    "transformer": "#7f7f7f",
    "moe-transformer": "#1f77b4",
    "mamba": "#2ca02c",
    "blackmamba": "#d62728",
}
_OTHERS = ("#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e")
_SMOOTHED = 0.05  # of a curve's steps are averaged
_PLACES = 200  # of a line, at most

Point = tuple[float, float, float, float]
"""Of a line: training FLOPs, seconds, loss, tokens."""
CURVES_HEAD = ("network", "seed", "training FLOPs", "seconds", "loss, smoothed", "tokens")
_BASE = "mamba"  # what the others' losses are compared with


@contextmanager
def figure(path: Path, columns: int = 1, height: float = 3.7) -> Generator[Any]:
    """Axes to draw on, in an array of (1, columns), `height` inches high; saved at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.2 * columns, height), dpi=130, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, columns, squeeze=False)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        drawn.savefig(temporary, format="png")


def colour(name: str, index: int = 0) -> str:
    """The same one for the same network everywhere."""
    return COLOURS.get(name, _OTHERS[index % len(_OTHERS)])


def line(run: Curve) -> list[Point]:
    """A run's smoothed loss at no more than 200 places.

    Without its first tenth, and without the last step, whose time is the validation's as well.
    """
    smooth = _smooth(np.array(run.losses))
    step = -(-len(smooth) // _PLACES)
    places = range(max(0, len(smooth) - 2), len(smooth) // 10 - 1, -step)
    return [
        (run.flops[i], run.seconds[i], float(smooth[i]), float(run.tokens[i]))
        for i in reversed(places)
    ]


def lines(curves: Mapping[str, Sequence[Curve]]) -> dict[str, list[list[Point]]]:
    """Of each network's runs."""
    return {name: [line(run) for run in runs] for name, runs in curves.items()}


def draw_ladder(path: Path, curves: Mapping[str, Sequence[Sequence[Point]]], jobs: int = 1) -> None:
    """Smoothed training loss against FLOPs and against time; a line a run. If dense Mamba is there,
    also by how much it is above that of dense Mamba after the same tokens, of the same seed.

    A colour is a network, a kind of line a rung.

    Args:
        path: of the PNG file.
        curves: by network, or network/rung.
        jobs: runs that shared the machine, which stretches the time.
    """
    gaps = _gaps(curves)
    with figure(path, columns=3 if gaps else 2) as axes:
        rungs = list(dict.fromkeys(name.partition("/")[2] for name in curves))
        for i, (name, runs) in enumerate(curves.items()):
            network, _, width = name.partition("/")
            for j, run in enumerate(runs):
                flops, seconds, loss, _ = zip(*run, strict=True)
                label = (f"{network}, {width} wide" if width else name) if j == 0 else None
                style: dict[str, Any] = {"color": colour(network, i), "lw": 1.2, "alpha": 0.85}
                style["ls"] = ("-", "--", ":")[rungs.index(width) % 3]
                axes[0, 0].plot(flops, loss, label=label, **style)
                axes[0, 1].plot(seconds, loss, **style)
                if gap := gaps.get((name, j)):
                    axes[0, 2].plot(*zip(*gap, strict=True), **style)
        axes[0, 0].set(xlabel="training FLOPs", ylabel="loss (nats per token)", xscale="log")
        axes[0, 0].minorticks_off()  # their labels would lie on each other
        low, high = axes[0, 0].get_xlim()
        ticks = [m * 10.0**e for e in range(-1, 30) for m in (1, 2, 5) if low < m * 10.0**e < high]
        axes[0, 0].set_xticks(ticks, [f"{tick:.0e}".replace("+", "") for tick in ticks])
        among = f", {jobs} runs at once" if jobs > 1 else ""
        axes[0, 1].set(xlabel=f"seconds on this machine{among}", ylabel="loss (nats per token)")
        if gaps:
            late = [abs(y) for gap in gaps.values() for _, y in gap[len(gap) // 3 :]]
            axes[0, 2].axhline(0, color="black", lw=0.8, ls=":")
            axes[0, 2].set(
                xlabel="million tokens", ylabel="loss less dense Mamba's, by seed",
                ylim=(-1.2 * max(late), 1.2 * max(late)),
            )  # fmt: skip
        _legend_above(axes[0, 0], 4)


def _gaps(
    curves: Mapping[str, Sequence[Sequence[Point]]],
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """By network/rung and place of the seed: million tokens, and loss less dense Mamba's there."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name, runs in curves.items():
        network, slash, rung = name.partition("/")
        bases = curves.get(_BASE + slash + rung, ())
        for j, (run, base) in enumerate(zip(runs, bases, strict=False)):
            losses = {tokens: loss for *_, loss, tokens in base}
            gap = [(n / 1e6, loss - losses[n]) for *_, loss, n in run if n in losses]
            if network != _BASE and gap:
                found[name, j] = gap
    return found


def draw_latency(path: Path, rows: Sequence[Latency]) -> None:
    """Time of a prompt, time of a token after it, and memory, by length of context.

    Networks that run by plain PyTorch are dashed: their slope counts, not their height. Memory of
    the two transformers is the same.
    """
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys(row.name for row in rows))
    with figure(path, columns=3) as axes:
        for i, name in enumerate(names):
            own = [row for row in rows if row.name == name]
            x = [row.context for row in own]
            is_plain = "transformer" in name  # attention has no native or recorded steps
            style: dict[str, Any] = {
                "color": colour(name, i),
                "marker": "o",
                "ms": 3,
                "ls": "--" if is_plain else "-",
                "lw": 3.0 - 0.5 * i,  # where lines lie on each other, all are seen
                "label": f"{name} (plain PyTorch)" if is_plain else name,
            }
            axes[0, 0].plot(x, [row.prompt_s for row in own], **style)
            axes[0, 1].plot(x, [row.token_ms for row in own], **style)
            axes[0, 2].plot(x, [row.state_bytes / 1e6 for row in own], **style)
        for axis, what in zip(
            axes[0],
            ("reading the prompt (s)", "each token after it (ms)", "memory of a sequence (MB)"),
            strict=True,
        ):
            axis.set(xlabel="tokens of context", ylabel=what, xscale="log", yscale="log")
            contexts = sorted({row.context for row in rows})
            axis.set_xticks(contexts, [f"{n:,}" for n in contexts], fontsize=8)
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
            axis.yaxis.set_major_formatter("{x:g}")
            for side in (axis.xaxis, axis.yaxis):
                side.set_minor_formatter("")  # they would lie on each other
        _legend_above(axes[0, 0], len(names))


def draw_sinkhorn(path: Path, pairs: Mapping[str, Mapping[str, Convergence]]) -> None:
    """Error of the marginals after each step, for both starts; a panel a setting."""
    with figure(path, columns=len(pairs)) as axes:
        for axis, (title, runs) in zip(axes[0], pairs.items(), strict=True):
            for start, run in runs.items():
                label = "the paper's start" if start == "paper" else "ordinary start"
                steps = range(1, len(run.errors) + 1)
                shade = COLOURS["blackmamba" if start == "paper" else "transformer"]
                axis.plot(steps, run.errors, marker="o", ms=3, color=shade, label=label)
                if 0 < run.authors_steps <= len(run.errors):
                    axis.axvline(run.authors_steps, color=shade, ls=":", lw=1)
            axis.set(
                title=title, xlabel="steps", ylabel="largest error of a marginal", yscale="log"
            )
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].legend(frameon=False, fontsize=8)


def draw_experts(path: Path, uses: Sequence[LayerUse]) -> None:
    """Each expert's share of the tokens of each domain: a panel a layer."""
    with figure(path, columns=len(uses)) as axes:
        for axis, use in zip(axes[0], uses, strict=True):
            n_experts = len(next(iter(use.share.values())))
            width = 0.8 / len(use.share)
            for i, (domain, share) in enumerate(use.share.items()):
                x = np.arange(n_experts) + (i - (len(use.share) - 1) / 2) * width
                axis.bar(x, share, width, label=domain, color=_OTHERS[i % len(_OTHERS)])
            axis.axhline(1 / n_experts, color="black", lw=0.8, ls=":")
            axis.set(title=f"layer {use.layer}", xlabel="expert", ylabel="share of tokens")
        axes[0, 0].legend(frameon=False, fontsize=8)


def draw_through_training(
    path: Path, steps: Sequence[int], series: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """A panel for each quantity, a line for each of its series, by training step."""
    with figure(path, columns=len(series)) as axes:
        for axis, (what, lines) in zip(axes[0], series.items(), strict=True):
            for i, (label, values) in enumerate(lines.items()):
                axis.plot(steps, values, marker="o", ms=3, color=_OTHERS[i], label=label)
            axis.set(xlabel="training step", ylabel=what)
            axis.legend(frameon=False, fontsize=8)


def draw_ablations(path: Path, losses: Mapping[str, Sequence[float]], base: str) -> None:
    """Final validation loss of each variant less the base's mean: a dot a seed."""
    zero = float(np.mean(losses[base]))
    names = list(losses)[::-1]
    with figure(path, height=1.2 + 0.25 * len(names)) as axes:
        whole = axes[0, 0]
        for y, name in enumerate(names):
            values = np.array(losses[name]) - zero
            whole.plot(values, [y] * len(values), "o", ms=4, alpha=0.7, color="#d62728")
            whole.plot([values.mean()], [y], "|", ms=14, color="black")
        whole.axvline(0, color="black", lw=0.8, ls=":")
        whole.set_yticks(range(len(names)), names, fontsize=8)
        whole.xaxis.get_major_locator().set_params(nbins=5)
        whole.set(xlabel=f"validation loss less that of {base} (nats per token)")


def _legend_above(axis: Any, columns: int) -> None:
    """Of a figure's lines, where no line is."""
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=8
    )


def _smooth(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    n = max(1, int(len(values) * _SMOOTHED))
    padded = np.concatenate([np.full(n - 1, values[0]), values])
    return np.convolve(padded, np.ones(n) / n, mode="valid")
