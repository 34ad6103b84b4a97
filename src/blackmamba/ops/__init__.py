"""The operations that the network is made of: pure functions on tensors.

Each folder holds the public function (`__init__.py`), its definition (`reference.py`) and faster
versions of it. `backend.py` says which one runs.
"""

from blackmamba.ops.activate import activate
from blackmamba.ops.adamw import AdamWTensors, adamw_, adamw_factors, global_norm
from blackmamba.ops.causal_conv1d import causal_conv1d
from blackmamba.ops.expert_mlp import expert_mlp
from blackmamba.ops.linear import linear
from blackmamba.ops.linear_cross_entropy import linear_cross_entropy
from blackmamba.ops.mamba_mixer import mamba_mixer
from blackmamba.ops.quantized_expert_mlp import quantized_expert_mlp
from blackmamba.ops.quantized_expert_mlp.frozen import frozen_expert_mlp
from blackmamba.ops.quantized_linear import (
    QuantizedWeight,
    dequantize,
    quantize_weight,
    quantized_linear,
)
from blackmamba.ops.rms_norm import add_rms_norm, rms_norm
from blackmamba.ops.rotary import rotary
from blackmamba.ops.router_logits import router_choice, router_logits
from blackmamba.ops.selective_scan import selective_scan
from blackmamba.ops.selective_state_update import selective_state_update
from blackmamba.ops.sinkhorn import SinkhornResult, sinkhorn, sinkhorn_choice

__all__ = [
    "AdamWTensors",
    "QuantizedWeight",
    "SinkhornResult",
    "activate",
    "adamw_",
    "adamw_factors",
    "add_rms_norm",
    "causal_conv1d",
    "dequantize",
    "expert_mlp",
    "frozen_expert_mlp",
    "global_norm",
    "linear",
    "linear_cross_entropy",
    "mamba_mixer",
    "quantize_weight",
    "quantized_expert_mlp",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "router_choice",
    "router_logits",
    "selective_scan",
    "selective_state_update",
    "sinkhorn",
    "sinkhorn_choice",
]
