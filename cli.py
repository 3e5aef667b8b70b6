"""What the command lines share: errors that take one line, the choice of a device, and the weights to draw with."""

import argparse
import itertools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

import checkpoint
from diffusion import SAMPLERS
from sampling import DEFAULT_STEPS, TrainedModel
from shortcut import SHORTCUTS

# torchrun tells each process its number, its number on its machine, and how many there are. Alone, it is number 0 of 1.
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
RUNS = Path("runs")
BUNDLED_WEIGHTS = Path(__file__).parent / "assets" / "dit-mnist.safetensors"
DISTILLED_WEIGHTS = BUNDLED_WEIGHTS.with_name("dit-mnist-fast.safetensors")


class UsageError(Exception):
    """The command line asks for something that cannot be done. The message is one line that names the fix."""


class WorkError(Exception):
    """Work that had begun cannot go on. The message is one line."""


def run_script(work: Callable[[], int | None], *bad_usage: type, memory: str = "lower --batch-size") -> NoReturn:
    """Do the work of a script and exit with the status that it returns, or with one line where it cannot be done.

    The status is 2 for bad usage: UsageError, CheckpointError and the exceptions given. It is 1 for work that cannot go
    on, and 130 for Ctrl-C. Other exceptions are faults in the code, and keep their traceback. memory: the fix where
    there is too little of it.
    """
    name = Path(sys.argv[0]).name
    warnings.showwarning = lambda message, *_: tqdm.write(f"{name}: warning: {message}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no half of a file is left
    try:
        sys.exit(work())
    except (UsageError, checkpoint.CheckpointError, *bad_usage) as error:
        status, message = 2, error
    except (WorkError, OSError, FloatingPointError) as error:  # OSError: a full disk, or no right to write there
        status, message = 1, error
        if isinstance(error, OSError) and error.filename:
            message = f"cannot use {error.filename} ({error.strerror}): make room there, or name another place"
    except (MemoryError, RuntimeError) as error:  # PyTorch has no classes of its own for most of these
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|not enough memory", str(error)):
            status, message = 1, f"there is too little memory: {memory}"
        elif WORLD > 1 and re.search("gloo|NCCL|[Cc]onnection", str(error)):
            gone = f"process {RANK} of {WORLD} stops, since another is gone, which torchrun names"
            status, message = 1, f"{gone} ({str(error)[:100]})"
        else:
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    # Names of files and classes may hold anything. What is printed is one line, and commands no terminal.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    print(f"{name}: error: {line}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, a UsageError, rather than a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (\S+): is ", r"\1 is ", message) + " (see --help)")


def number(kind: type, low: float, high: float = checkpoint.MOST_STEPS) -> Callable[[str], float]:
    """An argparse type: a number of this kind from low to high."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} or more" if value < low and high == checkpoint.MOST_STEPS else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"is {text[:40]}: use {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it for a text that is no number at all
    return parse


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises UsageError where it is missing."""
    mps = torch.backends.mps.is_available() and WORLD == 1  # processes cannot share the GPU of a Mac
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    name = name or next(device for device, there in available.items() if there)
    if not available[name]:
        raise UsageError(f"no {name} device here: leave --device out, or use --device cpu")
    if name == "cuda":
        gpus = torch.cuda.device_count()
        if gpus <= LOCAL_RANK:
            raise UsageError(f"more processes than the {gpus} GPUs here: lower --nproc-per-node")
        torch.set_float32_matmul_precision("high")  # TF32: much faster products, with 10 bits of mantissa
        torch.cuda.set_device(LOCAL_RANK)
    return torch.device(name)


def output_path(path: Path | None, default: str) -> Path:
    """Where to write a new file: `path`, else outputs/DEFAULT under the next free number. Makes the folder for it.

    Raises UsageError where a file is there already, or has another suffix than `default`.
    """
    stem, suffix = Path(default).stem, Path(default).suffix
    numbered = (Path("outputs") / f"{stem}-{number}{suffix}" for number in itertools.count(1))
    path = path or next(free for free in numbered if not free.exists())
    if path.suffix != suffix:
        raise UsageError(f"{path} must end in {suffix}")
    if path.exists():
        raise UsageError(f"{path} is there already: give another name, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path.parent} ({error}): name another place") from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"the folder {path.parent} may not be written: name another place")
    return path


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which weights draw, and how. `open_model` reads them."""
    flag = parser.add_argument_group("weights").add_argument
    flag("--checkpoint", type=Path, help="a file, or the folder of a run (default: the newest run, else bundled)")
    flag("--model", help="for official DiT weights, the model that they are of, such as DiT-XL/2")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the same seed draws the same images (default: 0)")
    flag("--sampler", choices=list(SAMPLERS), help="the way back from noise (default: dpm++, or for distilled weights "
         "shortcut, which goes with them alone)")
    steps = ", ".join(f"{n} for {name}" for name, n in DEFAULT_STEPS.items())
    flag("--steps", type=int, help=f"timesteps on that way (default: {steps})")
    flag("--eta", type=number(float, 0, 1), default=0.0, help="for ddim: fresh noise, 0 for none, 1 as in ddpm")
    guidance = "0 ignores the label, 1 is plain, above 1 exaggerates it; with LOW HIGH, at these timesteps only"
    flag("--guidance", type=float, nargs="+", metavar="W", help=f"{guidance} (default: what suits the weights)")
    flag("--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products; bf16 is faster on GPUs and "
         "some CPUs, and changes the images a little (default: fp32)")
    flag("--batch-size", type=number(int, 1), default=250, help="images at a time, which does not change them")
    flag("--device", choices=["cpu", "cuda", "mps"], help="(default: the best there is)")


def guidance_settings(words: list[float], timesteps: int) -> dict:
    """`--guidance W` or `--guidance W LOW HIGH` as arguments of sampling.sample. Raises UsageError."""
    weight, *interval = words
    inside = len(interval) == 2 and 0 <= interval[0] <= interval[1] < timesteps
    if interval and not (inside and all(t == int(t) for t in interval)):
        whole = "W alone, or W LOW HIGH with whole numbers"
        raise UsageError(f"--guidance takes {whole}, 0 <= LOW <= HIGH <= {timesteps - 1}")
    if not abs(weight) <= checkpoint.MOST_GUIDANCE:
        most = checkpoint.MOST_GUIDANCE
        raise UsageError(f"a guidance weight must be a finite number, {-most} to {most}: 1.5 is usual here")
    return dict(guidance=weight, interval=[int(t) for t in interval] or None)


def find_checkpoint(sampler: str | None = None) -> Path:
    """The newest run that has drawn, else the bundled weights; for the shortcut sampler, those that were distilled.

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


