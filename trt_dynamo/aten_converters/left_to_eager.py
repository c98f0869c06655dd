"""Why an op has no converter. What nobody has written yet is not here: it is said to have none, without a reason."""

from __future__ import annotations

import fnmatch
import functools

import torch
from torch._ops import OpOverload

# A node that bears this key in its meta stays in eager, for the reason under it.
STAYS_EAGER = "trt_dynamo_stays_eager"

# One that bears this one computes in float32 whatever the setting `precision` says, for the reason under it.
STAYS_FLOAT32 = "trt_dynamo_stays_float32"

# Reason to the ATen ops it holds for, all their overloads; `*` stands for any letters.
LEFT = {
    "TensorRT has no layer that factors or inverts a matrix": """
        linalg_cholesky* cholesky* linalg_det _linalg_det linalg_eig* _linalg_eigh _linalg_eigvals linalg_eigvals*
        linalg_inv* linalg_ldl* linalg_lstsq linalg_lu* lu_unpack linalg_matrix_exp linalg_pinv linalg_qr
        linalg_householder_product _linalg_slogdet _linalg_solve_ex linalg_solve_triangular _linalg_svd triangular_solve
        geqrf ormqr _linalg_check_errors""",
    "a special function that TensorRT has no layer for": """
        igamma igammac special_airy_ai special_bessel_* special_modified_bessel_* special_scaled_modified_bessel_*
        special_spherical_bessel_j0 special_zeta special_chebyshev_* special_shifted_chebyshev_* special_hermite_*
        special_laguerre_* special_legendre_*""",
    "it takes the bits of floats apart, for which TensorRT has no layer": "frexp nextafter hash_tensor",
    "the size of its result depends on the values of its input": """
        _unique _unique2 unique_consecutive unique_dim bincount repeat_interleave histogram _histogramdd*""",
    "its value goes to Python, so the graph has to stop for it": "_local_scalar_dense item equal allclose is_nonzero",
    "it belongs to a training step, which runs in eager": "*_backward *_backward_data *_backward_input",
    "sparse and nested tensors have no place in TensorRT": "segment_reduce _sparse_* sparse_* _nested_* to_sparse*",
    "a loss of sequences, whose recursion would be thousands of layers": "_ctc_loss ctc_loss _cudnn_ctc_loss",
    "complex numbers enter and leave engines as pairs of reals": """
        view_as_real view_as_complex resolve_conj resolve_neg""",
    "it changes the size of memory itself": "resize resize_ resize_as resize_as_ set_ _resize_output",
}

RANDOM = "TensorRT would draw the same numbers at each call, and others than torch's generator"


@functools.cache
def reasons() -> dict[str, str]:
    return {name: reason for reason, names in LEFT.items() for name in names.split()}


def why_none(target: object) -> str:
    """Why the converter of what an FX node calls is missing, for the user; empty where nothing stands against one."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return ""
    if torch.Tag.nondeterministic_seeded in target.tags:
        return RANDOM
    name = target.overloadpacket.__name__
    return next((reason for pattern, reason in reasons().items() if fnmatch.fnmatchcase(name, pattern)), "")
