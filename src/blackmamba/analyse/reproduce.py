"""Every claim of the paper that can be checked at a scale, checked: experiments in, one report out.

What is known of the paper is in docs/paper.md with its sources. Start at `reproduce`.
"""

import dataclasses
import itertools
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blackmamba.analyse import ablations, figures
from blackmamba.analyse.architectures import four_architectures
from blackmamba.analyse.claims import CLAIMS
from blackmamba.analyse.experts import expert_use, router_logits_of, rule_gap
from blackmamba.analyse.flops import counted_flops
from blackmamba.analyse.intervals import mean
from blackmamba.analyse.latency import latencies
from blackmamba.analyse.report import Section, Table, write_report
from blackmamba.analyse.runs import Bench, Curve
from blackmamba.analyse.scales import SCALES, Scale
from blackmamba.analyse.sinkhorn import (
    STARTS,
    Setting,
    Start,
    authors_steps,
    compare,
    converge,
    milliseconds,
    settings,
)
from blackmamba.config import ModelConfig, nearest
from blackmamba.data import DataConfig, PreparedData, ValidationStreams
from blackmamba.data.corpora import find_corpus
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.model.size import forward_flops, parameters, training_flops_per_token
from blackmamba.train.origin import origin

Tell = Callable[[str], None]


PARTS = ("sizes", "ladder", "latency", "experts", "sinkhorn", "ablations", "better")


