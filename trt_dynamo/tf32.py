"""Whether an engine may compute float32 products in TF32. Comes in: a segment's graph. Goes out: what torch's own
switches say of the products in it.

TensorRT has one switch for an engine, and its default is on. Torch has three: for matrix products (off, unless
`torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul` says otherwise), for convolutions and for recurrent
layers (`torch.backends.cudnn`, on).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

MATMUL = """mm bmm addmm baddbmm addbmm addmv mv dot vdot matmul linear _addmm_activation _trilinear _cdist_forward
    _pdist_forward _grouped_mm grouped_mm_fallback"""
RECURRENT = "lstm rnn mkldnn_rnn_layer _cudnn_rnn"

# Where in `torch.backends` the switch of each kind is. It gives what holds, whatever it was set by.
SWITCHES: Mapping[str, str] = {
    "matmul": "cuda.matmul.fp32_precision",
    "convolution": "cudnn.conv.fp32_precision",
    "recurrent": "cudnn.rnn.fp32_precision",
}


def allows_tf32(module: GraphModule) -> bool:
    """Whether torch would let every product of float32 in the graph be one of TF32. False where there is none, so that
    the switches are no part of such an engine's key.
    """
    kinds = {kind for node in module.graph.nodes if (kind := kind_of(node))}
    return bool(kinds) and all(operator.attrgetter(SWITCHES[kind])(torch.backends) == "tf32" for kind in kinds)


def kind_of(node: Node) -> str:
    """The switch for a node that multiplies float32; nothing for others."""
    if not isinstance(node.target, OpOverload) or not any(is_float32(each) for each in node.all_input_nodes):
        return ""
    name = str(node.target.overloadpacket).split(".")[-1]
    if name == "convolution":
        return "convolution"
    if name in RECURRENT.split():
        return "recurrent"
    return "matmul" if name in MATMUL.split() or "scaled_dot_product" in name else ""


def is_float32(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32