def open_model(args: argparse.Namespace) -> TrainedModel:
    """The weights and the settings that the flags of `add_model_flags` ask for. Raises UsageError, CheckpointError."""
    device = pick_device(args.device)
    args.checkpoint = args.checkpoint or find_checkpoint(args.sampler)
    trained = TrainedModel(*checkpoint.build(checkpoint.load(args.checkpoint, args.model), device))
    T, distilled = trained.diffusion.T, trained.model.config.shortcut
    sampler = args.sampler = args.sampler or trained.settings["sampler"]
    if distilled != (sampler == "shortcut"):
        fix = "with --sampler shortcut alone" if distilled else "with any other --sampler"
        raise UsageError(f"{args.checkpoint} was {'' if distilled else 'not '}distilled: draw from it {fix}")
    if distilled and args.guidance:
        raise UsageError(f"{args.checkpoint} was distilled with its guidance, which is fixed: set none")
    steps = min(DEFAULT_STEPS[sampler], T) if args.steps is None else args.steps
    if distilled and steps not in SHORTCUTS:
        raise UsageError(f"--steps is {steps}: use {', '.join(map(str, SHORTCUTS))}, which these weights learned")
    if not 1 <= steps <= T:
        raise UsageError(f"--steps is {steps}: use 1 to {T}, the timesteps that the model knows")
    if args.eta and sampler != "ddim":
        raise UsageError(f"--eta is {args.eta}: leave it out, or use it with --sampler ddim")
    trained.settings |= dict(seed=args.seed, sampler=sampler, steps=steps, eta=args.eta, precision=args.precision)
    if args.guidance:
        trained.settings |= guidance_settings(args.guidance, T)
    return trained
