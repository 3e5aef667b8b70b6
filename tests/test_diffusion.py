"""Claims about the mathematics. Most compare with an independent truth: a closed form, or the diffusers schedulers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusion import (
    PREDICTIONS,
    SCHEDULES,
    Diffusion,
    ddpm,
    drop_labels,
    guide,
    sample_timesteps,
    spaced_timesteps,
)
from sampling import constrained, crossfade, ddim, dpm_solver

T = 1000
BETA_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}                           # as diffusers calls them
PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def images(seed: int = 0, n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gaussian(seed: int, n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- schedules


def test_linear_schedule_is_that_of_ddpm():
    alpha_bar = 1.0
    d = Diffusion("linear")
    for t in range(T):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / (T - 1))
        assert d.alpha[t] == pytest.approx(math.sqrt(alpha_bar), rel=1e-9)
        assert d.sigma[t] == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-9)


def test_cosine_schedule_is_that_of_iddpm():
    d = Diffusion("cosine")

    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in range(T - 1):  # the last beta is capped
        assert d.alpha[t] ** 2 == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert d.alpha[T - 1] ** 2 / d.alpha[T - 2] ** 2 == pytest.approx(1 - 0.999)


def test_flow_schedule_is_a_straight_line():
    d = Diffusion("flow")
    for t in range(T):
        assert (d.alpha[t], d.sigma[t]) == pytest.approx((1 - (t + 1) / 1001, (t + 1) / 1001))


@every_schedule
@pytest.mark.parametrize("timesteps", [100, 400, 1000, 4000])
def test_noise_only_grows_and_ends_as_noise(schedule, timesteps):
    d = Diffusion(schedule, timesteps=timesteps)
    assert all(d.alpha[t] > d.alpha[t + 1] > 0 for t in range(timesteps - 1))
    assert d.alpha[timesteps - 1] ** 2 < 1e-4
    assert (d.alpha[-1], d.sigma[-1]) == (1, 0)


def test_q_sample_is_equation_4():
    """Noise added step by step has the mean and the variance of noise that is added at once."""
    d = Diffusion("linear")
    mean, variance = 1.0, 0.0
    for t in range(T):
        beta = 1e-4 + (0.02 - 1e-4) * t / (T - 1)
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
    t = torch.tensor([T - 1])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert d.q_sample(one, t, zero).item() == pytest.approx(mean, rel=1e-5)
    assert d.q_sample(zero, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-6)


@every_schedule
@every_prediction
def test_every_prediction_gives_back_x0(schedule, prediction):
    d = Diffusion(schedule, prediction)
    x0, eps = images(), gaussian(1)
    for t in (0, 1, 500, T - 2, T - 1):
        times = torch.full((4,), t)
        x_t, out = d.q_sample(x0, times, eps), d.target(x0, times, eps)
        tolerance = 1e-5 / min(1, d.alpha[t]) if prediction == "eps" else 1e-5  # eps at T - 1 says little of x0
        torch.testing.assert_close(d.predict_x0(out, x_t, times), x0, rtol=0, atol=tolerance)
        torch.testing.assert_close(d.predict_x0(out, x_t, t), x0, rtol=0, atol=tolerance)


@every_schedule
def test_velocity_is_the_derivative_of_x_t(schedule):
    """By the angle for linear and cosine, by tau for flow: a finite difference of the table."""
    d = Diffusion(schedule, "v", timesteps=20000)
    t, x0, eps = 10000, images().double(), gaussian(1).double()
    x = [d.alpha[i] * x0 + d.sigma[i] * eps for i in (t - 1, t + 1)]
    angle = [math.atan2(d.sigma[i], d.alpha[i]) if schedule != "flow" else d.sigma[i] for i in (t - 1, t + 1)]
    slope = (x[1] - x[0]) / (angle[1] - angle[0])
    target = d.target(x0.float(), torch.full((4,), t), eps.float()).double()
    torch.testing.assert_close(target, slope, rtol=1e-4, atol=1e-4)


def test_posterior_is_equation_6_and_7():
    d = Diffusion("linear")
    beta = [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]
    alpha_bar = [math.prod(1 - b for b in beta[: t + 1]) for t in range(T)]
    for t in (1, 2, 77, T - 1):
        before = alpha_bar[t - 1]
        c0 = math.sqrt(before) * beta[t] / (1 - alpha_bar[t])
        c = math.sqrt(1 - beta[t]) * (1 - before) / (1 - alpha_bar[t])
        variance = (1 - before) / (1 - alpha_bar[t]) * beta[t]
        assert d.posterior(t, t - 1) == pytest.approx((c, c0, variance, beta[t]), rel=1e-8)


@every_schedule
def test_posterior_of_any_stride_is_bayes_rule(schedule):
    """The product of q(x_s | x0) and q(x_t | x_s), both Gaussian in x_s, completed to a square."""
    d = Diffusion(schedule)
    for t, s in ((999, 0), (999, 500), (10, 3), (1, 0)):
        r = d.alpha[t] / d.alpha[s]
        k = d.sigma[t] ** 2 - r**2 * d.sigma[s] ** 2
        precision = 1 / d.sigma[s] ** 2 + r**2 / k
        expected = (r / k / precision, d.alpha[s] / d.sigma[s] ** 2 / precision, 1 / precision, k)
        assert d.posterior(t, s) == pytest.approx(expected, rel=1e-6)


@every_schedule
def test_the_last_step_is_x0_hat_without_noise(schedule):
    assert Diffusion(schedule).posterior(0, -1) == pytest.approx((0, 1, 0, Diffusion(schedule).sigma[0] ** 2))


@pytest.mark.parametrize("wrong", [dict(schedule="sigmoid"), dict(prediction="noise"), dict(timesteps=1)])
def test_what_is_unknown_is_refused(wrong):
    with pytest.raises(ValueError, match="use"):
        Diffusion(**wrong)


# ----------------------------------------------------------------------------------------------------------- training


@every_schedule
@every_prediction
def test_loss_of_a_perfect_prediction_is_zero_and_of_none_is_the_target(schedule, prediction):
    d, x0, eps, t = Diffusion(schedule, prediction), images(), gaussian(1), torch.tensor([0, 1, 500, 999])
    target = d.target(x0, t, eps)
    perfect = d.training_loss(lambda *_: target, x0, torch.zeros(4), t, eps)
    none = d.training_loss(lambda x, *_: torch.zeros_like(x), x0, torch.zeros(4), t, eps)
    assert perfect.tolist() == [0] * 4
    weight = 1 / d.tables["sigma"][t].clamp(min=0.05) ** 2 if prediction == "x0" else 1
    torch.testing.assert_close(none, weight * target.square().mean((1, 2, 3)))


@every_schedule
def test_the_loss_of_x0_is_that_of_the_v_it_implies(schedule):
    t = torch.tensor([60, 300, 500, 998])
    x0, eps, moved = images(), gaussian(1), 0.1 * gaussian(2)
    v, x = Diffusion(schedule, "v"), Diffusion(schedule, "x0")
    x_t = v.q_sample(x0, t, eps)
    out = v.target(x0, t, eps) + moved
    x0_hat = v.predict_x0(out, x_t, t)
    by_v = v.training_loss(lambda *_: out, x0, t, t, eps)
    torch.testing.assert_close(x.training_loss(lambda *_: x0_hat, x0, t, t, eps), by_v, rtol=1e-4, atol=1e-6)


@every_schedule
def test_min_snr_weighs_an_error_in_x0_by_the_clipped_snr(schedule):
    """Whatever is predicted: a prediction that is off by what moves x0_hat by 1 costs min(SNR, gamma)."""
    t = torch.tensor([50, 300, 500, 900])
    x0, eps = images(), gaussian(1)
    for prediction in PREDICTIONS:
        d = Diffusion(schedule, prediction, min_snr=5.0)
        x_t = d.q_sample(x0, t, eps)
        out = d.target(x0, t, eps)
        moved = d.predict_x0(out + 1, x_t, t) - d.predict_x0(out, x_t, t)
        loss = d.training_loss(lambda *_, out=out: out + 1, x0, t, t, eps)
        snr = torch.tensor([(d.alpha[i] / d.sigma[i]) ** 2 for i in t.tolist()])
        torch.testing.assert_close(loss, snr.clamp(max=5.0) * moved.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


@every_prediction
def test_min_snr_weights_are_those_of_the_paper(prediction):
    gamma, t = 5.0, torch.tensor([0, 100, 500, 999])
    d, min_snr = Diffusion("linear", prediction), Diffusion("linear", prediction, min_snr=gamma)
    x0, eps, out = images(), gaussian(1), gaussian(2)
    plain, weighted = (diffusion.training_loss(lambda *_: out, x0, t, t, eps) for diffusion in (d, min_snr))
    snr = torch.tensor([d.alpha[i] ** 2 / d.sigma[i] ** 2 for i in t.tolist()])
    x0_weight = 1 / d.tables["sigma"][t].clamp(min=0.05) ** 2  # without min-SNR, that of v
    expected = {k: snr.clamp(max=gamma) / w for k, w in {"x0": x0_weight, "eps": snr, "v": snr + 1}.items()}
    torch.testing.assert_close(weighted / plain, expected[prediction], rtol=1e-4, atol=1e-7)


def test_timesteps_cover_each_part_of_the_range_once():
    g = torch.Generator().manual_seed(0)
    t = sample_timesteps(100, T, "uniform", g)
    assert (t // 10).tolist() == list(range(100))


@pytest.mark.parametrize("mean", [0.0, 0.4])
def test_logit_normal_timesteps_have_their_quartiles(mean):
    t = sample_timesteps(10000, T, "logit-normal", torch.Generator().manual_seed(0), mean).double()
    quartiles = torch.quantile(t / T, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    expected = torch.sigmoid(torch.tensor([mean - 0.6745, mean, mean + 0.6745], dtype=torch.float64))
    torch.testing.assert_close(quartiles, expected, atol=2e-3, rtol=0)
    assert t.min() >= 0
    assert t.max() < T


def test_labels_are_dropped_with_their_probability():
    y = torch.arange(10).repeat(1000)
    u = torch.rand(10000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(y, 10, 0.1, u)
    assert (dropped == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(drop_labels(y, 10, 0.0, u), y)
    assert (drop_labels(y, 10, 1.0, u) == 10).all()


# ----------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 250, 999, 1000])
def test_timesteps_begin_at_noise_and_end_at_0(steps):
    timesteps = spaced_timesteps(T, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == T - 1
    assert timesteps[-1] == 0 or steps == 1
    assert all(t > s for t, s in pairwise(timesteps))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_too_few_or_too_many_steps_are_refused(steps):
    with pytest.raises(ValueError, match="use 1 to 1000"):
        spaced_timesteps(T, steps)


def optimal_for_gaussian(d: Diffusion, m: float, c: float):
    """E[x0 | x_t] where x0 ~ N(m, c^2), in closed form, for a Diffusion of prediction x0."""
    def predict(x, t):
        return m + d.alpha[t] * c**2 / (d.alpha[t] ** 2 * c**2 + d.sigma[t] ** 2) * (x - d.alpha[t] * m)

    return predict


def optimal_for_two_points(d: Diffusion, p: float):
    """E[x0 | x_t] where x0 is 1 with probability p, else -1."""
    def predict(x, t):
        return torch.tanh((2 * d.alpha[t] * x / d.sigma[t] ** 2 + math.log(p / (1 - p))) / 2)

    return predict


def all_samplers(d: Diffusion, predict, x: torch.Tensor, steps: dict[str, int]):
    g = torch.Generator().manual_seed(5)
    options = dict(constrain=constrained(clip=False))

    def noise():
        return torch.randn(x.shape, generator=g)

    yield ddpm(d, predict, x, spaced_timesteps(d.T, steps["ddpm"]), noise, **options)
    yield ddim(d, predict, x, spaced_timesteps(d.T, steps["ddim"]), noise, eta=0.5, **options)
    yield ddim(d, predict, x, spaced_timesteps(d.T, steps["ddim"]), **options)
    yield dpm_solver(d, predict, x, spaced_timesteps(d.T, steps["dpm++"]), **options)


@every_schedule
def test_every_sampler_returns_gaussian_data(schedule):
    d, m, c = Diffusion(schedule, "x0"), 0.4, 0.3
    x = torch.randn(40000, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    for out in all_samplers(d, optimal_for_gaussian(d, m, c), x, {"ddpm": 1000, "ddim": 500, "dpm++": 250}):
        assert out.mean().item() == pytest.approx(m, abs=0.008)
        assert out.std().item() == pytest.approx(c, abs=0.008)


@every_schedule
def test_every_sampler_returns_both_of_two_points(schedule):
    d, p = Diffusion(schedule, "x0"), 0.7
    x = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    for out in all_samplers(d, optimal_for_two_points(d, p), x, {"ddpm": 1000, "ddim": 500, "dpm++": 200}):
        assert (out > 0).float().mean().item() == pytest.approx(p, abs=0.015)
        assert (out.abs() - 1).abs().mean().item() < 0.01


@every_schedule
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver, 2)])
def test_order_of_accuracy(schedule, sampler, order):
    """Halving the step divides the error by 2^order. On Gaussian data the exact path keeps (x - alpha m) / std."""
    d, m, c = Diffusion(schedule, "x0", timesteps=20000), 0.4, 0.3
    begin, end = 16000, 4000

    def std(t):
        return math.sqrt((d.alpha[t] * c) ** 2 + d.sigma[t] ** 2)

    x = torch.tensor([-1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    exact = d.alpha[end] * m + std(end) / std(begin) * (x - d.alpha[begin] * m)
    errors = []
    for steps in (20, 40, 80):
        at = {}
        timesteps = torch.linspace(begin, end, steps + 1).round().long().tolist()
        predict = optimal_for_gaussian(d, m, c)
        keep = dict(constrain=constrained(clip=False), callback=lambda t, x_t, _, at=at: at.update({t: x_t}))
        sampler(d, predict, x, timesteps, **keep)
        errors.append((at[end] - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


def test_ddim_under_flow_is_eulers_method():
    d, x = Diffusion("flow", "v"), gaussian(1)
    v, timesteps = gaussian(2), spaced_timesteps(T, 5)
    expected = x
    for t, s in pairwise([*timesteps, -1]):
        expected = expected + (d.sigma[s] - d.sigma[t]) * v
    out = ddim(d, lambda *_: v, x, timesteps, constrain=constrained(clip=False))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_1_is_ddpm():
    d, x, predict = Diffusion("linear", "eps"), gaussian(1), lambda x, t: 0.3 * x
    outs = []
    for sampler, options in ((ddpm, {}), (ddim, dict(eta=1.0))):
        g = torch.Generator().manual_seed(0)
        noise = lambda g=g: torch.randn(4, 3, 4, 4, generator=g)  # noqa: E731
        outs.append(sampler(d, predict, x, spaced_timesteps(T, 20), noise, **options))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


@every_schedule
def test_samplers_show_every_step_and_clip_only_x0_hat(schedule):
    d, x = Diffusion(schedule, "x0"), 3 * gaussian(1)
    timesteps = spaced_timesteps(T, 6)
    for sampler, options in ((ddpm, dict(noise=lambda: gaussian(2))), (ddim, {}), (dpm_solver, {})):
        seen = []
        options["callback"] = lambda *step, seen=seen: seen.append(step)
        out = sampler(d, lambda x, t: 5 * x, x, timesteps, **options)
        assert [t for t, _, _ in seen] == timesteps
        assert torch.equal(seen[0][1], x)
        assert all(x0_hat.abs().max() <= 1 for _, _, x0_hat in seen)
        assert seen[1][1].abs().max() > 1
        assert torch.equal(out, seen[-1][2])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@every_prediction
@pytest.mark.parametrize("clip", [False, True])
def test_each_sampler_agrees_with_diffusers(schedule, prediction, clip):
    """Step by step, on random predictions."""
    common = dict(beta_schedule=BETA_SCHEDULE[schedule], prediction_type=PREDICTION_TYPE[prediction])
    if schedule == "linear":
        common.update(beta_start=1e-4, beta_end=0.02)
    d = Diffusion(schedule, prediction)
    timesteps = list(range(T - 1, -1, -100))  # the even stride that DDIMScheduler is made for
    predictions = {t: 0.5 * gaussian(t, n=2) for t in timesteps}

    def predict(x, t):
        return predictions[t]

    def theirs(scheduler, **options):
        x, path = gaussian(9, n=2), []
        for t in timesteps:
            path.append(x)
            x = scheduler.step(predictions[t], t, x, **options).prev_sample
        return [*path, x]

    def ours(sampler, *arguments, **options):
        path = []
        options |= dict(constrain=constrained(clip=clip), callback=lambda t, x, _: path.append(x))
        out = sampler(d, predict, gaussian(9, n=2), timesteps, *arguments, **options)
        return [*path, out]

    def noise():
        return torch.randn(2, 3, 4, 4, generator=generators[0])

    pairs = []
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    scheduler = DDPMScheduler(**common, variance_type="fixed_small", clip_sample=clip)
    scheduler.set_timesteps(timesteps=timesteps)
    pairs.append((ours(ddpm, noise), theirs(scheduler, generator=generators[1])))
    for eta in (0.0, 0.7):
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        scheduler = DDIMScheduler(**common, clip_sample=clip, set_alpha_to_one=True)
        scheduler.set_timesteps(len(timesteps))
        options = dict(eta=eta, use_clipped_model_output=True, generator=generators[1])
        pairs.append((ours(ddim, noise, eta=eta), theirs(scheduler, **options)))
    if not clip:  # this scheduler knows no static clipping
        scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=timesteps)
        pairs.append((ours(dpm_solver), theirs(scheduler)))
    for our_path, their_path in pairs:
        assert len(our_path) == len(timesteps) + 1
        for a, b in zip(our_path, their_path, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * max(1, b.abs().max().item()))


# ----------------------------------------------------------------------------------------------------------- guidance


def label_model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Outputs its label."""
    return torch.ones_like(x) * y.view(-1, 1, 1, 1)


