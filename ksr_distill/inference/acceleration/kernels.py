"""Triton kernels: group norm, and the transforms of a 3×3 convolution in Winograd's form.

The only module that imports Triton; ``operations`` asks for it where there is a GPU. Images are
(height, width, channels) without gaps, one at a time; sums and transforms are float32.

Winograd F(4×4, 3×3): 4×4 outputs from 6×6 inputs with 36 products instead of 144 (Lavin and Gray,
"Fast algorithms for convolutional neural networks", CVPR 2016), on the points 0, ±√½, ±√2, ∞. With
the usual 0, ±1, ±2, ∞ float16 loses twice as much (3.8e-3 against 1.8e-3 in L2; a direct
convolution in bfloat16 loses 2.9e-3; measured).
"""

# no_type_check keeps the tests' shape checker away: it would wrap what Triton has to read.
# The names follow the papers' matrices and Triton's own customs, its pointers have no shapes.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0913, PLR0917

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports] - comes with a GPU's torch
import triton.language as tl  # pyright: ignore[reportMissingImports]

ROOT_HALF = tl.constexpr(0.5**0.5)
ROOT_TWO = tl.constexpr(2.0**0.5)


@no_type_check
@triton.jit
def _evaluate_input(d0, d1, d2, d3, d4, d5):
    """Return Bᵀd: six samples at the six points."""
    even_half = d4 - 2.0 * d2
    odd_half = d3 * ROOT_HALF - d1 * ROOT_TWO
    even_two = d4 - 0.5 * d2
    odd_two = d3 * ROOT_TWO - d1 * ROOT_HALF
    return (
        d0 - 2.5 * d2 + d4,
        even_half + odd_half,
        even_half - odd_half,
        even_two + odd_two,
        even_two - odd_two,
        d1 - 2.5 * d3 + d5,
    )


@no_type_check
@triton.jit
def _evaluate_weight(g0, g1, g2):
    """Return Gg: three taps at the six points."""
    even_half = (g0 + 0.5 * g2) * (-1.0 / 1.5)
    odd_half = g1 * (-ROOT_HALF / 1.5)
    even_two = (g0 + 2.0 * g2) * (1.0 / 6.0)
    odd_two = g1 * (ROOT_TWO / 6.0)
    return (
        g0,
        even_half + odd_half,
        even_half - odd_half,
        even_two + odd_two,
        even_two - odd_two,
        g2,
    )


@no_type_check
@triton.jit
def _interpolate(m0, m1, m2, m3, m4, m5):
    """Return Aᵀm: four outputs from the products at the six points."""
    even_half, odd_half = m1 + m2, (m1 - m2) * ROOT_HALF
    even_two, odd_two = m3 + m4, (m3 - m4) * ROOT_TWO
    return (
        m0 + even_half + even_two,
        odd_half + odd_two,
        0.5 * even_half + 2.0 * even_two,
        0.5 * odd_half + 2.0 * odd_two + m5,
    )


@no_type_check
@triton.jit
def _norm_here(factor, offset, spatial_ptr, place, C, inside, SPATIAL: tl.constexpr):
    """Return the factor and offset of a pixel: (x·factor + offset)·Y + B of its latent."""
    if SPATIAL > 0:
        own_factor = tl.load(spatial_ptr + place, mask=inside, other=0.0).to(tl.float32)
        own_offset = tl.load(spatial_ptr + place + C, mask=inside, other=0.0).to(tl.float32)
        factor, offset = factor * own_factor, offset * own_factor + own_offset
    return factor, offset


@no_type_check
@triton.jit
def _normed(value, factor, offset, NORM: tl.constexpr, SILU: tl.constexpr):
    """Return value·factor + offset, [SiLU]."""
    value = value.to(tl.float32)
    if NORM:
        value = value * factor + offset
    if SILU:
        value = value * tl.sigmoid(value)
    return value


@no_type_check
@triton.jit
def _ring_pixel(ptr, factor, offset, inside, NORM: tl.constexpr, SILU: tl.constexpr):
    """Return a pixel, normalised, or 0 where it lies outside of the picture."""
    value = _normed(tl.load(ptr, mask=inside, other=0.0), factor, offset, NORM, SILU)
    return tl.where(inside, value, 0.0)


@no_type_check
@triton.jit
def _inner_pixel(
    ptr, factor, offset, inside, NORM: tl.constexpr, SILU: tl.constexpr, WHOLE: tl.constexpr
):
    """Return a pixel of the tile itself, which is inside where the tiles are whole."""
    if WHOLE:
        value = _normed(tl.load(ptr), factor, offset, NORM, SILU)
    else:
        value = _ring_pixel(ptr, factor, offset, inside, NORM, SILU)
    return value


