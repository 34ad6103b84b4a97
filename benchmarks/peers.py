"""Models of other packages in our shapes, with random weights: what a user would run instead.

The package is optional (`pip install '.[bench]'`); without it there is nothing to compare with.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig


def transformers_version() -> str:
    """Of the package; "" if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return ""
    import transformers

    return transformers.__version__


def mamba_peer(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' MambaForCausalLM in the shape of a dense Mamba; None without transformers."""
    if not transformers_version():
        return None
    from transformers import MambaConfig, MambaForCausalLM

    _quiet()
    shape = MambaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        state_size=config.d_state,
        expand=config.expand,
        conv_kernel=config.d_conv,
        time_step_rank=config.dt_rank,
    )
    return _filled(lambda: MambaForCausalLM(shape), dtype)


def jamba_peer(
    config: ModelConfig, dtype: torch.dtype = torch.float32, kernels: bool = False
) -> Any:
    """transformers' JambaForCausalLM in the shape of a BlackMamba; None without transformers.

    It is the nearest architecture in that package: each of its layers is a Mamba and a routed
    expert part, here with one expert a token. Its memory of a sequence wants an attention layer, so
    that the last of its Mamba parts is one: a little less work than ours.

    Args:
        kernels: those of mamba_ssm and causal_conv1d, which have to be installed, on a GPU.
    """
    if not transformers_version():
        return None
    from transformers import JambaConfig, JambaForCausalLM

    _quiet()
    pairs = config.n_layers // 2
    heads = config.d_model // 64 or 1
    shape = JambaConfig(
        vocab_size=config.vocab_size,
        tie_word_embeddings=True,
        hidden_size=config.d_model,
        intermediate_size=config.d_expert,
        num_hidden_layers=pairs,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=config.n_experts,
        num_experts_per_tok=1,
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=pairs,
        attn_layer_offset=pairs - 1,
        mamba_d_state=config.d_state,
        mamba_d_conv=config.d_conv,
        mamba_expand=config.expand,
        use_mamba_kernels=kernels,
    )
    return _filled(lambda: JambaForCausalLM(shape), dtype).eval()


class PeerDecoder:
    """A transformers model that reads a prompt and then one token of each row a call."""

    def __init__(self, model: Any, ids: Tensor):
        self._model = model
        self._name = (
            "cache_params" if type(model).__name__.startswith("Mamba") else "past_key_values"
        )
        self._memory = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), self._name)

    def step(self, ids: Tensor) -> Tensor:
        """Logits (b, v) after ids (b,)."""
        memory = {self._name: self._memory}
        out = self._model(input_ids=ids[:, None], use_cache=True, **memory)
        self._memory = getattr(out, self._name)
        return out.logits[:, -1]


def _quiet() -> None:
    """No warnings that its fast paths, which need a GPU, are not there."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


@torch.no_grad()
def _filled(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model with weights that are quick to draw: noise from one block, repeated."""
    with torch.device("meta"):
        model = build().to(dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()  # pyright: ignore[reportCallIssue]
    noise = (torch.randn(1_000_003) / 50).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            rates = torch.arange(1, parameter.shape[1] + 1)
            parameter.copy_(rates.log().expand_as(parameter))
        elif parameter.dim() == 1:  # norms, D and biases
            parameter.fill_(0 if name.endswith("bias") else 1)
        else:
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                piece = flat[start : start + len(noise)]
                piece.copy_(noise[: len(piece)])
    return model
