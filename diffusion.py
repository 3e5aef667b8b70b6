"""The mathematics of diffusion: noise schedules, the training loss, and the reverse samplers. It knows no network.

A diffusion model learns to undo noise. The forward process mixes an image x0 with noise eps ~ N(0, I), a little at the
first timestep and almost entirely at the last: x_t = a_t x0 + s_t eps. Training shows the network x_t and asks what was
mixed. Sampling starts from pure noise and goes back, timestep by timestep. A hat, as in x0_hat, marks what the network
believes. Ho et al., "Denoising Diffusion Probabilistic Models" (DDPM), arXiv 2006.11239, is the process to read first:

    Eq. 4        the forward process      Diffusion.q_sample
    Algorithm 1  training                 training_loss is its line 5; train.py draws what lines 2 to 4 draw
    Algorithm 2  sampling                 ddpm

Its relatives differ in one place each. A schedule says how a_t falls and s_t grows. Here beta_t is the variance of the
noise that timestep t adds, alpha_bar_t the product of all 1 - beta up to t, and tau grows evenly between 0 and 1:

    linear   a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar), beta from 1e-4 to 0.02      DDPM, section 4
    cosine   the same, where alpha_bar is a squared cosine                             iDDPM, arXiv 2102.09672, Eq. 17
    flow     a = 1 - tau, s = tau: a straight line from the image to the noise         rectified flow, arXiv 2209.03003

Timesteps t run from 0, the least noisy (DDPM's t = 1), to T - 1, which is almost pure noise (DDPM's t = T). The lists a
and s have one entry more, so that index -1 is the clean image, with a = 1 and s = 0. The last reverse step goes from
t = 0 to t = -1, and therefore adds no noise.

Images are in [-1, 1]. Shapes: B batch, C channels, H W height and width. A model is any function
model(x_t, t, y) -> (B, C, H, W), or (B, 2C, H, W) where it also learns the variance of the reverse step.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine", "flow")
PREDICTIONS = ("eps", "x0", "v")
TIMESTEP_DISTRIBUTIONS = ("uniform", "logit-normal")


def schedule_table(name: str, T: int) -> tuple[Tensor, Tensor]:
    """The pair (a, s) of a schedule in SCHEDULES, each (T,) float64."""
    if name == "flow":
        # tau reaches neither 0 nor 1, so that each kind of prediction can be turned into every other.
        tau = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
        return 1 - tau, tau
    if name == "linear":  # beta is scaled so that the last timestep is as noisy with any T as with the paper's 1000
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    else:
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]
    alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class Diffusion:
    """A noise schedule, and what the network predicts under it.

    schedule:   linear, cosine or flow
    prediction: eps, the noise; x0, the image; or v, the velocity a' x0 + s' eps, where a' and s' are derivatives. With
                linear and cosine, a = cos(phi) and s = sin(phi) for some angle phi, so the derivative by phi is
                (-s, a) (arXiv 2202.00512). With flow, the derivative by tau is (-1, 1).
    timesteps:  T; the network sees t in 0 ... T - 1
    device:     that of the images, where the tables are kept too

    Raises ValueError for other names, and for T below 2.
    """

    def __init__(
        self, schedule: str = "linear", prediction: str = "eps", timesteps: int = 1000,
        device: torch.device | str = "cpu",
    ):
        for what, name, known in (("schedule", schedule, SCHEDULES), ("prediction", prediction, PREDICTIONS)):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(known)}")
        if timesteps < 2:
            raise ValueError(f"timesteps is {timesteps}: use 2 or more (1000 is usual)")
        self.config = dict(schedule=schedule, prediction=prediction, timesteps=timesteps)
        self.prediction, self.T = prediction, timesteps

        a, s = schedule_table(schedule, timesteps)
        da, ds = (-s, a) if schedule != "flow" else (-torch.ones_like(a), torch.ones_like(s))
        # x0 is x_factor x_t + out_factor out: (x_t - s eps) / a for eps, (s' x_t - s v) / (a s' - s a') for v.
        x_factor, out_factor = {
            "eps": (1 / a, -s / a),
            "x0": (torch.zeros_like(a), torch.ones_like(a)),
            "v": (ds / (a * ds - s * da), -s / (a * ds - s * da)),
        }[prediction]
        # The samplers use plain numbers of double precision. Index -1 is the clean image.
        self.a, self.s = [*a.tolist(), 1.0], [*s.tolist(), 0.0]
        self.x_factor, self.out_factor = x_factor.tolist(), out_factor.tolist()

        # Training uses float32 tables. They are computed in double precision, since beta is the difference of almost
        # equal numbers. The variance at t = 0 is 0, which has no logarithm, so it becomes that at t = 1 (iDDPM's code).
        posterior = torch.tensor([self.posterior(t, t - 1) for t in range(timesteps)], dtype=torch.float64)
        _, c0, variance, beta = posterior.unbind(1)
        variance[0] = variance[1]
        a, s = (torch.tensor(numbers, dtype=torch.float64) for numbers in (self.a, self.s))
        tables = dict(a=a, s=s, da=da, ds=ds, x_factor=x_factor, out_factor=out_factor, c0=c0)
        tables |= dict(log_variance=variance.log(), log_beta=beta.log())
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def at(self, name: str, t: Tensor | int) -> Tensor:
        """A table's values at the timesteps t (B,), or at one for all, shaped (B or 1, 1, 1, 1) to multiply images."""
        return self.tables[name][t].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM Eq. 4: x_t = a_t x0 + s_t eps, at once for any timesteps t (B,)."""
        return self.at("a", t) * x0 + self.at("s", t) * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network is asked to predict at x_t = q_sample(x0, t, eps)."""
        if self.prediction == "v":
            return self.at("da", t) * x0 + self.at("ds", t) * eps
        return eps if self.prediction == "eps" else x0

    def predict_x0(self, out: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The x0_hat that follows from a prediction `out` at x_t. t is (B,), or one timestep for all images."""
        if isinstance(t, int):
            return self.x_factor[t] * x_t + self.out_factor[t] * out
        return self.at("x_factor", t) * x_t + self.at("out_factor", t) * out

    def step(self, x_t: Tensor, x0_hat: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """DDIM's step (arXiv 2010.02502, Eq. 12) from x_t towards x0_hat, to the noise level of s < t, (B,) or one."""
        eps_hat = (x_t - self.at("a", t) * x0_hat) / self.at("s", t)
        return self.at("a", s) * x0_hat + self.at("s", s) * eps_hat

    def undo_step(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The x0_hat with which `step` leads from x_t to x_s."""
        ratio = self.at("s", s) / self.at("s", t)
        return (x_s - ratio * x_t) / (self.at("a", s) - ratio * self.at("a", t))

    def posterior(self, t: int, s: int) -> tuple[float, float, float, float]:
        """One step back, from t to any timestep s < t, where -1 is the clean image. Returns (c, c0, variance, beta).

        q(x_t | x_s) is N(r x_s, beta) with r = a_t / a_s, and q(x_s | x_t, x0) is N(c x_t + c0 x0, variance). Under
        linear and cosine with s = t - 1 they are DDPM Eq. 2 and 6-7. A smaller s is respacing (iDDPM, section 4).
        """
        a, sigma = self.a, self.s  # sigma, because here s is a timestep
        r = a[t] / a[s]
        beta = sigma[t] ** 2 - (r * sigma[s]) ** 2
        ratio = (sigma[s] / sigma[t]) ** 2
        return r * ratio, a[s] * beta / sigma[t] ** 2, beta * ratio, beta

    def reverse_log_variance(self, mix: Tensor, t: Tensor) -> Tensor:
        """The log variance of the reverse step from t (B,) to t - 1.

        Without a learned variance, mix is empty and the result is the log of the posterior's variance. Otherwise mix
        (B, C, H, W), the second half of the output, leads from that (at -1) to log beta (at 1): iDDPM Eq. 15, where
        v is (mix + 1) / 2.
        """
        low, high = self.at("log_variance", t), self.at("log_beta", t)
        return torch.lerp(low, high, (mix + 1) / 2) if mix.shape[1] else low

    def variational_bound(self, x0: Tensor, x0_hat: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound (DDPM Eq. 5) that belongs to t, in bits per dimension, (B,).

        For t > 0 it is the KL divergence of q(x_{t-1} | x_t, x0) from the model's step. For t = 0 it is the negative
        log-likelihood of x0, an image of 256 levels, under the last step.
        """
        true_log_variance = self.at("log_variance", t)
        kl = 0.5 * (
            log_variance - true_log_variance - 1
            + (true_log_variance - log_variance).exp()
            + (self.at("c0", t) * (x0 - x0_hat)) ** 2 * (-log_variance).exp()  # the means share c x_t
        )
        nll = -discretized_log_likelihood(x0, x0_hat, log_variance)  # at t = 0 the mean is x0_hat
        at_zero = (t == 0).view(-1, 1, 1, 1)
        return torch.where(at_zero, nll, kl).flatten(1).mean(1) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """DDPM Eq. 13: log P(x), elementwise, of an 8-bit value x in [-1, 1], under N(mean, variance) cut into 256 bins."""
    def cdf(z):  # of the standard normal, approximated by tanh as in the published models, to agree with them
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = (-0.5 * log_variance).exp()  # below, 1 / 255 is half a bin, since the levels are 2 / 255 apart
    below, above = cdf((x - mean - 1 / 255) * inverse_std), cdf((x - mean + 1 / 255) * inverse_std)
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))  # the outer bins are open
    return p.clamp(min=1e-12).log()


