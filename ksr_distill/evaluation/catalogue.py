"""The metrics: title, unit, direction and meaning of each."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "one", "neither"]


@dataclass(frozen=True)
class Metric:
    """A column of the report.

    Attributes:
        key: In metrics.json and per_image.csv.
        better: `one` is best nearest to 1; with `neither` no model is marked as best.
        meaning: One sentence for readers who do not know the metric.
    """

    key: str
    title: str
    unit: str
    better: Better
    digits: int
    meaning: str

    def badness(self, value: float) -> float:
        """Return a number that is larger where the value is worse."""
        if self.better == "one":
            return abs(value - 1)
        return -value if self.better == "higher" else value

    @property
    def arrow(self) -> str:
        """Which direction is better, as a symbol."""
        return {"higher": "↑", "lower": "↓", "one": "→ 1", "neither": ""}[self.better]


METRICS = (
    Metric("psnr_y", "PSNR-Y", "dB", "higher", 2,
           "Pixel fidelity of the Y channel (BT.601); favours blur over misplaced detail."),
    Metric("ssim_y", "SSIM-Y", "", "higher", 4,
           "Structural similarity of the Y channel (Wang et al. 2004)."),
    Metric("ms_ssim_y", "MS-SSIM-Y", "", "higher", 4,
           "The same over five scales (Wang et al. 2003); needs 176 px a side."),
    Metric("lpips", "LPIPS", "", "lower", 4,
           "Distance in a network's features (arXiv:1801.03924)."),
    Metric("swd", "SWD", "×10³", "lower", 1,
           "Sliced Wasserstein distance of 7×7 patches over four levels of a Laplacian pyramid "
           "(after arXiv:1710.10196): is the texture distributed as in the original?"),
    Metric("top_octave_power_ratio", "Top octave", "×", "one", 3,
           "Power in the finest octave over the original's: below 1 blur, above 1 false detail."),
    Metric("lowres_consistency_psnr", "Lowres consistency", "dB", "higher", 2,
           "PSNR (RGB) after shrinking by area: is the output consistent with its input?"),
    Metric("checkerboard_peak", "Checkerboard", "×", "lower", 2,
           "The largest spectral peak at periods of 2, 4 and 8 px over the original's: 1 is none, "
           "2 twice the neighbouring frequencies."),
    Metric("colour_mean_drift", "Colour drift", "levels", "lower", 2,
           "Largest change of a channel's mean, in levels of 255."),
    Metric("colour_std_drift", "Contrast drift", "levels", "lower", 2,
           "Largest change of a channel's standard deviation, in levels of 255."),
    Metric("share_out_of_range", "Out of range", "%", "lower", 2,
           "Share of the values outside [-1, 1] before they are clipped."),
    Metric("kid", "KID", "", "lower", 5,
           "Kernel distance between features of native-resolution crops (arXiv:1801.01401)."),
    Metric("fid", "FID", "", "lower", 2,
           "Fréchet distance between features of native-resolution crops (arXiv:1706.08500)."),
    Metric("seconds_per_megapixel", "Time", "s/MP", "lower", 2,
           "Seconds per megapixel of output on the machine of this report."),
    Metric("peak_memory_per_megapixel", "Memory", "MiB/MP", "lower", 0,
           "Peak memory above the resting model per megapixel of output."),
)  # fmt: skip

BY_KEY = {metric.key: metric for metric in METRICS}
