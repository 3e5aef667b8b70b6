"""Sample images with a trained DiT: a grid, the path from noise to digit, an animation, or many for an evaluation.

    python inference.py                                     rows 0 to 9 of digits, one picture
    python inference.py --labels 3 1 4 1 5 --guidance 2
    python inference.py --trajectory
    python inference.py --interpolate 3 8 --gif --sampler shortcut --steps 2
    torchrun --nproc-per-node=4 inference.py --npz samples.npz --count 50000

This is the command line. The sampling itself is in sampling.py, and that of distilled weights in distill.py.
"""

import argparse
import errno
import math
import os
import shutil
import unicodedata
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
import cli
import dataset
from cli import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, RANK, WORLD, Parser, UsageError, number, output_path, run_script
from distill import STEP_COUNTS, ShortcutDiT, ShortcutModel
from folders import read_image
from latents import Autoencoder
from run import RUNS
from sampling import TrainedModel, crossfade, grid, image_noise, slerp, to_uint8

DEFAULT_STEPS = {**TrainedModel.default_steps, **ShortcutModel.default_steps}
HALVES = ("left", "right", "top", "bottom")


# ------------------------------------------------------------------------------------------------ weights and settings


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for weights and sampler, which evaluate.py has, too. `open_model` reads them."""
    flag = parser.add_argument_group("weights").add_argument
    flag("--checkpoint", type=Path, help="a file, or the folder of a run (default: the newest run, else bundled)")
    flag("--vae", help="for latents, the autoencoder that decodes them, a folder or name, see latents.py")
    flag("--model", help="for official DiT weights, the model that they are of, such as DiT-XL/2")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the same seed gives the same images (default: 0)")
    flag("--sampler", choices=list(DEFAULT_STEPS), help="(default: dpm++, or for distilled weights shortcut, which is "
         "only for these)")
    steps = ", ".join(f"{n} for {name}" for name, n in DEFAULT_STEPS.items())
    flag("--steps", type=int, help=f"sampling steps (default: {steps})")
    flag("--eta", type=number(float, 0, 1), default=0.0, help="for ddim: fresh noise, 0 for none, 1 as in ddpm")
    flag("--guidance", type=float, nargs="+", metavar="W", help="0 ignores the label, 1 is plain, above 1 exaggerates "
         "it; with LOW HIGH, only at these timesteps (default: what suits the weights)")
    flag("--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products; fp32 on CUDA means "
         "TF32; bf16 is faster on GPUs and some CPUs, and changes the images a little (default: fp32)")
    flag("--batch-size", type=number(int, 1), default=250, help="images at a time, which does not change them")
    flag("--device", choices=["cpu", "cuda", "mps"], help="(default: the best there is)")


def find_checkpoint(sampler: str | None = None) -> Path:
    """The newest run that has samples, else the bundled weights; for the shortcut sampler, the distilled ones.

    Raises UsageError where there are none.
    """
    if sampler == "shortcut":
        return DISTILLED_WEIGHTS
    runs = sorted(RUNS.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    runs = [path for path in runs if [*path.parent.glob("samples/*")] or not path.with_name("samples").exists()]
    path = runs[-1] if runs else BUNDLED_WEIGHTS
    if not path.is_file():
        raise UsageError("no weights yet: train some with python train.py, or give a file with --checkpoint")
    return path


def load_model(path: Path, device: torch.device | str = "cpu", model: str | None = None) -> TrainedModel:
    """The model of a checkpoint. model: the name of official weights. Raises CheckpointError."""
    state = checkpoint.load(path, model)
    if state.get("network") == ShortcutDiT.__name__:
        return ShortcutModel(*checkpoint.build(state, device, ShortcutDiT))
    return TrainedModel(*checkpoint.build(state, device))


def open_model(args: argparse.Namespace) -> TrainedModel:
    """The weights and the settings that the flags of `add_model_flags` ask for. Raises UsageError, CheckpointError."""
    args.checkpoint = args.checkpoint or find_checkpoint(args.sampler)
    trained = load_model(args.checkpoint, cli.pick_device(args.device), args.model)
    T, distilled = trained.diffusion.T, isinstance(trained, ShortcutModel)
    args.sampler = args.sampler or trained.settings["sampler"]
    if args.sampler not in trained.samplers:
        fix = "sample from it only with --sampler shortcut" if distilled else "use another --sampler"
        raise UsageError(f"{args.checkpoint} was {'' if distilled else 'not '}distilled: {fix}")
    if distilled and args.guidance:
        raise UsageError(f"{args.checkpoint} was distilled with its guidance, which is fixed: set none")
    steps = min(DEFAULT_STEPS[args.sampler], T) if args.steps is None else args.steps
    if distilled and steps not in STEP_COUNTS:
        raise UsageError(f"--steps is {steps}: use {', '.join(map(str, STEP_COUNTS))}, which these weights learned")
    if not 1 <= steps <= T:
        raise UsageError(f"--steps is {steps}: use 1 to {T}, the timesteps that the model knows")
    if args.eta and args.sampler != "ddim":
        raise UsageError(f"--eta is {args.eta}: leave it out, or use it with --sampler ddim")
    trained.settings |= dict(
        seed=args.seed, sampler=args.sampler, steps=steps, eta=args.eta, precision=args.precision
    )
    if args.guidance:
        trained.settings |= cli.guidance_settings(args.guidance, T)
    if args.vae:
        if trained.is_image:
            raise UsageError(f"{args.checkpoint} makes images, and --vae is for latents: leave it out")
        trained.autoencoder = Autoencoder(args.vae, trained.device)
        trained.autoencoder.decode(torch.zeros(1, *trained.shape))  # raises UsageError where it does not fit
    return trained


# ---------------------------------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser("inference.py", "Sample images with a trained DiT.")
    what = parser.add_argument_group("what to sample")
    mode = what.add_mutually_exclusive_group()
    mode.add_argument("--trajectory", action="store_true", help="a row for each label, from noise to image")
    mode.add_argument("--gif", action="store_true", help="an animation of the reverse process")
    weight = number(float, -checkpoint.MAX_GUIDANCE, checkpoint.MAX_GUIDANCE)
    mode.add_argument("--compare-guidance", type=weight, nargs="+", metavar="W", help="a row for each guidance scale")
    mode.add_argument("--npz", type=Path, metavar="FILE", help="--count images as arr_0 (uint8, NHWC), and labels")
    what.add_argument("--interpolate", nargs="+", metavar="L", help="a row from each label to the next; with --gif an "
                      "animation")
    what.add_argument("--inpaint", nargs=2, metavar=("HALF", "IMAGE"), help="keep a half of this image file, left, "
                      "right, top or bottom, and sample the other as --labels say")
    what.add_argument("--labels", nargs="+", metavar="L", help="classes or ranges, a row for each (default: 0-9)")
    what.add_argument("--per-class", type=number(int, 1, 10_000), help="images a label; 1 puts all in one row "
                      "(default: 10)")
    what.add_argument("--count", type=number(int, 1, 10**6), help="images in the --npz file (default: 10000)")
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
        raise UsageError("--trajectory and --compare-guidance sample one image a label: leave --per-class out")
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
    # Where classes have numbers as names, a number is a name. Elsewhere it counts the classes from 0.
    numbered = {} if any(name.isdecimal() for name in classes) else {str(i): i for i in range(len(classes))}
    known = numbered | {name: i for i, name in enumerate(classes)}
    labels = []
    for word in words:
        word = unicodedata.normalize("NFC", word)
        first, dash, last = word.partition("-")
        if word in known:
            labels.append(known[word])
        elif dash and {first, last} <= known.keys() and known[first] <= known[last]:
            labels += range(known[first], known[last] + 1)
        else:
            numbers = f"numbers 0 to {len(classes) - 1}, " if numbered else ""
            names = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise UsageError(f"no class {word!r}: use {numbers}names or a rising range of them: {names}")
    return labels


# ------------------------------------------------------------------------------------------------- what can be sampled


def save_arrays(args: argparse.Namespace, trained: TrainedModel, labels: Tensor) -> Path:
    """Write the .npz that --npz asks for. Latents, which have no picture, become an .npz in any case.

    The images are uint8 (n, S, S, C), or latents float32 (n, C, S, S) where no --vae decodes them. With --npz the
    processes of torchrun share the work, and process 0 writes. Returns the path.
    """
    path = output_path(args.npz or args.output, "latents.npz")
    world, decoded = WORLD if args.npz else 1, trained.is_image or args.vae
    pixels = 3 * trained.autoencoder.factor**2 * trained.shape[1] ** 2 if args.vae else math.prod(trained.shape)
    size = len(labels) * pixels * (1 if decoded else 4)
    if shutil.disk_usage(path.parent).free < size:  # before hours of work, and not after
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    mine = range(len(labels) * RANK // world, len(labels) * (RANK + 1) // world)  # this process's part
    images = trained.sample(labels[mine], args.batch_size, mine, show_progress=RANK == 0) if mine else None
    if decoded and mine:
        parts = [to_uint8(trained.to_images(part)) for part in images.split(args.batch_size)]
        images = torch.cat(parts).permute(0, 2, 3, 1)
    if world > 1:
        gathered = [None] * world if RANK == 0 else None
        dist.init_process_group("gloo")
        dist.gather_object(images, gathered)
        dist.destroy_process_group()
        images = torch.cat([part for part in gathered if part is not None]) if RANK == 0 else None
    if RANK == 0:
        arrays = dict(arr_0=images.numpy(), labels=labels.numpy())
        checkpoint.write_whole(path, lambda file: np.savez(file, **arrays))
    return path


def read_half(half: str, path: str, trained: TrainedModel) -> tuple[Tensor, Tensor]:
    """A file's image, and a mask that is True in the half to keep: `inpaint` of TrainedModel. Raises DataError."""
    C, S, _ = trained.shape
    image = dataset.to_float(read_image(Path(path), "L" if C == 1 else "RGB", S))[None]
    first = torch.arange(S) < S // 2
    masks = {"left": first, "right": ~first, "top": first[:, None], "bottom": ~first[:, None]}
    return image.to(trained.device), masks[half].expand(1, 1, S, S).to(trained.device)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write a picture of images (n, C, S, S), row by row."""
    picture = grid(images, columns)
    checkpoint.write_whole(path, lambda file: picture.save(file, "PNG"))


def save_gif(path: Path, images: Tensor, columns: int, durations: list[int]) -> None:
    """Write an animation of images (frames, n, C, S, S), whose frames last so many milliseconds."""
    frames = [grid(x, columns) for x in images]
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    checkpoint.write_whole(path, lambda file: frames[0].save(file, "GIF", **options))


def save_interpolation(args: argparse.Namespace, trained: TrainedModel, labels: list[int]) -> Path:
    """Write the images from each of these labels to the next: the noise moves from one image's to the other's, while
    one label fades into the other. A row for each pair, or with --gif an animation, which ends where it began. Returns
    the path.
    """
    if len(labels) < 2:
        raise UsageError("--interpolate needs two labels or more")
    if trained.settings["steps"] == 1:  # a mixture of two predictions, which is a mixture of pixels
        warnings.warn("in one step, one digit would only fade into the other: interpolating in 2 steps", stacklevel=2)
        trained.settings["steps"] = 2
    path = output_path(args.output, "interpolation.gif" if args.gif else "interpolation.png")
    noise = image_noise(args.seed, range(len(labels)), trained.shape, "cpu")()
    ends = list(zip(labels, noise, strict=True))
    if args.gif:
        ends.append(ends[0])
    fractions = torch.arange(24) / 24 if args.gif else torch.linspace(0, 1, 10)
    guidance = {name: trained.settings[name] for name in ("guidance", "guidance_interval")}
    images = []
    for (label, a), (next_label, b) in tqdm(list(pairwise(ends)), unit="pair", leave=False):
        start = torch.stack([slerp(a, b, fraction) for fraction in fractions])
        y = torch.full((len(fractions),), label)
        one, other = (trained.predictor(torch.full_like(y, n), **guidance) for n in (label, next_label))
        predict = crossfade(one, other, fractions.to(trained.device))
        images.append(trained.sample_batch(y, start=start, predict=predict, **trained.settings).cpu())
    images = trained.to_images(torch.cat(images))
    if args.gif:
        save_gif(path, images[:, None], 1, [60] * len(images))
    else:
        save_grid(path, images, len(fractions))
    return path


def save_trajectory(args: argparse.Namespace, trained: TrainedModel, labels: Tensor, columns: int) -> Path:
    """Write x_t at some timesteps of the reverse process, and the images that it ends with: a row for each label, or
    with --gif an animation. Returns its path.
    """
    path = output_path(args.output, "denoising.gif" if args.gif else "trajectory.png")
    timesteps = trained.timesteps(trained.settings["sampler"], trained.settings["steps"])
    noisy = {t: [] for t in timesteps[:: math.ceil(len(timesteps) / (40 if args.gif else 9))]}  # x_t of each batch

    def callback(t: int, x_t: Tensor, x0_hat: Tensor) -> None:
        if t in noisy:
            noisy[t].append(x_t.cpu())

    images = trained.sample(labels, args.batch_size, callback=callback)
    frames = torch.stack([trained.to_images(x) for x in (*map(torch.cat, noisy.values()), images)])
    if args.gif:
        save_gif(path, frames, columns, [80] * len(noisy) + [2000])  # with a rest on the result
    else:
        save_grid(path, frames.transpose(0, 1).flatten(0, 1), len(frames))
    return path


def generate(args: argparse.Namespace) -> Path:
    """Sample what the command line asks for. Returns the path of the file.

    Raises UsageError, CheckpointError, DataError, FloatingPointError.
    """
    trained = open_model(args)
    classes = trained.description["classes"]
    picture = args.trajectory or args.gif or args.compare_guidance or args.interpolate or args.inpaint
    if not trained.is_image and (args.inpaint or picture and not args.vae):
        raise UsageError("this model makes latents, not pictures: use --vae, --npz, or only --labels (no --inpaint)")
    if args.interpolate:
        return save_interpolation(args, trained, parse_labels(args.interpolate, classes))
    if args.inpaint:
        trained.settings["inpaint"] = read_half(*args.inpaint, trained)
    per_class = 1 if args.trajectory or args.compare_guidance else args.per_class or 10
    labels = torch.tensor(parse_labels(args.labels, classes)).repeat_interleave(per_class)
    if args.npz:
        labels = torch.arange(args.count or 10_000) % max(len(classes), 1)
    if args.npz or not (trained.is_image or args.vae):
        return save_arrays(args, trained, labels)
    columns = len(labels) if per_class == 1 else per_class
    if args.trajectory or args.gif:
        return save_trajectory(args, trained, labels, columns)
    path = output_path(args.output, "guidance.png" if args.compare_guidance else "grid.png")
    scales = args.compare_guidance or [trained.settings["guidance"]]
    images = torch.cat([trained.sample(labels, args.batch_size, guidance=scale) for scale in scales])
    save_grid(path, trained.to_images(images), columns)
    return path


def main() -> None:
    args = parse_args()
    if RANK == 0:
        print(generate(args))
    elif args.npz:  # for a picture, one process is enough
        generate(args)


if __name__ == "__main__":
    run_script(main)