def draw_timesteps(
    n: int, T: int, distribution: str = "uniform", generator: torch.Generator | None = None, mean: float = 0.0
) -> Tensor:
    """n timesteps in 0 ... T - 1, int64, on the CPU, in rising order: one from each of n equally probable parts.

    So each batch covers all noise levels, and its loss varies less. uniform is DDPM's distribution. logit-normal is the
    sigmoid of a normal variable of variance 1, and prefers the middle timesteps (arXiv 2403.03206, section 3.1). A mean
    of this variable above 0 prefers those of more noise.
    """
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    if distribution == "logit-normal":
        u = torch.sigmoid(mean + torch.special.ndtri(u))  # ndtri, the inverse normal CDF, makes u normal
    elif distribution != "uniform":
        raise ValueError(f"unknown distribution {distribution!r}: use one of {', '.join(TIMESTEP_DISTRIBUTIONS)}")
    return (u * T).long().clamp(max=T - 1)


def drop_labels(y: Tensor, null: int, p: float, u: Tensor) -> Tensor:
    """Labels y (B,), of which each becomes the null class with probability p, by numbers u (B,) uniform in [0, 1).

    So one network learns to predict with the label and without it, and guidance needs both (arXiv 2207.12598).
    """
    return torch.where(u < p, null, y)


