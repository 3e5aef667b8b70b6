"""Draw images with a trained DiT: a grid, the way from noise to digit, an animation, or many for an evaluation.

    python inference.py                                     rows 0 to 9 of digits, one picture
    python inference.py --labels 3 1 4 1 5 --guidance 2
    python inference.py --trajectory
    python inference.py --interpolate 3 8 --gif --sampler shortcut --steps 1
    torchrun --nproc-per-node=4 inference.py --npz samples.npz --count 50000

This is the command line. The drawing itself is in sampling.py.
"""

import argparse
import math
import os
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import checkpoint
from cli import RANK, WORLD, Parser, UsageError, add_model_flags, number, open_model, output_path, run_script
from sampling import TrainedModel, grid, image_noise, sample, slerp, timesteps, to_uint8

# The slices of rows and columns that make a half of an image of S pixels a side.
HALVES = {
    "left": lambda S: (slice(None), slice(S // 2)), "right": lambda S: (slice(None), slice(S // 2, S)),
    "top": lambda S: (slice(S // 2),), "bottom": lambda S: (slice(S // 2, S),),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser(description="Draw images with a trained DiT.")
    what = parser.add_argument_group("what to draw")
    mode = what.add_mutually_exclusive_group()
    mode.add_argument("--trajectory", action="store_true", help="a row for each label, from noise to image")
    mode.add_argument("--gif", action="store_true", help="an animation of the denoising")
    weight = number(float, -checkpoint.MOST_GUIDANCE, checkpoint.MOST_GUIDANCE)
    mode.add_argument("--compare-guidance", type=weight, nargs="+", metavar="W", help="a row for each weight")
    mode.add_argument("--npz", type=Path, metavar="FILE", help="--count images as arr_0 (uint8, NHWC), and labels")
    what.add_argument("--interpolate", nargs="+", metavar="L", help="a row for each way from a label to the next; with "
                      "--gif an animation")
    what.add_argument("--inpaint", nargs=2, metavar=("HALF", "IMAGE"), help="keep a half of this image file, left, "
                      "right, top or bottom, and draw the other as --labels say")
    what.add_argument("--labels", nargs="+", metavar="L", help="classes or ranges, a row for each (default: 0-9)")
    what.add_argument("--per-class", type=number(int, 1, 10_000), help="images a label; 1 puts all in one row "
                      "(default: 10)")
    what.add_argument("--count", type=number(int, 1, 10_000_000), help="images in the --npz file (default: 10000)")
    what.add_argument("--output", type=Path, help="a new .png, or .gif for --gif (default: a new name in outputs/)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    others = args.trajectory or args.compare_guidance or args.npz or args.inpaint or args.labels or args.per_class
    if args.interpolate and (others or args.eta or args.sampler == "ddpm"):
        raise UsageError("--interpolate goes with --gif, and with samplers that add no noise: leave other flags out")
    if args.inpaint and args.inpaint[0] not in HALVES:
        raise UsageError(f"--inpaint keeps a half, one of {', '.join(HALVES)}: not {args.inpaint[0]!r}")
    if args.npz and (args.labels or args.output or args.per_class):
        raise UsageError("--npz names the file and takes the labels in turn: leave out --output, --labels, --per-class")
    if args.count and not args.npz:
        raise UsageError("--count goes with --npz: use --per-class")
    if (args.trajectory or args.compare_guidance) and args.per_class:
        raise UsageError("--trajectory and --compare-guidance draw one image a label: leave --per-class out")
    if args.compare_guidance:  # each row has its own weight, which acts throughout or at the LOW HIGH of --guidance
        args.guidance = args.guidance or [1.0]
    return args


def parse_labels(words: list[str] | None, classes: list[str]) -> list[int]:
    """The numbers of the classes that words such as "3", "7-9" or "cat" name. Raises UsageError.

    Without words, they are the first ten classes, or ten times 0 for an unconditional model.
    """
    if words is None:
        return list(range(min(10, len(classes)))) or [0] * 10
    if not classes:
        raise UsageError("this model knows no labels: leave --labels out")
    labels = []
    for word in words:
        first, dash, last = word.partition("-")
        if word in classes:
            labels.append(classes.index(word))
        elif first.isdecimal() and (last.isdecimal() or not dash):
            labels += range(int(first), min(int(last or first), len(classes)) + 1)
        else:
            names = ", ".join(classes[:20])
            raise UsageError(f"no class {word!r}: use numbers 0 to {len(classes) - 1}, or names: {names}")
    if not labels or max(labels) >= len(classes):
        raise UsageError(f"--labels {' '.join(words)}: the classes are 0 to {len(classes) - 1}")
    return labels


def draw_batches(trained: TrainedModel, labels: Tensor, batch_size: int, world: int) -> Iterator[np.ndarray]:
    """The images of the labels (n,) in turn: uint8 (b, S, S, C), or latents, which stay float32 (b, C, S, S).

    In each round every one of `world` processes draws a batch, and all of them get the batches of all.
    """
    config, n = trained.model.config, len(labels)
    for first in tqdm(range(0, n, world * batch_size), unit="batch", disable=RANK > 0):
        indices = range(min(first + RANK * batch_size, n), min(first + (RANK + 1) * batch_size, n))
        images = torch.empty(0, config.in_channels, config.image_size, config.image_size)
        if indices:  # in the last round there may be none left for this process
            images = sample(trained.model, trained.diffusion, labels[indices], indices=indices, **trained.settings)
        images = to_uint8(images).permute(0, 2, 3, 1) if trained.is_image else images
        drawn = [images.cpu().numpy()] * world
        if world > 1:
            dist.all_gather_object(drawn, drawn[RANK])
        yield np.concatenate(drawn)


def draw_arrays(args: argparse.Namespace, trained: TrainedModel, labels: Tensor) -> Path:
    """The .npz that --npz asks for. Latents, which have no picture, become an .npz in any case. Returns its path.

    The array grows on the disk, so that memory holds one round of batches, and not all images. With --npz the processes
    of torchrun share the work, and process 0 writes.
    """
    path = output_path(args.npz or args.output, "latents.npz")
    n, C, S = len(labels), trained.model.config.in_channels, trained.model.config.image_size
    shape, dtype = ((n, S, S, C), "|u1") if trained.is_image else ((n, C, S, S), "<f4")
    world = WORLD if args.npz else 1
    if world > 1:
        dist.init_process_group("gloo")

    def write(file: BinaryIO) -> None:
        if hasattr(os, "posix_fallocate"):  # so that a disk which is too small shows now
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, dict(descr=dtype, fortran_order=False, shape=shape))
                for images in draw_batches(trained, labels, args.batch_size, world):
                    member.write(images.tobytes())
            with archive.open("labels.npy", "w") as member:
                np.save(member, labels.numpy())

    if RANK == 0:
        checkpoint.write_whole(path, write)
    else:
        for _ in draw_batches(trained, labels, args.batch_size, world):
            pass
    if world > 1:
        dist.destroy_process_group()
    return path


def known_half(half: str, path: str, trained: TrainedModel) -> tuple[Tensor, Tensor]:
    """A file's image, and a mask that is True in the half to keep: `known` of diffusion.denoise. Raises UsageError."""
    import dataset  # only here, since it takes seconds to import

    device, config = trained.model.pos_embed.device, trained.model.config
    C, S = config.in_channels, config.image_size
    try:
        image = dataset.read_image(path).convert("L" if C == 1 else "RGB")
    except dataset.DataError as error:
        raise UsageError(str(error)) from error
    pixels = torch.from_numpy(np.array(ImageOps.fit(image, (S, S), Image.Resampling.BILINEAR)))
    mask = torch.zeros(1, 1, S, S, dtype=torch.bool)
    mask[:, :, *HALVES[half](S)] = True
    return dataset.to_float(pixels.view(1, S, S, C).permute(0, 3, 1, 2)).to(device), mask.to(device)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write a picture of images (n, C, S, S), row by row."""
    picture = grid(images, columns)
    checkpoint.write_whole(path, lambda file: picture.save(file, "PNG"))


def save_gif(path: Path, images: Tensor, columns: int, durations: list[int]) -> None:
    """Write an animation of images (frames, n, C, S, S), whose frames last so many milliseconds."""
    frames = [grid(x, columns) for x in images]
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    checkpoint.write_whole(path, lambda file: frames[0].save(file, "GIF", **options))


def draw_interpolation(args: argparse.Namespace, trained: TrainedModel, labels: list[int]) -> Path:
    """The way from each of these labels to the next: the noise of one image turns into that of another, while the label
    fades. A row for each way; or, with --gif, a film, which ends where it began. Returns the path of the file.
    """
    if len(labels) < 2:
        raise UsageError("--interpolate needs two labels or more")
    path = output_path(args.output, "interpolation.gif" if args.gif else "interpolation.png")
    config, images = trained.model.config, []
    noise = image_noise(args.seed, range(len(labels)), (config.in_channels, *[config.image_size] * 2), "cpu")()
    ends = [*zip(labels, noise, strict=True)]
    ends += ends[:1] if args.gif else []
    share = torch.arange(24) / 24 if args.gif else torch.linspace(0, 1, 10)
    for (one, a), (other, b) in tqdm([*pairwise(ends)], unit="way", leave=False):
        start = torch.stack([slerp(a, b, fraction) for fraction in share])
        y, other = torch.full_like(share, one).long(), torch.full_like(share, other).long()
        images.append(sample(trained.model, trained.diffusion, y, start=start, fade=(other, share), **trained.settings))
    images = torch.cat(images)
    if args.gif:
        save_gif(path, images[:, None], 1, [60] * len(images))
    else:
        save_grid(path, images, len(share))
    return path


def draw_picture(args: argparse.Namespace, trained: TrainedModel, labels: Tensor, columns: int) -> Path:
    """A grid with an image for each label, or one of its relatives. Returns its path."""
    name = (
        "trajectory.png" if args.trajectory else "denoising.gif" if args.gif
        else "guidance.png" if args.compare_guidance else "grid.png"
    )
    path = output_path(args.output, name)
    way = timesteps(trained.settings["sampler"], trained.diffusion.T, trained.settings["steps"])
    shown = way[:: math.ceil(len(way) / (9 if args.trajectory else 40))]
    noisy = {t: [] for t in shown if args.trajectory or args.gif}  # x_t of each batch, at the timesteps shown
    weights = [dict(guidance=weight) for weight in args.compare_guidance or ()] or [{}]

    def look(t: int, x_t: Tensor, x0_hat: Tensor) -> None:
        if t in noisy:
            noisy[t].append(x_t.cpu())

    images = torch.cat([trained.draw(labels, args.batch_size, callback=look, **weight) for weight in weights])
    way = [torch.cat(x_t) for x_t in noisy.values()] + [images]

    if args.trajectory:
        save_grid(path, torch.stack(way, dim=1).flatten(0, 1), len(way))
    elif args.gif:
        save_gif(path, torch.stack(way), columns, [80] * len(way[1:]) + [2000])  # with a rest on the result
    else:
        save_grid(path, images, columns)
    return path


def draw(args: argparse.Namespace) -> Path:
    """Draw what the command line asks for. Returns the path of the file. Raises UsageError, CheckpointError."""
    trained = open_model(args)
    classes = trained.description["classes"]
    picture = args.trajectory or args.gif or args.compare_guidance or args.interpolate or args.inpaint
    if not trained.is_image and picture:
        raise UsageError("this model makes latents, not pictures: use --npz, or --labels alone")
    if args.interpolate:
        return draw_interpolation(args, trained, parse_labels(args.interpolate, classes))
    if args.inpaint:
        trained.settings["known"] = known_half(*args.inpaint, trained)
    per_class = 1 if args.trajectory or args.compare_guidance else args.per_class or 10
    labels = torch.tensor(parse_labels(args.labels, classes)).repeat_interleave(per_class)
    if args.npz:
        labels = torch.arange(args.count or 10_000) % max(len(classes), 1)
    if args.npz or not trained.is_image:
        return draw_arrays(args, trained, labels)
    return draw_picture(args, trained, labels, columns=len(labels) if per_class == 1 else per_class)


def main() -> None:
    args = parse_args()
    if RANK == 0:
        print(draw(args))
    elif args.npz:  # for a picture, one process is enough
        draw(args)


if __name__ == "__main__":
    run_script(main)
