"""Where the teacher learns: t uniform, and a share of the draws where detail appears."""

import pytest
import torch

from ksr_distill.diffusion import NoiseSchedule
from ksr_distill.models import KSRUNet
from ksr_distill.randomness import generator_for
from ksr_distill.training.build import loaded_unet
from ksr_distill.training.teacher import DETAIL_LOG_SNR, TeacherModule
from tests.training.conftest import TINY, adamw


def drawn(detail_share: float, update: int = 0) -> torch.Tensor:
    module = TeacherModule(
        unet=KSRUNet(**TINY), optim=adamw(), scale=2, distance="l2", detail_share=detail_share,
        seed=0, num_updates=10, ema_decay=0.9, compile_networks=False, cuda_graphs=False,
        record={},
    )  # fmt: skip
    return module.draw_t(torch.zeros(4000, 3, 8, 8), generator_for(0, update))


def share_of_detail(t: torch.Tensor) -> float:
    log_snr = NoiseSchedule("linear").log_snr()[t]
    low, high = DETAIL_LOG_SNR
    return float(((low <= log_snr) & (log_snr <= high)).float().mean())


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.065), (0.2, 0.25), (1.0, 1.0)])
def test_a_share_of_the_timesteps_lies_where_detail_appears(share, expected):
    t = drawn(share)
    assert share_of_detail(t) == pytest.approx(expected, abs=0.02)
    assert t.min() >= 0
    assert (t.max() > 990) == (share < 1)


def test_draws_are_a_function_of_the_generator_alone():
    assert torch.equal(drawn(0.2), drawn(0.2))
    assert not torch.equal(drawn(0.2), drawn(0.2, update=1))


def test_without_a_share_t_is_drawn_as_before():
    generator = generator_for(0, 0)
    assert torch.equal(drawn(0.0), torch.randint(1000, (4000,), generator=generator))


PLAIN = {key: list(v) if isinstance(v, tuple) else v for key, v in TINY.items()}  # as in conf/


@pytest.fixture
def folder(tmp_path):
    KSRUNet(**TINY).half().save_pretrained(tmp_path / "sr")
    return str(tmp_path)


def test_a_training_goes_on_from_a_teacher_in_float32(folder):
    unet = loaded_unet(folder, {**PLAIN, "dropout": 0.1})
    saved = KSRUNet.from_pretrained(folder, subfolder="sr").state_dict()
    assert all(torch.equal(value, saved[name].float()) for name, value in unet.state_dict().items())
    assert {value.dtype for value in unet.state_dict().values()} == {torch.float32}
    assert unet.config["dropout"] == 0.1


def test_a_teacher_of_another_layout_is_refused_by_key(folder):
    with pytest.raises(ValueError, match=r"model\.num_groups=2 is not that of teacher="):
        loaded_unet(folder, {**PLAIN, "num_groups": 2, "dropout": 0.0})