def training_loss(
    diffusion: Diffusion, model: Callable, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor, snr_gamma: float | None = None
) -> Tensor:
    """DDPM Algorithm 1, line 5: the loss of each image, (B,). A training step follows the gradient of its mean.

    x0: (B, C, H, W) in [-1, 1], y: (B,) labels, t: (B,) timesteps, eps: noise like x0

    The loss is the squared error of the network's output. With snr_gamma it is that of x0_hat instead, times
    min(SNR, snr_gamma), where SNR = a^2 / s^2 (min-SNR, arXiv 2303.09556). Without it, a predicted x0 is measured by
    the error of the v that it implies, with a divisor of at least 0.05 (JiT, arXiv 2511.13720, section 4.3; for linear
    and cosine it is the weight SNR + 1 of arXiv 2202.00512, section 4). Otherwise timesteps of little noise, where x0
    is easy to see, would hardly count. A model of 2C channels is trained with the hybrid loss L_simple + lambda L_vlb
    (iDDPM, Eq. 16). L_vlb is a sum over T timesteps. With lambda = 1 / T, one random timestep stands for the sum. (The
    paper's lambda of 0.001 is that of T = 1000.)
    """
    C = x0.shape[1]
    x_t = diffusion.q_sample(x0, t, eps)
    out = model(x_t, t, y).float()
    error = out[:, :C] - diffusion.target(x0, t, eps)
    loss = error.square().flatten(1).mean(1)
    if snr_gamma is not None:
        a, s, out_factor = (diffusion.tables[name][t] for name in ("a", "s", "out_factor"))
        # An error in `out` is an error in x0_hat that is out_factor times as large.
        loss = loss * (((a / s) ** 2).clamp(max=snr_gamma) * out_factor**2)
    elif diffusion.prediction == "x0":
        loss = loss / diffusion.tables["s"][t].clamp(min=0.05) ** 2  # because v_hat - v is (x0 - x0_hat) / s
    if out.shape[1] == 2 * C:
        x0_hat = diffusion.predict_x0(out[:, :C].detach(), x_t, t)  # detached, so L_vlb teaches only the variance
        log_variance = diffusion.reverse_log_variance(out[:, C:], t)
        loss = loss + diffusion.variational_bound(x0, x0_hat, log_variance, t)
    return loss


