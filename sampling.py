"""From a seed to images: noise that belongs to an image, drawing with a trained network, and pictures of the result.

The samplers themselves, which turn noise into images step by step, are mathematics and stand in diffusion.py.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion import SAMPLERS, Diffusion, guide, spaced_timesteps
from dit import DiT
from shortcut import shortcut_timesteps
from speed import fast_attention

DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "dpm++": 20, "shortcut": 4}
DEFAULT_GUIDANCE = 1.5


def seeded(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random generator number `index` of a seed. Both are whole numbers from 0 to 2^32 - 1."""
    # PyTorch keeps 32 bits of a CPU generator's seed. With seed + index, image 1 of seed 0 would be image 0 of seed 1.
    # The factor, 2^32 divided by the golden ratio, sets the generators of neighbouring seeds far apart.
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + index) % 2**32)


def image_noise(seed: int, indices: range, shape: tuple[int, ...], device: torch.device | str) -> Callable[[], Tensor]:
    """Gaussian noise for the images `indices` of a seed. Each call returns fresh noise (n, *shape) on the device.

    Every image has a generator of its own, on the CPU. Image i of a seed therefore meets the same noise in a batch of
    any size and on any device.
    """
    generators = [seeded(seed, i) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Noise that is `fraction` of the way from a to b, which have one shape, along an arc (arXiv 1609.04468).

    Gaussian noise of many dimensions always has about the same length, and so has every point of the arc. The points of
    a straight line are shorter, and the network knows no such noise.
    """
    angle = torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return (torch.sin((1 - fraction) * angle) * a + torch.sin(fraction * angle) * b) / torch.sin(angle)


def crossfade(one: Callable, other: Callable, share: Tensor) -> Callable[..., Tensor]:
    """predict(x_t, t) between two others, such as those of two labels: one fades into the other by share (B,), 0 to 1.

    What is mixed are predictions, which amounts to mixing scores (arXiv 2206.01714). A mixture of the two embeddings
    does not work: the network has never seen one, and draws noise.
    """
    def predict(x_t: Tensor, t: Tensor | int, d: Tensor | int | None = None) -> Tensor:
        return torch.lerp(one(x_t, t, d), other(x_t, t, d), share.view(-1, 1, 1, 1))

    return predict


def timesteps(sampler: str, T: int, steps: int) -> list[int]:
    """The timesteps, of T, at which a sampler of diffusion.SAMPLERS looks when it takes so many steps."""
    return shortcut_timesteps(T, steps) if sampler == "shortcut" else spaced_timesteps(T, steps)


def sample(
    model: DiT, diffusion: Diffusion, labels: Tensor, *, seed: int = 0, indices: range | None = None,
    sampler: str = "dpm++", steps: int = DEFAULT_STEPS["dpm++"], eta: float = 0.0, guidance: float = DEFAULT_GUIDANCE,
    interval: tuple[int, int] | None = None, start: Tensor | None = None, fade: tuple[Tensor, Tensor] | None = None,
    precision: str = "fp32", **options,
) -> Tensor:
    """Draw an image for each of the labels (n,), as one batch (n, C, S, S), S pixels a side, in [-1, 1] with `clip`.

    indices:  the number of each image within the seed (default: 0 to n - 1)
    start:    noise (n, C, S, S) to begin with, in place of the seed's
    fade:     other labels (n,), and how far (n,) each image is on its way to them, see `crossfade`
    sampler:  one of diffusion.SAMPLERS, which looks at the image at `steps` timesteps
    eta:      for ddim, how much fresh noise each step adds: 0 for none, 1 for as much as ddpm
    precision: fp32, or bf16 for matrix products in bfloat16

    For guidance and interval see diffusion.guide, for the options clip, known and callback diffusion.denoise.
    """
    config, device = model.config, model.pos_embed.device
    shape = (config.in_channels, config.image_size, config.image_size)
    noise = image_noise(seed, range(len(labels)) if indices is None else indices, shape, device)
    weight = guidance if config.num_classes else 1.0
    predict = guide(model, labels.to(device), config.num_classes, weight, interval)
    if fade is not None:
        other, share = (values.to(device) for values in fade)
        predict = crossfade(predict, guide(model, other, config.num_classes, weight, interval), share)
    options |= {"ddpm": dict(noise=noise), "ddim": dict(noise=noise, eta=eta)}.get(sampler, {})
    x = noise() if start is None else start.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast, fast_attention(device, precision):
        images = SAMPLERS[sampler](diffusion, predict, x, timesteps(sampler, diffusion.T, steps), **options)
    if not images.isfinite().all():
        raise FloatingPointError("the network draws what is no number: lower --guidance, or use other weights")
    return images


class TrainedModel:
    """A trained network, the process it was trained under, and the settings that suit it, as arguments of `sample`.

    is_image: whether it makes images. Otherwise it makes latents, which a separate decoder (a VAE) turns into images;
              they cannot be shown as they are, and are not limited to [-1, 1].
    """

    def __init__(self, model: DiT, diffusion: Diffusion, description: dict):
        self.model, self.diffusion, self.description = model, diffusion, description
        self.is_image = model.config.in_channels in (1, 3)
        self.settings = {name: description[name] for name in ("guidance", "interval")}
        sampler = "shortcut" if model.config.shortcut else "dpm++"
        self.settings |= dict(sampler=sampler, steps=DEFAULT_STEPS[sampler], clip=self.is_image)

    def draw(
        self, labels: Tensor, batch_size: int, what: str = "sampling", callback: Callable | None = None, **options
    ) -> Tensor:
        """Images (n, C, S, S) of the labels (n,), on the CPU, drawn batch by batch under a progress bar called `what`.

        callback: called with (t, x_t, x0_hat) at each step of each batch. Options take the place of settings.
        """
        settings = {**self.settings, **options}
        parts = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
        steps = len(parts) * settings["steps"]
        with tqdm(total=steps, desc=what, unit="step", leave=False, dynamic_ncols=True) as bar:
            def look(*step) -> None:
                bar.update()
                if callback:
                    callback(*step)

            draw = partial(sample, self.model, self.diffusion, callback=look, **settings)
            return torch.cat([draw(labels[part], indices=part).cpu() for part in parts])


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in 0 ... 255, the inverse of dataset.to_float."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # as uint8, 256 would wrap to 0


def grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images (n, C, S, S) in [-1, 1], with C = 1 or 3, as one picture, row by row. Small images are enlarged."""
    n, C, S, _ = images.shape
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (S + gap) + gap, columns * (S + gap) + gap, C), 64, np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        top, left = gap + i // columns * (S + gap), gap + i % columns * (S + gap)
        canvas[top : top + S, left : left + S] = image
    picture = Image.fromarray(canvas[:, :, 0] if C == 1 else canvas)
    scale = max(1, 64 // S)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
