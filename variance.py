"""Beyond DDPM: a learned variance of the reverse steps, and the likelihood of an image.

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (iDDPM), arXiv 2102.09672, sections 2 and 3.

With `learn_sigma` the network predicts 2C channels. The first half is the prediction that diffusion.py knows. The
second, called `mix` here, sets the variance of the reverse step for each pixel: between that of the posterior (-1) and
beta (1), on a logarithmic scale.
"""

import math

import torch
from torch import Tensor

from diffusion import Diffusion


class LearnedVariance(Diffusion):
    """A Diffusion whose model returns (B, 2C, H, W), see above. Its arguments are those of Diffusion."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # The tables are computed in double precision, since beta is the difference of almost equal numbers.
        steps = torch.tensor([self.posterior(t, t - 1) for t in range(self.T)], dtype=torch.float64)
        _, c_0, variance, beta = steps.unbind(1)
        variance[0] = variance[1]  # at t = 0 it is 0, which has no logarithm (as in iDDPM's code)
        self.add_tables(c_0=c_0, min_log_variance=variance.log(), max_log_variance=beta.log())

    def predict_x0(self, out: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        return super().predict_x0(out[:, : x_t.shape[1]], x_t, t)

    def reverse_std(self, t: int, s: int, out: Tensor) -> Tensor:
        mix = out[:, out.shape[1] // 2 :]
        _, _, variance, beta = self.posterior(t, s)  # for any s, while the tables hold s = t - 1
        low, high = math.log(variance), math.log(beta)
        return (0.5 * (low + (mix + 1) / 2 * (high - low))).exp()

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The hybrid loss L_simple + lambda L_vlb of each image, (B,): iDDPM Eq. 16.

        L_vlb is a sum over T timesteps, estimated as T times the term of one random timestep. With lambda = 1 / T the
        two factors cancel. (iDDPM's lambda is 0.001 for any T, which is the same for T = 1000.)
        """
        out, mix = out.chunk(2, dim=1)
        x0_hat = self.predict_x0(out.detach(), x_t, t)  # detached, so that L_vlb trains only the variance
        return super().loss(out, x0, x_t, t, eps) + self.variational_bound(x0, x0_hat, self.log_variance(mix, t), t)

    def log_variance(self, mix: Tensor, t: Tensor) -> Tensor:
        """iDDPM Eq. 15: the log variance of the step from t (B,) to t - 1. The paper's v, in 0 ... 1, is (mix + 1) / 2.
        """
        low, high = self.extract("min_log_variance", t), self.extract("max_log_variance", t)
        return torch.lerp(low, high, (mix + 1) / 2)

    def variational_bound(self, x0: Tensor, x0_hat: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound (DDPM Eq. 5) that belongs to t, in bits per dimension, (B,).

        For t > 0 it is the KL divergence of q(x_{t-1} | x_t, x0) from the model's step. For t = 0 it is the negative
        log-likelihood of x0, an image of 256 levels, under the last step.
        """
        true_log_variance = self.extract("min_log_variance", t)
        kl = 0.5 * (
            log_variance - true_log_variance - 1
            + (true_log_variance - log_variance).exp()
            + (self.extract("c_0", t) * (x0 - x0_hat)) ** 2 * (-log_variance).exp()  # both means contain c_t x_t
        )
        nll = -discretized_log_likelihood(x0, x0_hat, log_variance)  # at t = 0 the mean is x0_hat
        at_zero = (t == 0).view(-1, 1, 1, 1)
        return torch.where(at_zero, nll, kl).flatten(1).mean(1) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """DDPM Eq. 13: log P(x), elementwise, of an 8-bit value x in [-1, 1], under N(mean, variance) cut into 256 bins."""
    def cdf(z):  # of the standard normal, approximated by tanh as in the published models, to agree with them
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = (-0.5 * log_variance).exp()
    below = cdf((x - mean - 1 / 255) * inverse_std)  # levels are 2 / 255 apart, so 1 / 255 is half a bin
    above = cdf((x - mean + 1 / 255) * inverse_std)
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))  # the outer bins are open
    return p.clamp(min=1e-12).log()
