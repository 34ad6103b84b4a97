"""From logits to the next id: filters in a fixed order, then one draw a row.

Letters: b batch, v vocabulary.

The order is: repetition penalty, temperature, top-k, top-p, min-p, draw. Each filter is a function
of its own; a dropped id has logit -inf, and at least one id stays. Of equally likely ids the lower
one counts as the likelier, everywhere: top_k=1 or top_p=0 is greedy decoding.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.errors import ConfigError, InputError

_DIVISORS = (1e-30, 1e30)  # float32 divides by these without leaving its normal range
_N_SEEDS = 2**32  # torch's CPU generator tells no more seeds apart


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next id is chosen from the logits. The defaults are greedy decoding."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the largest logit (only the repetition penalty applies)."""
    top_k: int = 0
    """Keep so many of the likeliest ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest ids whose probability together reaches it; 1 keeps all."""
    min_p: float = 0.0
    """Keep ids at least this share as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes ids of the prompt and of the output so far less likely; 1 changes nothing."""
    seed: int = 0
    """Row i of a batch draws with seed + i: what that prompt draws alone with that seed."""

    def __post_init__(self) -> None:
        low, high = _DIVISORS
        if self.temperature != 0:
            _check_real("temperature", self.temperature, low, high, "0 (greedy) or ")
        _check_real("repetition_penalty", self.repetition_penalty, low, high)
        _check_real("top_p", self.top_p, 0, 1)
        _check_real("min_p", self.min_p, 0, 1)
        _check_whole("top_k", self.top_k, math.inf, "0 (keep all) or a number of ids")
        _check_whole("seed", self.seed, _N_SEEDS - 1, f"a whole number 0 .. {_N_SEEDS - 1}")