# ---------------------------------------------------------------------------------------------------------- sampling
#
# A sampler takes noise x (B, C, H, W) at timesteps[0] and returns images. It calls `predict` once for each timestep.
#
#   predict(x_t, t)  the network's output for the whole batch at one timestep t, see `guide`
#   timesteps        decreasing, from T - 1 to 0, see `spaced_timesteps`
#   noise()          a fresh N(0, I) tensor like x
#   options          clip, known and callback, see `denoise`
#
# Here s is the timestep after t on the way back. Therefore the s of the schedule is called sigma.


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from T - 1 down to 0, or T - 1 alone. Raises ValueError outside 1 ... T."""
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: use 1 to {T}, the number of timesteps that the model knows")
    return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long().tolist()


def guide(
    model: Callable, y: Tensor, null: int, weight: float = 1.0, interval: tuple[int, int] | None = None
) -> Callable[..., Tensor]:
    """predict(x_t, t) for labels y (B,), with classifier-free guidance (arXiv 2207.12598).

    out = unconditional + weight (conditional - unconditional). Weight 0 ignores the labels, 1 is the plain conditional
    model, above 1 exaggerates the labels. (The paper's w is our weight - 1.) With interval = (low, high), the weight is
    1 where not low <= t <= high (arXiv 2404.07724). A learned variance is never guided. t is (B,), or one timestep for
    all images. predict(x_t, t, d) hands the size d of a step on to a shortcut model.
    """
    low, high = interval or (0, math.inf)

    def predict(x_t: Tensor, t: Tensor | int, d: Tensor | int | None = None) -> Tensor:
        C, nulls = x_t.shape[1], torch.full_like(y, null)
        t, *d = (torch.as_tensor(n, device=y.device).expand(len(y)) for n in (t, d) if n is not None)
        guided = (low <= t) & (t <= high) & (weight != 1)
        if not guided.any() or (weight == 0 and guided.all()):  # one of the two predictions is enough
            return model(x_t, t, nulls if guided.any() else y, *d).float()
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, nulls]), *d).float()
        conditional, unconditional = both.chunk(2)
        w = torch.where(guided, weight, 1.0).view(-1, 1, 1, 1)
        guided = unconditional[:, :C] + w * (conditional[:, :C] - unconditional[:, :C])
        return torch.cat([guided, conditional[:, C:]], dim=1)

    return predict


def denoise(
    diffusion: Diffusion, predict: Callable, x: Tensor, t: int, clip: bool = True,
    known: tuple[Tensor, Tensor] | None = None, callback: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """What all samplers do at x_t: find x0_hat. Returns it with the second half of the output, which may be empty.

    clip clamps x0_hat to [-1, 1], where images are. x_t is noisy, and must be free to leave that range. The callback is
    called with (t, x_t, x0_hat).

    known = (image, mask) is for inpainting. Where the mask is True, the image is given, and takes the place of x0_hat.
    So this part of x_t is what the forward process would make of it, and the network fills in the rest to fit.
    (RePaint, arXiv 2201.09865, replaces the part in x_t, and also goes back to repeat each step several times.)
    """
    out, mix = predict(x, t).tensor_split([x.shape[1]], dim=1)
    x0_hat = diffusion.predict_x0(out, x, t)
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    if known is not None:
        x0_hat = torch.where(known[1], known[0], x0_hat)
    if callback is not None:
        callback(t, x, x0_hat)
    return x0_hat, mix


@torch.no_grad()
def ddpm(
    diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], noise: Callable, **options
) -> Tensor:
    """DDPM Algorithm 2: each step draws from q(x_s | x_t, x0_hat), with the posterior's variance or a learned one.

    The paper's line 4 writes the same mean in terms of eps_hat. Going through x0_hat (Eq. 7) allows us to clip it. The
    posterior's variance is one of the two that the paper tries; the other is beta (section 3.2).
    """
    for t, s in pairwise([*timesteps, -1]):
        x0_hat, mix = denoise(diffusion, predict, x, t, **options)
        c, c0, variance, beta = diffusion.posterior(t, s)
        x = c * x + c0 * x0_hat
        if s < 0:
            break  # the clean image: no noise
        low, high = math.log(variance), math.log(beta)  # for any s, while the tables of Diffusion hold s = t - 1
        std = (0.5 * (low + (mix + 1) / 2 * (high - low))).exp() if mix.shape[1] else math.sqrt(variance)
        x = x + std * noise()
    return x


@torch.no_grad()
def ddim(
    diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], noise: Callable | None = None,
    eta: float = 0.0, **options,
) -> Tensor:
    """DDIM, arXiv 2010.02502, Eq. 12 and 16: go on with x0_hat and eps_hat to the noise level of s.

    With eta = 0 it is deterministic, and for flow it is Euler's method. With eta = 1 it is DDPM.
    """
    if eta and noise is None:
        raise ValueError("eta above 0 adds noise: give the function that draws it, or eta 0")
    a, sigma = diffusion.a, diffusion.s
    for t, s in pairwise([*timesteps, -1]):
        x0_hat, _ = denoise(diffusion, predict, x, t, **options)
        eps_hat = (x - a[t] * x0_hat) / sigma[t]  # from x0_hat, which may have been clipped
        variance = eta**2 * diffusion.posterior(t, s)[2]
        x = a[s] * x0_hat + math.sqrt(sigma[s] ** 2 - variance) * eps_hat
        if variance > 0:
            x = x + math.sqrt(variance) * noise()
    return x


@torch.no_grad()
def dpm_solver(diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], **options) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2: DDIM with an x0_hat that is extrapolated from the last two.

    It is of second order in h, the difference of lambda = log(a / s) between two timesteps. Only the first step, which
    has no x0_hat before it, and the last, where lambda goes to infinity, are of first order.
    """
    a, sigma = diffusion.a, diffusion.s
    before = None  # x0_hat and h of the step before
    for t, s in pairwise([*timesteps, -1]):
        x0_hat, _ = denoise(diffusion, predict, x, t, **options)
        if s < 0:
            return x0_hat
        h = math.log(a[s] / sigma[s]) - math.log(a[t] / sigma[t])
        D = x0_hat if before is None else x0_hat + h / (2 * before[1]) * (x0_hat - before[0])  # the paper's D
        x = sigma[s] / sigma[t] * x - a[s] * math.expm1(-h) * D
        before = x0_hat, h


@torch.no_grad()
def shortcut(diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], **options) -> Tensor:
    """Shortcut models, arXiv 2410.12557, Algorithm 2: DDIM's steps, of whose size d the network is told.

    timesteps are those of shortcut.shortcut_timesteps, because only such steps were learned. See there how.
    """
    for t, s in pairwise([*timesteps, -1]):
        x0_hat, _ = denoise(diffusion, partial(predict, d=t - s), x, t, **options)
        x = diffusion.step(x, x0_hat, t, s)
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver, "shortcut": shortcut}