def reproduce(
    out: str | Path,
    scale: str = "ci",
    *,
    text: Sequence[str] = ("corpus:bible",),
    only: Sequence[str] = PARTS,
    command: str = "",
    tell: Tell = lambda _: None,
) -> Path:
    """Run the experiments and write OUT/report.html; what was trained before is not trained again.

    Args:
        out: folder of everything; made if it is missing.
        scale: one of `SCALES`.
        text: what to train on, see `DataConfig.text`.
        only: some of `PARTS`.
        command: shown in the report.
        tell: is given a line now and then.
    Returns:
        The report.
    Raises:
        ConfigError: no such scale or part.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale={scale!r}: {nearest(scale, SCALES)}")
    for part in only:
        if part not in PARTS:
            raise ConfigError(f"part {part!r}: {nearest(part, PARTS)}")
    lab = _Lab(Path(out), SCALES[scale], tuple(text), tell)
    sections: list[Section] = []
    for part in PARTS:
        if part in only:
            tell(f"== {part}")
            sections.append(getattr(lab, part)())
    sections.append(_NOT_HERE)
    facts = [*_machine(), ("scale", scale), ("text", ", ".join(text)), ("command", command)]
    return write_report(lab.out, "BlackMamba, reproduced", facts, sections)


def _section(
    key: str,
    *,
    finding: str,
    tables: tuple[Table, ...] = (),
    pictures: tuple[tuple[str, Path], ...] = (),
) -> Section:
    claim = CLAIMS[key]
    return Section(key, claim.title, claim.text, finding, tables, pictures)


_NOT_HERE = _section(
    "not-here",
    finding="That needs the released weights and the benchmarks' data: `blackmamba eval MODEL "
    "--tasks paper`. The paper's own table is not repeated here: its numbers are known to us "
    "from recollection only.",
)


class _Lab:
    """One folder of experiments; each part gives its section."""

    def __init__(self, out: Path, scale: Scale, text: tuple[str, ...], tell: Tell):
        self.out, self._scale, self._tell = out, scale, tell
        out.mkdir(parents=True, exist_ok=True)
        data = DataConfig(text=text, vocab_size=scale.vocab_size)
        self._bench = Bench(out / "runs", data, scale.settings, tell)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def sizes(self) -> Section:
        """Parameters and FLOPs of the four networks, and torch's count of them."""
        rows: list[tuple[str, ...]] = []
        exact = True
        for rung in self._scale.ladder:
            for name, config in self._four(rung).items():
                count, flops = parameters(config), forward_flops(config, 0)
                small = dataclasses.replace(config, vocab_size=64, unused_vocab=0)
                counted = counted_flops(small, 1, 16)
                exact &= counted.forward == counted.expected_forward
                exact &= counted.training == 3 * counted.forward
                rows.append((
                    f"{name}, {rung[0]} wide", f"{config.n_layers}", f"{count.total:,}",
                    f"{count.active:,}", f"{flops.total:,}",
                    f"{training_flops_per_token(config, self._scale.settings.seq_len):,}",
                ))  # fmt: skip
        head = ("network", "layers", "parameters", "active a token", "forward FLOPs a token",
                "training FLOPs a token")  # fmt: skip
        verdict = "exactly" if exact else "NOT"
        return _section(
            "sizes",
            finding="The closed forms of products and attention agree "
            f"{verdict} with torch's operation counter, forward and three times that with the "
            "backward pass.",
            tables=(Table("sizes", head, tuple(rows)),),
        )

    def ladder(self) -> Section:
        """Train the four at every rung."""
        scale, curves = self._scale, dict[str, list[Curve]]()
        rows: list[tuple[str, ...]] = []
        best: list[str] = []
        for rung in scale.ladder:
            found = {
                name: [
                    self._bench.curve(f"{name}-{rung[0]}x{rung[1]}", config, seed)
                    for seed in range(scale.seeds)
                ]
                for name, config in self._four(rung).items()
            }
            ends = {n: mean([run.final_nats for run in runs]) for n, runs in found.items()}
            best.append(min(ends, key=lambda name: ends[name].value))
            for name, runs in found.items():
                curves[f"{name}/{rung[0]}"] = runs
                rows.append((
                    f"{name}, {rung[0]} wide", f"{parameters(runs[0].config).active:,}",
                    f"{runs[0].flops[-1]:.3g}", str(ends[name]),
                    str(mean([run.final_bits for run in runs])),
                    str(mean([run.seconds[-1] for run in runs])),
                ))  # fmt: skip
        picture = self.out / "ladder.png"
        figures.draw_ladder(picture, curves)
        head = ("network", "active parameters", "training FLOPs", "validation, nats a token",
                "bits a byte", "seconds")  # fmt: skip
        wins = best.count("blackmamba")
        return _section(
            "ladder",
            finding=f"BlackMamba has the lowest mean validation loss on {wins} of {len(best)} rungs"
            + ("." if wins == len(best) else f"; the lowest were {', '.join(best)}.")
            + f" {scale.seeds} seeds; ± is the 95 % interval of so few. Same text, order, tokens "
            "and optimizer for all; none was tuned on its own. Validation is in windows as long as "
            "in training.",
            tables=(Table("ladder", head, tuple(rows)),),
            pictures=(("Training loss, one line a run", picture),),
        )

    def latency(self) -> Section:
        """Time of prompts and tokens by length of context."""
        scale, tables, pictures, words = self._scale, list[Table](), list[tuple[str, Path]](), ""
        wide = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        models: dict[str, BlackMamba] = {}
        for name, config in self._four(scale.latency).items():
            models[name] = BlackMamba(config, device=self._device, dtype=wide).eval()
        for batch_size in scale.batch_sizes:
            self._tell(f"latency at batch {batch_size}")
            rows = latencies(models, scale.contexts, batch_size=batch_size)
            picture = self.out / f"latency-{batch_size}.png"
            figures.draw_latency(picture, rows)
            pictures.append((f"Batch {batch_size}, {self._device.type}", picture))
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
        return _section(
            "latency",
            finding=f"A token after {scale.contexts[-1]:,} tokens of context against one after "
            f"{scale.contexts[0]:,}: {words}. Each network by the fastest way that this program "
            "has for it; attention has no native or recorded steps, so compare the slopes.",
            tables=tuple(tables),
            pictures=tuple(pictures),
        )

    def experts(self) -> Section:
        """What the experts of one trained model do, and what its two rules of routing cost."""
        curve, models = self._probed()
        data = PreparedData.open(curve.folder / "data")
        last = models[max(models)]
        held_out = self._batches(data)
        domains = {
            "held-out text": [ids for ids, _ in held_out],
            "program source": self._other_text(data),
        }
        uses = expert_use(last.to(self._device), domains)
        heat, through = self.out / "experts.png", self.out / "experts-training.png"
        figures.draw_experts(heat, uses)
        steps, gaps = (
            sorted(models),
            [rule_gap(models[s].to(self._device), held_out) for s in sorted(models)],
        )
        agreement = [
            statistics.fmean(
                u.agreement for u in expert_use(models[s], {"": domains["held-out text"]})
            )
            for s in steps
        ]
        figures.draw_through_training(
            through,
            steps,
            {
                "validation loss": {
                    "largest logit (inference)": [g.inference_nats for g in gaps],
                    "Sinkhorn (training)": [g.training_nats for g in gaps],
                },
                "cost of the switch (nats)": {"inference less training": [g.cost for g in gaps]},
                "tokens with the same expert": {"mean of layers": agreement},
            },
        )
        spell = data.tokenizer.decode
        use_rows = tuple(
            (
                f"{u.layer}", f"{u.entropy:.3f}", f"{u.token_information:.3f}",
                f"{u.chance_information:.3f}", f"{u.position_information:.3f}",
                f"{u.agreement:.3f}",
            )
            for u in uses
        )  # fmt: skip
        words = tuple(
            (f"{u.layer}", f"{expert}", " ".join(repr(spell([i])) for i in ids))
            for u in uses
            for expert, ids in enumerate(u.favourites)
        )
        gap_rows = tuple(
            (
                f"{s}",
                f"{g.inference_nats:.4f}",
                f"{g.training_nats:.4f}",
                f"{g.cost:+.4f}",
                f"{a:.3f}",
            )
            for s, g, a in zip(steps, gaps, agreement, strict=True)
        )
        use_head = ("layer", "evenness", "token tells expert", "by chance", "position tells expert",
                    "same expert in training")  # fmt: skip
        return _section(
            "experts",
            finding="Counted by the inference rule. Training chooses by Sinkhorn's plan, inference "
            f"by the largest logit; at the end the switch costs {gaps[-1].cost:+.4f} nats a token "
            f"and {100 * (1 - agreement[-1]):.1f} % of tokens change their expert.",
            tables=(
                Table("experts", use_head, use_rows),
                Table(
                    "experts-rules",
                    ("step", "inference rule", "training rule", "cost", "same expert"),
                    gap_rows,
                ),
                Table("experts-tokens", ("layer", "expert", "tokens beyond its share"), words),
            ),
            pictures=(
                ("Share of tokens by expert and domain", heat),
                (
                    "Through training: loss by both rules, their difference, how often they agree",
                    through,
                ),
            ),
        )

    def sinkhorn(self) -> Section:
        """Steps to balance from both starts."""
        scale = self._scale
        chosen = settings(scale.sinkhorn_tokens, scale.sinkhorn_experts)
        rows: list[tuple[str, ...]] = []
        saved: list[float] = []
        for found in compare(chosen, seeds=3):
            s = found.setting
            ones, paper = found.steps_to["ones"], found.steps_to["paper"]
            saved.append(ones[1e-2] - paper[1e-2])
            rows.append((
                f"{s.tokens:,} x {s.experts}, logits ±{s.spread:g}",
                *(f"{_count(ones[t])} → {_count(paper[t])}" for t in (1e-2, 1e-3)),
                f"{_count(found.authors_steps['ones'])} → {_count(found.authors_steps['paper'])}",
                f"{found.argmax_overload:.2f}",
                *(
                    f"{found.overload['ones'][n]:.2f} → {found.overload['paper'][n]:.2f}"
                    for n in (1, 2, 4, 0)
                ),
            ))  # fmt: skip
        head = ("tokens x experts", "steps to 1 %", "to 0.1 %", "authors' test", "overload without",
                "after 1", "after 2", "after 4", "after all")  # fmt: skip
        tokens, n_experts = max(scale.sinkhorn_tokens), min(scale.sinkhorn_experts)
        panels = {
            f"logits ±{x:g}": {
                start: converge(Setting(tokens, n_experts, x, x).logits(0), start)
                for start in STARTS
            }
            for x in (0.5, 1.0, 2.0)
        }
        picture = self.out / "sinkhorn.png"
        figures.draw_sinkhorn(picture, panels)
        cost = tuple(
            (
                f"{t:,} x {n_experts}",
                start,
                f"{milliseconds(Setting(t, n_experts, 1.0, 1.0), start, self._device):.3f}",
            )
            for t, start in itertools.product(scale.sinkhorn_tokens, STARTS)
        )
        return _section(
            "sinkhorn",
            finding="At equal accuracy (every marginal within 1 %) the paper's start saves "
            f"{statistics.fmean(saved):.1f} steps on average over {len(chosen)} settings, "
            f"{min(saved):.0f} to {max(saved):.0f}. The authors' stopping test is on the change of "
            "the column factors; with their start those are so small that it passes at once, "
            "balanced or not. → is from the ordinary start to the paper's; overload is the busiest "
            "expert's tokens over the mean, less 1.",
            tables=(
                Table("sinkhorn", head, tuple(rows)),
                Table(
                    "sinkhorn-cost",
                    ("tokens x experts", "start", f"ms on this {self._device.type}"),
                    cost,
                ),
                self._sinkhorn_in_training(),
            ),
            pictures=(
                (
                    f"Error after each step, {tokens:,} tokens, {n_experts} experts; dotted: where "
                    "the authors' test stops",
                    picture,
                ),
            ),
        )

    def ablations(self) -> Section:
        """One change to the paper's network at a time."""
        scale = self._scale
        base = self._four(scale.ladder[0])["blackmamba"]
        losses: dict[str, list[float]] = {}
        rows: list[tuple[str, ...]] = []
        for variant in ablations.variants(base, scale.experts):
            runs = [
                self._bench.curve(f"ablation-{variant.name}", variant.config, seed)
                for seed in range(scale.ablation_seeds)
            ]
            losses[variant.name] = [run.final_nats for run in runs]
            change = mean(losses[variant.name]).value - mean(losses[ablations.PAPER]).value
            count = parameters(variant.config)
            rows.append((
                variant.name, variant.question, f"{count.total:,}", f"{count.active:,}",
                f"{runs[0].flops[-1]:.3g}", str(mean(losses[variant.name])), f"{change:+.4f}",
            ))  # fmt: skip
        picture = self.out / "ablations.png"
        figures.draw_ablations(picture, losses, ablations.PAPER)
        head = ("variant", "of", "parameters", "active", "training FLOPs",
                "validation, nats a token", "less the paper's")  # fmt: skip
        lowest = min(losses, key=lambda name: mean(losses[name]).value)
        return _section(
            "ablations",
            finding=f"Lowest here: {lowest}. {scale.ablation_seeds} seed(s) each: differences "
            "below the spread of seeds say nothing.",
            tables=(Table("ablations", head, tuple(rows)),),
            pictures=(("Each dot a seed, the bar their mean", picture),),
        )

    def better(self) -> Section:
        """A recipe meant to reach the paper's loss with at most 70 % of its training FLOPs."""
        scale = self._scale
        rows: list[tuple[str, ...]] = []
        verdicts: list[str] = []
        for rung in scale.ladder[:2]:
            base = self._four(rung)["blackmamba"]
            new = ablations.better(base)
            name = f"{rung[0]}x{rung[1]}"
            share = 0.7 * training_flops_per_token(base, scale.settings.seq_len)
            share /= training_flops_per_token(new, scale.settings.seq_len)
            fewer = ablations.with_fewer_steps(scale.settings, share, optimizer="muon")
            paper = [
                self._bench.curve(f"blackmamba-{name}", base, seed) for seed in range(scale.seeds)
            ]
            ours = [
                self._bench.curve(f"better-{name}", new, seed, fewer) for seed in range(scale.seeds)
            ]
            ends = [mean([run.final_nats for run in runs]) for runs in (paper, ours)]
            for label, config, runs, end in zip(
                ("paper's", "better"), (base, new), (paper, ours), ends, strict=True
            ):
                rows.append((
                    f"{label}, {rung[0]} wide", f"{parameters(config).total:,}",
                    f"{parameters(config).active:,}", f"{runs[0].flops[-1]:.3g}", str(end),
                ))  # fmt: skip
            reached = "reaches" if ends[1].value <= ends[0].value else "does not reach"
            spent = ours[0].flops[-1] / paper[0].flops[-1]
            verdicts.append(f"{rung[0]} wide: {reached} it, with {100 * spent:.0f} % of the FLOPs")
        head = ("recipe", "parameters", "active", "training FLOPs", "validation, nats a token")
        return _section(
            "better",
            finding="The paper's loss with 70 % of its training FLOPs? "
            + "; ".join(verdicts)
            + ".",
            tables=(Table("better", head, tuple(rows)),),
        )

    def _four(self, rung: tuple[int, int]) -> dict[str, ModelConfig]:
        return four_architectures(*rung, self._scale.vocab_size)

    def _probed(self) -> tuple[Curve, dict[int, BlackMamba]]:
        """One run of the ladder's first BlackMamba that kept what it was on its way."""
        scale = self._scale
        every = max(1, scale.settings.steps // scale.probes)
        kept = dataclasses.replace(
            scale.settings, checkpoint_every=every, keep_checkpoints=scale.probes + 2
        )
        curve = self._bench.curve("probed", self._four(scale.ladder[0])["blackmamba"], 0, kept)
        return curve, self._bench.checkpoints(curve)

    def _batches(self, data: PreparedData, number: int = 6) -> list[tuple[Tensor, Tensor]]:
        """Of the held-out text, without what is not predicted."""
        scale = self._scale.settings
        streams = ValidationStreams(
            data.validation.tokens, scale.batch_size, scale.seq_len, data.tokenizer.eot_id
        )
        pairs = itertools.islice((pair for pair in streams if not (pair[1] == -100).any()), number)
        return [(ids.to(self._device), labels.to(self._device)) for ids, labels in pairs]

    def _other_text(self, data: PreparedData, number: int = 6) -> list[Tensor]:
        """Of the Python that runs this: text that the model may never have seen."""
        scale, corpus = self._scale.settings, find_corpus("python-stdlib")
        wanted, ids = number * scale.batch_size * scale.seq_len, list[int]()
        for document in itertools.chain.from_iterable(map(corpus.documents, corpus.files())):
            ids += data.tokenizer.encode(document)
            if len(ids) >= wanted:
                break
        whole = torch.tensor(ids[:wanted], device=self._device)
        return list(whole.view(number, scale.batch_size, scale.seq_len))

    def _sinkhorn_in_training(self) -> Table:
        curve, models = self._probed()
        data = PreparedData.open(curve.folder / "data")
        [(ids, _)] = self._batches(data, 1)
        rows: list[tuple[str, ...]] = []
        for step, model in sorted(models.items()):
            layers = router_logits_of(model.to(self._device), ids)
            steps: dict[Start, str] = {}
            for start in STARTS:
                runs = [converge(logits, start) for logits in layers.values()]
                balanced = statistics.fmean(run.steps_to[1e-2] or math.inf for run in runs)
                theirs = statistics.fmean(
                    authors_steps(logits, start, 2.0, 300) or math.inf for logits in layers.values()
                )
                steps[start] = f"{_count(balanced)} ({_count(theirs)})"
            spread = statistics.fmean(float(logits.std()) for logits in layers.values())
            rows.append((f"{step}", f"{spread:.2f}", steps["ones"], steps["paper"]))
        head = (
            "training step",
            "spread of logits",
            "ordinary start: to 1 % (authors' test)",
            "paper's start",
        )
        return Table("sinkhorn-training", head, tuple(rows))


def _count(steps: float) -> str:
    return "never" if math.isinf(steps) else f"{steps:g}" if steps == int(steps) else f"{steps:.1f}"


def _machine() -> list[tuple[str, str]]:
    facts: Mapping[str, str] = {key: str(value) for key, value in origin().items()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        *(("blackmamba " + key, value) for key, value in facts.items()),
        ("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("GPU", gpu),
    ]
