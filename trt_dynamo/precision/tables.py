"""How each op takes to a half type. In: a node. Out: its `Role`. docs/precision.md says the same in words.

An op that no table names computes in float32.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten


class Role(enum.Enum):
    """What the op does to the precision of its operands and results."""

    MATRIX = "in the half type"
    ATTENTION = "in the half type, its mask without what that type makes infinite"
    BETWEEN = "as its operands are"
    SCALING = "as its first operand is, the others in float32"
    MOVEMENT = "moves or picks values: as its operand is, or as all who read it want it"
    CODES = "rounds to codes or reads them, with a scale in float32: its values in either type"
    NORM = "in float32, its result may be rounded"
    CREATION = "makes a constant"
    CAST = "the model's own change of type"
    WIDE = "in float32"


def packets(names: str) -> frozenset[str]:
    return frozenset(names.split())


MATRIX = packets(
    "mm bmm addmm baddbmm addbmm addmv mv matmul linear convolution _addmm_activation _trilinear "
    "_grouped_mm transformers.grouped_mm_fallback trt_dynamo.lstm trt_dynamo.rnn mkldnn_rnn_layer _cudnn_rnn"
)

ATTENTION = packets(
    "trt_dynamo.scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_fused_attention_overrideable"
)

# Bounded by their operands, or nearly so.
BETWEEN = packets(
    "add sub rsub mul div neg abs sign sgn relu leaky_relu _prelu_kernel elu gelu silu mish sigmoid tanh hardtanh "
    "hardsigmoid hardswish threshold clamp maximum minimum fmax fmin where copysign native_dropout "
    "rrelu_with_noise_functional avg_pool2d avg_pool3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa trt_dynamo.resample "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell"
)

SCALING = packets("_native_batch_norm_legit_no_training _batch_norm_no_update")

MOVEMENT = packets(
    "view _unsafe_view reshape _reshape_alias view_copy permute permute_copy t transpose expand squeeze unsqueeze "
    "slice select narrow_copy alias detach clone contiguous lift_fresh_copy split split_with_sizes "
    "split_with_sizes_copy unsafe_split unsafe_split_with_sizes unbind unbind_copy as_strided as_strided_copy repeat "
    "flip roll cat stack constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d trt_dynamo.pad_circular diagonal unfold index index_select gather take "
    "embedding slice_scatter select_scatter diagonal_scatter as_strided_scatter scatter index_put _unsafe_index_put "
    "masked_select masked_scatter copy max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d "
    "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d amax amin max min topk sort kthvalue median "
    "argmax argmin cummax cummin upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d"
)

# Each with what is rounded, or the codes, first; then the scales.
CODES = packets(
    "trt_dynamo.fake_quantize fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams quantized_decomposed.quantize_per_tensor "
    "quantized_decomposed.quantize_per_channel quantized_decomposed.dequantize_per_tensor "
    "quantized_decomposed.dequantize_per_channel torchao.quantize_affine torchao.dequantize_affine "
    "torchao.quantize_affine_float8_non_decomposed torchao.dequantize_affine_float8_non_decomposed"
)

# They add many numbers up, or look closely at some, and end in numbers of a size that all types have.
NORM = packets(
    "native_layer_norm native_group_norm _fused_rms_norm _native_batch_norm_legit _softmax softplus "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d grid_sampler_2d grid_sampler_3d"
)

CREATION = packets("full scalar_tensor prims.scalar_tensor full_like empty empty_strided empty_permuted")

CAST = packets("_to_copy prims.convert_element_type")

# What these give is another thing for an operand that is off by little: a place in a wave, a whole number.
PLACES = packets("sin cos tan sinc floor ceil trunc frac remainder fmod floor_divide bucketize searchsorted")

# Ops of which some overloads or arguments are another matter.
EXCEPTIONS = {aten.view.dtype, aten.scatter.reduce, aten.scatter.value_reduce}

# More numbers than this are not averaged in a half type.
LARGEST_WINDOW = 64

ROLES = {
    name: role
    for role, names in (
        (Role.MATRIX, MATRIX),
        (Role.ATTENTION, ATTENTION),
        (Role.BETWEEN, BETWEEN),
        (Role.SCALING, SCALING),
        (Role.MOVEMENT, MOVEMENT),
        (Role.CODES, CODES),
        (Role.NORM, NORM),
        (Role.CREATION, CREATION),
        (Role.CAST, CAST),
    )
    for name in names
}


def packet_of(target: Any) -> str:
    """`mm` for `aten.mm.default`; ops that are not torch's with their namespace; nothing for what is no op."""
    return str(target.overloadpacket).removeprefix("aten.") if isinstance(target, OpOverload) else ""


def role_of(node: Node) -> Role:
    """The role of a `call_function` node."""
    name = packet_of(node.target)
    role = ROLES.get(name, Role.WIDE)
    if node.target in EXCEPTIONS or accumulates(node) or is_square(node, name):
        return Role.WIDE
    if name in ("avg_pool2d", "avg_pool3d"):
        size = node.args[1]
        window = 1
        for each in size if isinstance(size, list | tuple) else [size] * int(name[-2]):
            window *= int(each)  # type: ignore[arg-type]
        return Role.BETWEEN if window <= LARGEST_WINDOW else Role.NORM
    if name == "div" and divides_by_a_tensor(node):
        return Role.WIDE
    return role


def accumulates(node: Node) -> bool:
    """Whether a write adds to what was there."""
    if packet_of(node.target) not in ("index_put", "_unsafe_index_put"):
        return False
    return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))


def is_square(node: Node, name: str) -> bool:
    """Whether a tensor is multiplied by itself, as in the statistics of a norm that is written out."""
    return name == "mul" and node.args[0] is node.args[1]


def divides_by_a_tensor(node: Node) -> bool:
    """Whether the divisor is a tensor of more than one element: small ones make large results."""
    divisor = node.args[1]
    value = divisor.meta.get("val") if isinstance(divisor, Node) else None
    rounds = node.args[2] if len(node.args) > 2 else node.kwargs.get("rounding_mode")
    return rounds is not None or (isinstance(value, torch.Tensor) and value.ndim > 0)
