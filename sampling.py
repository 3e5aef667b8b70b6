"""From a seed to images: noise that belongs to an image, drawing with a trained network, and pictures of the result.

The samplers themselves, which turn noise into images step by step, are mathematics and stand in diffusion.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion import SAMPLERS, Diffusion, guide, spaced_timesteps
from dit import DiT, DiTConfig

DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "dpm++": 20}
DEFAULT_GUIDANCE = 1.5


def seeded(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator with the number `index` of a seed. Both are whole numbers from 0 to 2^32 - 1."""
    # PyTorch keeps 32 bits of a CPU generator's seed. The factor, 2^32 over the golden ratio, sets the numbers of
    # neighbouring seeds far apart, so that they do not share generators.
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + index) % 2**32)


class ImageNoise:
    """Gaussian noise for the images `indices` of a seed. Each call returns fresh noise (n, *shape) on the device.

    Every image has a generator of its own, on the CPU. Image i of a seed therefore meets the same noise in a batch of
    any size and on any device.
    """

    def __init__(self, seed: int, indices: range | list[int], shape: tuple[int, ...], device: torch.device | str):
        self.generators = [seeded(seed, i) for i in indices]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def sample(
    model: DiT, diffusion: Diffusion, labels: Tensor, *, seed: int = 0, indices: range | list[int] | None = None,
    sampler: str = "dpm++", steps: int = 20, eta: float = 0.0, guidance: float = DEFAULT_GUIDANCE,
    interval: tuple[int, int] | None = None, clip: bool = True, callback: Callable | None = None,
) -> Tensor:
    """Draw an image (C, S, S) in [-1, 1] for each of the labels (n,), as one batch (n, C, S, S).

    indices:  the number of each image within the seed (default: 0 to n - 1)
    sampler:  one of diffusion.SAMPLERS, which calls the network at `steps` timesteps
    eta:      for ddim, the share of fresh noise
    guidance, interval, clip: see diffusion.guide and the samplers
    callback: called with (t, x_t, x0_hat) at each step
    """
    config, device = model.config, model.pos_embed.device
    shape = (config.in_channels, config.image_size, config.image_size)
    noise = ImageNoise(seed, range(len(labels)) if indices is None else indices, shape, device)
    predict = guide(model, labels.to(device), config.num_classes, guidance if config.num_classes else 1.0, interval)
    options = {"ddpm": dict(noise=noise), "ddim": dict(noise=noise, eta=eta), "dpm++": {}}[sampler]
    timesteps = spaced_timesteps(diffusion.T, steps)
    return SAMPLERS[sampler](diffusion, predict, noise(), timesteps, clip=clip, callback=callback, **options)


def is_image(config: DiTConfig) -> bool:
    """Whether the network makes images, and not latents, which have no picture and do not stay in [-1, 1]."""
    return config.in_channels in (1, 3)


@dataclass
class TrainedModel:
    """A trained network, the process it was trained under, what its file says of it, and the settings to draw with.

    description: see checkpoint.describe
    settings:    arguments of `sample`
    """

    model: DiT
    diffusion: Diffusion
    description: dict
    settings: dict

    def draw(self, labels: Tensor, **options) -> Tensor:
        """Images (n, C, S, S) of the labels (n,). Options take the place of the settings of the same names."""
        return sample(self.model, self.diffusion, labels, **{**self.settings, **options})


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in 0 ... 255, the inverse of dataset.to_float.

    The clamp comes before the cast, because a cast of 256 to uint8 gives 0.
    """
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


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
