"""The recipes' noise levels, by draws of the script: what --logit_mean and --training_shift give, and its sign."""

from types import SimpleNamespace

import pytest
import torch

STYLE = {"weighting_scheme": "logit_normal", "logit_mean": -3, "training_shift": 1}
SUBJECT = {"weighting_scheme": "none", "training_shift": 1}
VAE = SimpleNamespace(latent_channels=1, shift_factor=0.0, scaling_factor=1.0)


def draw(script, argv, flags, count=4000):
    """u and sigma of as many images, as an update draws them."""
    args = script.parse_args(argv(**flags))
    moments, seeds = torch.zeros(count, 2, 1, 1), range(count)
    _, _, u, _ = script.draw_latents(args, VAE, moments, seeds, torch.device("cpu"))
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    scheduler = script.load_scheduler(args, script.read_pipeline(args), accelerator)
    return u.double(), scheduler.sigmas[(u * 1000).long()].double()


def test_a_style_s_are_those_of_the_style_friendly_sampler(lora, argv):
    """log-SNR = 2 log((1 - sigma) / sigma) is normal with mean -6 and deviation 2: arXiv 2411.14793v3, section 3.2."""
    u, sigma = draw(lora, argv, STYLE)
    assert torch.allclose(sigma, 1 - u, atol=2e-3)  # the table has 1000 levels, from noisy to clean
    log_snr = 2 * torch.log(u / (1 - u))
    assert log_snr.mean().item() == pytest.approx(-6, abs=0.1)
    assert log_snr.std().item() == pytest.approx(2, abs=0.1)
    quantiles = torch.quantile(log_snr, torch.tensor([0.025, 0.16, 0.5, 0.84, 0.975], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([-9.92, -7.99, -6, -4.01, -2.08], abs=0.25)
    assert sigma.mean().item() == pytest.approx(0.93, abs=0.005)


@pytest.mark.parametrize(
    ("flags", "mean", "above"),
    [
        ({}, 0.715, 0.14),  # the default, with SD3's shift of 3
        ({"training_shift": 1}, 0.501, 0.01),
        (SUBJECT, 0.5, 0.1),
    ],
)
def test_means_as_the_readme_gives_them(flags, mean, above, lora, argv):
    _, sigma = draw(lora, argv, flags)
    assert sigma.mean().item() == pytest.approx(mean, abs=0.015)
    assert (sigma > 0.9).double().mean().item() == pytest.approx(above, abs=0.02)
