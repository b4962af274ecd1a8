"""Metrics of images against their originals, on batches and on the device of the tensors.

Each returns one value per image and does not synchronise with the device, so the training monitors
can call them. To measure pictures as they are saved, apply `levels.round_to_8_bit` first.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# MATLAB's rgb2ycbcr (BT.601): Y = 16 + 65.481 R + 128.553 G + 24.966 B with RGB in [0, 1].
LUMA_WEIGHTS = (65.481, 128.553, 24.966)
LUMA_OFFSET = 16.0
# Equal images get this instead of infinity: means and intervals stay numbers.
MAX_PSNR_DB = 100.0

CHECKERBOARD_PERIODS_PX = (2, 4, 8)
# In a Hann window of 32 px a period of 2, 4 or 8 px falls on a bin and leaks nothing two bins away,
# half-way to the next line of the period of 8.
CHECKERBOARD_TILE_PX = 32
_EULER_GAMMA = 0.5772156649


def luma(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1 H W"]:
    """Return Y of BT.601 as MATLAB's rgb2ycbcr gives it for doubles: black 16, white 235."""
    channels = ((images.float() + 1) / 2).unbind(dim=1)
    y = sum(weight * channel for weight, channel in zip(LUMA_WEIGHTS, channels, strict=True))
    return LUMA_OFFSET + y.unsqueeze(1)


def crop_border(images: Float[Tensor, "b c H W"], border_px: int) -> Float[Tensor, "b c H2 W2"]:
    """Return the images without `border_px` pixels at each side.

    Raises:
        ValueError: If nothing would be left.
    """
    height, width = images.shape[-2:]
    if not 0 <= 2 * border_px < min(height, width):
        raise ValueError(
            f"border_px={border_px} leaves nothing of {width}x{height} px; "
            "use less than half a side"
        )
    return images[..., border_px : height - border_px, border_px : width - border_px]


def psnr(
    images: Float[Tensor, "b c H W"], originals: Float[Tensor, "b c H W"], *, peak: float
) -> Float[Tensor, " b"]:
    """Return the PSNR in dB per image over all channels; `MAX_PSNR_DB` at most.

    Args:
        peak: The distance from black to white in the tensors' unit (255 for Y, 2 for [-1, 1]).
    """
    mse = (images.float() - originals.float()).square().mean(dim=(1, 2, 3)) / peak**2
    return -10 * mse.clamp_min(10 ** (-MAX_PSNR_DB / 10)).log10()


def psnr_y(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"], *, border_px: int
) -> Float[Tensor, " b"]:
    """Return the PSNR in dB of the Y channel with peak 255, as super-resolution papers give it.

    Args:
        border_px: Cropped at each side before measuring; by custom the upscaling factor.
    """
    cropped = crop_border(luma(images), border_px), crop_border(luma(hires), border_px)
    return psnr(*cropped, peak=255.0)


def lowres_consistency_psnr(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"], *, scale: int
) -> Float[Tensor, " b"]:
    """Return the PSNR in dB (RGB, no border cropped) after shrinking both by area.

    High if the image is consistent with its lowres. Reduced by area whatever the degradation was:
    the same operator A as in the student's lowres-consistency loss. At the right and bottom a
    remainder of less than `scale` pixels is left out.
    """
    return psnr(F.avg_pool2d(images, scale), F.avg_pool2d(hires, scale), peak=2.0)


def top_octave_power_ratio(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, " b"]:
    """Return the image's power in the highest octave over the original's; the target is 1.

    The power of the Y channel's 2-D spectrum where max(|f_y|, |f_x|) > 0.25 cycles per pixel, whole
    image, no window. Below 1 is blur, above 1 invented or ringing detail.
    """
    f_y = torch.fft.fftfreq(hires.shape[-2], device=hires.device).abs()[:, None]
    f_x = torch.fft.fftfreq(hires.shape[-1], device=hires.device).abs()[None, :]
    top_octave = (torch.maximum(f_y, f_x) > 0.25).float()
    ours, theirs = (
        (torch.fft.fft2(luma(x)).abs().square() * top_octave).sum(dim=(1, 2, 3))
        for x in (images, hires)
    )
    return ours / theirs.clamp_min(torch.finfo(torch.float32).tiny)


