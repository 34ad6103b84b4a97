"""Perplexity of a text."""

import math
import sys

import pytest
import torch
from torch.nn import functional as F

from blackmamba.data import Tokenizer
from blackmamba.errors import DataError
from blackmamba.evaluate import perplexity
from blackmamba.model import BlackMamba
from blackmamba.presets import presets

TEXT = "words and more words, and some others. Grüße! " * 30


@pytest.fixture
def model() -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(presets["tiny"]).eval()


def test_it_is_the_mean_loss_of_one_full_pass(model: BlackMamba, monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.train([TEXT], 300)
    ids = [tokenizer.eot_id, *tokenizer.encode(TEXT)]
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]))[0].double()
    expected = F.cross_entropy(logits, torch.tensor(ids[1:])).item()
    monkeypatch.setattr(sys.modules["blackmamba.evaluate.perplexity"], "_PIECE", 7)
    result = perplexity(model, tokenizer, TEXT)
    assert result.n_tokens == len(ids) - 1
    assert result.n_bytes == len(TEXT.encode())
    assert result.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(
        expected * result.n_tokens / math.log(2) / result.n_bytes, rel=1e-5
    )
    assert perplexity(model, tokenizer, TEXT, max_tokens=9).n_tokens == 9


def test_what_cannot_be_measured(model: BlackMamba):
    tokenizer = Tokenizer.train([TEXT], 300)
    with pytest.raises(DataError, match="the text is empty"):
        perplexity(model, tokenizer, "")
    many = Tokenizer.train([" ".join(f"{chr(97 + i % 26)}{i}" for i in range(3000))], 900)
    with pytest.raises(DataError, match="the model's vocabulary has 512"):
        perplexity(model, many, TEXT)
