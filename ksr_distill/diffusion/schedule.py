"""The noise schedules of the released models."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""Of all released models."""


def linear_betas() -> Float[Tensor, " t"]:
    """Return the super-resolution models' betas, 1e-4 → 0.02 (DDPM, arXiv:2006.11239, §4)."""
    return torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)


def cosine_betas() -> Float[Tensor, " t"]:
    """Return the refiner's betas, capped at 0.999 (arXiv:2102.09672, eq. 17 with s = 0.008)."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    n = NUM_TRAIN_TIMESTEPS
    betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)]
    return torch.tensor(betas, dtype=torch.float64)


class NoiseSchedule:
    """ᾱ_t in double precision, with float32 factors that broadcast over images.

    Args:
        kind: ``linear`` for the super-resolution U-Nets, ``cosine`` for the latent refiner.
    """

    num_train_timesteps = NUM_TRAIN_TIMESTEPS

    def __init__(self, kind: str = "linear") -> None:
        if kind not in ("linear", "cosine"):
            raise ValueError(f"kind={kind!r} is no noise schedule; use linear or cosine")
        betas = {"linear": linear_betas, "cosine": cosine_betas}[kind]()
        self.kind = kind
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def signal(self, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """Return a_t = √ᾱ_t, in float32, on t's device."""
        return self._on(t.device)[0][t][:, None, None, None]

    def noise(self, t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """Return s_t = √(1 - ᾱ_t), in float32, on t's device."""
        return self._on(t.device)[1][t][:, None, None, None]

    def add_noise(
        self,
        x_0: Float[Tensor, "b c h w"],
        eps: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """Draw x_t from q(x_t | x_0) = a_t·x_0 + s_t·eps (DDPM, arXiv:2006.11239, eq. 4).

        Args:
            t: Timesteps in [0, num_train_timesteps); larger is noisier. May differ in the batch.
        """
        return self.signal(t) * x_0 + self.noise(t) * eps

    def log_snr(self) -> Float[Tensor, " t"]:
        """Return log(ᾱ_t / (1 - ᾱ_t)) of every timestep; it falls from about 9 to -10."""
        return torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod)

    def timestep_of_log_snr(self, log_snr: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Return, for each log-SNR, the first timestep that is at least as noisy."""
        rising = self._on(log_snr.device)[2]
        t = torch.searchsorted(rising, -log_snr.float())
        return t.clamp(max=self.num_train_timesteps - 1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return √ᾱ, √(1 - ᾱ) and -log-SNR; copied once per device, as a copy synchronises."""
        if device not in self._tables:
            tables = (self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), -self.log_snr())
            a, s, rising = (table.float().to(device) for table in tables)
            self._tables[device] = (a, s, rising)
        return self._tables[device]
