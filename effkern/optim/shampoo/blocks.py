"""A parameter as a matrix, and the matrix as blocks of at most a given size along the preconditioned sides."""

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """Rows [row, row + m) and columns [col, col + n) of a matrix."""

    row: int
    col: int
    m: int
    n: int


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[d0, d1, ..] is d0 x (d1 d2 ..), so that a convolution has one row per output channel."""
    cols = 1
    for size in shape[1:]:
        cols *= size
    return shape[0], cols


def is_matrix(shape: tuple[int, ...]) -> bool:
    """At least two rows and two columns: what the rule "auto" gives to Shampoo; the rest is AdamW's."""
    return len(shape) >= 2 and min(matrix_shape(shape)) >= 2


def memory_order(parameter: Tensor) -> tuple[int, ...]:
    """Its dimensions, those after the first as they lie in memory: channels-last is a matrix without a copy."""
    strides = parameter.stride()
    rest = sorted(range(1, parameter.dim()), key=lambda d: (-strides[d], d))
    return (0, *rest)


def as_matrix(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The matrix that `tensor` is; a view, or a copy where its memory has another order."""
    return tensor if tensor.dim() == 2 else tensor.permute(order).flatten(1)


def cuts(size: int, limit: int, split: bool) -> list[tuple[int, int]]:
    """(start, length) of pieces of at most `limit`: as few as possible, all equal but for a shorter last one."""
    if not split or size <= limit:
        return [(0, size)]
    count = -(-size // limit)
    length = -(-size // count)
    return [(start, min(length, size - start)) for start in range(0, size, length)]


def split(rows: int, cols: int, limit: int, left: bool, right: bool) -> dict[tuple[int, int], list[Block]]:
    """Blocks by their shape, row by row. A side without preconditioner is not cut: it costs nothing there."""
    found: dict[tuple[int, int], list[Block]] = {}
    for row, m in cuts(rows, limit, left):
        for col, n in cuts(cols, limit, right):
            found.setdefault((m, n), []).append(Block(row, col, m, n))
    return found


def take(matrix: Tensor, block: Block) -> Tensor:
    """The block as a view."""
    if block.m == matrix.shape[0] and block.n == matrix.shape[1]:
        return matrix
    return matrix[block.row : block.row + block.m, block.col : block.col + block.n]
