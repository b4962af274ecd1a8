"""Triton kernels of a whole batch's 3×3 convolution in Winograd's form, forwards and backwards.

The pictures of a batch lie one under the other, (batch·height, width, channels) without gaps, and
both sides of a picture are multiples of 4: a tile belongs to one picture. The points and the
matrices are those of ``inference.acceleration.kernels``, which works on one picture at a time and
takes the norms into the transforms; in training those are the compiler's.
"""

# no_type_check keeps the tests' shape checker away: it would wrap what Triton has to read.
# The names follow the papers' matrices and Triton's own customs, its pointers have no shapes.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0913, PLR0917

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports] - comes with a GPU's torch
import triton.language as tl  # pyright: ignore[reportMissingImports]

from ksr_distill.inference.acceleration.kernels import (
    ROOT_HALF,
    ROOT_TWO,
    _evaluate_input,
    _evaluate_weight,
    _interpolate,
    _product_column,
    _store_column,
    _store_weight_column,
)

LARGEST = tl.constexpr(16.0)
"""What the largest value of a gradient is scaled to: Winograd adds up to 20 of them in float16."""


@no_type_check
@triton.jit
def _scale_of(largest_ptr, scale, SCALED: tl.constexpr):
    """Return the power of two that brings the largest value to at most LARGEST; or the scale."""
    if SCALED:
        largest = tl.load(largest_ptr).to(tl.float32)
        # As far as 2^±100: a picture of zeros has no scale, and its inverse has to be finite.
        exponent = tl.floor(tl.log2(LARGEST / tl.maximum(largest, 1e-30)))
        scale = tl.exp2(tl.minimum(tl.maximum(exponent, -100.0), 100.0))
        is_number = largest == largest  # noqa: PLR0124
        scale = tl.where(is_number, scale, largest)
    return scale


@no_type_check
@triton.jit
def _input_row(ptr, x, width, inside, C):
    """Return a row's six pixels from x - 1 on, at the six points; ``ptr`` is its pixel at x."""
    d0 = tl.load(ptr - C, mask=inside & (x > 0), other=0.0).to(tl.float32)
    d1 = tl.load(ptr, mask=inside, other=0.0).to(tl.float32)
    d2 = tl.load(ptr + C, mask=inside, other=0.0).to(tl.float32)
    d3 = tl.load(ptr + 2 * C, mask=inside, other=0.0).to(tl.float32)
    d4 = tl.load(ptr + 3 * C, mask=inside, other=0.0).to(tl.float32)
    d5 = tl.load(ptr + 4 * C, mask=inside & (x + 4 < width), other=0.0).to(tl.float32)
    return _evaluate_input(d0, d1, d2, d3, d4, d5)


