"""One step from noise to image: how a network learns to make long steps.

Frans et al., "One Step Diffusion via Shortcut Models", arXiv 2410.12557.

The way from noise to image is curved, and an ordinary network knows only its direction at x_t. So it has to go in many
small steps. A shortcut model is told the size d of the step to come as well, and predicts the x0_hat that leads where
the way really goes. It learns that from itself: one step should arrive where two of half the size do (the paper's
Eq. 4). Where the smallest steps arrive, a teacher says, an ordinary network that is trained already.

Sizes are counted in timesteps, d = t - s for a step from t to s, where s = -1 is the clean image, as in diffusion.py. A
step of the whole way has d = T.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import Diffusion

SHORTCUTS = (1, 2, 4, 8, 16, 32)  # into how many steps the way can be cut


def shortcut_timesteps(T: int, steps: int) -> list[int]:
    """Timesteps from T - 1 on that cut the way to the clean image into 1, 2, 4, 8, 16 or 32 equal steps.

    Raises ValueError for other numbers.
    """
    if steps not in SHORTCUTS:
        raise ValueError(f"{steps} sampling steps: use {', '.join(map(str, SHORTCUTS))}, which a shortcut model learns")
    return [round(T * i / steps) - 1 for i in range(steps, 0, -1)]


def draw_steps(n: int, T: int, generator: torch.Generator | None = None) -> Tensor:
    """n steps (t, s) for a shortcut model to learn, from timestep t to s < t, as an int64 tensor (n, 2) on the CPU.

    Of each 8 in a row, one crosses the whole way, one half of it, then a quarter, 1/8 and 1/16 of it, and three 1/32,
    on which all others stand. Of these others, a share of 0.3 begins in pure noise, where few steps have to begin.
    """
    parts = torch.tensor([1, 2, 4, 8, 16, 32, 32, 32]).repeat(n // 8 + 1)[:n]
    u = torch.rand(2, n, generator=generator, dtype=torch.float64)
    begins = (u[0] < 0.3) & (parts < SHORTCUTS[-1])
    i = torch.where(begins, parts, (u[1] * parts).long() + 1)  # counted from the image: step 1 arrives there
    return torch.stack([(T * i / parts).round().long() - 1, (T * (i - 1) / parts).round().long() - 1], dim=1)


def shortcut_target(diffusion: Diffusion, predict: Callable, x_t: Tensor, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0_hat that leads from t (B,) to s (B,) in one step, to where predict(x_t, t, y, d) comes in two halves."""
    x, middle = x_t, (t + s) // 2
    for now, then in ((t, middle), (middle, s)):
        out = predict(x, now, y, now - then).float()[:, : x.shape[1]]
        x = diffusion.step(x, diffusion.predict_x0(out, x, now).clamp(-1, 1), now, then)
    return diffusion.undo_step(x_t, x, t, s)


def shortcut_loss(
    diffusion: Diffusion, model: Callable, average: Callable, teacher: Callable, x0: Tensor, y: Tensor, steps: Tensor,
    eps: Tensor,
) -> Tensor:
    """The loss of each image, (B,): the error of the x0_hat for a step, against that of two steps of half the size.

    The halves are taken by the student's own moving average, which is steadier than the student. Those of the smallest
    size are the teacher's. If it is guided, its guidance is learned with the rest, so that the student needs none.

    model, average, teacher: the student, its average, and the teacher, each (x_t, t, y, d) -> output
    x0: (B, C, H, W) in [-1, 1], y: (B,) labels, steps: (B, 2) as by `draw_steps`, eps: noise like x0

    Targets are found as in progressive distillation (arXiv 2202.00512, Algorithm 2), which halves the number of steps
    of one network after another. Under flow, an error of x0_hat is one of the mean velocity u = (x_t - x0_hat) / s,
    times s. The loss is its square over s, a compromise: the square alone neglects small t, and that of u large ones.
    """
    t, s = steps.unbind(1)
    x_t = diffusion.q_sample(x0, t, eps)
    with torch.no_grad():
        target, smallest = torch.empty_like(x0), t - s < 1.5 * diffusion.T / SHORTCUTS[-1]
        for predict, which in ((teacher, smallest), (average, ~smallest)):
            if which.any():
                target[which] = shortcut_target(diffusion, predict, x_t[which], y[which], t[which], s[which])
    out = model(x_t, t, y, t - s).float()[:, : x0.shape[1]]
    error = diffusion.predict_x0(out, x_t, t) - target
    return error.square().flatten(1).mean(1) / diffusion.tables["s"][t]
