"""Many short training runs over the same data, each a folder of its own that is not made twice."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from blackmamba.checkpoint import load
from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig, PreparedData, prepare
from blackmamba.files import write_text
from blackmamba.model import BlackMamba
from blackmamba.model.size import training_flops_per_token
from blackmamba.train import RunConfig, TrainConfig, run
from blackmamba.train.metrics import METRICS_FILE, read_metrics

_DATA, _FINAL = "data", "final.json"
_ROWS = 16  # windows that are read together


@dataclasses.dataclass(frozen=True)
class Curve:
    """A finished run."""

    name: str
    seed: int
    folder: Path
    config: ModelConfig
    seq_len: int
    tokens: tuple[int, ...]
    """Read up to the end of each step."""
    losses: tuple[float, ...]
    """Training loss of each step, nats per token."""
    seconds: tuple[float, ...]
    """Since the run's start."""
    final_nats: float
    """Validation loss at the end, nats per token, in windows of seq_len that begin with an empty
    memory: attention was not trained to look back further, so that it would lose by more."""
    final_bits: float
    """The same, bits per byte."""

    @property
    def flops(self) -> tuple[float, ...]:
        """Training FLOPs up to the end of each step, by the closed form."""
        each = training_flops_per_token(self.config, self.seq_len)
        return tuple(float(each * n) for n in self.tokens)


class Bench:
    """Trains networks on one prepared text, under one folder.

    Args:
        folder: of all its runs; what is finished in it is read and not trained again.
        data: the text.
        settings: of every run; its seed is set for each.
        tell: is given a line when a run begins.
    """

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        settings: TrainConfig,
        tell: Callable[[str], None] = lambda _: None,
    ):
        self._folder, self._data, self._settings, self._tell = folder, data, settings, tell

    def curves(self, networks: Mapping[str, ModelConfig], seeds: int) -> dict[str, list[Curve]]:
        """Train every network with every seed from 0."""
        return {
            name: [self.curve(name, config, seed) for seed in range(seeds)]
            for name, config in networks.items()
        }

    def curve(
        self,
        name: str,
        config: ModelConfig,
        seed: int,
        settings: TrainConfig | None = None,
    ) -> Curve:
        """Train one network, or read what it did.

        Args:
            name: of its folder and in figures.
            config: of the network.
            seed: of weights and order of the text.
            settings: other ones than the bench's.
        """
        train = dataclasses.replace(settings or self._settings, seed=seed)
        whole = RunConfig(model=config, data=self._data, train=train)
        folder = self._folder / f"{name}-seed{seed}"
        if not (folder / _FINAL).exists():
            self._tell(f"training {name}, seed {seed}: {train.steps} steps")
            shutil.rmtree(folder, ignore_errors=True)
            self._share_data(folder)
            run(whole, folder)
            nats, bits = windowed_loss(folder, train.seq_len)
            write_text(folder / _FINAL, json.dumps({"nats": nats, "bits": bits}) + "\n")
        return _read(name, seed, folder, config, train.seq_len)

    def checkpoints(self, curve: Curve) -> dict[int, BlackMamba]:
        """The models that a run saved on its way, in evaluation mode, by step."""
        folders = sorted((curve.folder / "checkpoints").glob("step-*"))
        return {int(folder.name.removeprefix("step-")): load(folder) for folder in folders}

    def _share_data(self, folder: Path) -> None:
        """Tokens that were made once are copied: each run has its own folder of them."""
        prepare(self._data, self._folder / _DATA)
        shutil.copytree(self._folder / _DATA, folder / _DATA)


def _read(name: str, seed: int, folder: Path, config: ModelConfig, seq_len: int) -> Curve:
    rows = [row for row in read_metrics(folder / METRICS_FILE) if row["loss"] is not None]
    final = json.loads((folder / _FINAL).read_text(encoding="utf-8"))
    return Curve(
        name=name,
        seed=seed,
        folder=folder,
        config=config,
        seq_len=seq_len,
        tokens=tuple(row["tokens"] for row in rows),
        losses=tuple(row["loss"] for row in rows),
        seconds=tuple(row["seconds"] for row in rows),
        final_nats=final["nats"],
        final_bits=final["bits"],
    )


@torch.inference_mode()
def windowed_loss(folder: Path, seq_len: int) -> tuple[float, float]:
    """Of a run's model on its held-out text, in windows read from an empty memory.

    Args:
        folder: of a finished run.
        seq_len: tokens of a window; what is left over at the end is not read.
    Returns:
        Nats per token by the inference rule of routing, and bits per byte.
    """
    data = PreparedData.open(folder / _DATA)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(folder / "model", device=device)
    ids = torch.from_numpy(data.validation.tokens[:].astype(np.int64)).to(device)
    seq_len = min(seq_len, len(ids) - 1)
    windows = (len(ids) - 1) // seq_len
    inputs, labels = (
        ids[first : first + windows * seq_len].view(windows, seq_len) for first in (0, 1)
    )
    total = sum(
        float(model.loss(i, l)) * l.numel()
        for i, l in zip(inputs.split(_ROWS), labels.split(_ROWS), strict=True)
    )
    nats = total / labels.numel()
    tokens_per_byte = data.validation.n_tokens / data.validation.n_bytes
    return nats, nats * tokens_per_byte / math.log(2)