@no_type_check
@triton.jit(do_not_specialize=["height", "width", "num_tiles"])
def transform_input_kernel(
    x_ptr, largest_ptr, out_ptr, height, width, num_tiles, C, scale,
    SCALED: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write BᵀdB of every tile, scaled: (36, tiles, channels). CHANNELS divides C."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tile = tl.minimum(tile, num_tiles - 1)  # the last ones are made twice
    y = tile // (width // 4) * 4
    x = tile % (width // 4) * 4
    scale = _scale_of(largest_ptr, scale, SCALED)
    line = width * C
    ptr = x_ptr + y.to(tl.int64) * line + x * C + channel
    within = channel < C
    above, below = (y % height > 0) & within, (y % height + 4 < height) & within
    inside = (y >= 0) & within
    a0, a1, a2, a3, a4, a5 = _input_row(ptr - line, x, width, above, C)
    b0, b1, b2, b3, b4, b5 = _input_row(ptr, x, width, inside, C)
    c0, c1, c2, c3, c4, c5 = _input_row(ptr + line, x, width, inside, C)
    d0, d1, d2, d3, d4, d5 = _input_row(ptr + 2 * line, x, width, inside, C)
    e0, e1, e2, e3, e4, e5 = _input_row(ptr + 3 * line, x, width, inside, C)
    f0, f1, f2, f3, f4, f5 = _input_row(ptr + 4 * line, x, width, below, C)
    plane = num_tiles.to(tl.int64) * C
    ptr = out_ptr + tile.to(tl.int64) * C + channel
    _store_column(ptr, plane, a0 * scale, b0 * scale, c0 * scale, d0 * scale,
                  e0 * scale, f0 * scale)  # fmt: skip
    _store_column(ptr + plane * 1, plane, a1 * scale, b1 * scale, c1 * scale, d1 * scale,
                  e1 * scale, f1 * scale)  # fmt: skip
    _store_column(ptr + plane * 2, plane, a2 * scale, b2 * scale, c2 * scale, d2 * scale,
                  e2 * scale, f2 * scale)  # fmt: skip
    _store_column(ptr + plane * 3, plane, a3 * scale, b3 * scale, c3 * scale, d3 * scale,
                  e3 * scale, f3 * scale)  # fmt: skip
    _store_column(ptr + plane * 4, plane, a4 * scale, b4 * scale, c4 * scale, d4 * scale,
                  e4 * scale, f4 * scale)  # fmt: skip
    _store_column(ptr + plane * 5, plane, a5 * scale, b5 * scale, c5 * scale, d5 * scale,
                  e5 * scale, f5 * scale)  # fmt: skip


@no_type_check
@triton.jit
def _weight_row(ptr, mask, stride_x, FLIPPED: tl.constexpr):
    """Return one row of taps at the six points, from the last tap on if flipped."""
    first = 2 if FLIPPED else 0
    g0 = tl.load(ptr + first * stride_x, mask=mask, other=0.0).to(tl.float32)
    g1 = tl.load(ptr + stride_x, mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(ptr + (2 - first) * stride_x, mask=mask, other=0.0).to(tl.float32)
    return _evaluate_weight(g0, g1, g2)


@no_type_check
@triton.jit
def transform_weight_kernel(
    weight_ptr, out_ptr, count, C, stride_out, stride_in, stride_y, stride_x,
    FLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write GgGᵀ of every pair of channels, (36, out, in), from taps of any layout.

    FLIPPED turns each kernel by half a turn, as its input's gradient needs it.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    ptr = weight_ptr + (index // C).to(tl.int64) * stride_out + (index % C) * stride_in
    first = 2 if FLIPPED else 0
    a0, a1, a2, a3, a4, a5 = _weight_row(ptr + first * stride_y, mask, stride_x, FLIPPED)
    b0, b1, b2, b3, b4, b5 = _weight_row(ptr + stride_y, mask, stride_x, FLIPPED)
    c0, c1, c2, c3, c4, c5 = _weight_row(ptr + (2 - first) * stride_y, mask, stride_x, FLIPPED)
    plane = count.to(tl.int64)
    out_ptr += index
    _store_weight_column(out_ptr, plane, mask, a0, b0, c0)
    _store_weight_column(out_ptr + plane, plane, mask, a1, b1, c1)
    _store_weight_column(out_ptr + plane * 2, plane, mask, a2, b2, c2)
    _store_weight_column(out_ptr + plane * 3, plane, mask, a3, b3, c3)
    _store_weight_column(out_ptr + plane * 4, plane, mask, a4, b4, c4)
    _store_weight_column(out_ptr + plane * 5, plane, mask, a5, b5, c5)


@no_type_check
@triton.jit
def _store_row(ptr, C, scale, m0, m1, m2, m3, m4, m5):
    """Store a row's four pixels."""
    y0, y1, y2, y3 = _interpolate(m0, m1, m2, m3, m4, m5)
    tl.store(ptr, y0 * scale)
    tl.store(ptr + C, y1 * scale)
    tl.store(ptr + 2 * C, y2 * scale)
    tl.store(ptr + 3 * C, y3 * scale)


@no_type_check
@triton.jit(do_not_specialize=["width", "num_tiles"])
def transform_output_kernel(
    m_ptr, largest_ptr, out_ptr, width, num_tiles, C, scale,
    SCALED: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write AᵀMA of every tile, scaled back. CHANNELS divides C."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tile = tl.minimum(tile, num_tiles - 1)  # the last ones are made twice
    plane = num_tiles.to(tl.int64) * C
    scale = 1.0 / _scale_of(largest_ptr, scale, SCALED)
    ptr = m_ptr + tile.to(tl.int64) * C + channel
    a0, b0, c0, d0 = _product_column(ptr, plane)
    a1, b1, c1, d1 = _product_column(ptr + plane, plane)
    a2, b2, c2, d2 = _product_column(ptr + plane * 2, plane)
    a3, b3, c3, d3 = _product_column(ptr + plane * 3, plane)
    a4, b4, c4, d4 = _product_column(ptr + plane * 4, plane)
    a5, b5, c5, d5 = _product_column(ptr + plane * 5, plane)
    line = width * C
    y = tile // (width // 4) * 4
    x = tile % (width // 4) * 4
    out = out_ptr + y.to(tl.int64) * line + x * C + channel
    _store_row(out, C, scale, a0, a1, a2, a3, a4, a5)
    _store_row(out + line, C, scale, b0, b1, b2, b3, b4, b5)
    _store_row(out + 2 * line, C, scale, c0, c1, c2, c3, c4, c5)
    _store_row(out + 3 * line, C, scale, d0, d1, d2, d3, d4, d5)


@no_type_check
@triton.jit
def _evaluate_gradient(y0, y1, y2, y3):
    """Return Ay: four outputs' gradients at the six points."""
    even_half, odd_half = y0 + 0.5 * y2, (y1 + 0.5 * y3) * ROOT_HALF
    even_two, odd_two = y0 + 2.0 * y2, (y1 + 2.0 * y3) * ROOT_TWO
    return (
        y0,
        even_half + odd_half,
        even_half - odd_half,
        even_two + odd_two,
        even_two - odd_two,
        y3,
    )


@no_type_check
@triton.jit
def _gradient_row(ptr, C, scale):
    """Return a row's four pixels at the six points."""
    y0 = tl.load(ptr).to(tl.float32) * scale
    y1 = tl.load(ptr + C).to(tl.float32) * scale
    y2 = tl.load(ptr + 2 * C).to(tl.float32) * scale
    y3 = tl.load(ptr + 3 * C).to(tl.float32) * scale
    return _evaluate_gradient(y0, y1, y2, y3)


@no_type_check
@triton.jit
def _store_gradient_column(ptr, plane, y0, y1, y2, y3):
    """Store four rows of one column at the six points, six planes apart."""
    v0, v1, v2, v3, v4, v5 = _evaluate_gradient(y0, y1, y2, y3)
    tl.store(ptr, v0)
    tl.store(ptr + plane * 6, v1)
    tl.store(ptr + plane * 12, v2)
    tl.store(ptr + plane * 18, v3)
    tl.store(ptr + plane * 24, v4)
    tl.store(ptr + plane * 30, v5)


@no_type_check
@triton.jit(do_not_specialize=["width", "num_tiles"])
def transform_gradient_kernel(
    y_ptr, largest_ptr, out_ptr, width, num_tiles, C, TILES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write AyAᵀ of every tile, scaled: (36, tiles, channels). CHANNELS divides C."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tile = tl.minimum(tile, num_tiles - 1)  # the last ones are made twice
    y = tile // (width // 4) * 4
    x = tile % (width // 4) * 4
    scale = _scale_of(largest_ptr, 1.0, True)
    line = width * C
    ptr = y_ptr + y.to(tl.int64) * line + x * C + channel
    a0, a1, a2, a3, a4, a5 = _gradient_row(ptr, C, scale)
    b0, b1, b2, b3, b4, b5 = _gradient_row(ptr + line, C, scale)
    c0, c1, c2, c3, c4, c5 = _gradient_row(ptr + 2 * line, C, scale)
    d0, d1, d2, d3, d4, d5 = _gradient_row(ptr + 3 * line, C, scale)
    plane = num_tiles.to(tl.int64) * C
    ptr = out_ptr + tile.to(tl.int64) * C + channel
    _store_gradient_column(ptr, plane, a0, b0, c0, d0)
    _store_gradient_column(ptr + plane, plane, a1, b1, c1, d1)
    _store_gradient_column(ptr + plane * 2, plane, a2, b2, c2, d2)
    _store_gradient_column(ptr + plane * 3, plane, a3, b3, c3, d3)
    _store_gradient_column(ptr + plane * 4, plane, a4, b4, c4, d4)
    _store_gradient_column(ptr + plane * 5, plane, a5, b5, c5, d5)


@no_type_check
@triton.jit
def _taps(u0, u1, u2, u3, u4, u5):
    """Return Gᵀu: what six points say of three taps."""
    half, two = u1 + u2, u3 + u4
    return (
        u0 - half * (1.0 / 1.5) + two * (1.0 / 6.0),
        (u3 - u4) * (ROOT_TWO / 6.0) - (u1 - u2) * (ROOT_HALF / 1.5),
        (two - half) * (1.0 / 3.0) + u5,
    )


@no_type_check
@triton.jit
def _taps_of_column(ptr, plane, mask):
    """Return one column of points, its rows six planes apart, as three taps."""
    u0 = tl.load(ptr, mask=mask, other=0.0)
    u1 = tl.load(ptr + plane * 6, mask=mask, other=0.0)
    u2 = tl.load(ptr + plane * 12, mask=mask, other=0.0)
    u3 = tl.load(ptr + plane * 18, mask=mask, other=0.0)
    u4 = tl.load(ptr + plane * 24, mask=mask, other=0.0)
    u5 = tl.load(ptr + plane * 30, mask=mask, other=0.0)
    return _taps(u0, u1, u2, u3, u4, u5)


@no_type_check
@triton.jit
def _store_taps(ptr, stride_x, mask, scale, u0, u1, u2, u3, u4, u5):
    g0, g1, g2 = _taps(u0, u1, u2, u3, u4, u5)
    tl.store(ptr, g0 * scale, mask=mask)
    tl.store(ptr + stride_x, g1 * scale, mask=mask)
    tl.store(ptr + 2 * stride_x, g2 * scale, mask=mask)


@no_type_check
@triton.jit
def transform_weight_gradient_kernel(
    u_ptr, largest_ptr, out_ptr, count, C, stride_out, stride_in, stride_y, stride_x, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write GᵀuG of every pair of channels, scaled back, from float32 (36, out, in).

    Args:
        scale: Of the pixels; that of the gradient follows from its largest value.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    plane = count.to(tl.int64)
    scale = 1.0 / (scale * _scale_of(largest_ptr, 1.0, True))
    ptr = u_ptr + index
    a0, b0, c0 = _taps_of_column(ptr, plane, mask)
    a1, b1, c1 = _taps_of_column(ptr + plane, plane, mask)
    a2, b2, c2 = _taps_of_column(ptr + plane * 2, plane, mask)
    a3, b3, c3 = _taps_of_column(ptr + plane * 3, plane, mask)
    a4, b4, c4 = _taps_of_column(ptr + plane * 4, plane, mask)
    a5, b5, c5 = _taps_of_column(ptr + plane * 5, plane, mask)
    ptr = out_ptr + (index // C).to(tl.int64) * stride_out + (index % C) * stride_in
    _store_taps(ptr, stride_x, mask, scale, a0, a1, a2, a3, a4, a5)
    _store_taps(ptr + stride_y, stride_x, mask, scale, b0, b1, b2, b3, b4, b5)
    _store_taps(ptr + 2 * stride_y, stride_x, mask, scale, c0, c1, c2, c3, c4, c5)
