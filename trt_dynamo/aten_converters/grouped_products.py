"""Matrix products by groups, as a mixture of experts makes them: rows sorted by group, a matrix for each group, and the
cumulative ends of the groups, which only the device knows.

No size in a network may depend on those, so the rows of a group cannot be cut out. Of two ways the cheaper is taken:
all rows times all matrices, of which each row keeps its own product; or blocks of rows, each of one group, the last of
a group filled up, with a copy of the group's matrix for each block.
"""

from __future__ import annotations

import torch

from trt_dynamo.aten_converters.matmul import multiplied
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter, foreign
from trt_dynamo.aten_converters.shapes import ceildiv, maximum, minimum
from trt_dynamo.aten_converters.sorting import count_before
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

# So many rows a GPU multiplies by a matrix in the time that it takes to copy that matrix, and to read it: the GPUs of
# today do 200 to 400 operations of a half type for each byte that they move.
ROWS_PER_COPY = 1000
ROWS_PER_READ = 300

# More elements than this are too much memory beside the operands. TensorRT's own limit for a tensor is twice as many.
MOST_ELEMENTS = 2**30


@converter(aten._grouped_mm.default)
def grouped_mm(
    net: Network, a: Tensor, b: Tensor, offs: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`offs` divides what is 2-D: the rows of `a`, the columns of `b`, or, of two such, the dim that they share."""
    if not a.dtype is b.dtype is net.result_dtype():
        raise Unsupported("a result of another type than its operands")
    if offs is None:
        return multiplied(net, a, b)
    if a.ndim == 2 and b.ndim == 2:
        return shared_groups(net, a, b, offs)
    if a.ndim == 2:
        return grouped_rows(net, a, b, offs)
    turned = grouped_rows(net, net.permute(b, [1, 0]), net.permute(a, [0, 2, 1]), offs)
    return net.permute(turned, [1, 0])


@foreign("transformers.grouped_mm_fallback.default")
def grouped_mm_fallback(net: Network, rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """transformers' own op, for types and devices that torch has no kernel for."""
    return grouped_rows(net, rows, matrices, offs)


def grouped_rows(net: Network, rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """Each of `rows` [S, K] times the matrix of its group, one of `matrices` [G, K, N]: [S, N]. Rows behind the last
    group give zeros, as of transformers' op; torch's leaves there what the memory held.
    """
    count, inner = rows.shape
    groups, _, columns = matrices.shape
    if 0 in (count, inner, groups, columns):
        return net.full((count, columns), 0, rows.dtype)
    group = group_of(net, offs, count)
    own = net.elementwise("MIN", group, groups - 1)
    if takes_blocks(net, count, matrices):
        result = by_blocks(net, rows, matrices, offs, own)
    else:
        result = by_choice(net, rows, matrices, own)
    inside = net.elementwise("LESS", group, groups)
    return net.where(net.unsqueeze(inside, [1]), result, 0)


def group_of(net: Network, offs: Tensor, count: Dim) -> Tensor:
    """The group of each of `count` rows, int32; behind the last one, how many groups there are."""
    return count_before(net, offs, net.linspace((count,), 0, (1,), offs.dtype), True, torch.int32)


def by_choice(net: Network, rows: Tensor, matrices: Tensor, own: Tensor) -> Tensor:
    """All products [G, S, N], of which a row takes that of its own group. No matrix is copied."""
    count, (groups, _, columns) = rows.shape[0], matrices.shape
    every = net.reshape(net.matmul(rows, matrices), (groups * count, columns))
    place = net.elementwise("SUM", net.elementwise("PROD", own, count), net.linspace((count,), 0, (1,), torch.int32))
    return net.gather(every, place, 0)


def by_blocks(net: Network, rows: Tensor, matrices: Tensor, offs: Tensor, own: Tensor) -> Tensor:
    """The rows of a group begin a block. What fills a block up are rows like any other, whose products nobody takes."""
    count, groups, columns = rows.shape[0], matrices.shape[0], matrices.shape[2]
    blocks, length = cut(count, groups)
    ends = net.cast(offs, torch.int32)
    starts = net.slice(ends, [-1], [groups], [1], "FILL", net.scalar(0, torch.int32))
    sizes = net.elementwise("SUB", ends, starts)
    needed = net.elementwise("FLOOR_DIV", net.elementwise("SUM", sizes, length - 1), length)
    last = net.running_sum(needed, 0)  # of the blocks of a group, the place behind it
    first = net.elementwise("SUB", last, needed)
    # The group's first row, less the rows that all blocks before it have: what a place among the blocks is ahead.
    ahead = net.elementwise("SUB", starts, net.elementwise("PROD", first, length))

    holder = net.elementwise("MIN", group_of(net, last, blocks), groups - 1)
    slots = net.linspace((blocks, length), 0, (length, 1), torch.int32)
    taken = net.elementwise("SUM", slots, net.unsqueeze(net.gather(ahead, holder, 0), [1]))
    taken = net.elementwise("MAX", net.elementwise("MIN", taken, count - 1), 0)
    products = net.matmul(net.gather(rows, taken, 0), chosen(net, matrices, holder))

    place = net.elementwise("SUB", net.linspace((count,), 0, (1,), torch.int32), net.gather(ahead, own, 0))
    place = net.elementwise("MIN", place, blocks * length - 1)  # of a row behind the last group
    return net.gather(net.reshape(products, (blocks * length, columns)), place, 0)


def chosen(net: Network, matrices: Tensor, places: Tensor) -> Tensor:
    """The matrices at the places; of transposed ones, the copies are not transposed either."""
    if matrices.transposed is None:
        return net.gather(matrices, places, 0)
    return net.permute(net.gather(matrices.transposed, places, 0), [0, 2, 1])


def shared_groups(net: Network, a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """[M, S] by [S, N], for each group over its part of S: the rest is 0 in both. A group without elements gives 0."""
    (rows, count), columns, groups = a.shape, b.shape[1], offs.shape[0]
    shape = (groups, rows, columns)
    if 0 in (*shape, count):
        return net.full(shape, 0, a.dtype)
    if net.most(groups * count * (rows + columns)) > MOST_ELEMENTS:
        raise Unsupported(too_large(net, count, groups))
    number = net.linspace((groups, 1), 0, (1, 0), torch.int32)
    member = net.elementwise("EQUAL", number, group_of(net, offs, count))
    left = net.where(net.unsqueeze(member, [1]), a, 0)
    right = net.where(net.unsqueeze(member, [2]), b, 0)
    return net.matmul(left, right)


# -- which way --------------------------------------------------------------------------------------------------------


def cut(count: Dim, groups: Dim) -> tuple[Dim, Dim]:
    """How many blocks there may be, and of how many rows each: of as many as a group has on average, so that the full
    ones are no more than the groups, and no more than the groups are those that are not.
    """
    return minimum(count, 2 * groups), maximum(ceildiv(count, groups), 1)


def takes_blocks(net: Network, count: Dim, matrices: Tensor) -> bool:
    """Whether blocks are the cheaper way, for as many rows as there were while tracing.

    Raises:
        Unsupported: neither way fits into the memory.
    """
    groups, inner, columns = matrices.shape
    blocks, length = cut(count, groups)
    copies, laid_out = blocks * inner * columns, blocks * length * (inner + columns)
    blocks_fit = max(net.most(copies), net.most(laid_out)) <= MOST_ELEMENTS and not net.may_be_empty(count)
    all_fit = net.most(groups * count * columns) <= MOST_ELEMENTS
    if not blocks_fit and not all_fit:
        raise Unsupported(too_large(net, count, groups))
    if not (blocks_fit and all_fit):
        return blocks_fit
    of_blocks = net.guessed(blocks) * (ROWS_PER_COPY + net.guessed(length))
    return of_blocks < net.guessed(groups) * max(net.guessed(count), ROWS_PER_READ)


def too_large(net: Network, count: Dim, groups: Dim) -> str:
    return (
        f"up to {net.most(count)} rows in {net.most(groups)} groups, whose sizes only the device knows: without such "
        "sizes in a network their products take too much memory"
    )
