import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from scipy.signal import convolve2d
from torch import nn

from ksr_distill.evaluation.feature_network import FeatureNetwork, load_feature_network
from ksr_distill.evaluation.lpips import LPIPS
from ksr_distill.evaluation.metrics import luma
from ksr_distill.evaluation.similarity import ms_ssim_y, ssim_y
from ksr_distill.randomness import generator_for


def smooth(side, seed):
    coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator_for(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


def noisy(images, amount=0.1):
    return images + amount * torch.randn(images.shape, generator=generator_for(9))


def test_ssim_y_is_scikit_image_on_the_cropped_y_channel():
    skimage_metrics = pytest.importorskip("skimage.metrics")
    hires = smooth(64, 0)
    images = noisy(hires)
    ours, theirs = (luma(x)[0, 0, 2:-2, 2:-2].numpy() for x in (images, hires))
    expected = skimage_metrics.structural_similarity(
        ours, theirs, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim_y(images, hires, border_px=2).item() == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_y_is_the_formula_of_wang_2003():
    hires = smooth(192, 1)
    images = noisy(hires, 0.3)
    ours, theirs = (luma(x)[0, 0].numpy().astype(np.float64) for x in (images, hires))
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2

    def blur(a):
        return convolve2d(a, window, mode="valid")

    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mean_a, mean_b = blur(ours), blur(theirs)
        variances = blur(ours**2) - mean_a**2 + blur(theirs**2) - mean_b**2
        c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        contrast = (2 * (blur(ours * theirs) - mean_a * mean_b) + c_2) / (variances + c_2)
        luminance = (2 * mean_a * mean_b + c_1) / (mean_a**2 + mean_b**2 + c_1)
        value = (contrast * luminance).mean() if scale == 4 else contrast.mean()
        expected *= value**weight
        side = ours.shape[0] // 2
        ours, theirs = (a.reshape(side, 2, side, 2).mean(axis=(1, 3)) for a in (ours, theirs))
    assert ms_ssim_y(images, hires, border_px=0).item() == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_refuses_images_whose_last_scale_is_smaller_than_its_window():
    with pytest.raises(ValueError, match=r"60x60 px are too small for MS-SSIM.*176 px"):
        ms_ssim_y(smooth(64, 0), smooth(64, 0), border_px=2)


def torchvision_layers(backbone):
    """Layers in torchvision's order, written down apart from ours."""
    conv, relu, pool = nn.Conv2d, nn.ReLU, nn.MaxPool2d
    if backbone == "alex":
        return [
            conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, 1, 2), relu(), pool(3, 2),
            conv(192, 384, 3, 1, 1), relu(), conv(384, 256, 3, 1, 1), relu(),
            conv(256, 256, 3, 1, 1), relu(), pool(3, 2),
        ]  # fmt: skip
    layers, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [conv(channels, width, 3, 1, 1), relu()]
            channels = width
        layers.append(pool(2, 2))
    return layers


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_that_of_torchmetrics(backbone, monkeypatch, tmp_path):
    # torchmetrics needs torchvision for the trunk alone: we hand it one of the same layout.
    torch.manual_seed(0)
    trunk = nn.Sequential(*torchvision_layers(backbone))
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_, **__: trunk)
    theirs = torchmetrics_lpips._LPIPS(net=backbone, pnet_rand=True)
    weights = {f"features.{key}": value for key, value in trunk.state_dict().items()}
    weights["classifier.6.weight"] = torch.zeros(2, 2)
    torch.save(weights, tmp_path / "weights.pth")
    ours = LPIPS(load_feature_network(tmp_path / "weights.pth", key="lpips_weights"))
    hires = smooth(64, 2)
    expected = theirs(noisy(hires), hires).flatten()
    torch.testing.assert_close(ours(noisy(hires), hires), expected)
    assert expected.item() > 0
    assert ours(hires, hires).item() == 0


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"neither torchvision's VGG16 nor its AlexNet.*features"):
        load_feature_network(tmp_path / "resnet.pth", key="lpips_weights")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_feature_network(tmp_path / "damaged.pth", key="lpips_weights")
    with pytest.raises(ValueError, match="is no file; give torchvision's"):
        load_feature_network(tmp_path / "missing.pth", key="lpips_weights")


def test_the_feature_network_gives_one_vector_per_image():
    network = FeatureNetwork("alex")
    assert network(smooth(64, 3)).shape == (1, network.num_features)
