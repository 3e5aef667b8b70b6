"""Sample images with a trained DiT: a grid, the path from noise to digit, an animation.

    python inference.py                                     rows 0 to 9 of digits, one picture
    python inference.py --labels 3 1 4 1 5 --guidance 2
    python inference.py --trajectory
    python inference.py --interpolate 3 8 --gif --sampler shortcut --steps 2
    python inference.py --from drawing.png --strength 0.6   your image, with noise, made into each digit

This is the command line. The sampling itself is in sampling.py, and that of distilled weights in shortcut.py. From
Python, checkpoint.load_model(path).sample([3, 1, 4]) is enough. tools/sample_npz.py samples many images into one file.
"""

import argparse
import math
import signal
import warnings
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
from torch import Tensor
from tqdm import tqdm

import dataset
import folders
from checkpoint import write_whole
from cli import RANK, Parser, UsageError, number, output_path, run_script, usage
from model_flags import add_model_flags, open_model, parse_labels
from sampling import MAX_GUIDANCE, TrainedModel, crossfade, grid, image_noise, slerp

HALVES = ("left", "right", "top", "bottom")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser("inference.py", "Sample images with a trained DiT.")
    what = parser.add_argument_group("what to sample")
    mode = what.add_mutually_exclusive_group()
    mode.add_argument("--trajectory", action="store_true", help="a row for each label, from noise to image")
    mode.add_argument("--gif", action="store_true", help="an animation of the reverse process")
    weight = number(float, -MAX_GUIDANCE, MAX_GUIDANCE)
    mode.add_argument("--compare-guidance", type=weight, nargs="+", metavar="W", help="a row for each guidance scale")
    start = what.add_mutually_exclusive_group()
    start.add_argument("--interpolate", nargs="+", metavar="L", help="a row from each label to the next; with --gif an "
                       "animation")
    start.add_argument("--inpaint", nargs=2, metavar=("HALF", "IMAGE"), help="keep a half of this image file, left, "
                       "right, top or bottom, and sample the other as --labels say")
    start.add_argument("--from", dest="image", metavar="IMAGE", help="begin with this image file, with noise up to "
                       "--strength, and make it what --labels say")
    what.add_argument("--strength", type=number(float, 0, 1), help="for --from: 0 keeps the image, 1 is all noise "
                      "(default: 0.6)")
    what.add_argument("--labels", nargs="+", metavar="L", help="classes or ranges, a row for each (default: 0-9)")
    what.add_argument("--per-class", type=number(int, 1, 10_000), help="images a label; 1 puts all in one row "
                      "(default: 10)")
    what.add_argument("--output", type=Path, help="a new .png, or .gif for --gif (default: a new name in outputs/)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    one_each = args.trajectory or args.compare_guidance
    if args.interpolate and (one_each or args.labels or args.per_class or args.eta or args.sampler == "ddpm"):
        raise UsageError("--interpolate goes with --gif, and with samplers that add no noise: leave other flags out")
    if args.inpaint and args.inpaint[0] not in HALVES:
        raise UsageError(f"--inpaint keeps a half, one of {', '.join(HALVES)}: not {args.inpaint[0]!r}")
    if args.strength is not None and not args.image:
        raise UsageError("--strength goes with --from IMAGE: leave it out")
    if one_each and args.per_class:
        raise UsageError("--trajectory and --compare-guidance sample one image a label: leave --per-class out")
    if args.compare_guidance:  # each row has its own weight, which acts throughout or at the LOW HIGH of --guidance
        weight = next((w for w in args.compare_guidance if w != 1), 1.0)  # in their place for `open_model` to check
        args.guidance = [weight, *(args.guidance or [])[1:]]
    return args


# ------------------------------------------------------------------------------------------------- what can be sampled


def read_image(path: str, trained: TrainedModel) -> Tensor:
    """An image file as the network knows images, (1, C, S, S) in [-1, 1]. Raises DataError."""
    C, S, _ = trained.shape
    return dataset.to_float(folders.read_image(Path(path), "L" if C == 1 else "RGB", S))[None].to(trained.device)


def half_mask(half: str, S: int) -> Tensor:
    """A mask (1, 1, S, S) that is True in the half to keep: `inpaint` of TrainedModel."""
    first = torch.arange(S) < S // 2
    masks = {"left": first, "right": ~first, "top": first[:, None], "bottom": ~first[:, None]}
    return masks[half].expand(1, 1, S, S)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write a picture of images (n, C, S, S), row by row."""
    picture = grid(images, columns)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def save_gif(path: Path, images: Tensor, columns: int, durations: list[int]) -> None:
    """Write an animation of images (frames, n, C, S, S), whose frames last so many milliseconds."""
    frames = [grid(x, columns) for x in images]
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_whole(path, lambda file: frames[0].save(file, "GIF", **options))


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
    guidance = [trained.settings[name] for name in ("guidance", "guidance_interval")]
    timesteps = trained.timesteps(trained.settings["steps"])
    images = []
    for (label, a), (next_label, b) in tqdm(list(pairwise(ends)), unit="pair", leave=False):
        start = torch.stack([slerp(a, b, fraction) for fraction in fractions])
        y = torch.full((len(fractions),), label)
        one, other = (trained.predictor(torch.full_like(y, n), timesteps, *guidance) for n in (label, next_label))
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
    timesteps = trained.timesteps(trained.settings["steps"], trained.settings.get("strength", 1.0))
    noisy = {t: [] for t in timesteps[:: math.ceil(len(timesteps) / (40 if args.gif else 9))]}  # x_t of each batch

    def callback(t: int, x_t: Tensor, x0_hat: Tensor) -> None:
        if t in noisy:
            noisy[t].append(x_t.cpu())

    images = trained.sample(labels, args.batch_size, progress="sampling", callback=callback)
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
    if not trained.is_image and (args.inpaint or args.image or not args.vae):
        raise UsageError("this model makes latents: add --vae, without --inpaint or --from, or use tools/sample_npz.py")
    if args.interpolate:
        return save_interpolation(args, trained, parse_labels(args.interpolate, classes))
    if args.inpaint:
        half, path = args.inpaint
        trained.settings["inpaint"] = read_image(path, trained), half_mask(half, trained.shape[1]).to(trained.device)
    if args.image:
        strength = 0.6 if args.strength is None else args.strength
        trained.settings |= dict(image=read_image(args.image, trained), strength=strength)
        with usage():
            trained.timesteps(trained.settings["steps"], strength)
    per_class = 1 if args.trajectory or args.compare_guidance else args.per_class or 10
    labels = torch.tensor(parse_labels(args.labels, classes)).repeat_interleave(per_class)
    columns = len(labels) if per_class == 1 else per_class
    if args.trajectory or args.gif:
        return save_trajectory(args, trained, labels, columns)
    path = output_path(args.output, "guidance.png" if args.compare_guidance else "grid.png")
    scales = args.compare_guidance or [trained.settings["guidance"]]
    images = [trained.sample(labels, args.batch_size, progress="sampling", guidance=scale) for scale in scales]
    save_grid(path, trained.to_images(torch.cat(images)), columns)
    return path


def main() -> None:
    args = parse_args()
    if RANK == 0:  # for a picture, one process is enough
        print(generate(args))


if __name__ == "__main__":
    run_script(main)