@no_type_check
@triton.jit
def _input_row(
    ptr, lf, lo, mf, mo, rf, ro, x, width, row_inside, C,
    INNER: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Return a row's six pixels from x - 1 on, normalised, at the six points.

    The four inner ones lie on one latent (factor mf, offset mo), their neighbours maybe on others.
    ``ptr`` is the row's pixel at x.
    """
    d0 = _ring_pixel(ptr - C, lf, lo, row_inside & (x > 0), NORM, SILU)
    d1 = _inner_pixel(ptr, mf, mo, row_inside, NORM, SILU, INNER)
    d2 = _inner_pixel(ptr + (1 // UP) * C, mf, mo, row_inside & (x + 1 < width), NORM, SILU, INNER)
    d3 = _inner_pixel(ptr + (2 // UP) * C, mf, mo, row_inside & (x + 2 < width), NORM, SILU, INNER)
    d4 = _inner_pixel(ptr + (3 // UP) * C, mf, mo, row_inside & (x + 3 < width), NORM, SILU, INNER)
    d5 = _ring_pixel(ptr + (4 // UP) * C, rf, ro, row_inside & (x + 4 < width), NORM, SILU)
    return _evaluate_input(d0, d1, d2, d3, d4, d5)


@no_type_check
@triton.jit
def _norms_of_row(
    factor, offset, spatial_ptr, row, x, channel, width, row_inside, C, SPATIAL: tl.constexpr
):
    """Return the factors and offsets of a row's left, inner and right pixels."""
    latents = width // SPATIAL if SPATIAL > 0 else 0
    step = SPATIAL if SPATIAL > 0 else 1
    place = (row * latents + x // step) * (2 * C) + channel
    left = tl.where(x % step == 0, 2 * C, 0)
    right = tl.where((x + 4) % step == 0, 2 * C, 0)
    lf, lo = _norm_here(factor, offset, spatial_ptr, place - left, C, row_inside & (x > 0), SPATIAL)
    mf, mo = _norm_here(factor, offset, spatial_ptr, place, C, row_inside, SPATIAL)
    rf, ro = _norm_here(
        factor, offset, spatial_ptr, place + right, C, row_inside & (x + 4 < width), SPATIAL
    )
    return lf, lo, mf, mo, rf, ro


@no_type_check
@triton.jit
def _store_column(ptr, plane, d0, d1, d2, d3, d4, d5):
    """Store six rows of one column at the six points, six planes apart."""
    v0, v1, v2, v3, v4, v5 = _evaluate_input(d0, d1, d2, d3, d4, d5)
    tl.store(ptr, v0)
    tl.store(ptr + plane * 6, v1)
    tl.store(ptr + plane * 12, v2)
    tl.store(ptr + plane * 18, v3)
    tl.store(ptr + plane * 24, v4)
    tl.store(ptr + plane * 30, v5)


@no_type_check
@triton.jit(do_not_specialize=["height", "width", "tiles_across", "first_tile", "num_tiles"])
def winograd_input_kernel(
    x_ptr, affine_ptr, spatial_ptr, out_ptr,
    height, width, tiles_across, first_tile, num_tiles, C, scale,
    NORM: tl.constexpr, SILU: tl.constexpr, SPATIAL: tl.constexpr, UP: tl.constexpr,
    WHOLE: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write BᵀdB of every tile: (36, tiles, channels) from (height/UP, width/UP, channels).

    CHANNELS divides C. SPATIAL is 0 or a multiple of 4, so that a tile lies on one latent and its
    border on others. WHOLE says that no tile reaches over the picture's edge.
    """
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tile = tl.minimum(tile, num_tiles - 1)  # the last ones are made twice
    y = (tile + first_tile) // tiles_across * 4
    x = (tile + first_tile) % tiles_across * 4
    factor, offset = 1.0, 0.0
    if NORM:
        factor = tl.load(affine_ptr + channel)
        offset = tl.load(affine_ptr + C + channel)
    line = width // UP * C
    ptr = x_ptr + ((y // UP).to(tl.int64) * line + (x // UP) * C) + channel
    step = SPATIAL if SPATIAL > 0 else 1
    above, below = (y > 0) & (channel < C), (y + 4 < height) & (channel < C)
    second, third = (y + 1 < height) & (channel < C), (y + 2 < height) & (channel < C)
    inside, fourth = (y < height) & (channel < C), (y + 3 < height) & (channel < C)
    row = y // step
    lf, lo, mf, mo, rf, ro = _norms_of_row(
        factor, offset, spatial_ptr, row - tl.where(y % step == 0, 1, 0), x, channel, width, above,
        C, SPATIAL)  # fmt: skip
    a0, a1, a2, a3, a4, a5 = _input_row(
        ptr - line, lf, lo, mf, mo, rf, ro, x, width, above, C, False, NORM, SILU, UP
    )
    lf, lo, mf, mo, rf, ro = _norms_of_row(
        factor, offset, spatial_ptr, row, x, channel, width, inside, C, SPATIAL
    )
    b0, b1, b2, b3, b4, b5 = _input_row(
        ptr, lf, lo, mf, mo, rf, ro, x, width, inside, C, WHOLE, NORM, SILU, UP
    )
    c0, c1, c2, c3, c4, c5 = _input_row(
        ptr + (1 // UP) * line, lf, lo, mf, mo, rf, ro, x, width, second, C, WHOLE, NORM, SILU, UP
    )
    d0, d1, d2, d3, d4, d5 = _input_row(
        ptr + (2 // UP) * line, lf, lo, mf, mo, rf, ro, x, width, third, C, WHOLE, NORM, SILU, UP
    )
    e0, e1, e2, e3, e4, e5 = _input_row(
        ptr + (3 // UP) * line, lf, lo, mf, mo, rf, ro, x, width, fourth, C, WHOLE, NORM, SILU, UP
    )
    lf, lo, mf, mo, rf, ro = _norms_of_row(
        factor, offset, spatial_ptr, row + tl.where((y + 4) % step == 0, 1, 0), x, channel, width,
        below, C, SPATIAL)  # fmt: skip
    f0, f1, f2, f3, f4, f5 = _input_row(
        ptr + (4 // UP) * line, lf, lo, mf, mo, rf, ro, x, width, below, C, False, NORM, SILU, UP
    )
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
def _weight_row(weight_ptr, place, mask, stride_x):
    """Return one row of taps at the six points."""
    g0 = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    g1 = tl.load(weight_ptr + place + stride_x, mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(weight_ptr + place + 2 * stride_x, mask=mask, other=0.0).to(tl.float32)
    return _evaluate_weight(g0, g1, g2)


@no_type_check
@triton.jit
def _store_weight_column(out_ptr, plane, mask, g0, g1, g2):
    u0, u1, u2, u3, u4, u5 = _evaluate_weight(g0, g1, g2)
    tl.store(out_ptr, u0, mask=mask)
    tl.store(out_ptr + plane * 6, u1, mask=mask)
    tl.store(out_ptr + plane * 12, u2, mask=mask)
    tl.store(out_ptr + plane * 18, u3, mask=mask)
    tl.store(out_ptr + plane * 24, u4, mask=mask)
    tl.store(out_ptr + plane * 30, u5, mask=mask)


@no_type_check
@triton.jit
def winograd_weight_kernel(
    weight_ptr, out_ptr, count, C, stride_out, stride_in, stride_y, stride_x, BLOCK: tl.constexpr
):  # fmt: skip
    """Write GgGᵀ of every pair of channels: (36, out, in) from taps of any layout."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    place = (index // C).to(tl.int64) * stride_out + (index % C) * stride_in
    a0, a1, a2, a3, a4, a5 = _weight_row(weight_ptr, place, mask, stride_x)
    b0, b1, b2, b3, b4, b5 = _weight_row(weight_ptr, place + stride_y, mask, stride_x)
    c0, c1, c2, c3, c4, c5 = _weight_row(weight_ptr, place + 2 * stride_y, mask, stride_x)
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
def _product_column(ptr, plane):
    """Return one column of products, its rows six planes apart, as four outputs."""
    m0 = tl.load(ptr).to(tl.float32)
    m1 = tl.load(ptr + plane * 6).to(tl.float32)
    m2 = tl.load(ptr + plane * 12).to(tl.float32)
    m3 = tl.load(ptr + plane * 18).to(tl.float32)
    m4 = tl.load(ptr + plane * 24).to(tl.float32)
    m5 = tl.load(ptr + plane * 30).to(tl.float32)
    return _interpolate(m0, m1, m2, m3, m4, m5)


@no_type_check
@triton.jit
def _store_output(
    out_ptr, residual_ptr, value, inside, RESIDUAL: tl.constexpr, WHOLE: tl.constexpr
):
    """Store one pixel with what is added to it; return it as stored, 0 outside."""
    if WHOLE:
        if RESIDUAL:
            value += tl.load(residual_ptr).to(tl.float32)
        tl.store(out_ptr, value)
        value = value.to(out_ptr.dtype.element_ty).to(tl.float32)
    else:
        if RESIDUAL:
            value += tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr, value, mask=inside)
        value = tl.where(inside, value.to(out_ptr.dtype.element_ty).to(tl.float32), 0.0)
    return value


@no_type_check
@triton.jit
def _store_output_row(
    out_ptr, residual_ptr, x, width, row_inside, C, bias, scale, m0, m1, m2, m3, m4, m5,
    RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store four pixels; return their sum and their sum of squares."""
    y0, y1, y2, y3 = _interpolate(m0, m1, m2, m3, m4, m5)
    y0 = _store_output(out_ptr, residual_ptr, y0 * scale + bias, row_inside, RESIDUAL, WHOLE)
    y1 = _store_output(out_ptr + C, residual_ptr + C, y1 * scale + bias,
                       row_inside & (x + 1 < width), RESIDUAL, WHOLE)  # fmt: skip
    y2 = _store_output(out_ptr + 2 * C, residual_ptr + 2 * C, y2 * scale + bias,
                       row_inside & (x + 2 < width), RESIDUAL, WHOLE)  # fmt: skip
    y3 = _store_output(out_ptr + 3 * C, residual_ptr + 3 * C, y3 * scale + bias,
                       row_inside & (x + 3 < width), RESIDUAL, WHOLE)  # fmt: skip
    return y0 + y1 + y2 + y3, y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3


@no_type_check
@triton.jit(
    do_not_specialize=[
        "height", "width", "tiles_across", "first_tile", "num_tiles", "first_row", "rounds"
    ]
)  # fmt: skip
def winograd_output_kernel(
    m_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr,
    height, width, tiles_across, first_tile, num_tiles, C, scale, first_row, rounds,
    RESIDUAL: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write Aᵀ M A + bias [+ residual], and each program's sums per channel for a norm.

    CHANNELS divides C. WHOLE says that no tile reaches over the picture's edge.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    plane = num_tiles.to(tl.int64) * C
    line = width * C
    total = tl.zeros([TILES, CHANNELS], tl.float32)
    squares = tl.zeros([TILES, CHANNELS], tl.float32)
    for i in range(rounds):
        number = (tl.program_id(0) * rounds + i) * TILES + tl.arange(0, TILES)[:, None]
        tile = tl.minimum(number, num_tiles - 1)  # the last ones are made twice, but count once
        y = (tile + first_tile) // tiles_across * 4
        x = (tile + first_tile) % tiles_across * 4
        ptr = m_ptr + tile.to(tl.int64) * C + channel
        a0, b0, c0, d0 = _product_column(ptr, plane)
        a1, b1, c1, d1 = _product_column(ptr + plane, plane)
        a2, b2, c2, d2 = _product_column(ptr + plane * 2, plane)
        a3, b3, c3, d3 = _product_column(ptr + plane * 3, plane)
        a4, b4, c4, d4 = _product_column(ptr + plane * 4, plane)
        a5, b5, c5, d5 = _product_column(ptr + plane * 5, plane)
        place = y.to(tl.int64) * line + x * C + channel
        out, residual = out_ptr + place, residual_ptr + place
        inside = (y < height) & (channel < C)
        sum_a, squares_a = _store_output_row(
            out, residual, x, width, inside, C, bias, scale,
            a0, a1, a2, a3, a4, a5, RESIDUAL, WHOLE)  # fmt: skip
        inside = (y + 1 < height) & (channel < C)
        sum_b, squares_b = _store_output_row(
            out + line, residual + line, x, width, inside, C, bias, scale,
            b0, b1, b2, b3, b4, b5, RESIDUAL, WHOLE)  # fmt: skip
        inside = (y + 2 < height) & (channel < C)
        sum_c, squares_c = _store_output_row(
            out + 2 * line, residual + 2 * line, x, width, inside, C, bias, scale,
            c0, c1, c2, c3, c4, c5, RESIDUAL, WHOLE)  # fmt: skip
        inside = (y + 3 < height) & (channel < C)
        sum_d, squares_d = _store_output_row(
            out + 3 * line, residual + 3 * line, x, width, inside, C, bias, scale,
            d0, d1, d2, d3, d4, d5, RESIDUAL, WHOLE)  # fmt: skip
        counts = number < num_tiles
        total += tl.where(counts, sum_a + sum_b + sum_c + sum_d, 0.0)
        squares += tl.where(counts, squares_a + squares_b + squares_c + squares_d, 0.0)
    row = sums_ptr + (first_row + tl.program_id(0)).to(tl.int64) * 2 * C
    ones = tl.arange(0, 1)[:, None]
    tl.store(row + channel + ones, tl.sum(total, 0)[None, :])
    tl.store(row + C + channel + ones, tl.sum(squares, 0)[None, :])


@no_type_check
@triton.jit(do_not_specialize=["num_pixels", "rounds"])
def add_kernel(
    x_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, num_pixels, C, rounds,
    RESIDUAL: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write x + bias [+ residual], and each program's sums per channel for a norm."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for i in range(rounds):
        pixel = (tl.program_id(0) * rounds + i) * PIXELS + tl.arange(0, PIXELS)[:, None]
        mask = (pixel < num_pixels) & (channel < C)
        place = pixel.to(tl.int64) * C + channel
        value = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) + bias
        if RESIDUAL:
            value += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if STORE:
            tl.store(out_ptr + place, value, mask=mask)
            value = value.to(out_ptr.dtype.element_ty).to(tl.float32)
        value = tl.where(mask, value, 0.0)
        total += value
        squares += value * value
    if SUMS:
        row = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C
        ones = tl.arange(0, 1)[:, None]
        tl.store(row + channel + ones, tl.sum(total, 0)[None, :], mask=channel < C)
        tl.store(row + C + channel + ones, tl.sum(squares, 0)[None, :], mask=channel < C)


@no_type_check
@triton.jit(do_not_specialize=["num_rows", "num_pixels"])
def finish_norm_kernel(
    sums_ptr, weight_ptr, bias_ptr, scale_shift_ptr, pending_ptr, out_ptr,
    num_rows, num_pixels, eps, C,
    PER_GROUP: tl.constexpr, AFFINE: tl.constexpr, SCALE_SHIFT: tl.constexpr,
    PENDING: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one group's factors and offsets: GroupNorm(x)·(scale + 1) + shift = x·factor + offset.

    A pending bias is part of the sums, but not yet of x.
    """
    lane = tl.arange(0, CHANNELS)[None, :]
    channel = tl.program_id(0) * PER_GROUP + lane
    valid = lane < PER_GROUP
    total = tl.zeros([ROWS, CHANNELS], tl.float64)
    squares = tl.zeros([ROWS, CHANNELS], tl.float64)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        place = row.to(tl.int64) * 2 * C + channel
        mask = (row < num_rows) & valid
        total += tl.load(sums_ptr + place, mask=mask, other=0.0).to(tl.float64)
        squares += tl.load(sums_ptr + place + C, mask=mask, other=0.0).to(tl.float64)
    count = num_pixels * PER_GROUP
    mean = tl.sum(tl.sum(total, 1), 0) / count
    variance = tl.sum(tl.sum(squares, 1), 0) / count - mean * mean
    factor = (1.0 / tl.sqrt(variance.to(tl.float32) + eps)) + tl.zeros([1, CHANNELS], tl.float32)
    offset = -mean.to(tl.float32) * factor
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
        factor *= weight
        offset = offset * weight + tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    if SCALE_SHIFT:
        scale = tl.load(scale_shift_ptr + channel, mask=valid, other=0.0).to(tl.float32) + 1.0
        shift = tl.load(scale_shift_ptr + C + channel, mask=valid, other=0.0).to(tl.float32)
        factor *= scale
        offset = offset * scale + shift
    if PENDING:
        offset += factor * tl.load(pending_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + channel, factor, mask=valid)
    tl.store(out_ptr + C + channel, offset, mask=valid)


@no_type_check
@triton.jit(do_not_specialize=["num_pixels", "width"])
def apply_norm_kernel(
    x_ptr, affine_ptr, spatial_ptr, out_ptr, num_pixels, width, C,
    SILU: tl.constexpr, SPATIAL: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the normalised picture."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    mask = (pixel < num_pixels) & (channel < C)
    factor = tl.load(affine_ptr + channel, mask=channel < C, other=0.0)
    offset = tl.load(affine_ptr + C + channel, mask=channel < C, other=0.0)
    place = pixel.to(tl.int64) * C + channel
    if SPATIAL > 0:
        latent = pixel // width // SPATIAL * (width // SPATIAL) + pixel % width // SPATIAL
        factor, offset = _norm_here(
            factor, offset, spatial_ptr, latent * (2 * C) + channel, C, mask, SPATIAL
        )
    value = _normed(tl.load(x_ptr + place, mask=mask, other=0.0), factor, offset, True, SILU)
    tl.store(out_ptr + place, value, mask=mask)
