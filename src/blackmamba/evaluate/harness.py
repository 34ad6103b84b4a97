"""A BlackMamba model for EleutherAI's lm-evaluation-harness: `--model blackmamba`.

Importing this file needs the package lm_eval (extra `eval`). Versions of it that discover entry
points know the name `blackmamba` where this package is installed; for the others

    python -m blackmamba.evaluate.harness --model blackmamba --model_args pretrained=runs/demo

is `lm_eval` with the name registered first.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from blackmamba.checkpoint import load, load_tokenizer
from blackmamba.data import Tokenizer
from blackmamba.errors import ConfigError
from blackmamba.evaluate.likelihood import continuation_likelihoods, document_likelihoods
from blackmamba.generate import generate_text
from blackmamba.model import BlackMamba

NAME = "blackmamba"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_THEIR_DEFAULT = "cuda:0"  # what the harness passes where no device was named
_MAX_NEW_TOKENS = 256
_ROWS_OF_GENERATION = 32


class BlackMambaLM(TemplateLM):
    """Scores and continues text for the harness.

    Args:
        pretrained: a model folder, a run folder, a hub name, or a model.
        tokenizer: a tokenizer, or what `Tokenizer.load` takes; "": the model folder's own.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda", ...
        dtype: "float32", "bfloat16" or "float16".
        batch_size: most rows that are read together; 1 (the harness's own default), 0 and "auto":
            as many as `batch_tokens` allow.
        batch_tokens: most tokens, with pads, that are read together.
        max_length: 0: contexts and documents of any length, which is what the model can do. Else
            contexts keep their last max_length tokens and documents are read in windows of
            max_length, as models of a fixed context are scored.
        expert_activation: "silu" or "gelu" in place of what the folder says; "": as it says.
        show_progress: whether bars are drawn.
        max_batch_size: what the harness passes beside batch_size; must be unset.
    Raises:
        ConfigError: an argument is not one of these.
        CheckpointError, DataError: the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | BlackMamba,
        tokenizer: str | Tokenizer = "",
        *,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int | str = 1,
        batch_tokens: int = 4096,
        max_length: int = 0,
        expert_activation: str = "",
        show_progress: bool = True,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if max_batch_size is not None:
            raise ConfigError(
                f"max_batch_size={max_batch_size}: rows are batched by tokens here; "
                "use batch_tokens or batch_size"
            )
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
        if max_length < 0:
            raise ConfigError(f"max_length={max_length}: must be at least 0")
        if isinstance(pretrained, BlackMamba):
            if not isinstance(tokenizer, Tokenizer):
                raise ConfigError("a model that is given as an object needs its tokenizer as one")
            self.model, self.tokenizer = pretrained.eval(), tokenizer
        else:
            self.model = load(
                pretrained,
                device=_device(device),
                dtype=_DTYPES[dtype],
                expert_activation=expert_activation or None,  # pyright: ignore[reportArgumentType]
            )
            self.tokenizer = _tokenizer(pretrained, tokenizer)
        self.max_length = max_length
        self._rows = _rows(batch_size)
        self._batch_tokens = batch_tokens
        self._is_silent = not show_progress

    @property
    def eot_token_id(self) -> int:
        """What an empty context is replaced by, and what a document begins after."""
        return self.tokenizer.eot_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness keeps requests."""
        return f"blackmamba-{self.tokenizer.fingerprint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; this tokenizer adds none of its own, whatever the flag says."""
        return self.tokenizer.encode(string)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, answer) for _, context, answer in requests]
        with _bar(len(pairs), "Scoring answers", self._is_silent or disable_tqdm) as tell:
            scores = continuation_likelihoods(
                self.model,
                pairs,
                batch_tokens=self._batch_tokens,
                max_rows=self._rows,
                on_progress=tell,
            )
        found = [(score.nats, score.is_greedy) for score in scores]
        for (texts, _, _), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, each after an end of text."""
        texts = [str(request.args[0]) for request in requests]
        documents = [self.tok_encode(text) for text in texts]
        with _bar(len(documents), "Scoring texts", self._is_silent or disable_tqdm) as tell:
            if self.max_length:
                nats = [self._windowed(ids, tell) for ids in documents]
            else:
                nats = document_likelihoods(
                    self.model,
                    documents,
                    self.eot_token_id,
                    batch_tokens=self._batch_tokens,
                    max_rows=self._rows,
                    on_progress=tell,
                )
        for text, score in zip(texts, nats, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return nats

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts as their own settings say, until one of their stop strings.

        Raises:
            ConfigError: a setting is not known here.
        """
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(_arguments(request)[1]), []).append(i)
        with _bar(len(requests), "Generating", self._is_silent or disable_tqdm) as tell:
            for group in alike.values():
                settings = _generation(dict(_arguments(requests[group[0]])[1]))
                rows = self._rows or _ROWS_OF_GENERATION
                for start in range(0, len(group), rows):
                    batch = group[start : start + rows]
                    prompts = [str(_arguments(requests[i])[0]) for i in batch]
                    found = generate_text(self.model, self.tokenizer, prompts, **settings)
                    for i, text in zip(batch, found, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    tell(len(batch))
        return texts

    def _cut(self, context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """With no more context than max_length allows."""
        if not self.max_length:
            return context, answer
        kept = max(1, self.max_length + 1 - len(answer))
        return context[-kept:], answer

    def _windowed(self, ids: list[int], tell: Callable[[int], None]) -> float:
        windows = map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ),
        )
        pairs = [(list(context), list(targets)) for context, targets in windows]
        scores = continuation_likelihoods(
            self.model, pairs, batch_tokens=self._batch_tokens, max_rows=self._rows
        )
        tell(1)
        return sum(score.nats for score in scores)


