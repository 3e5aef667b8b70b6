"""One step from noise to image: how a network learns to make long steps.

Frans et al., "One Step Diffusion via Shortcut Models", arXiv 2410.12557.

The way from noise to image is curved, and an ordinary network knows only its direction at x_t. So it has to go in many
small steps. A shortcut model is told the size d of the step to come as well, and predicts the x0_hat that leads where
the way really goes. It learns that from itself: one step should arrive where two of half the size do (the paper's
Eq. 4). In the paper the smallest steps are learned from data in the same training. Here a teacher says where they
arrive, an ordinary network that is trained already, so that this is a distillation.

Sizes are counted in timesteps, d = t - s for a step from t to s, where s = -1 is the clean image, as in diffusion.py. A
step of the whole way has d = T.

A long step tends to be soft, because a squared error asks for the mean of all images that could be meant. So the images
that are drawn in one step are also compared with the teacher's as a distribution, see `matching_loss`: Yin et al.,
"One-step Diffusion with Distribution Matching Distillation" (DMD), arXiv 2311.18828.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import Diffusion

SHORTCUTS = (1, 2, 4, 8, 16, 32)  # into how many steps the way can be cut
LEARNED = (1, 1, 2, 4, 8, 16, 32, 32, 32, 32)  # of each 10 images, which part of the way the step to learn crosses
MATCHING, HOLD = 0.25, 0.1  # for steps of the whole way, the weights of `matching_loss` and of `shortcut_loss`
MATCHED = 0.4  # the share of the teacher's guidance with which images are drawn that have the distribution to match


def shortcut_timesteps(T: int, steps: int) -> list[int]:
    """Timesteps from T - 1 on that cut the way to the clean image into 1, 2, 4, 8, 16 or 32 equal steps.

    Raises ValueError for other numbers.
    """
    if steps not in SHORTCUTS:
        raise ValueError(f"{steps} sampling steps: use {', '.join(map(str, SHORTCUTS))}, which a shortcut model learns")
    return [round(T * i / steps) - 1 for i in range(steps, 0, -1)]


def draw_steps(n: int, T: int, generator: torch.Generator | None = None) -> Tensor:
    """n steps (t, s) for a shortcut model to learn, from timestep t to s < t, as an int64 tensor (n, 2) on the CPU.

    Of each 10 in a row, two cross the whole way, one half of it, then a quarter, 1/8 and 1/16 of it, and four 1/32, on
    which all others stand. Of these others, a share of 0.3 begins in pure noise, where few steps have to begin.
    """
    parts = torch.tensor(LEARNED).repeat(n // len(LEARNED) + 1)[:n]
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
) -> tuple[Tensor, Tensor]:
    """The loss of each image, (B,): the error of the x0_hat for a step, against that of two steps of half the size.

    The halves are taken by the student's own moving average, which is steadier than the student. Those of the smallest
    size are the teacher's. If it is guided, its guidance is learned with the rest, so that the student needs none.

    model, average, teacher: the student, its average, and the teacher, each (x_t, t, y, d) -> output
    x0: (B, C, H, W) in [-1, 1], y: (B,) labels, steps: (B, 2) as by `draw_steps`, eps: noise like x0

    Returns the student's x0_hat (B, C, H, W) as well.

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
    x0_hat = diffusion.predict_x0(out, x_t, t)
    return (x0_hat - target).square().flatten(1).mean(1) / diffusion.tables["s"][t], x0_hat


def matching_loss(
    diffusion: Diffusion, teacher: Callable, fake: Callable, x: Tensor, y: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses, each (B,), of images that a student drew, and of the network `fake`, which learns from them.

    teacher, fake: networks (x_t, t, y) -> output, of which the second begins as a copy of the first
    x: (B, C, H, W), what the student drew for labels y (B,), t: (B,) timesteps, noise: like x

    A network that is trained on images of a kind tells at every x_t in which direction more of them are. Trained on
    real images, that is the teacher; trained on the student's, as it goes, it is `fake`. The difference of the two
    leads from where the student draws too much to where it draws too little (DMD, Eq. 7 and 8; here `fake` learns once
    for each step of the student). It is divided by how far the teacher's x0_hat is from x. The teacher may be guided,
    but less than for drawing: there guidance acts on one way, here on all that the student draws, again and again, so
    that the student would forget all but the most typical images.
    """
    x_t = diffusion.q_sample(x.detach(), t, noise)
    C = x.shape[1]
    fake_x0 = diffusion.predict_x0(fake(x_t, t, y).float()[:, :C], x_t, t)
    fake_loss = (fake_x0 - x.detach()).square().flatten(1).mean(1) / diffusion.tables["s"][t].clamp(min=0.05) ** 2
    with torch.no_grad():
        real_x0 = diffusion.predict_x0(teacher(x_t, t, y).float()[:, :C], x_t, t)
        scale = (x - real_x0).abs().flatten(1).mean(1).clamp(min=1e-3).view(-1, 1, 1, 1)
        wanted = x - (fake_x0 - real_x0) / scale
    return 0.5 * (x - wanted).square().flatten(1).mean(1), fake_loss
