"""Claims about the learned variance and the likelihood, compared with an independent truth."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from conftest import trained
from diffusion import ddpm, guide
from test_diffusion import T, gaussian, images
from test_numerics import network
from variance import LearnedVariance, discretized_log_likelihood


def test_learned_variance_loss_equals_an_independent_computation():
    """L_simple + L_vlb in float64, from the betas and torch.distributions."""
    d, x0, eps = LearnedVariance("linear", "eps"), images(n=6), gaussian(1, n=6)
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # the open bins
    t = torch.tensor([0, 0, 1, 2, 500, 999])
    out, v = eps + 0.1 * gaussian(2, n=6), gaussian(3, n=6)
    loss = d.training_loss(lambda *_: torch.cat([out, v], dim=1), x0, t, t, eps)

    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta_tilde = (1 - before) / (1 - alpha_bar) * beta
    beta_tilde[0] = beta_tilde[1]
    for i, time in enumerate(t.tolist()):
        X0, E, OUT, V = (z[i].double() for z in (x0, eps, out, v))
        ab, ab_before, b = alpha_bar[time], before[time], beta[time]
        x_t = ab.sqrt() * X0 + (1 - ab).sqrt() * E

        def mean(z, x_t=x_t, ab=ab, ab_before=ab_before, b=b):
            return ab_before.sqrt() * b / (1 - ab) * z + (1 - b).sqrt() * (1 - ab_before) / (1 - ab) * x_t

        x0_hat = (x_t - (1 - ab).sqrt() * OUT) / ab.sqrt()
        fraction = (V + 1) / 2
        std = (0.5 * (fraction * b.log() + (1 - fraction) * beta_tilde[time].log())).exp()
        if time:
            model = torch.distributions.Normal(mean(x0_hat), std)
            truth = torch.distributions.Normal(mean(X0), beta_tilde[time].sqrt())
            bound = torch.distributions.kl_divergence(truth, model)
        else:
            def cdf(z):
                return 0.5 + 0.5 * torch.tanh(z * (1 + 0.044715 * z * z) * math.sqrt(2 / math.pi))

            high = torch.where(X0 > 0.999, 1.0, cdf((X0 + 1 / 255 - mean(x0_hat)) / std))
            low = torch.where(X0 < -0.999, 0.0, cdf((X0 - 1 / 255 - mean(x0_hat)) / std))
            bound = -(high - low).clamp(min=1e-12).log()
        expected = (E - OUT).square().mean() + bound.mean() / math.log(2)
        assert loss[i].item() == pytest.approx(expected.item(), rel=2e-4)


def test_learned_variance_loss_does_not_move_the_mean():
    d, x0, eps, t = LearnedVariance("linear", "eps"), images(), gaussian(1), torch.tensor([0, 1, 500, 999])
    out, v = gaussian(2).requires_grad_(), (0.3 * gaussian(3)).requires_grad_()
    d.training_loss(lambda *_: torch.cat([out, v], dim=1), x0, t, t, eps).sum().backward()
    torch.testing.assert_close(out.grad, 2 * (out - eps).detach() / out[0].numel())
    assert (v.grad.abs().amax((1, 2, 3)) > 0).all()


def test_discretized_likelihood_is_a_distribution_over_256_levels():
    levels = torch.arange(256) / 127.5 - 1
    for mean, log_variance in ((0.0, -2.0), (0.9, -6.0), (-1.2, -4.0)):
        p = discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_variance)).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        normal = torch.distributions.Normal(torch.tensor(mean), math.exp(0.5 * log_variance))
        exact = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
        torch.testing.assert_close(p[1:-1], exact[1:-1], atol=1e-3, rtol=0)


def test_ddpm_with_a_learned_variance_agrees_with_diffusers():
    d, timesteps = LearnedVariance("linear", "eps"), list(range(T - 1, -1, -1))[:50]  # adjacent steps, as it knows them
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=True)
    scheduler.set_timesteps(T)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    predictions = {t: torch.cat([0.5 * gaussian(t), 0.5 * gaussian(t + T)], dim=1) for t in timesteps}
    path, x = [], gaussian(9)
    ddpm(
        d, lambda x, t: predictions[t], x, timesteps, lambda: torch.randn(4, 3, 4, 4, generator=generators[0]),
        callback=lambda t, x, _: path.append(x),
    )
    for t, ours in zip(timesteps, path, strict=True):
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)
        x = scheduler.step(predictions[t], t, x, generator=generators[1]).prev_sample


def test_the_variance_is_not_guided():
    y, x = torch.tensor([0, 1, 2, 3]), gaussian(0)

    def model(x, t, y):
        label = torch.ones_like(x) * y.view(-1, 1, 1, 1)
        return torch.cat([label, 10 * label], dim=1)

    for weight in (0.0, 1.0, 3.0):
        out = guide(model, y, null=10, scale=weight)(x, 500)
        expected = (10 + weight * (y - 10)).float().view(4, 1, 1, 1).expand(4, 3, 4, 4)
        torch.testing.assert_close(out[:, :3], expected)
        torch.testing.assert_close(out[:, 3:], 10.0 * y.view(4, 1, 1, 1).expand(4, 3, 4, 4))


def test_a_sampler_guides_the_prediction_and_leaves_the_variance_as_the_conditional_one():
    """As a trained network is sampled: inside of the interval and outside."""
    ours = trained(network(learn_sigma=True), LearnedVariance("linear", "eps"))
    x, y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    predict = ours.predictor(y, [150, 250], guidance=3.0, guidance_interval=[100, 200])
    for t, weight in ((150, 3.0), (250, 1.0)):
        times = torch.full((3,), t)
        conditional, unconditional = ours.model(x, times, y), ours.model(x, times)
        out, guided = predict(x, t), unconditional + weight * (conditional - unconditional)
        torch.testing.assert_close(out[:, :1], guided[:, :1])
        torch.testing.assert_close(out[:, 1:], conditional[:, 1:])
        assert not torch.allclose(conditional[:, 1:], unconditional[:, 1:])


@pytest.mark.parametrize("s", [499, 400, 0])
def test_the_noise_of_a_reverse_step_is_between_that_of_the_posterior_and_beta(s):
    """Of adjacent steps and longer ones; for adjacent ones it is that of the loss."""
    d = LearnedVariance("cosine", "eps")
    _, _, variance, beta = d.posterior(500, s)
    v = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    std = d.reverse_std(500, s, torch.cat([torch.zeros(3, 1, 1, 1), v], dim=1)).flatten()
    torch.testing.assert_close(std.square(), torch.tensor([variance, math.sqrt(variance * beta), beta]))
    if s == 499:
        log_variance = d.log_variance(v, torch.full((3,), 500)).flatten()
        torch.testing.assert_close(2 * std.log(), log_variance, rtol=1e-4, atol=1e-4)


def test_a_perfect_prediction_costs_only_the_likelihood_of_the_image():
    d, x0, eps, t = LearnedVariance("flow", "x0"), images(), gaussian(1), torch.tensor([0, 1, 500, 999])
    out = torch.cat([x0, -torch.ones_like(x0)], dim=1)  # x0 is known, and the variance is the posterior's
    loss = d.training_loss(lambda *_: out, x0, t, t, eps)
    torch.testing.assert_close(loss[1:], torch.zeros(3))  # at t = 0 it is the likelihood of an 8-bit image
    assert loss[0] > 0
