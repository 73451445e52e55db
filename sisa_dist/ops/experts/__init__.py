"""Rows of tokens through the experts that chose them: sorted by expert, multiplied in groups, brought back.

Functions of tensors: who is chosen and with what weight is the router's affair (model/moe.py).
"""

from sisa_dist.ops.experts.choice import check_backend
from sisa_dist.ops.experts.products import grouped_matmul
from sisa_dist.ops.experts.rows import arrange, combine, dispatch

__all__ = ["arrange", "check_backend", "combine", "dispatch", "grouped_matmul"]
