"""The network: plain PyTorch that reads like the paper. Start at language_model.py."""

from blackmamba.model.balance import Losses, RouterLoad, balance_step
from blackmamba.model.language_model import BlackMamba, keeps_float32
from blackmamba.model.layer import Trace
from blackmamba.model.quantize import quantize
from blackmamba.model.quantized import QuantizedStorage
from blackmamba.model.router import Routing, RoutingStats
from blackmamba.model.select import select
from blackmamba.model.state import AttentionState, MambaState, State
from blackmamba.model.upcycle import upcycle

__all__ = [
    "AttentionState",
    "BlackMamba",
    "Losses",
    "MambaState",
    "QuantizedStorage",
    "RouterLoad",
    "Routing",
    "RoutingStats",
    "State",
    "Trace",
    "balance_step",
    "keeps_float32",
    "quantize",
    "select",
    "upcycle",
]
