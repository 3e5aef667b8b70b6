"""The mathematics of diffusion as in DDPM, for any noise schedule. It is independent of the network.

A diffusion model learns to remove noise. The forward process turns an image x0 into noise eps ~ N(0, I), in T
timesteps: x_t = alpha_t x0 + sigma_t eps. The network is trained to predict x0, eps or v from x_t, see `Diffusion`.
(train.py predicts x0 under flow; the defaults here are those of DDPM.) Sampling runs the reverse process: it starts
from pure noise and removes a little of it at each timestep. A hat, as in x0_hat, marks a prediction.

DDPM is Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239:

    Section 4    the noise schedule       linear_schedule
    Eq. 4        the forward process      Diffusion.q_sample
    Algorithm 1  training                 Diffusion.training_loss is its line 5; train.py does what lines 2 to 4 say
    Eq. 6, 7     the reverse step         Diffusion.posterior
    Algorithm 2  sampling                 ddpm

Timesteps t run from 0, the least noisy (DDPM's t = 1), to T - 1, which is almost pure noise (DDPM's t = T). The lists
alpha and sigma have one entry more, so that index -1 is the clean image, with alpha = 1 and sigma = 0. The last reverse
step goes from t = 0 to -1, and therefore adds no noise. In the samplers, s is the timestep that follows t. Samplers
that need fewer steps are in sampling.py.

Images are in [-1, 1]. Shapes: B batch, C channels, H W height and width. A model is any function
model(x_t, t, y) -> (B, C, H, W) of noisy images, timesteps (B,) and labels (B,).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

PREDICTIONS = ("eps", "x0", "v")
TIMESTEP_DISTRIBUTIONS = ("uniform", "logit-normal")


# ---------------------------------------------------------------------------------------------------- noise schedules
#
# Each returns (alpha, sigma), both (T,) float64. beta_t is the variance of the noise that timestep t adds, and
# alpha_bar_t is the product of all 1 - beta up to t.


def linear_schedule(T: int) -> tuple[Tensor, Tensor]:
    """DDPM, section 4: beta rises linearly from 1e-4 to 0.02."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    # The factor keeps the noise at T - 1 about the same for any T of 100 or more. Below T = 20 beta would exceed 1.
    return from_beta(beta * (1000 / T))


def cosine_schedule(T: int) -> tuple[Tensor, Tensor]:
    """iDDPM, arXiv 2102.09672, Eq. 17: alpha_bar is a squared cosine."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return from_beta(1 - f[1:] / f[:-1])


def flow_schedule(T: int) -> tuple[Tensor, Tensor]:
    """Rectified flow, arXiv 2209.03003: a straight line from the image to the noise."""
    # tau reaches neither 0 nor 1, so that each kind of prediction can be converted to any other.
    tau = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
    return 1 - tau, tau


def from_beta(beta: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), the square roots of alpha_bar and 1 - alpha_bar (DDPM Eq. 4), with beta at most 0.999."""
    alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule, "flow": flow_schedule}


# ---------------------------------------------------------------------------------------- the forward process, the loss


