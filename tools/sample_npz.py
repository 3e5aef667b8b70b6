"""Sample many images into one .npz, for an evaluation, with one process or with several.

    python tools/sample_npz.py samples.npz --count 50000
    torchrun --nproc-per-node=4 tools/sample_npz.py samples.npz --count 50000

The file holds arr_0, uint8 (n, S, S, C), as the evaluation code of ADM and DiT reads it, and the labels, which take the
classes in turn. Latents that no --vae decodes are float32 (n, C, S, S).
"""

import argparse
import errno
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
from cli import RANK, WORLD, Parser, number, output_path, run_script  # noqa: E402
from inference import add_model_flags, open_model  # noqa: E402
from sampling import TrainedModel, to_uint8  # noqa: E402


def check_space(path: Path, trained: TrainedModel, count: int) -> None:
    """Raises OSError where the disk is too small for the file: before hours of work, and not after."""
    decoded, size = trained.is_image or trained.autoencoder, math.prod(trained.shape) * 4
    if decoded:
        size = 3 * trained.autoencoder.factor**2 * trained.shape[1] ** 2 if trained.autoencoder else size // 4
    if shutil.disk_usage(path.parent).free < count * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sample_part(trained: TrainedModel, labels: Tensor, batch_size: int) -> Tensor:
    """This process's part of the images, as they are stored, see above."""
    mine = range(len(labels) * RANK // WORLD, len(labels) * (RANK + 1) // WORLD)
    samples = trained.sample(labels[mine], batch_size, mine, progress="sampling" if RANK == 0 else None)
    if not (trained.is_image or trained.autoencoder):
        return samples
    parts = [to_uint8(trained.to_images(part)) for part in samples.split(batch_size)]
    return torch.cat(parts).permute(0, 2, 3, 1)


def gather(images: Tensor) -> Tensor | None:
    """The images of all processes, in process 0."""
    if WORLD == 1:
        return images
    gathered = [None] * WORLD if RANK == 0 else None
    dist.init_process_group("gloo")
    dist.gather_object(images, gathered)
    dist.destroy_process_group()
    return torch.cat(gathered) if RANK == 0 else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser("sample_npz.py", "Sample many images into one .npz.")
    parser.add_argument("output", type=Path, nargs="?", help="a new .npz (default: a new name in outputs/)")
    parser.add_argument("--count", type=number(int, 1, 10**6), default=10_000, help="images (default: 10000)")
    add_model_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Raises UsageError, CheckpointError, FloatingPointError, OSError."""
    args = parse_args(argv)
    trained = open_model(args)
    if RANK == 0:
        path = output_path(args.output, "samples.npz")
        check_space(path, trained, args.count)
    labels = torch.arange(args.count) % max(len(trained.description["classes"]), 1)
    images = gather(sample_part(trained, labels, args.batch_size))
    if RANK == 0:
        arrays = dict(arr_0=images.numpy(), labels=labels.numpy())
        checkpoint.write_whole(path, lambda file: np.savez(file, **arrays))
        print(path)


if __name__ == "__main__":
    run_script(main)