def test_guidance_moves_away_from_the_null_class():
    x, y = gaussian(0), torch.tensor([0, 1, 2, 3])
    for weight in (0.0, 1.0, 3.0):
        out = guide(label_model, y, null=10, scale=weight)(x, 500)
        expected = (10 + weight * (y - 10)).float().view(4, 1, 1, 1).expand(4, 3, 4, 4)
        torch.testing.assert_close(out, expected)


def test_guidance_acts_in_its_interval_only():
    y = torch.tensor([3])
    predict = guide(label_model, y, null=10, scale=2.0, interval=(100, 200))
    x = gaussian(0, n=1)
    at = {t: predict(x, t)[0, 0, 0, 0].item() for t in (99, 100, 200, 201)}
    assert at == {99: 3, 100: -4, 200: -4, 201: 3}


def test_without_guidance_the_network_is_called_once_for_each_image():
    sizes = []

    def model(x, t, y):
        sizes.append(len(x))
        return x

    for weight in (1.0, 2.0):
        guide(model, torch.zeros(4, dtype=torch.long), 10, weight)(gaussian(0), 0)
    assert sizes == [4, 8]


def test_guidance_takes_a_timestep_for_each_image():
    x, y = gaussian(0), torch.tensor([0, 1, 2, 3])
    predict = guide(lambda x, t, y: x * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1), y, 10, 2.0, interval=(100, 200))
    t = torch.tensor([99, 100, 200, 201])
    one_by_one = torch.cat([predict(x, n)[i : i + 1] for i, n in enumerate(t.tolist())])
    torch.testing.assert_close(predict(x, t), one_by_one)


