"""Claims about numbers: loss, gradients and samples are finite in every corner, and do not depend on the threads."""

from itertools import product

import pytest
import torch

from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, load_model
from conftest import trained
from diffusion import PREDICTIONS, SCHEDULES, Diffusion
from dit import DiT, DiTConfig
from shortcut import ShortcutModel
from variance import LearnedVariance


def network(kind: type[DiT] = DiT, **options) -> DiT:
    """A network that answers to everything: noise, timestep and label."""
    torch.manual_seed(0)
    shape = dict(image_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    model = kind(DiTConfig(**shape, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def process(learn_sigma: bool) -> type[Diffusion]:
    return LearnedVariance if learn_sigma else Diffusion


@pytest.mark.parametrize(("schedule", "prediction"), list(product(SCHEDULES, PREDICTIONS)))
def test_loss_and_gradient_are_finite_in_every_corner(schedule, prediction):
    """The first and the last timestep; black, grey, white and random images; alone and in a batch; bf16; T of 2."""
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [torch.full((1, 1, 8, 8), level) for level in (-1.0, 0.0, 1.0)] + [noise.clamp(-1, 1)]
    for learn_sigma, T, precision, gamma in product((False, True), (2, 1000), ("fp32", "bf16"), (None, 5.0)):
        model = network(learn_sigma=learn_sigma)
        diffusion = process(learn_sigma)(schedule, prediction, T, min_snr=gamma)
        for t, x0, eps in product((0, T - 1), [*images, torch.cat(images)], (noise, torch.zeros_like(noise))):
            n = len(x0)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                arguments = x0, torch.arange(n) % 4, torch.full((n,), t), eps.expand(n, -1, -1, -1)
                loss = diffusion.training_loss(model, *arguments)
            assert loss.shape == (n,) and loss.isfinite().all()
        loss.mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("schedule", "prediction"), list(product(SCHEDULES, PREDICTIONS)))
def test_samples_are_finite_in_every_corner(schedule, prediction):
    for learn_sigma, T in ((False, 1000), (True, 1000), (False, 2)):
        ours = trained(network(learn_sigma=learn_sigma), process(learn_sigma)(schedule, prediction, T))
        for sampler, steps, guidance, precision in product(
            ("ddpm", "ddim", "dpm++"), (1, 2), (0.0, 1.0, 20.0, 100.0), ("fp32", "bf16")
        ):
            for n in (1, 5):
                options = dict(sampler=sampler, steps=steps, guidance=guidance, precision=precision)
                images = ours.sample_batch(torch.arange(n) % 4, eta=1.0 if sampler == "ddim" else 0.0, **options)
                assert images.isfinite().all() and images.abs().max() < 1.001


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "sampler"), list(product(SCHEDULES, ("ddpm", "ddim", "dpm++"))))
def test_samples_of_all_timesteps_are_finite(schedule, sampler):
    model = network()
    for prediction, guidance in (("eps", 20.0), ("x0", 0.0), ("v", 20.0)):
        diffusion = Diffusion(schedule, prediction, 1000)
        images = trained(model, diffusion).sample_batch(
            torch.arange(1), sampler=sampler, steps=1000, guidance=guidance
        )
        assert images.isfinite().all() and images.abs().max() < 1.1


@pytest.mark.parametrize("weights", [BUNDLED_WEIGHTS, DISTILLED_WEIGHTS])
def test_samples_do_not_depend_on_the_number_of_threads(weights):
    ours, before = load_model(weights), torch.get_num_threads()
    samplers = [dict(steps=1), dict(steps=4)]
    if not isinstance(ours, ShortcutModel):
        samplers = [dict(sampler=name, steps=4) for name in ("ddpm", "ddim", "dpm++")]
    try:
        for options in samplers:
            sampled = []
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                sampled.append(ours.sample(torch.arange(6), 6, **options))
            for images in sampled[1:]:
                torch.testing.assert_close(images, sampled[0], rtol=0, atol=2e-3)
    finally:
        torch.set_num_threads(before)


def test_samples_that_are_not_finite_end_in_one_line():
    model = network()
    torch.nn.init.constant_(model.final_layer.linear.bias, 1e38)
    with pytest.raises(FloatingPointError, match="lower --guidance, or use other weights"):
        trained(model, Diffusion("flow", "eps")).sample_batch(
            torch.arange(2), sampler="dpm++", steps=3, guidance=20.0, clip=False
        )
