"""How well a model predicts text that it has not seen."""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.data import ChatData, MixtureData, PreparedData, ValidationStreams
from blackmamba.data.packing import IGNORED
from blackmamba.model import BlackMamba
from blackmamba.train.metrics import finite
from blackmamba.train.parallel.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class Validation:
    """How well a text was predicted."""

    nats: float
    """Sum of -log p over its tokens, the end of text before each document included."""
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the text, without the ends of text."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """What a compressor that uses this model would need for each byte of text."""
        return self.nats / math.log(2) / self.n_bytes


@dataclasses.dataclass(frozen=True)
class Validations:
    """Of one moment of a run."""

    weights: Validation
    average: Validation | None
    """Of the moving average of the weights, if there is one."""

    def row(self) -> dict[str, dict[str, float | None]]:
        """Their part of a line of metrics.jsonl."""
        found = {"validation": self.weights}
        if self.average is not None:
            found["validation_ema"] = self.average
        return {
            name: {
                "nats_per_token": finite(validation.nats_per_token),
                "bits_per_byte": finite(validation.bits_per_byte),
            }
            for name, validation in found.items()
        }


@torch.inference_mode()
def validate(
    model: BlackMamba,
    data: PreparedData | ChatData | MixtureData,
    *,
    batch_size: int,
    seq_len: int,
    ranks: Ranks | None = None,
) -> Validation:
    """Predict every validation token exactly once, with the routing that inference uses.

    Args:
        model: comes back in the mode, training or evaluation, that it came in.
        data: its validation split is read. Of conversations only the answers count, and each is
            read from its own beginning, however long it is.
        batch_size: parallel streams that the text is cut into; each begins with an empty memory.
        seq_len: tokens of a stream that are read at once; the memory is carried from piece to
            piece, so this changes memory and speed, not the result.
        ranks: who shares the streams; each reads its part of them, and all know the result.
    """
    if isinstance(data, ChatData):
        return _validate_answers(model, data, batch_size, seq_len)
    ranks = ranks or Ranks()
    streams = ValidationStreams(data.validation.tokens, batch_size, seq_len, data.tokenizer.eot_id)
    device = model.embedding.weight.device
    nats = torch.zeros((), dtype=torch.float64)
    state = None
    was_training = model.training
    model.eval()
    try:
        for every_id, every_label in streams:
            input_ids, labels = _own_streams(every_id, every_label, ranks)
            logits, state = model.prefill(input_ids.to(device), state)
            losses = F.cross_entropy(  # where the logits are: not with weights that were offloaded
                logits.float().flatten(0, 1), labels.to(logits.device).flatten(), reduction="none"
            )
            nats = nats.to(losses.device) + losses.double().sum()
    finally:
        model.train(was_training)
        if hasattr(model, "reshard"):  # FSDP keeps the embedding, which may change next
            model.reshard()  # pyright: ignore[reportCallIssue]
    return Validation(ranks.sum_(nats).item(), streams.n_predicted, data.validation.n_bytes)


def _own_streams(input_ids: Tensor, labels: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's rows; where there are fewer than ranks, a row that does not count.

    All ranks have to run the model equally often, as they do it together.
    """
    n, rank, size = len(input_ids), ranks.rank, ranks.size
    own = slice(n * rank // size, n * (rank + 1) // size)
    if own.start == own.stop:
        return input_ids[:1], torch.full_like(labels[:1], IGNORED)
    return input_ids[own], labels[own]


def _validate_answers(
    model: BlackMamba, data: ChatData, batch_size: int, seq_len: int
) -> Validation:
    """Over the answers' words and ends; bits are those of their text. Every rank reads all."""
    device = model.embedding.weight.device
    nats = torch.zeros((), dtype=torch.float64)
    n_tokens, was_training = 0, model.training
    model.eval()
    try:
        for input_ids, labels, lengths in data.validation_batches(batch_size):
            state = None
            for start in range(0, input_ids.shape[1], seq_len):
                piece = slice(start, start + seq_len)
                left = (lengths - start).clamp(0, input_ids[:, piece].shape[1]).to(device)
                logits, state = model.prefill(input_ids[:, piece].to(device), state, lengths=left)
                wanted = labels[:, piece].flatten().to(logits.device)
                losses = F.cross_entropy(
                    logits.float().flatten(0, 1), wanted, ignore_index=IGNORED, reduction="none"
                )
                nats = nats.to(losses.device) + losses.double().sum()
            n_tokens += int((labels != IGNORED).sum())
    finally:
        model.train(was_training)
        if hasattr(model, "reshard"):  # FSDP keeps the embedding, which may change next
            model.reshard()  # pyright: ignore[reportCallIssue]
    return Validation(nats.item(), n_tokens, data.index.n_validation_bytes)
