"""Rows that are too long for one process: each rank of a group holds a piece of every row.

What a Mamba layer knows of the tokens before a piece is the convolution's last inputs and the
scan's state; both are handed from rank to rank, forward and, as gradients, backward.
`pieces.py` says how rows are cut, `convolution.py` and `scan.py` hand on.
"""

from blackmamba.ops.sequence.convolution import inputs_before
from blackmamba.ops.sequence.pieces import Pieces
from blackmamba.ops.sequence.scan import selective_scan_of_pieces

__all__ = ["Pieces", "inputs_before", "selective_scan_of_pieces"]
