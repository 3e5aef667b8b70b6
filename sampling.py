"""From a seed to images: noise that belongs to an image, sampling with a trained network, and grids of the result.

The samplers themselves, which turn noise into images step by step, are mathematics; diffusion.py has them.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion import SAMPLERS, Diffusion, guide, spaced_timesteps
from dit import DiT
from speed import autocast
from variance import guidance_scales


def seeded(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random generator number `index` of a seed. Both are whole numbers from 0 to 2^32 - 1."""
    # PyTorch keeps 32 bits of a CPU generator's seed. With seed + index, image 1 of seed 0 would be image 0 of seed 1.
    # The factor, a prime near 2^32 divided by the golden ratio, sets the generators of neighbouring seeds far apart.
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + index) % 2**32)


def image_noise(seed: int, indices: range, shape: tuple[int, ...], device: torch.device | str) -> Callable[[], Tensor]:
    """Gaussian noise for the images `indices` of a seed. Each call returns fresh noise (n, *shape) on the device.

    Every image has a generator of its own, on the CPU. Image i of a seed therefore gets the same noise in a batch of
    any size and on any device.
    """
    generators = [seeded(seed, i) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


class TrainedModel:
    """A trained network, the diffusion process it was trained under, and the settings that suit it.

    description: see checkpoint.describe; sampling needs only its guidance and guidance_interval
    is_image:    whether it makes images. Otherwise it makes latents, which a separate decoder (a VAE) turns into
                 images; they cannot be shown as they are, and are not limited to [-1, 1].
    autoencoder: a latents.Autoencoder that decodes latents, if one was given
    settings:    arguments of `sample_batch`
    """

    samplers = SAMPLERS
    default_steps = {"dpm++": 20, "ddim": 50, "ddpm": 1000}  # the first sampler is the default

    def __init__(self, model: DiT, diffusion: Diffusion, description: dict):
        self.model, self.diffusion, self.description = model, diffusion, description
        config = model.config
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.device = model.pos_embed.device
        self.is_image = config.in_channels in (1, 3)
        self.autoencoder = None
        sampler, steps = next(iter(self.default_steps.items()))
        self.settings = dict(
            sampler=sampler, steps=min(steps, diffusion.T), clip=self.is_image,
            guidance=description["guidance"], guidance_interval=description["guidance_interval"],
        )

    def sample(
        self, labels: Tensor, batch_size: int, indices: range | None = None, what: str = "sampling",
        show_progress: bool = True, callback: Callable | None = None, **options,
    ) -> Tensor:
        """Images (n, C, S, S) of the labels (n,), on the CPU, batch by batch under a progress bar called `what`.

        indices:  the number of each image within the seed (default: 0 to n - 1)
        callback: called with (t, x_t, x0_hat) at each step of each batch
        options:  override `settings`
        """
        settings = {**self.settings, **options}
        indices = range(len(labels)) if indices is None else indices
        batches = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
        images = []
        with tqdm(
            total=len(batches) * settings["steps"], desc=what, unit="step", leave=False, dynamic_ncols=True,
            disable=None if show_progress else True,  # None: where the output is no terminal
        ) as bar:
            def after_step(*step) -> None:
                bar.update()
                if callback:
                    callback(*step)

            for batch in batches:
                x = self.sample_batch(labels[batch], indices=indices[batch], callback=after_step, **settings)
                images.append(x.cpu())
        return torch.cat(images)

    def sample_batch(
        self, labels: Tensor, *, seed: int = 0, indices: range | None = None, start: Tensor | None = None,
        predict: Callable | None = None, sampler: str, steps: int, eta: float = 0.0, guidance: float = 1.0,
        guidance_interval: list[int] | None = None, precision: str = "fp32", **constraints,
    ) -> Tensor:
        """One image for each of the labels (n,): (n, C, S, S), S pixels a side, in [-1, 1] with `clip`.

        indices:     the number of each image within the seed (default: 0 to n - 1)
        start:       noise (n, C, S, S) to begin with, in place of the seed's
        predict:     in place of the prediction for these labels, see `predictor`
        sampler:     one of `samplers`, with so many steps
        eta:         for ddim, how much fresh noise each step adds: 0 for none, 1 for as much as ddpm
        guidance, guidance_interval: see diffusion.guide
        precision:   fp32, or bf16 for matrix products in bfloat16
        constraints: clip, inpaint and callback, see `constrained`

        Raises FloatingPointError where the samples are not finite.
        """
        noise = image_noise(seed, range(len(labels)) if indices is None else indices, self.shape, self.device)
        if predict is None:
            predict = self.predictor(labels, guidance, guidance_interval)
        x = noise() if start is None else start.to(self.device)
        options = dict(constrain=constrained(**constraints)) | (dict(eta=eta) if sampler == "ddim" else {})
        with autocast(self.device, precision):
            timesteps = self.timesteps(sampler, steps)
            images = self.samplers[sampler](self.diffusion, predict, x, timesteps, noise, **options)
        if not images.isfinite().all():
            raise FloatingPointError("the samples are not finite: lower --guidance, or use other weights")
        return images

    def to_images(self, samples: Tensor) -> Tensor:
        """Samples (n, C, S, S) as images in [-1, 1]. Latents are decoded, or else show their first three channels."""
        if self.autoencoder:
            return self.autoencoder.decode(samples)
        return samples if self.is_image else (samples[:, :3] / 3).clamp(-1, 1)  # latents are about N(0, 1)

    def predictor(self, labels: Tensor, guidance: float = 1.0, guidance_interval: list[int] | None = None) -> Callable:
        """predict(x_t, t) for labels (n,), as the samplers call it."""
        config = self.model.config
        scale = guidance if config.num_classes else 1.0
        if config.learn_sigma:
            scale = guidance_scales(scale, config.in_channels, self.device)
        interval = guidance_interval or (0, math.inf)
        return guide(self.model, labels.to(self.device), config.num_classes, scale, interval)

    def timesteps(self, sampler: str, steps: int) -> list[int]:
        """The timesteps at which this sampler calls the network."""
        return spaced_timesteps(self.diffusion.T, steps)


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Noise that is `fraction` of the way from a to b, which have one shape, along an arc (arXiv 1609.04468).

    Gaussian noise of many dimensions always has about the same norm, and so has every point of the arc. The points of a
    straight line have a smaller one, and the network was trained on no such noise.
    """
    angle = torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return (torch.sin((1 - fraction) * angle) * a + torch.sin(fraction * angle) * b) / torch.sin(angle)


def crossfade(one: Callable, other: Callable, fraction: Tensor) -> Callable:
    """predict(x_t, t) between two others, such as those of two labels: image i is fraction[i] of the way, 0 to 1.

    Mixing predictions amounts to mixing scores (arXiv 2206.01714). A mixture of the two label embeddings does not work:
    the network was trained on no such embedding, and returns noise.
    """
    return lambda x_t, t: torch.lerp(one(x_t, t), other(x_t, t), fraction.view(-1, 1, 1, 1))


def constrained(
    clip: bool = True, inpaint: tuple[Tensor, Tensor] | None = None, callback: Callable | None = None
) -> Callable:
    """The function `constrain` that samplers call (diffusion.py).

    clip:     clamp x0_hat to [-1, 1]
    inpaint:  (image, mask). Where the mask is True, the image is known, and replaces x0_hat. So this part of x_t is
              what the forward process would make of it, and the network fills in the rest to fit. (RePaint, arXiv
              2201.09865, replaces the part in x_t, and also repeats each step several times.)
    callback: called with (t, x_t, x0_hat)
    """
    def constrain(x0_hat: Tensor, x_t: Tensor, t: int) -> Tensor:
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        if inpaint is not None:
            image, mask = inpaint
            x0_hat = torch.where(mask, image, x0_hat)
        if callback is not None:
            callback(t, x_t, x0_hat)
        return x0_hat

    return constrain


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in 0 ... 255, the inverse of dataset.to_float."""
    scaled = (images.float() * 127.5).add_(127.5).round_().clamp_(0, 255)  # in place, since images may be many
    return scaled.to(torch.uint8)  # as uint8, 256 would wrap to 0


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