def checkerboard_peaks(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b 3"]:
    """Return how far patterns of 2, 4 and 8 px stand out in the image; 1 is as in the original.

    Strided and transposed convolutions leave patterns of these periods. The frequencies of a period
    p are (i/p, j/p), without (0, 0) and those that belong to a shorter period here: 3, 12 and 48.
    The value is the largest over them of the image's `spectral_prominence` divided by the
    original's. Above 2, a pattern is twice its surroundings. Measured on Set5/Set14: nearest gives
    7 at 2 px; bicubic 1.7 at 8 px, since its spectrum bends steeply there.
    """
    relative = spectral_prominence(images) / spectral_prominence(hires)
    bins = torch.arange(CHECKERBOARD_TILE_PX, device=images.device)

    def lattice(period_px: int) -> Bool[Tensor, "f_y f_x"]:
        on_a_line = bins % (CHECKERBOARD_TILE_PX // period_px) == 0
        return on_a_line[:, None] & on_a_line[None, :]

    peaks = [
        (relative * (lattice(period) & ~lattice(period // 2))).amax(dim=(-2, -1))
        for period in CHECKERBOARD_PERIODS_PX
    ]
    return torch.stack(peaks, dim=1)


def spectral_prominence(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b f_y f_x"]:
    """Return the power at each frequency over that of its neighbours; 1 in white noise.

    1. Each of R, G and B is cut into tiles of 32 px, half overlapping; the mean of each tile is
       subtracted, and a Hann window applied. P is its power spectrum.
    2. Each bin of P is divided by the geometric mean of its 16 neighbours at Chebyshev distance 2,
       times exp(gamma), the geometric mean's deficit in white noise. Geometric, because a smooth
       gain such as blur then cancels. The power of 8-bit rounding is added to both, so a flat tile
       gives 1 and not 0/0.
    3. The mean over tiles, over channels, and over mirrored and transposed frequencies. Every tile
       has the same weight, so that a faint or coloured pattern in a dark smooth corner counts,
       which the spectrum of the whole image would mask.

    Raises:
        ValueError: If a side is shorter than a tile.
    """
    tile = CHECKERBOARD_TILE_PX
    if min(images.shape[-2:]) < tile:
        raise ValueError(
            f"images of {images.shape[-1]}x{images.shape[-2]} px are too small to look for "
            f"checkerboards; give at least {tile} px a side"
        )
    window = torch.hann_window(tile, device=images.device)
    window = window[:, None] * window[None, :]
    tiles = images.float().unfold(2, tile, tile // 2).unfold(3, tile, tile // 2)
    tiles = (tiles - tiles.mean(dim=(-2, -1), keepdim=True)) * window
    power = torch.fft.fft2(tiles).abs().square().flatten(1, 3)
    rounding_power = window.square().sum() * (2 / 255) ** 2 / 12
    log_power = (power + rounding_power * 1e-3).log()  # finite where a tile is flat
    neighbours = _mean_at_distance_2(log_power).exp() * math.exp(_EULER_GAMMA)
    prominence = ((power + rounding_power) / (neighbours + rounding_power)).mean(dim=1)
    mirrored = prominence.flip(-1).roll(1, dims=-1)
    prominence = (prominence + mirrored) / 2
    return (prominence + prominence.mT) / 2


def _mean_at_distance_2(spectra: Float[Tensor, "b n f_y f_x"]) -> Float[Tensor, "b n f_y f_x"]:
    """Return the mean of the 16 bins around each bin, spectra being periodic: 5x5 less 3x3."""
    padded = F.pad(spectra, (2, 2, 2, 2), mode="circular")
    five_by_five = F.avg_pool2d(padded, 5, stride=1) * 25
    three_by_three = F.avg_pool2d(padded[..., 1:-1, 1:-1], 3, stride=1) * 9
    return (five_by_five - three_by_three) / 16


def share_out_of_range(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Return the share of the values outside [-1, 1], which saving clips."""
    return (images.abs() > 1).float().mean(dim=(1, 2, 3))


def channel_mean_drift(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b 3"]:
    """Return mean(image) - mean(original) of R, G and B, in units of the range [-1, 1]."""
    return images.float().mean(dim=(2, 3)) - hires.float().mean(dim=(2, 3))


def channel_std_drift(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b 3"]:
    """Return std(image) - std(original) of R, G and B, in units of the range [-1, 1]."""
    return images.float().std(dim=(2, 3)) - hires.float().std(dim=(2, 3))
