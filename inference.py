"""Draw images with a trained DiT: a grid, the way from noise to digit, an animation, or many for an evaluation.

    python inference.py                                     rows 0 to 9 of digits, one picture
    python inference.py --labels 3 1 4 1 5 --guidance 2
    python inference.py --trajectory
    torchrun --nproc-per-node=4 inference.py --npz samples.npz --count 50000
"""

import argparse
import itertools
import math
import os
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
from diffusion import SAMPLERS, Diffusion, guide, spaced_timesteps
from dit import DiT, DiTConfig

BUNDLED_WEIGHTS = Path(__file__).parent / "assets" / "dit-mnist.safetensors"
RUNS = Path("runs")
DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "dpm++": 20}
DEFAULT_GUIDANCE = 1.5


def seeded(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator number `index` of a seed, both below 2^32."""
    # PyTorch's CPU generator keeps 32 bits of a seed. The golden ratio sets the numbers of different seeds far apart.
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + index) % 2**32)


class ImageNoise:
    """Gaussian noise (n, *shape) for the images `indices` of a seed; each call gives the next.

    Every image has a generator of its own, on the CPU: image i of a seed meets the same noise in any batch and on any
    device.
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
    """Images (n, C, S, S) in [-1, 1] of the labels (n,), as one batch.

    indices:  the number of each image within the seed, 0 ... n - 1 unless told
    callback: called with (t, x_t, x0_hat) at each step
    """
    config, device = model.config, model.pos_embed.device
    shape = (config.in_channels, config.image_size, config.image_size)
    noise = ImageNoise(seed, range(len(labels)) if indices is None else indices, shape, device)
    predict = guide(model, labels.to(device), config.num_classes, guidance if config.num_classes else 1.0, interval)
    options = {"ddpm": dict(noise=noise), "ddim": dict(noise=noise, eta=eta), "dpm++": {}}[sampler]
    timesteps = spaced_timesteps(diffusion.T, steps)
    return SAMPLERS[sampler](diffusion, predict, noise(), timesteps, clip=clip, callback=callback, **options)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 0 ... 255: rounded, and clamped before the cast, which would wrap around."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images (n, C, S, S) in [-1, 1], C = 1 or 3, as one picture, row by row. Small ones are enlarged, to be seen."""
    n, C, S, _ = images.shape
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (S + gap) + gap, columns * (S + gap) + gap, C), 64, np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        top, left = gap + i // columns * (S + gap), gap + i % columns * (S + gap)
        canvas[top : top + S, left : left + S] = image
    picture = Image.fromarray(canvas[:, :, 0] if C == 1 else canvas)
    scale = max(1, 64 // S)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


# ------------------------------------------------------------------------------------------------------ command line


class UsageError(Exception):
    """The command line asks for something that cannot be; the message is one line that names the fix."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every help text, except where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw images with a trained DiT.", formatter_class=HelpFormatter)
    what = parser.add_argument_group("what to draw")
    mode = what.add_mutually_exclusive_group()
    mode.add_argument("--trajectory", action="store_true", help="a row a label, from noise to image")
    mode.add_argument("--gif", action="store_true", help="an animation of the denoising")
    mode.add_argument("--compare-guidance", type=float, nargs="+", metavar="W", help="a row a weight, same noise")
    mode.add_argument("--npz", type=Path, metavar="FILE", help="--count images as arr_0 (uint8, NHWC), and labels")
    what.add_argument("--labels", nargs="+", metavar="L", help="classes or ranges, a row each (default: 0-9)")
    what.add_argument("--per-class", type=int, help="images of each label, 1: all in one row (default: 10)")
    what.add_argument("--count", type=int, help="images in the --npz file (default: 10000)")
    what.add_argument("--output", type=Path, help="a new .png, or .gif for --gif (default: a new name in outputs/)")
    add_model_flags(parser)
    return parser.parse_args(argv)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which weights draw, and how; see `open_model`."""
    what = parser.add_argument_group("weights")
    what.add_argument("--checkpoint", type=Path, help="a file, or a run (default: the newest run, else bundled)")
    what.add_argument("--model", help="which model official DiT weights are of: DiT-XL/2, say")
    what = parser.add_argument_group("sampling")
    what.add_argument("--seed", type=int, default=0, help="the same seed draws the same images; 0 to 2^32 - 1")
    what.add_argument("--sampler", choices=list(SAMPLERS), default="dpm++", help="the way back from noise")
    steps = ", ".join(f"{n} for {name}" for name, n in DEFAULT_STEPS.items())
    what.add_argument("--steps", type=int, help=f"network calls on that way (default: {steps})")
    guidance = "0 ignores labels, 1 plain, above 1 guided (default: what suits the weights)"
    what.add_argument("--eta", type=float, default=0.0, help="for ddim: fresh noise, 0 none, 1 as in ddpm")
    what.add_argument("--guidance", type=float, help=guidance)
    interval = "guide at these timesteps only (default: what suits the weights; with --guidance, all)"
    what.add_argument("--guidance-interval", type=int, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    what.add_argument("--batch-size", type=int, default=250, help="images at a time; does not change them")
    what.add_argument("--device", choices=["cpu", "cuda", "mps"], help="(default: the best there is)")


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises UsageError where it is missing."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # processes cannot share a Mac's GPU
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and alone, "cpu": True}
    name = name or next(device for device, there in available.items() if there)
    if not available[name]:
        raise UsageError(f"no {name} device here: leave --device out, or use --device cpu")
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc-per-node")
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(local_rank)
    return torch.device(name)


def find_checkpoint() -> Path:
    """The newest run, else the bundled weights. Raises UsageError where there is neither."""
    runs = sorted(RUNS.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    path = runs[-1] if runs else BUNDLED_WEIGHTS
    if not path.is_file():
        raise UsageError("no weights yet: train some with python train.py, or give a file with --checkpoint")
    return path


def parse_labels(words: list[str] | None, classes: list[str]) -> list[int]:
    """["3", "7-9", "cat"] -> class numbers; None -> the first ten, or ten rows of anything. Raises UsageError."""
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


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for what argparse cannot see: values out of range, or that do not go together."""
    for flag, value in (("--per-class", args.per_class), ("--count", args.count)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}: use 1 or more")
    if args.npz and (args.labels or args.output or args.per_class):
        raise UsageError("--npz names the file and takes the labels in turn: leave out --output, --labels, --per-class")
    if args.count and not args.npz:
        raise UsageError("--count goes with --npz: use --per-class")
    if (args.trajectory or args.compare_guidance) and args.per_class:
        raise UsageError("--trajectory and --compare-guidance draw one image a label: leave --per-class out")
    if not all(map(math.isfinite, args.compare_guidance or ())):
        raise UsageError("a guidance weight must be a finite number: 1.5 is usual here")


def open_model(args: argparse.Namespace) -> tuple[Callable, Diffusion, DiTConfig, dict]:
    """(draw, diffusion, config, description) as the flags of `add_model_flags` say; `draw` is `sample` with the model
    and the settings filled in, which stand in args from then on. Raises UsageError, CheckpointError."""
    device = pick_device(args.device)
    args.checkpoint = args.checkpoint or find_checkpoint()
    state = checkpoint.load(args.checkpoint, args.model)
    model, diffusion, description = checkpoint.build(state, device)
    T = diffusion.T
    args.steps = min(DEFAULT_STEPS[args.sampler], T) if args.steps is None else args.steps
    if args.guidance is None:
        args.guidance = description["guidance"]
        args.guidance_interval = args.guidance_interval or description["interval"]
    if args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}: use 1 or more")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed is {args.seed}: use 0 to {2**32 - 1}")
    if not 1 <= args.steps <= T:
        raise UsageError(f"--steps is {args.steps}: use 1 to {T}, the timesteps that the model knows")
    if not 0 <= args.eta <= 1 or (args.eta and args.sampler != "ddim"):
        raise UsageError(f"--eta is {args.eta}: use 0 to 1, with --sampler ddim")
    if not math.isfinite(args.guidance):
        raise UsageError("a guidance weight must be a finite number: 1.5 is usual here")
    if args.guidance_interval and not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] < T:
        raise UsageError(f"--guidance-interval takes LOW and HIGH, 0 <= LOW <= HIGH <= {T - 1}")
    draw = partial(
        sample, model, diffusion, seed=args.seed, sampler=args.sampler, steps=args.steps, eta=args.eta,
        guidance=args.guidance, interval=args.guidance_interval, clip=is_image(model.config),
    )
    return draw, diffusion, model.config, description


def is_image(config: DiTConfig) -> bool:
    """Or else the latent of an autoencoder, which has no picture and does not stay in [-1, 1]."""
    return config.in_channels in (1, 3)


def output_path(path: Path | None, default: str) -> Path:
    """The path, or outputs/DEFAULT under the next free number; in a folder that is there. Raises UsageError."""
    suffix = Path(default).suffix
    if path is None:
        names = (f"{Path(default).stem}-{number}{suffix}" for number in itertools.count(1))
        path = next(Path("outputs") / name for name in names if not (Path("outputs") / name).exists())
    if path.suffix != suffix:
        raise UsageError(f"{path} must end in {suffix}")
    if path.exists():
        raise UsageError(f"{path} is there already: give another name, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path.parent} ({error}): name another place") from error
    return path


def write_npz(
    path: Path, draw: Callable, labels: Tensor, shape: tuple[int, ...], dtype: type, batch_size: int, shared: bool
) -> None:
    """One image per label (count,), as an .npz of arr_0 (count, *shape) and labels.

    draw(labels, indices) returns a part of arr_0. It grows on the disk, so that memory holds one batch. With `shared`,
    the processes of torchrun share the work, and the file must lie where all of them can write.
    """
    rank, world = (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))) if shared else (0, 1)
    array_file, zip_file = path.with_name(path.name + ".array"), path.with_name(path.name + ".partial")
    if world > 1:
        torch.distributed.init_process_group("gloo")
    if rank == 0:
        np.lib.format.open_memmap(array_file, "w+", dtype, (len(labels), *shape)).flush()
        if hasattr(os, "posix_fallocate"):  # a disk that is too small shows now
            with open(array_file, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array_file.stat().st_size)
    if world > 1:
        torch.distributed.barrier()
    array = np.lib.format.open_memmap(array_file, "r+")
    with tqdm(total=len(labels), unit="image", disable=rank > 0) as bar:
        for first in range(rank * batch_size, len(labels), world * batch_size):
            indices = range(first, min(first + batch_size, len(labels)))
            array[first : indices.stop] = draw(labels[first : indices.stop], indices)
            bar.update(min(world * batch_size, len(labels) - first))
    array.flush()
    del array  # closes the file, which Windows wants before it is removed
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        with zipfile.ZipFile(zip_file, "w") as file:
            file.write(array_file, "arr_0.npy")
            with file.open("labels.npy", "w") as member:
                np.save(member, labels.numpy())
        os.replace(zip_file, path)
        array_file.unlink()


def draw_arrays(args: argparse.Namespace, draw: Callable, labels: Tensor, config: DiTConfig) -> Path:
    """The .npz that --npz asks for; of latents, which have no picture, an .npz in any case. Its path."""
    C, S = config.in_channels, config.image_size
    shape, dtype = ((S, S, C), np.uint8) if is_image(config) else ((C, S, S), np.float32)

    def draw_array(labels: Tensor, indices: range) -> np.ndarray:
        images = draw(labels, indices=indices).cpu()
        return to_uint8(images).permute(0, 2, 3, 1).numpy() if is_image(config) else images.numpy()

    path = output_path(args.npz or args.output, "latents.npz")
    write_npz(path, draw_array, labels, shape, dtype, args.batch_size, shared=args.npz is not None)
    return path


def draw_picture(args: argparse.Namespace, draw: Callable, labels: Tensor, columns: int, timesteps: list[int]) -> Path:
    """A grid of one image a label, or one of its relatives; its path."""
    name = (
        "trajectory.png" if args.trajectory else "denoising.gif" if args.gif
        else "guidance.png" if args.compare_guidance else "grid.png"
    )
    path = output_path(args.output, name)
    shown = timesteps[:: math.ceil(len(timesteps) / (9 if args.trajectory else 40))]  # of the way, if it is shown
    noisy = {t: [] for t in shown if args.trajectory or args.gif}
    weights = [dict(guidance=weight) for weight in args.compare_guidance or ()] or [{}]
    parts = [slice(i, i + args.batch_size) for i in range(0, len(labels), args.batch_size)]
    with tqdm(total=len(weights) * len(parts) * len(timesteps), desc="sampling", unit="step", leave=False) as bar:
        def callback(t: int, x_t: Tensor, x0_hat: Tensor) -> None:
            bar.update()
            if t in noisy:
                noisy[t].append(x_t.cpu())

        images = torch.cat([
            draw(labels[part], indices=range(len(labels))[part], callback=callback, **weight).cpu()
            for weight in weights
            for part in parts
        ])
    way = [torch.cat(x_t) for x_t in noisy.values()] + [images]

    if args.trajectory:
        grid(torch.stack(way, dim=1).flatten(0, 1), len(way)).save(path)
    elif args.gif:
        frames = [grid(x, columns) for x in way]
        durations = [80] * len(way[1:]) + [2000]  # milliseconds; rest on the result
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    else:
        grid(images, columns).save(path)
    return path


def run(args: argparse.Namespace) -> Path:
    """Draw what the command line asks for; the path of the file. Raises UsageError, CheckpointError."""
    check(args)
    if args.compare_guidance:
        args.guidance = 1.0  # each row has its own
    draw, diffusion, config, description = open_model(args)
    classes = description["classes"]
    if not is_image(config) and (args.trajectory or args.gif or args.compare_guidance):
        raise UsageError("this model makes latents, not pictures: use --npz, or --labels alone")
    per_class = 1 if args.trajectory or args.compare_guidance else args.per_class or 10
    labels = torch.tensor(parse_labels(args.labels, classes)).repeat_interleave(per_class)
    if args.npz:
        labels = torch.arange(args.count or 10_000) % max(len(classes), 1)
    if args.npz or not is_image(config):
        return draw_arrays(args, draw, labels, config)
    columns = len(labels) if per_class == 1 else per_class
    return draw_picture(args, draw, labels, columns, spaced_timesteps(diffusion.T, args.steps))


def main() -> None:
    args, rank = parse_args(), int(os.environ.get("RANK", 0))
    if rank > 0 and not args.npz:
        return  # one process is enough for a picture
    try:
        path = run(args)
    except (UsageError, checkpoint.CheckpointError) as error:
        sys.exit(fail(error))
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(fail(error, status=1))
    except KeyboardInterrupt:
        sys.exit(130)
    if rank == 0:
        print(path)


def fail(error: object, status: int = 2) -> int:
    """Print an error as one line; the exit status, by default that of bad usage."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