class Diffusion:
    """A noise schedule, and what the network predicts under it.

    schedule:   linear, cosine or flow
    prediction: eps, the noise; x0, the image; or v, the velocity alpha' x0 + sigma' eps. The derivatives alpha' and
                sigma' are by the angle phi for linear and cosine, where alpha = cos(phi) and sigma = sin(phi)
                (arXiv 2202.00512), and by tau for flow, where they are -1 and 1.
    timesteps:  T; t is in 0 ... T - 1
    device:     that of the images
    min_snr:    weight the loss by min(SNR, min_snr), see `loss_weight`

    Raises ValueError for other names, and for T below 2.
    """

    def __init__(
        self, schedule: str = "linear", prediction: str = "eps", timesteps: int = 1000,
        device: torch.device | str = "cpu", min_snr: float | None = None,
    ):
        for what, name, known in (("schedule", schedule, SCHEDULES), ("prediction", prediction, PREDICTIONS)):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(known)}")
        if timesteps < 2:
            raise ValueError(f"timesteps is {timesteps}: use 2 or more (1000 is usual)")
        self.config = dict(schedule=schedule, prediction=prediction, timesteps=timesteps)
        self.prediction, self.T = prediction, timesteps

        alpha, sigma = SCHEDULES[schedule](timesteps)
        if schedule == "flow":
            d_alpha, d_sigma = -torch.ones_like(alpha), torch.ones_like(sigma)
        else:
            d_alpha, d_sigma = -sigma, alpha
        # x0 = x_factor x_t + out_factor out: (x_t - sigma eps) / alpha for eps,
        # (sigma' x_t - sigma v) / (alpha sigma' - sigma alpha') for v.
        x_factor, out_factor = {
            "eps": (1 / alpha, -sigma / alpha),
            "x0": (torch.zeros_like(alpha), torch.ones_like(alpha)),
            "v": (d_sigma / (alpha * d_sigma - sigma * d_alpha), -sigma / (alpha * d_sigma - sigma * d_alpha)),
        }[prediction]

        # The steps of samplers are computed from these numbers, in double precision. `extract` has them for images.
        self.alpha, self.sigma = [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0]
        self.tables, self.device = {}, device
        self.add_tables(
            alpha=torch.tensor(self.alpha, dtype=torch.float64),
            sigma=torch.tensor(self.sigma, dtype=torch.float64),
            d_alpha=d_alpha, d_sigma=d_sigma, x_factor=x_factor, out_factor=out_factor,
        )
        self.tables["loss_weight"] = self.loss_weight(min_snr)

    def add_tables(self, **tables: Tensor) -> None:
        """Keep tables of one number a timestep, (T,) or longer, as float32 on the device."""
        self.tables |= {name: table.float().to(self.device) for name, table in tables.items()}

    def extract(self, name: str, t: Tensor | int) -> Tensor:
        """A table's values at the timesteps t (B,), or at one for all, shaped (B or 1, 1, 1, 1) to multiply images."""
        return self.tables[name][t].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM Eq. 4: x_t = alpha_t x0 + sigma_t eps, in one step for any timesteps t (B,)."""
        return self.extract("alpha", t) * x0 + self.extract("sigma", t) * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict at x_t = q_sample(x0, t, eps)."""
        if self.prediction == "v":
            return self.extract("d_alpha", t) * x0 + self.extract("d_sigma", t) * eps
        return eps if self.prediction == "eps" else x0

    def training_loss(self, model: Callable, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM Algorithm 1, line 5: the loss of each image, (B,). A training step follows the gradient of its mean.

        x0: (B, C, H, W) in [-1, 1], y: (B,) labels, t: (B,) timesteps, eps: noise like x0
        """
        x_t = self.q_sample(x0, t, eps)                          # (B, C, H, W)
        out = model(x_t, t, y).float()                           # (B, C, H, W)
        return self.loss(out, x0, x_t, t, eps)                   # (B,)

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of what the network predicts at x_t, (B,): the squared error, times `loss_weight`."""
        error = out - self.target(x0, t, eps)
        return self.tables["loss_weight"][t] * error.square().flatten(1).mean(1)

    def loss_weight(self, min_snr: float | None) -> Tensor:
        """The weight of the squared error at each timestep, (T,).

        It is 1, as in DDPM's L_simple, except for a predicted x0. There, timesteps of little noise, at which x0 is easy
        to see, would hardly count. So the loss is that of the v which x0_hat implies: v_hat - v is (x0 - x0_hat) /
        sigma, with a sigma of at least 0.05 (JiT, arXiv 2511.13720, section 4.3).

        min_snr: use the squared error of x0_hat times min(SNR, min_snr) instead, where SNR = (alpha / sigma)^2
                 (arXiv 2303.09556). An error in `out` is an error in x0_hat that is out_factor times as large.
        """
        alpha, sigma = self.tables["alpha"][:-1], self.tables["sigma"][:-1]
        if min_snr is not None:
            return (alpha / sigma).square().clamp(max=min_snr) * self.tables["out_factor"].square()
        if self.prediction == "x0":
            return 1 / sigma.clamp(min=0.05).square()
        return torch.ones_like(sigma)

    # ------------------------------------------------------------------------------------------- the reverse process

    def predict_x0(self, out: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The x0_hat that follows from a prediction `out` at x_t. t is (B,), or one timestep for all images."""
        return self.extract("x_factor", t) * x_t + self.extract("out_factor", t) * out

    def posterior(self, t: int, s: int) -> tuple[float, float, float, float]:
        """A reverse step from t to any timestep s < t, where -1 is the clean image: (c_t, c_0, variance, beta).

        q(x_t | x_s) is N(r x_s, beta) with r = alpha_t / alpha_s, and q(x_s | x_t, x0) is N(c_t x_t + c_0 x0,
        variance). Under linear and cosine with s = t - 1 they are DDPM Eq. 2 and 6-7. A smaller s is respacing (iDDPM,
        section 4).
        """
        alpha, sigma = self.alpha, self.sigma
        r = alpha[t] / alpha[s]
        beta = sigma[t] ** 2 - (r * sigma[s]) ** 2
        ratio = (sigma[s] / sigma[t]) ** 2
        return r * ratio, alpha[s] * beta / sigma[t] ** 2, beta * ratio, beta

    def reverse_std(self, t: int, s: int, out: Tensor) -> Tensor | float:
        """The standard deviation of the noise that a reverse step adds. variance.py learns it from `out` instead."""
        return math.sqrt(self.posterior(t, s)[2])


def sample_timesteps(
    n: int, T: int, distribution: str = "uniform", generator: torch.Generator | None = None, mean: float = 0.0
) -> Tensor:
    """n timesteps in 0 ... T - 1, int64, on the CPU, in rising order: one from each of n equally probable intervals.

    So each batch covers all noise levels, and its loss varies less. uniform is DDPM's distribution. logit-normal is the
    sigmoid of a normal variable of variance 1, and prefers the middle timesteps (arXiv 2403.03206, section 3.1). A mean
    of this variable above 0 prefers timesteps of more noise. Raises ValueError for other distributions.
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


def guide(
    model: Callable, y: Tensor, null: int, scale: float = 1.0, interval: tuple[float, float] = (0, math.inf)
) -> Callable[..., Tensor]:
    """predict(x_t, t) for labels y (B,), with classifier-free guidance (arXiv 2207.12598).

    out = unconditional + scale * (conditional - unconditional), where scale is the guidance scale: 0 is unconditional,
    1 is conditional, above 1 extrapolates. (The paper's w is scale - 1.) Outside of interval = (low, high), the scale
    is 1 (arXiv 2404.07724). Only as many channels as x_t has are guided: the others, of a learned variance, stay
    conditional.

    t: one timestep for all images, or (B,). Where the scale is not 1, the network is called once with a batch of 2B.
    """
    low, high = interval
    nulls = torch.full_like(y, null)

    def predict(x_t: Tensor, t: Tensor | int) -> Tensor:
        one = not isinstance(t, Tensor)
        times = torch.full_like(y, t) if one else t
        if scale == 1 or one and not low <= t <= high:  # compared as numbers, so that nothing waits for a GPU
            return model(x_t, times, y).float()
        both = model(torch.cat([x_t, x_t]), torch.cat([times, times]), torch.cat([y, nulls])).float()
        conditional, unconditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if not one:
            guided = torch.where(((low <= t) & (t <= high)).view(-1, 1, 1, 1), guided, conditional)
        C = x_t.shape[1]
        return torch.cat([guided[:, :C], conditional[:, C:]], dim=1) if both.shape[1] > C else guided

    return predict


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from T - 1 down to 0, or only T - 1. Raises ValueError outside 1 ... T."""
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: use 1 to {T}, the number of timesteps that the model knows")
    return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long().tolist()


def clip(x0_hat: Tensor, x_t: Tensor, t: int) -> Tensor:
    """Clamp x0_hat to [-1, 1], where images are. x_t is noisy, and must be free to leave that range."""
    return x0_hat.clamp(-1, 1)


# A sampler turns noise x (B, C, H, W) at timesteps[0] into images, with one call of predict for each timestep. All
# samplers have the same arguments:
#
#   predict(x_t, t)             the network's output for the whole batch at one timestep t, an int, see `guide`
#   timesteps                   decreasing, from T - 1 to 0, see `spaced_timesteps`
#   noise()                     a fresh N(0, I) tensor like x
#   constrain(x0_hat, x_t, t)   returns the x0_hat to use: clamped, as by `clip`, or with a part that is known
#   callback(t, x_t, x0_hat)    is called at each step, if there is one, with the x0_hat that is used


@torch.no_grad()
def ddpm(
    diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], noise: Callable,
    constrain: Callable = clip, callback: Callable | None = None,
) -> Tensor:
    """DDPM Algorithm 2: each step samples from q(x_s | x_t, x0_hat).

    The paper's line 4 writes the same mean in terms of eps_hat. With x0_hat (Eq. 7) it can be clamped. The posterior's
    variance is one of the two that the paper tries; the other is beta (section 3.2).
    """
    for t, s in pairwise([*timesteps, -1]):
        out = predict(x, t)
        x0_hat = constrain(diffusion.predict_x0(out, x, t), x, t)
        if callback:
            callback(t, x, x0_hat)
        c_t, c_0, _, _ = diffusion.posterior(t, s)
        x = c_t * x + c_0 * x0_hat
        if s >= 0:  # the clean image gets no noise
            x = x + diffusion.reverse_std(t, s, out) * noise()
    return x
