"""From noise to images: samplers in few steps, and what a trained network needs to be sampled from.

    ddim, dpm_solver    samplers with the arguments of diffusion.ddpm, which needs many more steps
    image_noise         the noise that belongs to an image of a seed
    TrainedModel        a network with its diffusion process and the settings that suit it: labels -> images
    grid, to_pil        images as pictures
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion import Diffusion, clip, ddpm, guide, spaced_timesteps
from dit import DiT
from speed import autocast

MAX_GUIDANCE = 100


# ------------------------------------------------------------------------------------------------ samplers in few steps


@torch.no_grad()
def ddim(
    diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], noise: Callable | None = None,
    constrain: Callable = clip, callback: Callable | None = None, eta: float = 0.0,
) -> Tensor:
    """DDIM, arXiv 2010.02502, Eq. 12 and 16: combine x0_hat and eps_hat at the noise level of s.

    eta, 0 to 1, scales the standard deviation of the noise that each step adds. With 0 the sampler is deterministic,
    needs no noise(), and for flow is Euler's method (where x0_hat is not clamped). With 1 it is DDPM, with the variance
    of the posterior. The arguments are explained in diffusion.py.
    """
    alpha, sigma = diffusion.alpha, diffusion.sigma
    for t, s in pairwise([*timesteps, -1]):
        x0_hat = constrain(diffusion.predict_x0(predict(x, t), x, t), x, t)
        if callback:
            callback(t, x, x0_hat)
        eps_hat = (x - alpha[t] * x0_hat) / sigma[t]  # from x0_hat, which may have been clamped
        variance = eta**2 * diffusion.posterior(t, s)[2]
        x = alpha[s] * x0_hat + math.sqrt(sigma[s] ** 2 - variance) * eps_hat
        if variance > 0:
            x = x + math.sqrt(variance) * noise()
    return x


@torch.no_grad()
def dpm_solver(
    diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], noise: Callable | None = None,
    constrain: Callable = clip, callback: Callable | None = None,
) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2: DDIM with an x0_hat that is extrapolated from the last two.

    It is of second order in h, the difference of lambda = log(alpha / sigma) between two timesteps. Only the first
    step, which has no x0_hat before it, and the last, where lambda goes to infinity, are of first order. It adds no
    noise. The arguments are explained in diffusion.py.
    """
    alpha, sigma = diffusion.alpha, diffusion.sigma
    previous_x0_hat = previous_h = None
    for t, s in pairwise([*timesteps, -1]):
        x0_hat = constrain(diffusion.predict_x0(predict(x, t), x, t), x, t)
        if callback:
            callback(t, x, x0_hat)
        if s < 0:
            return x0_hat
        h = math.log(alpha[s] / sigma[s]) - math.log(alpha[t] / sigma[t])
        extrapolated = x0_hat  # the paper's D
        if previous_x0_hat is not None:
            slope = h / (2 * previous_h)
            extrapolated = x0_hat + slope * (x0_hat - previous_x0_hat)
        x = sigma[s] / sigma[t] * x - alpha[s] * math.expm1(-h) * extrapolated
        previous_x0_hat, previous_h = x0_hat, h


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}


# ----------------------------------------------------------------------------------------------------- noise and labels


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
    cuda = torch.device(device).type == "cuda"  # where a copy need not wait for what the GPU still has to do
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device, non_blocking=cuda)


def guidance_settings(values: list[float], timesteps: int) -> dict:
    """[W] or [W, LOW, HIGH] as the settings guidance and guidance_interval of `sample_batch`. Raises ValueError."""
    weight, *interval = values
    inside = len(interval) == 2 and 0 <= interval[0] <= interval[1] < timesteps
    if interval and not (inside and all(t == int(t) for t in interval)):
        limits = f"W, or W LOW HIGH with whole numbers, 0 <= LOW <= HIGH <= {timesteps - 1}"
        raise ValueError(f"--guidance is {' '.join(map(str, values))}: use {limits}")
    if not abs(weight) <= MAX_GUIDANCE:
        raise ValueError(f"a guidance scale must be a finite number, {-MAX_GUIDANCE} to {MAX_GUIDANCE}: 1.5 is usual")
    return dict(guidance=weight, guidance_interval=[int(t) for t in interval] or None)


