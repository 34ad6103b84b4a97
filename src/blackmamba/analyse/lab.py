"""What the parts of a report share: a folder, a scale, runs on one text, and learning rates."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blackmamba.analyse import ablations
from blackmamba.analyse.architectures import four_architectures
from blackmamba.analyse.claims import CLAIMS
from blackmamba.analyse.report import Section, Table
from blackmamba.analyse.runs import Bench, Curve, Plan
from blackmamba.analyse.scales import Scale
from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig, MixtureData, PreparedData, ValidationStreams
from blackmamba.data.corpora import find_corpus
from blackmamba.data.packing import Sliceable
from blackmamba.model import BlackMamba
from blackmamba.train import TrainConfig

Rung = tuple[int, int]
BETTER = ablations.BETTER


class Lab:
    """One folder of experiments.

    Args:
        out: the folder; made if it is missing.
        scale: how large they are.
        data: what is trained on.
        jobs: training runs at once.
        tell: is given a line now and then.
        seconds: see `Bench`.
    """

    def __init__(
        self,
        out: Path,
        scale: Scale,
        data: DataConfig,
        jobs: int,
        tell: Callable[[str], None],
        seconds: float = math.inf,
    ):
        self.out, self.scale, self.jobs, self.tell = out, scale, jobs, tell
        out.mkdir(parents=True, exist_ok=True)
        self.bench = Bench(out / "runs", data, jobs, tell, seconds)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._taken: dict[str, float] = {}
        # Networks so small are done before the host has started their kernels one by one.
        self._settings = dataclasses.replace(
            scale.settings,
            capture=self.device.type == "cuda",
            checkpoint_every=-(-scale.settings.steps // scale.cuts) if scale.cuts else 0,
            keep_checkpoints=1,
        )

    def network(self, name: str, rung: Rung) -> ModelConfig:
        """One of the four, or the better recipe's."""
        four = four_architectures(*rung, self.scale.vocab_size)
        return ablations.better(four["blackmamba"]) if name == BETTER else four[name]

    def plan(self, name: str, rung: Rung, seed: int, share: float = 1.0) -> Plan:
        """A run of the ladder with the learning rate that was found for the network.

        The rate is divided by the width over that of the first rung: for AdamW and for Muon at
        AdamW's scale a matrix's steps should fall as its rows get longer (2203.03466, table 3).

        Args:
            name, rung: see `network`.
            seed: of the run.
            share: of the scale's steps; the schedule ends there.
        """
        lr = self.rate(name) * self.scale.ladder[0][0] / rung[0]
        settings = ablations.with_fewer_steps(
            self._settings, share, lr=lr, **ablations.optimizer_of(name)
        )
        return Plan(f"{name}-{rung[0]}x{rung[1]}", self.network(name, rung), seed, settings)

    def trials(self, names: Iterable[str]) -> list[Plan]:
        """The short runs that learning rates are chosen by; none where there is one to take."""
        return [
            self._trial(name, lr) for name in names if len(self._rates(name)) > 1
            for lr in self._rates(name)
        ]  # fmt: skip

    def rate(self, name: str) -> float:
        """The learning rate of a network at the first rung: the best of its trials."""
        if name not in self._taken:
            rates = self._rates(name)
            losses = dict.fromkeys(rates, 0.0)
            if len(rates) > 1:
                for lr in rates:
                    losses[lr] = self.bench.curve(self._trial(name, lr)).final_nats
            self._taken[name] = min(losses, key=lambda lr: losses[lr])
        return self._taken[name]

    def rates_table(self, names: Sequence[str]) -> Table:
        """Every trial's validation loss, a row a network."""
        rows: list[tuple[str, ...]] = []
        for name in names:
            cells = [
                f"{lr:g}: {self.bench.curve(self._trial(name, lr)).final_nats:.4f}"
                for lr in (self._rates(name) if len(self._rates(name)) > 1 else ())
            ]
            rows.append((name, ", ".join(cells) or "not tuned", f"{self.rate(name):g}"))
        head = ("network", "learning rate: validation after a short run", "taken")
        return Table(f"rates-{names[-1]}", head, tuple(rows))

    def _rates(self, name: str) -> tuple[float, ...]:
        return self.scale.muon_lrs if name == BETTER else self.scale.lrs

    def _trial(self, name: str, lr: float) -> Plan:
        share = self.scale.tuning_steps / self.scale.settings.steps
        settings = ablations.with_fewer_steps(
            self._settings, share, lr=lr, **ablations.optimizer_of(name)
        )
        return Plan(f"rate-{name}-{lr:g}", self.network(name, self.scale.ladder[0]), 0, settings)

    def probe(self) -> Plan:
        """A run of the ladder's first BlackMamba that keeps what it was on its way."""
        plan, probes = self.plan("blackmamba", self.scale.ladder[0], 0), self.scale.probes
        every = max(1, plan.settings.steps // probes)
        kept = dataclasses.replace(
            plan.settings, checkpoint_every=every, keep_checkpoints=probes + 2
        )
        return dataclasses.replace(plan, name="probed", settings=kept, keeps_checkpoints=True)

    def probed(self) -> tuple[Curve, dict[int, BlackMamba]]:
        """That run and the models that it kept, by step."""
        curve = self.bench.curve(self.probe())
        return curve, self.bench.checkpoints(curve)

    def batches(
        self, data: PreparedData | MixtureData, number: int = 6
    ) -> list[tuple[Tensor, Tensor]]:
        """Of the held-out text, without what is not predicted."""
        return self._read(data.validation.tokens, data.tokenizer.eot_id, number)

    def domains(self, data: PreparedData | MixtureData) -> dict[str, list[Tensor]]:
        """Text by kind: what each source holds out; of one source, that and what is foreign."""
        if isinstance(data, MixtureData) and len(data.held_out) > 1:
            return {
                name: [ids for ids, _ in self._read(tokens, data.tokenizer.eot_id, 6)]
                for name, tokens in data.held_out.items()
            }
        own = [ids for ids, _ in self.batches(data)]
        return {"held-out text": own, "program source": self.other_text(data)}

    def _read(self, tokens: Sliceable, eot_id: int, number: int) -> list[tuple[Tensor, Tensor]]:
        settings = self.scale.settings
        rows = max(1, min(settings.batch_size, len(tokens) // settings.seq_len))
        streams = ValidationStreams(tokens, rows, settings.seq_len, eot_id)
        pairs = itertools.islice((pair for pair in streams if not (pair[1] == -100).any()), number)
        return [(ids.to(self.device), labels.to(self.device)) for ids, labels in pairs]

    def other_text(self, data: PreparedData | MixtureData, number: int = 6) -> list[Tensor]:
        """Of the Python that runs this: text that the model may never have seen."""
        settings, corpus = self.scale.settings, find_corpus("python-stdlib")
        wanted, ids = number * settings.batch_size * settings.seq_len, list[int]()
        for document in itertools.chain.from_iterable(map(corpus.documents, corpus.files())):
            ids += data.tokenizer.encode(document)
            if len(ids) >= wanted:
                break
        whole = torch.tensor(ids[:wanted], device=self.device)
        return list(whole.view(number, settings.batch_size, settings.seq_len))


def section(
    key: str,
    *,
    finding: str,
    tables: tuple[Table, ...] = (),
    pictures: tuple[tuple[str, Path], ...] = (),
    numbers: tuple[Table, ...] = (),
) -> Section:
    """The section of a claim."""
    claim = CLAIMS[key]
    return Section(key, claim.title, claim.text, finding, tables, pictures, numbers)


def settings_words(settings: TrainConfig) -> str:
    """What every run of a ladder has in common."""
    return (
        f"{settings.steps:,} steps of {settings.batch_size} x {settings.seq_len} tokens, "
        f"{settings.steps * settings.batch_size * settings.seq_len / 1e6:.1f} million in all"
    )
