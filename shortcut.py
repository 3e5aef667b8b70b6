"""Shortcut models: networks that also receive the size of a sampling step, and therefore sample in one step, or in few.

Frans et al., "One Step Diffusion via Shortcut Models", arXiv 2410.12557. The path of the reverse process from noise to
image is curved, and a diffusion model predicts only its direction at x_t, so a large step has a large error. A shortcut
model predicts the x0_hat with which a step of its size ends on the path. distill.py trains it.

A span (t, s) is a sampling step from timestep t to s < t, where s = -1 is the clean image, as in diffusion.py. Its size
is t - s, and a single step from noise to image has size T.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from dit import DiT, DiTConfig, TimestepEmbedder
from sampling import TrainedModel, ddim

STEP_COUNTS = (1, 2, 4, 8, 16, 32)  # numbers of sampling steps that a shortcut model learns


class ShortcutDiT(DiT):
    """A DiT that also receives the size t - s of the step to take: what DiT calls t is here spans (t, s), (B, 2)."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.d_embedder = TimestepEmbedder(config.hidden_size)
        nn.init.normal_(self.d_embedder.mlp[0].weight, std=0.02)
        nn.init.zeros_(self.d_embedder.mlp[0].bias)
        nn.init.zeros_(self.d_embedder.mlp[2].weight)  # at first, all step sizes are alike
        nn.init.zeros_(self.d_embedder.mlp[2].bias)

    def condition(self, spans: Tensor, y: Tensor) -> Tensor:
        t, s = spans.unbind(1)
        return super().condition(t, y) + self.d_embedder(t - s)


def shortcut_timesteps(T: int, steps: int) -> list[int]:
    """Timesteps from T - 1 on that cut the path to the clean image into 1, 2, 4, 8, 16 or 32 equal steps.

    Raises ValueError for other numbers.
    """
    if steps not in STEP_COUNTS:
        counts = ", ".join(map(str, STEP_COUNTS))
        raise ValueError(f"{steps} sampling steps: use {counts}, which a shortcut model learns")
    return [round(T * i / steps) - 1 for i in range(steps, 0, -1)]


class ShortcutModel(TrainedModel):
    """A trained ShortcutDiT. It takes DDIM's steps, each predicted for its size (arXiv 2410.12557, Algorithm 2).

    It has learned its teacher's guidance, and needs none.
    """

    samplers = {"shortcut": ddim}
    default_steps = {"shortcut": 4}

    def predictor(
        self, labels: Tensor, timesteps: list[int], guidance: float = 1.0, guidance_interval: list[int] | None = None
    ) -> Callable:
        y, following = labels.to(self.device), dict(pairwise([*timesteps, -1]))

        def predict(x_t: Tensor, t: int) -> Tensor:
            spans = torch.stack([torch.full_like(y, t), torch.full_like(y, following[t])], dim=1)
            return self.model(x_t, spans, y).float()

        return predict

    def timesteps(self, steps: int, strength: float = 1.0) -> list[int]:
        """Those of its timesteps that are at most `strength` of the way to the noise: it has learned no others.

        Raises ValueError where there is none.
        """
        timesteps = shortcut_timesteps(self.diffusion.T, steps)
        known = [t for t in timesteps if t <= strength * timesteps[0]]
        if not known:
            least = math.ceil(100 * timesteps[-1] / timesteps[0]) / 100
            raise ValueError(f"with {steps} steps these weights begin with a --strength of {least:.2f} or more: "
                             "set that, or more --steps")
        return known