def of_batch(value: object, batch: slice, n: int) -> object:
    """An option of `TrainedModel.sample_batch` for a batch of n images: where it holds n images, those of the batch."""
    if isinstance(value, tuple):
        return tuple(of_batch(part, batch, n) for part in value)
    return value[batch] if isinstance(value, Tensor) and value.ndim == 4 and len(value) == n else value


class TrainedModel:
    """A trained network, the diffusion process it was trained under, and the settings that suit it.

    description: see checkpoint.describe; sampling needs only its guidance, guidance_interval and makes
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
        self.device = next(model.parameters()).device
        self.is_image = description.get("makes", "images") == "images"
        self.autoencoder = None
        sampler, steps = next(iter(self.default_steps.items()))
        self.settings = dict(
            sampler=sampler, steps=min(steps, diffusion.T), clip=self.is_image,
            guidance=description["guidance"], guidance_interval=description["guidance_interval"],
        )

    def sample(
        self, labels: Tensor | list[int], batch_size: int = 250, indices: range | None = None,
        progress: str | None = None, callback: Callable | None = None, **options,
    ) -> Tensor:
        """One image for each of the labels (n,): (n, C, S, S), in [-1, 1], on the CPU, sampled batch by batch.

        labels:   numbers of classes, 0 to num_classes; the last is the null class, "no label"
        indices:  the number of each image within the seed (default: 0 to n - 1)
        progress: the name of a progress bar (default: none)
        callback: called with (t, x_t, x0_hat) at each step of each batch
        options:  override `settings`, see `sample_batch`; such as seed=1, steps=50, guidance=2.0

        Raises FloatingPointError where the samples are not finite, ValueError for unknown labels or numbers of steps.
        """
        labels, settings = torch.as_tensor(labels), {**self.settings, **options}
        most = self.model.config.num_classes
        if len(labels) and not 0 <= labels.min() <= labels.max() <= most:
            raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}: use 0 to {most}")
        indices = range(len(labels)) if indices is None else indices
        batches = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
        steps = len(self.timesteps(settings["steps"], settings.get("strength", 1.0)))
        images = []
        with tqdm(
            total=len(batches) * steps, desc=progress, unit="step", leave=False, dynamic_ncols=True,
            disable=None if progress else True,  # None: where the output is no terminal
        ) as bar:
            def after_step(*step) -> None:
                bar.update()
                if callback:
                    callback(*step)

            for batch in batches:
                given = {name: of_batch(value, batch, len(labels)) for name, value in settings.items()}
                x = self.sample_batch(labels[batch], indices=indices[batch], callback=after_step, **given)
                images.append(x.cpu())
        return torch.cat(images) if images else torch.empty(0, *self.shape)

    def sample_batch(
        self, labels: Tensor, *, seed: int = 0, indices: range | None = None, start: Tensor | None = None,
        image: Tensor | None = None, strength: float = 1.0, predict: Callable | None = None, sampler: str, steps: int,
        eta: float = 0.0, guidance: float = 1.0, guidance_interval: list[int] | None = None, precision: str = "fp32",
        clip: bool = True, inpaint: tuple[Tensor, Tensor] | None = None, callback: Callable | None = None,
    ) -> Tensor:
        """One image for each of the labels (n,): (n, C, S, S), S pixels a side, in [-1, 1] with `clip`.

        indices:   the number of each image within the seed (default: 0 to n - 1)
        start:     noise (n, C, S, S) to begin with, in place of the seed's
        image:     an image (C, S, S) or (n, C, S, S) to begin with, which gets noise up to the timestep strength *
                   (T - 1) and is denoised from there (SDEdit, arXiv 2108.01073); strength is 0 to 1
        predict:   in place of the prediction for these labels, see `predictor`
        sampler:   one of `samplers`, with so many steps from noise to image
        eta:       for ddim, how much fresh noise each step adds: 0 for none, 1 for as much as ddpm
        guidance, guidance_interval: see diffusion.guide
        precision: fp32, or bf16 for matrix products in bfloat16
        clip, inpaint: see `constrained`; callback: called with (t, x_t, x0_hat) at each step

        Raises FloatingPointError where the samples are not finite.
        """
        noise = image_noise(seed, range(len(labels)) if indices is None else indices, self.shape, self.device)
        timesteps = self.timesteps(steps, strength)
        if predict is None:
            predict = self.predictor(labels, timesteps, guidance, guidance_interval)
        x = noise() if start is None else start.to(self.device)
        if image is not None:
            x = self.diffusion.q_sample(image.to(self.device), torch.full((len(x),), timesteps[0]), x)
        options = dict(eta=eta) if eta else {}
        with autocast(self.device, precision):
            images = self.samplers[sampler](
                self.diffusion, predict, x, timesteps, noise, constrained(clip, inpaint), callback, **options
            )
        if not images.isfinite().all():
            raise FloatingPointError("the samples are not finite: lower --guidance, or use other weights")
        return images

    def predict_x0(self, x_t: Tensor, t: int, labels: Tensor | list[int], guidance: float = 1.0) -> Tensor:
        """The image (n, C, S, S) that the network predicts for noisy images x_t, all at timestep t, with labels (n,).

        Make x_t with `diffusion.q_sample(x0, torch.full((n,), t), torch.randn_like(x0))`.
        """
        x_t, labels = x_t.to(self.device), torch.as_tensor(labels)
        with torch.no_grad():
            return self.diffusion.predict_x0(self.predictor(labels, [t], guidance)(x_t, t), x_t, t)

    def to_images(self, samples: Tensor) -> Tensor:
        """Samples (n, C, S, S) as images in [-1, 1]. Latents are decoded, or else show their first channels, 3 or 1."""
        if self.autoencoder:
            return self.autoencoder.decode(samples)
        shown = 3 if samples.shape[1] >= 3 else 1
        return samples if self.is_image else (samples[:, :shown] / 3).clamp(-1, 1)  # latents are about N(0, 1)

    def predictor(
        self, labels: Tensor, timesteps: list[int], guidance: float = 1.0, guidance_interval: list[int] | None = None
    ) -> Callable:
        """predict(x_t, t) for labels (n,), as the samplers call it at each of these timesteps."""
        config = self.model.config
        scale = guidance if config.num_classes else 1.0
        return guide(self.model, labels.to(self.device), config.num_classes, scale, guidance_interval or (0, math.inf))

    def timesteps(self, steps: int, strength: float = 1.0) -> list[int]:
        """The timesteps at which a sampler calls the network, of so many `steps` from noise to image. With a strength
        below 1 they begin at timestep strength * (T - 1), and are fewer in proportion.

        Raises ValueError for a number of steps that is not possible.
        """
        T = self.diffusion.T
        whole, first = spaced_timesteps(T, steps), round(strength * (T - 1))
        return whole if strength == 1 else spaced_timesteps(first + 1, min(max(1, round(strength * steps)), first + 1))


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


def constrained(clip: bool = True, inpaint: tuple[Tensor, Tensor] | None = None) -> Callable:
    """The function `constrain` that samplers call (diffusion.py).

    clip:    clamp x0_hat to [-1, 1]
    inpaint: (image, mask). Where the mask is True, the image is known, and replaces x0_hat. So this part of x_t is
             what the forward process would make of it, and the network fills in the rest to fit. (RePaint, arXiv
             2201.09865, replaces the part in x_t, and also repeats each step several times.)
    """
    def constrain(x0_hat: Tensor, x_t: Tensor, t: int) -> Tensor:
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        if inpaint is not None:
            image, mask = inpaint
            x0_hat = torch.where(mask, image, x0_hat)
        return x0_hat

    return constrain


# ------------------------------------------------------------------------------------------------------------- pictures


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in 0 ... 255, the inverse of dataset.to_float."""
    scaled = (images.float() * 127.5).add_(127.5).round_().clamp_(0, 255)  # in place, since images may be many
    return scaled.to(torch.uint8)  # as uint8, 256 would wrap to 0


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (n, C, S, S) in [-1, 1], with C = 1 or 3, as pictures of their own size."""
    arrays = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


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
