"""Perplexity of a text, read once from beginning to end with the memory carried along."""

import torch
from torch.nn import functional as F

from blackmamba.data import Tokenizer
from blackmamba.errors import DataError
from blackmamba.model import BlackMamba
from blackmamba.train import Validation

_PIECE = 512  # tokens read at once; the memory makes the result independent of it


@torch.inference_mode()
def perplexity(
    model: BlackMamba, tokenizer: Tokenizer, text: str, *, max_tokens: int = 4096
) -> Validation:
    """Measure how well `model` predicts `text`, by its inference routing.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        text: any text; its first token is predicted from an end-of-text token.
        max_tokens: no more tokens than this are predicted.
    Raises:
        DataError: the text is empty, or the tokenizer has more tokens than the model.
    """
    if tokenizer.n_tokens > model.config.vocab_size:
        raise DataError(
            f"tokenizer of {tokenizer.n_tokens} tokens: the model's vocabulary has "
            f"{model.config.vocab_size}"
        )
    ids = tokenizer.encode(text)[:max_tokens]
    if not ids:
        raise DataError("the text is empty: perplexity needs at least one token")
    device = model.embedding.weight.device
    tokens = torch.tensor([tokenizer.eot_id, *ids], device=device)
    state, nats = None, 0.0
    for start in range(0, len(ids), _PIECE):
        piece = tokens[start : start + _PIECE + 1]
        logits, state = model.prefill(piece[None, :-1], state)
        nats += F.cross_entropy(logits[0].float(), piece[1:], reduction="sum").item()
    return Validation(nats, len(ids), len(tokenizer.decode(ids).encode("utf-8")))
