"""Triton kernels of Shampoo: batched products with one triangle computed and mirrored, and the two ends of an update.

B blocks; an output tile is BLOCK x BLOCK, the depth goes in steps of DEPTH
"""

import triton
import triton.language as tl


@triton.jit
def _multiply(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y of float32 tiles. bf16x3: hi hi + hi lo + lo hi, where lo is what hi = bf16(x) leaves."""
    if PRECISION == "bf16x3":
        x_hi, y_hi = x.to(tl.bfloat16), y.to(tl.bfloat16)
        x_lo = (x - x_hi.to(tl.float32)).to(tl.bfloat16)
        y_lo = (y - y_hi.to(tl.float32)).to(tl.bfloat16)
        # The small ones first.
        acc = tl.dot(x_lo, y_hi, acc)
        acc = tl.dot(x_hi, y_lo, acc)
        return tl.dot(x_hi, y_hi, acc)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def product_kernel(
    x_ptr, y_ptr, c_ptr, out_ptr, keep_ptr,
    rows, columns, depth,
    x_batch, x_row, x_depth,
    y_batch, y_depth, y_column,
    c_batch, c_row, out_batch, out_row,
    alpha, beta,
    HAS_C: tl.constexpr, HAS_KEEP: tl.constexpr, MIRROR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = alpha C + beta X Y for each of the batch; with MIRROR from the lower triangle alone, both written.

    `keep`: 0 for a block that stays as it is. `out` may be C, as a tile reads what it writes, or its mirror image.
    """
    b = tl.program_id(1).to(tl.int64)
    if HAS_KEEP and tl.load(keep_ptr + b) == 0:
        return
    tile = tl.program_id(0)
    if MIRROR:
        # Tile t of the lower triangle, row by row: i (i + 1) / 2 <= t. The root may be one off.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        j = tile - i * (i + 1) // 2
    else:
        across = tl.cdiv(columns, BLOCK)
        i, j = tile // across, tile % across
    r = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.arange(0, DEPTH).to(tl.int64)
    x = x_ptr + b * x_batch + r[:, None] * x_row + k[None, :] * x_depth
    y = y_ptr + b * y_batch + k[:, None] * y_depth + c[None, :] * y_column
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = start + k < depth
        left = tl.load(x, mask=(r < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        right = tl.load(y, mask=inside[:, None] & (c < columns)[None, :], other=0.0).to(tl.float32)
        acc = _multiply(left, right, acc, PRECISION)
        x += DEPTH * x_depth
        y += DEPTH * y_depth
    acc *= beta
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    if HAS_C:
        acc += alpha * tl.load(c_ptr + b * c_batch + r[:, None] * c_row + c[None, :], mask=inside, other=0.0)
    out = out_ptr + b * out_batch
    if MIRROR:
        acc = tl.where(r[:, None] >= c[None, :], acc, tl.trans(acc)) if i == j else acc
        tl.store(out + r[:, None] * out_row + c[None, :], acc, mask=inside)
        if i != j:
            tl.store(out + c[:, None] * out_row + r[None, :], tl.trans(acc), mask=tl.trans(inside))
    else:
        tl.store(out + r[:, None] * out_row + c[None, :], acc, mask=inside)


# A row of a table: of a block's gradient, momentum and weight each the address and the two strides.
ROW = tl.constexpr(9)


@triton.jit
def _elements(entry, r, c, TYPE: tl.constexpr):
    return tl.load(entry).to(tl.pointer_type(TYPE)) + r * tl.load(entry + 1) + c * tl.load(entry + 2)


@triton.jit
def direction_kernel(
    table_ptr, out_ptr, rows, columns, decay, weight,
    GRAD: tl.constexpr, MOMENTUM: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = what the roots are applied to, of one block."""
    b = tl.program_id(1).to(tl.int64)
    entry = table_ptr + b * ROW
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * columns
    inside = at < size
    r, c = at // columns, at % columns
    d = tl.load(_elements(entry, r, c, GRAD), mask=inside, other=0.0).to(tl.float32)
    if HAS_MOMENTUM:
        m = tl.load(_elements(entry + 3, r, c, MOMENTUM), mask=inside, other=0.0).to(tl.float32)
        m = decay * m + weight * d
        d = decay * m + weight * d if NESTEROV else m
    tl.store(out_ptr + b * size + at, d, mask=inside)


@triton.jit
def update_kernel(
    table_ptr, update_ptr, keep_ptr, step_ptr, lr_ptr, rows, columns, momentum_decay, momentum_weight, lr, weight_decay,
    GRAD: tl.constexpr, MOMENTUM: tl.constexpr, WEIGHT: tl.constexpr, HAS_MOMENTUM: tl.constexpr, HAS_LR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """W <- (1 - lr decay) W - lr s U and the momentum, of one block, unless it is to stay as it is."""
    b = tl.program_id(1).to(tl.int64)
    entry = table_ptr + b * ROW
    if tl.load(keep_ptr + b) == 0:
        return
    if HAS_LR:
        lr = tl.load(lr_ptr).to(tl.float32)
    step = tl.load(step_ptr + b)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * columns
    inside = at < size
    r, c = at // columns, at % columns
    w = _elements(entry + 6, r, c, WEIGHT)
    u = tl.load(update_ptr + b * size + at, mask=inside, other=0.0)
    new = (1.0 - lr * weight_decay) * tl.load(w, mask=inside, other=0.0).to(tl.float32) - lr * step * u
    tl.store(w, new, mask=inside)
    if HAS_MOMENTUM:
        m = _elements(entry + 3, r, c, MOMENTUM)
        g = tl.load(_elements(entry, r, c, GRAD), mask=inside, other=0.0).to(tl.float32)
        tl.store(
            m, momentum_decay * tl.load(m, mask=inside, other=0.0).to(tl.float32) + momentum_weight * g, mask=inside
        )