def sample(
    logits: Tensor,
    config: SamplingConfig,
    *,
    n_tokens: int | None = None,
    seen: Tensor | None = None,
    uniforms: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """Choose the next id of each row; a row's choice depends on nothing of the other rows.

    Args:
        logits: (b, v), any float dtype; computed on in float32 (float64 if that is what they are).
        config: how to choose.
        n_tokens: only ids 0 .. n_tokens - 1 are chosen, also by greedy decoding; None: all v.
        seen: (b, v) bool, true for ids of the row's prompt and output so far; read if
            config.repetition_penalty is not 1.
        uniforms: (b,) float32 of 0 .. 1 - 2**-24, as torch.rand gives; read if config.temperature
            is not 0.
        check: whether to look at the logits, which waits for the device; without, `usable_rows`
            tells which ids are any good.
    Returns:
        ids: (b,) int64.
    Raises:
        InputError: a shape is wrong, `seen` or `uniforms` is needed and absent, or a row's logits
            cannot be chosen from (NaN, +infinity or nothing but -infinity).
    """
    if config.temperature == 0:
        return _prepared(logits, config, n_tokens, seen, check).argmax(-1)
    distribution = probabilities(logits, config, n_tokens=n_tokens, seen=seen, check=check)
    if uniforms is None or uniforms.shape != logits.shape[:1]:
        shape = None if uniforms is None else tuple(uniforms.shape)
        raise InputError(f"uniforms of shape {shape}: must be {tuple(logits.shape[:1])}")
    return draw(distribution, uniforms)


def probabilities(
    logits: Tensor,
    config: SamplingConfig,
    *,
    n_tokens: int | None = None,
    seen: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """The distribution that `sample` draws from at a temperature above 0.

    Args:
        logits, config, n_tokens, seen, check: as for `sample`.
    Returns:
        (b, n_tokens) float32 or float64; rows sum to 1.
    Raises:
        InputError: as for `sample`.
        ConfigError: config.temperature is 0.
    """
    if config.temperature == 0:
        raise ConfigError("temperature=0.0: greedy decoding has no distribution to draw from")
    logits = apply_temperature(_prepared(logits, config, n_tokens, seen, check), config.temperature)
    if config.top_k > 0:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = keep_min_p(logits, config.min_p)
    return logits.softmax(-1)


def usable_rows(logits: Tensor, n_tokens: int | None = None) -> Tensor:
    """(b,) bool: whether an id can be chosen from the first n_tokens logits of each row."""
    return logits[:, :n_tokens].amax(-1).isfinite()  # the largest is NaN if any is


def refuse_unusable(usable: Tensor) -> None:
    """Raise InputError unless all of `usable_rows` are true; waits for the device."""
    if not usable.all():
        raise InputError(
            f"logits of {int((~usable).sum())} of {len(usable)} rows hold NaN or +infinity, "
            "or nothing but -infinity: the weights are damaged, or too large for their dtype"
        )


def _prepared(
    logits: Tensor,
    config: SamplingConfig,
    n_tokens: int | None,
    seen: Tensor | None,
    check: bool,
) -> Tensor:
    """Checked logits (b, n_tokens) in float32 or wider after the repetition penalty."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InputError(
            f"logits of shape {tuple(logits.shape)}, {logits.dtype}: must be (b, v), floating"
        )
    n_tokens = logits.shape[1] if n_tokens is None else n_tokens
    if not 1 <= n_tokens <= logits.shape[1]:
        raise InputError(f"n_tokens={n_tokens}: must be 1 .. {logits.shape[1]}")
    wide = logits[:, :n_tokens].to(torch.promote_types(logits.dtype, torch.float32))
    if config.repetition_penalty != 1:
        if seen is None or seen.shape != logits.shape or seen.dtype != torch.bool:
            what = None if seen is None else (tuple(seen.shape), seen.dtype)
            raise InputError(f"seen of {what}: must be {tuple(logits.shape)}, torch.bool")
        wide = penalise_repetition(wide, seen[:, :n_tokens], config.repetition_penalty)
    if check:
        refuse_unusable(usable_rows(wide))
    return wide


# ---- filters: (b, v) -> (b, v) --------------------------------------------------------------


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids in `seen` (b, v) less likely by the factor `penalty`, whatever their number.

    Source:
        Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1. It divides every logit; that would
        make ids of negative logit likelier, so we multiply those, as `transformers` does.
    """
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by `temperature`, measured from the largest logit so that nothing overflows.

    Source:
        Ackley, Hinton and Sejnowski 1985, "A learning algorithm for Boltzmann machines".
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest ids; all of them if there are no more than k.

    Source:
        Fan, Lewis and Dauphin 2018 (arXiv 1805.04833).
    """
    k = min(int(k), logits.shape[-1])
    ordered = logits.topk(k).values
    return _keep_first(logits, ordered, torch.full_like(ordered[:, :1], k, dtype=torch.int64))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest ids whose probability together reaches `p`.

    Source:
        Holtzman et al. 2020 (arXiv 1904.09751), the "nucleus".
    """
    ordered = logits.sort(-1, descending=True).values
    reached = ordered.softmax(-1).cumsum(-1)
    n_kept = (reached < p).sum(-1, keepdim=True) + 1
    return _keep_first(logits, ordered, n_kept.clamp(max=logits.shape[-1]))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep the ids that are at least `min_p` times as likely as the likeliest.

    Source:
        Nguyen et al. 2024 (arXiv 2407.01082).
    """
    floor = logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(logits < floor, -math.inf)


def _keep_first(logits: Tensor, ordered: Tensor, n: Tensor) -> Tensor:
    """Keep the first n (b, 1) ids in the order of falling logit, the lower id first among equals.

    Args:
        logits: (b, v).
        ordered: (b, any) the largest logits in falling order, at least n of them.
        n: (b, 1) int64, at least 1.
    """
    last = ordered.gather(-1, n - 1)
    above, equal = logits > last, logits == last
    kept = above | (equal & (equal.cumsum(-1) <= n - above.sum(-1, keepdim=True)))
    return logits.masked_fill(~kept, -math.inf)


# ---- the draw -------------------------------------------------------------------------------


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an id a row by inverting the cumulative distribution; never one of probability 0.

    One number a draw, whatever the filters, keeps a row's random numbers in step with its tokens.

    Args:
        probabilities: (b, v), not negative; rows may sum to anything above 0.
        uniforms: (b,) float32 of 0 .. 1 - 2**-24, as torch.rand gives.
    Returns:
        ids: (b,) int64; ids of row i come up with probability probabilities[i] / its sum.
    """
    # The zeros keep out ids of probability 0 also where a parallel sum is not monotonic. As
    # (1 - 2**-24) * total rounds to less than total, some entry is always above the target.
    cumulative = torch.where(probabilities > 0, probabilities.cumsum(-1), 0)
    target = cumulative.amax(-1) * uniforms.to(cumulative)
    return (cumulative > target[:, None]).to(torch.uint8).argmax(-1)  # the first that is


class RowUniforms:
    """Random numbers for a batch, a stream for each row.

    Row i's n-th number is the n-th of a CPU generator with seed + i (modulo 2**32): it depends
    neither on the other rows nor on the device that the model is on.
    """

    def __init__(self, seed: int, n_rows: int):
        self._generators = [
            torch.Generator().manual_seed(int(seed + row) % _N_SEEDS) for row in range(n_rows)
        ]

    def next(self, rows: Sequence[int]) -> Tensor:
        """The next number of each of these rows: (len(rows),) float32 of 0 .. 1 - 2**-24."""
        return torch.stack([torch.rand((), generator=self._generators[row]) for row in rows])


# ---- checks ---------------------------------------------------------------------------------


def _check_real(name: str, value: object, low: float, high: float, also: str = "") -> None:
    if not (_is_number(value, numbers.Real) and low <= value <= high):  # pyright: ignore[reportOperatorIssue]
        raise ConfigError(f"{name}={value!r}: must be {also}within {low:g} .. {high:g}")


def _check_whole(name: str, value: object, high: float, valid: str) -> None:
    if not (_is_number(value, numbers.Integral) and 0 <= value <= high):  # pyright: ignore[reportOperatorIssue]
        raise ConfigError(f"{name}={value!r}: must be {valid}")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