if NAME not in model_registry:
    register_model(NAME)(BlackMambaLM)


def _arguments(request: Instance) -> Sequence[Any]:
    """Text and settings; the harness's own annotation has no arguments."""
    return request.args


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate_text` for the harness's generation settings."""
    until = settings.pop("until", [])
    samples = settings.pop("do_sample", None)
    temperature = float(settings.pop("temperature", 1.0 if samples else 0.0))
    new_tokens = _MAX_NEW_TOKENS
    for name in ("max_tokens", "max_new_tokens", "max_gen_toks"):
        new_tokens = int(settings.pop(name, new_tokens))
    known = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "seed": int}
    options = {name: known[name](settings.pop(name)) for name in list(settings) if name in known}
    if settings:
        raise ConfigError(f"generation setting {min(settings)!r}: not known here")
    return {
        "max_new_tokens": new_tokens,
        "temperature": 0.0 if samples is False else temperature,
        "stop": [until] if isinstance(until, str) else [stop for stop in until if stop],
        **options,
    }


@contextmanager
def _bar(total: int, what: str, is_off: bool) -> Generator[Callable[[int], None]]:
    with tqdm(total=total, desc=what, disable=is_off) as bar:

        def tell(done: int) -> None:
            bar.update(done)

        yield tell


def _rows(batch_size: int | str) -> int:
    if str(batch_size).startswith("auto"):
        return 0
    try:
        number = int(batch_size)
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(f'batch_size={batch_size!r}: must be "auto" or a number of at least 0')
    return 0 if number == 1 else number


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name in (None, "", "auto") or (name == _THEIR_DEFAULT and not has_gpu):
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name}: not usable on this machine ({reason})") from None
    return device


def _tokenizer(model: str, tokenizer: str | Tokenizer) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer:
        return Tokenizer.load(tokenizer)
    own = load_tokenizer(model)
    if own is None:
        raise ConfigError(f"{model}: has no tokenizer of its own; give tokenizer=PATH_OR_NAME")
    return own


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
