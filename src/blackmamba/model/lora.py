"""Low-rank adapters: a trained addition B A to matrices that stay as they are.

A matrix with an adapter is a parametrisation (torch.nn.utils.parametrize): whoever reads
`layer.weight` or `experts.fc1` gets W + alpha / rank * B A. So every operation, fused ones
included, sees adapted weights and gives gradients for them, and no other file knows of adapters.
The price: the sum is written out in each pass, and the gradient of a whole matrix exists for a
moment. Stacked experts have an A and a B each, multiplied in one batch.

Letters: r rank, e experts, o rows, i columns.

Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3. Their dropout is of each token's inputs; here
columns of A are dropped for all tokens of a step, as the weight is made once for all of them.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blackmamba.errors import ConfigError
from blackmamba.model.select import select

_USUAL = {"in_proj", "x_proj", "out_proj", "q_proj", "k_proj", "v_proj", "fc1", "fc2"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Which matrices get an adapter, and of what kind."""

    rank: int = 0
    """r; 0: no adapters."""
    alpha: float = 16.0
    """The addition is alpha / rank * B A."""
    dropout: float = 0.0
    """Chance of a column of A to be left out of a training step."""
    targets: tuple[str, ...] = ("*",)
    """Names of matrices: "in_proj", "fc1", or patterns of whole ones, "layers.0-3.mixer.*" (see
    `select`). A pattern reaches projections of Mamba and attention, dense layers and experts;
    others (router, conv_weight, dt_proj, A_log, embedding, head) only by their name at its end."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank={self.rank}: must be at least 1, or 0 for no adapters")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha={self.alpha}: must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}: must be at least 0 and below 1")
        if not self.targets:
            raise ConfigError("lora.targets is empty: must name at least one matrix")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What the adapters of a model are."""

    config: LoRAConfig
    base: str
    """Name of the model without them, for people."""
    fingerprint: str
    """Of its weights."""


class LowRank(nn.Module):
    """The addition to one matrix (o, i), or to each of a stack (e, o, i).

    Attributes:
        lora_A: (r, i) or (e, r, i); lora_B: (o, r) or (e, o, r), 0 at first. float32 or wider.
        kept: (i,), what columns of A are multiplied with in training.
    """

    kept: Tensor

    def __init__(self, weight: Tensor, config: LoRAConfig):
        super().__init__()
        *stack, o, i = weight.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        r = config.rank
        self.scale, self.dropout = config.alpha / r, config.dropout
        self.lora_A = nn.Parameter(torch.empty(*stack, r, i, dtype=wide, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(*stack, o, r, dtype=wide, device=weight.device))
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(i), 1 / math.sqrt(i))
        kept = torch.ones(i, dtype=wide, device=weight.device)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted matrix, in its own dtype."""
        A = self.lora_A * self.kept if self.training and self.dropout else self.lora_A
        return (weight + self.scale * (self.lora_B @ A)).to(weight.dtype)


_adaptations: WeakKeyDictionary[nn.Module, Adaptation] = WeakKeyDictionary()


def adaptation(model: nn.Module) -> Adaptation | None:
    """What the adapters of `model` are; None if it has none."""
    return _adaptations.get(model)


def add_adapters(model: nn.Module, adapted: Adaptation) -> None:
    """Put adapters on a model, in place; they change nothing yet. All else is frozen.

    A is drawn from torch's global generator.

    Raises:
        ConfigError: lora.targets name something that is missing or no matrix.
    """
    chosen = _targets(dict(model.named_parameters()), adapted.config.targets)
    model.requires_grad_(False)
    for name in chosen:
        path, _, last = name.rpartition(".")
        weight = model.get_parameter(name)
        parametrize.register_parametrization(
            model.get_submodule(path), last, LowRank(weight, adapted.config), unsafe=True
        )
    _adaptations[model] = adapted


def adapters(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Name of each adapted matrix, as in the model without adapters, and what is added to it."""
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            yield _plain_name(path), _low_rank(module)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted matrix, as "<matrix>.lora_A" and "<matrix>.lora_B"."""
    return {
        f"{name}.{which}": tensor.detach()
        for name, added in adapters(model)
        for which, tensor in added.named_parameters()
    }


def adapter_name(parameter: str) -> str:
    """What `adapter_tensors` calls the A or B that is a parameter of this name."""
    path, _, which = _plain_name(parameter).rpartition(".0.")
    return f"{path}.{which}"


def draw_dropout(model: nn.Module, seed: int, step: int) -> None:
    """Choose the columns that are left out of a step, as a function of (seed, step) alone."""
    random = torch.Generator().manual_seed(((seed << 32) + step) % 2**63)
    for _, added in adapters(model):
        if added.dropout:
            kept = torch.rand(len(added.kept), generator=random) >= added.dropout
            added.kept.copy_(kept / (1 - added.dropout))


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without adapters that computes the same."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.rpartition(".")[2].startswith("lora_"):
            found[_plain_name(name.removesuffix(".original"))] = tensor
    with torch.no_grad():
        for name, added in adapters(model):
            was_training = added.training
            found[name] = added.eval()(found[name])
            added.train(was_training)
    return found


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to their matrices, in place; the model then has none."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name, inner in list(module.parametrizations.items()):  # pyright: ignore
                weight = inner.original
                weight.copy_(_low_rank(inner).eval()(weight))
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    _adaptations.pop(model, None)


def _low_rank(module: Iterable[nn.Module]) -> LowRank:
    (added,) = module
    assert isinstance(added, LowRank)  # this package has no other parametrisation
    return added


def _plain_name(name: str) -> str:
    return name.replace(".parametrizations.", ".")


def _targets(parameters: Mapping[str, Tensor], patterns: tuple[str, ...]) -> list[str]:
    """Names of the parameters to adapt, in the model's order."""
    names = {name.removesuffix(".weight"): name for name in parameters}
    last_words = {alias.rpartition(".")[2] for alias in names}
    found: set[str] = set()
    for pattern in patterns:
        is_word = pattern in last_words and pattern not in names
        last = pattern.rpartition(".")[2]
        for alias in select(names, [f"*.{pattern}" if is_word else pattern], "lora.targets"):
            word = alias.rpartition(".")[2]
            if word == last and parameters[names[alias]].dim() < 2:
                raise ConfigError(f"lora.targets: {pattern!r} is a vector and has no low rank")
            if word == last or word in _USUAL:
                found.add(names[alias])
    if not found:
        raise ConfigError(
            f"lora.targets={list(patterns)}: reach no matrix that is usually adapted; name others"
        )
    return [name for name in parameters if name in found]
