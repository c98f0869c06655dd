"""2:4 sparsity: weights of which, along the dim that a product adds up, each four in a row have two zeros.

Comes in: a model to prune (`sparsify`), or a segment's graph and its weights (`sparsity_of`). Goes out: what was
pruned, or which products read such weights. No TensorRT is needed for it.
"""

from __future__ import annotations

from trt_dynamo.sparsity.products import Product, SegmentSparsity, sparsity_of
from trt_dynamo.sparsity.pruning import PrunedWeight, Sparsified, sparsify

__all__ = ["Product", "PrunedWeight", "SegmentSparsity", "Sparsified", "sparsify", "sparsity_of"]
