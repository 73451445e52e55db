"""Which kernel computes a softmax attention, and how it is called: one interface over every kernel we can use.

Two things are asked of a kernel. The bisected path attends rectangles: a forward that returns lse, so that pieces of a
row can be merged, and a backward from the *global* out and lse, as in ring attention (rectangle.py). Plain attention
and the one-call path ask for one causal call (causal.py). Neither is what `F.scaled_dot_product_attention` offers, so
the kernels are called directly (torch_kernels.py, packages.py), each is compared with plain products in fp64 before it
is used (probe.py), and the choice is from device, dtype and shapes alone, never from a tensor's value (choice.py;
explain.py tells a person).
Nothing here knows about decay, levels or documents.
"""

from sisa_dist.ops.backends.causal import causal_call
from sisa_dist.ops.backends.choice import NAMES, check_name
from sisa_dist.ops.backends.explain import Verdict, explain_backends
from sisa_dist.ops.backends.rectangle import Gradients, Rows, attend, attend_backward, value_width

__all__ = [
    "NAMES",
    "Gradients",
    "Rows",
    "Verdict",
    "attend",
    "attend_backward",
    "causal_call",
    "check_name",
    "explain_backends",
    "value_width",
]
