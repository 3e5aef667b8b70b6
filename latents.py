"""Latents: images that an autoencoder (VAE) has made 8 times smaller a side, on which the official DiT trains.

    python tools/encode.py FOLDER --vae stabilityai/sd-vae-ft-ema --output latents.npz
    python train.py --dataset latents.npz --model DiT-S/2
    python inference.py --checkpoint runs/latents-1 --vae stabilityai/sd-vae-ft-ema

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752. The autoencoder is
diffusers.AutoencoderKL; the package diffusers is needed for nothing else (pip install diffusers).
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dataset import DataError, Images, read_npz

MAX_CLASSES = 100_000  # where a file has no names for its labels
AT_ONCE = 8            # images that are encoded or decoded together, because each takes much memory


class Autoencoder:
    """An AutoencoderKL, whose latents are scaled to a standard deviation of about 1, as its config says.

    source: the folder or the name at Hugging Face from which diffusers loads it

    Raises DataError where diffusers or the autoencoder is missing.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataError("--vae needs the package diffusers: pip install diffusers") from error
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each of several attempts
        try:
            with warnings.catch_warnings(action="ignore"):
                self.vae = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False).to(device).eval()
        except Exception as error:  # whatever diffusers finds wrong with a file or with the network connection
            reason = (" ".join(str(error).split()) or type(error).__name__)[:150]
            raise DataError(f"cannot load the autoencoder {source} ({reason}): name another by --vae") from error
        self.device, config = device, self.vae.config
        self.channels, self.factor = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] -> latents (n, C, S, S). noise, N(0, I) like them, samples their posterior."""
        latents = []
        for x, eps in zip(images.split(AT_ONCE), noise.split(AT_ONCE), strict=True):
            posterior = self.vae.encode(x.to(self.device)).latent_dist
            latents.append((posterior.mean + posterior.std * eps.to(self.device) - self.shift) * self.scale)
        return torch.cat(latents).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, C, S, S) -> images (n, 3, H, W), on the CPU, in [-1, 1]. Raises DataError for another C."""
        if latents.shape[1] != self.channels:
            raise DataError(f"these latents have {latents.shape[1]} channels, and those of --vae {self.channels}: "
                            "use the autoencoder with which they were encoded")
        parts = [part.to(self.device) / self.scale + self.shift for part in latents.split(AT_ONCE)]
        return torch.cat([self.vae.decode(part).sample.clamp(-1, 1).cpu() for part in parts])


def load_latents(path: Path, image_size: int | None = None) -> Images:
    """The latents of an .npz as tools/encode.py writes it: arr_0, float (N, C, S, S), labels (N,), and classes, which
    are their names (otherwise the labels are). Raises DataError, also where image_size is not None or S.
    """
    fix = "make it with tools/encode.py"
    try:
        arrays = read_npz(path)
        latents, labels = torch.from_numpy(arrays["arr_0"]), torch.from_numpy(arrays["labels"])
        count = min(int(labels.max()) + 1, MAX_CLASSES)
        classes = tuple(str(name) for name in arrays.get("classes", range(count)))
    except Exception as error:  # a broken file can provoke any
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(f"cannot read latents and labels of {path} ({reason}): {fix}") from error
    if latents.ndim != 4 or latents.shape[2] != latents.shape[3] or not latents.is_floating_point():
        raise DataError(f"arr_0 of {path} is {latents.dtype} {tuple(latents.shape)}, not float (N, C, S, S): {fix}")
    known = not labels.is_floating_point() and ((labels >= 0) & (labels < max(len(classes), 1))).all()
    if labels.shape != latents.shape[:1] or not known:
        raise DataError(f"the labels of {path} are not {len(latents)} numbers of its classes: {fix}")
    if not latents.isfinite().all():
        raise DataError(f"arr_0 of {path} holds numbers that are not finite: {fix}")
    if image_size not in (None, latents.shape[-1]):
        size = latents.shape[-1]
        raise DataError(f"the latents of {path} have {size} pixels a side, not {image_size}: leave --image-size out")
    return Images(latents.float(), labels.long(), classes, f"{len(labels):,} latents of {path.name}")