def test_a_crossfade_begins_with_one_label_and_ends_with_the_other():
    x, y = gaussian(0), torch.tensor([0, 1, 2, 3])
    one, other = (guide(label_model, labels, 10, 3.0) for labels in (y, y + 5))
    ends = crossfade(one, other, torch.tensor([0.0, 0.0, 1.0, 1.0]))(x, 500)
    assert torch.equal(ends[:2], one(x, 500)[:2]) and torch.equal(ends[2:], other(x, 500)[2:])
    halfway = crossfade(one, other, torch.full((4,), 0.5))(x, 500)
    torch.testing.assert_close(halfway, (one(x, 500) + other(x, 500)) / 2)


# ---------------------------------------------------------------------------------------------------------- inpainting


@every_schedule
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver])
def test_what_is_known_stays_and_is_noised_as_the_forward_process_would(schedule, sampler):
    """Its noise in x_t is that of x_T, if no noise is added in between, and at the end it is as it was."""
    d, image, eps, seen = Diffusion(schedule, "x0"), images(1), gaussian(2), []
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    g = torch.Generator().manual_seed(0)
    options = dict(noise=lambda: torch.randn(eps.shape, generator=g)) if sampler is ddpm else {}
    x = d.alpha[T - 1] * image + d.sigma[T - 1] * eps
    how = dict(constrain=constrained(inpaint=(image, mask)), callback=lambda t, x_t, x0_hat: seen.append((t, x_t)))
    out = sampler(d, lambda x, t: x * 0.3, x, spaced_timesteps(T, 20), **how, **options)
    assert torch.equal(out[..., :2], image[..., :2]) and not torch.equal(out[..., 2:], image[..., 2:])
    for t, x_t in seen:
        noise = (x_t - d.alpha[t] * image)[..., :2] / d.sigma[t]
        if sampler is ddpm:
            assert noise.std().item() == pytest.approx(1, abs=0.3)
        else:
            torch.testing.assert_close(noise, eps[..., :2], rtol=0, atol=1e-3)


