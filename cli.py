"""What the command lines share: errors that take one line, argument types, the choice of a device, new file names."""

import argparse
import io
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from tqdm import tqdm

from checkpoint import MAX_GUIDANCE, MAX_STEPS, CheckpointError, refusing
from dataset import DataError, Images
from dit import MODELS, DiTConfig
from speed import best_precision, threads, unusable


def process_numbers() -> tuple[int, int, int]:
    """The number of this process, its number on its machine, and how many there are, as torchrun sets them.

    A process that torchrun did not start is number 0 of 1, whatever a variable says; `check_environment` refuses it.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, local_rank, world, *_ = values = [os.environ.get(name, "") for name in names]
    numbers = all(value.isdecimal() for value in (rank, local_rank, world))
    if not all(values) or not numbers or not max(int(rank), int(local_rank)) < int(world):
        return 0, 0, 1
    return int(rank), int(local_rank), int(world)


RANK, LOCAL_RANK, WORLD = process_numbers()
ASSETS = Path(__file__).parent / "assets"
BUNDLED_WEIGHTS = ASSETS / "dit-mnist.safetensors"
DISTILLED_WEIGHTS = ASSETS / "dit-mnist-fast.safetensors"
NOT_SETTINGS = ("help", "run_dir", "resume")  # flags that a run does not keep


class UsageError(Exception):
    """The command line asks for something that cannot be done. The message is one line that names the fix."""


class WorkError(Exception):
    """Work that had begun cannot continue. The message is one line."""


def check_environment() -> None:
    """Raises UsageError where the environment names several processes, but not as torchrun does."""
    rank, world = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if (rank, world) != (str(RANK), str(WORLD)):
        raise UsageError(f"RANK is {rank!r} and WORLD_SIZE {world!r} here: start with torchrun, or unset both")


class Output:
    """A stream for what is printed, which stops no work when it goes away: a pipe that is closed, a disk that is full.

    Then what is written to it is lost.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or io.StringIO()  # a closed stderr is None
        with suppress(AttributeError, OSError):
            self.stream.reconfigure(errors="replace")  # for names that the terminal cannot show

    def write(self, text: str) -> int | None:
        return self.attempt("write", text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, method: str, *arguments: str) -> int | None:
        """Call a method of the stream. Where it fails, what is still buffered, and all that follows, goes nowhere."""
        with suppress(OSError, ValueError):
            return getattr(self.stream, method)(*arguments)
        with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def repeat_signal(ignored: "sys.UnraisableHookArgs") -> None:
    """Send a signal once more whose exception was lost, because it was raised while Python removed an object."""
    again = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(ignored.exc_type)
    if again is None:
        sys.__unraisablehook__(ignored)
    else:
        with suppress(RuntimeError):  # no thread can begin while Python ends
            threading.Timer(0.01, os.kill, (os.getpid(), again)).start()


def run_script(work: Callable[[], int | None], memory: str = "lower --batch-size") -> NoReturn:
    """Do the work of a script and exit with the status that it returns, or with one line where it cannot be done.

    The status is 2 for bad usage (UsageError, CheckpointError, DataError), 1 for work that cannot continue,
    and 130 for Ctrl-C. Other exceptions are faults in the code, and keep their traceback.

    memory: the fix where there is too little of it
    """
    name = Path(sys.argv[0]).name
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
    if not isinstance(sys.stderr, Output):
        sys.stderr = Output(sys.stderr)
    warnings.showwarning = lambda message, *_: tqdm.write(f"{name}: warning: {message}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no half of a file is left
    sys.unraisablehook = repeat_signal
    try:
        check_environment()
        status = work()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        status, message = explain(error, memory)
    # Names of files and classes may hold anything. What is printed is one line, and commands no terminal.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    line = line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}"  # a file can hold a name of any length
    print(f"{name}: error: {line}", file=sys.stderr)
    sys.exit(status)


def explain(error: Exception, memory: str) -> tuple[int, str]:
    """The exit status and the message for an exception, see `run_script`. Raises those that are faults in the code."""
    if isinstance(error, UsageError | CheckpointError | DataError):
        return 2, str(error)
    if isinstance(error, WorkError | FloatingPointError):
        return 1, str(error)
    if isinstance(error, OSError):  # a full disk, or no right to write there
        place = f"cannot use {error.filename} ({error.strerror}): make room there, or name another place"
        return 1, place if error.filename else str(error)
    # PyTorch has no exceptions of its own for a CPU without memory, or for a process that is gone.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return 1, f"there is too little memory: {memory}"
    if isinstance(error, RuntimeError) and WORLD > 1:
        gone = f"process {RANK} of {WORLD} stops, since another is gone, which torchrun names"
        return 1, f"{gone} ({str(error)[:100]})"
    raise error


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, a UsageError, rather than a page of usage.

    presets: the defaults of a training that depend on the device: {"cpu": {"lr": 7e-3, ...}, ...}
    """

    def __init__(self, prog: str, description: str, presets: dict[str, dict] | None = None):
        super().__init__(prog, description=description)
        self.presets = presets or {}

    def group(self, title: str) -> Callable[..., None]:
        """A group of flags, as a function that adds one: flag("--lr", default, help, **options of add_argument)."""
        group = self.add_argument_group(title)

        def flag(name: str, default: object, help: str, **options) -> None:
            key = name.lstrip("-").replace("-", "_")
            shown = ", ".join(f"{preset[key]} on {device}" for device, preset in self.presets.items() if key in preset)
            if isinstance(default, bool):
                options["action"] = argparse.BooleanOptionalAction
            if shown or "(default" not in help:
                help = f"{help} (default: {shown or '%(default)s'})"
            group.add_argument(name, default=default, help=help, **options)

        return flag

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (\S+): is ", r"\1 is ", message) + " (see --help)")

    def settings(
        self, argv: list[str] | None, saved: dict | None = None, may_change: set[str] = frozenset()
    ) -> tuple[argparse.Namespace, torch.device]:
        """The settings of a run, and its device. A flag that is given comes first, then the setting that a resumed run
        saved, then the preset of the device, then the parser's default.

        may_change: what a resumed run may do otherwise than it began. Raises UsageError, CheckpointError.
        """
        given = self.parse_args(argv)
        if given.minutes and given.steps:
            raise UsageError("--minutes replaces --steps: leave one out")
        if saved is None:
            device, saved = pick_device(given.device), {}
            self.set_defaults(**self.presets[device.type])
        elif given.minutes:
            raise UsageError("--minutes replaces --steps: a run that is resumed takes --steps")
        else:
            with refusing("the settings in this checkpoint are damaged"):
                self.check(saved)
            device = pick_device(given.device or saved["device"])
            self.set_defaults(**saved)
        args = self.parse_args(argv)
        for name in sorted(saved.keys() - may_change):
            if getattr(args, name) != saved[name]:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} was {saved[name]} in this run and cannot change: leave it out")
        if given.minutes:
            args.steps = None
        elif args.steps:
            args.minutes = None
        args.precision = args.precision or best_precision(device)
        if args.batch_size % (WORLD * args.grad_accum_steps):
            divisor = f"--grad-accum-steps {args.grad_accum_steps}"
            divisor = f"{WORLD} processes x {divisor}" if WORLD > 1 else divisor
            raise UsageError(f"--batch-size {args.batch_size} is not a multiple of {divisor}: use one that is")
        return args, device

    def check(self, settings: dict) -> None:
        """Raise some exception unless these settings, from a file, are ones that a command line could have given."""
        actions = {action.dest: action for action in self._actions if action.dest not in NOT_SETTINGS}
        if settings.keys() != actions.keys():
            raise ValueError("they have other names")
        for name, action in actions.items():
            values = settings[name] if action.nargs == "+" and settings[name] is not None else [settings[name]]
            if type(values) is not list:
                raise TypeError(f"{name} is not a list")
            for value in values:
                if value is None:
                    fits = action.default is None or name in ("steps", "minutes")
                elif isinstance(action, argparse.BooleanOptionalAction):
                    fits = type(value) is bool
                else:
                    known = type(value) in (int, float, str) and (action.choices is None or value in action.choices)
                    fits = known and (action.type or str)(str(value)) == value
                if not fits:
                    raise ValueError(f"{name} cannot be like this")
        if settings["steps"] is None and settings["minutes"] is None:
            raise ValueError("they have neither steps nor minutes")


def number(kind: type, low: float, high: float = MAX_STEPS) -> Callable[[str], float]:
    """An argparse type: a number of this kind from low to high."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} or more" if value < low and high == MAX_STEPS else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"is {text[:40]}: use {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it for a text that is no number at all
    return parse


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises UsageError where it is missing, or cannot compute.

    A GPU that cannot compute is left alone, with a warning, where no device was named.
    """
    mps = torch.backends.mps.is_available() and WORLD == 1  # processes cannot share the GPU of a Mac
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    asked, name = name, name or next(device for device, there in available.items() if there)
    if not available[name]:
        raise UsageError(f"no {name} device here: leave --device out, or use --device cpu")
    if name == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        raise UsageError(f"more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc-per-node")
    if reason := unusable(torch.device(name, LOCAL_RANK) if name == "cuda" else torch.device(name)):
        message = f"this PyTorch cannot compute on the {name} device here ({reason})"
        if asked or WORLD > 1:  # processes on different devices would wait for each other
            raise UsageError(f"{message}: use --device cpu")
        warnings.warn(f"{message}: the CPU does the work", stacklevel=2)
        name = "cpu"
    if name == "cuda":
        # TF32 from compute capability 8 on: much faster products, with 10 bits of mantissa.
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(LOCAL_RANK)
    if name == "cpu":
        threads.adapt(seconds=0.2)
    return torch.device(name)


def guidance_settings(values: list[float], timesteps: int) -> dict:
    """`--guidance W` or `--guidance W LOW HIGH` as arguments of TrainedModel.sample_batch. Raises UsageError."""
    weight, *interval = values
    inside = len(interval) == 2 and 0 <= interval[0] <= interval[1] < timesteps
    if interval and not (inside and all(t == int(t) for t in interval)):
        raise UsageError(
            f"--guidance takes W, or W LOW HIGH with whole numbers, 0 <= LOW <= HIGH <= {timesteps - 1}"
        )
    if not abs(weight) <= MAX_GUIDANCE:
        raise UsageError(f"a guidance scale must be a finite number, {-MAX_GUIDANCE} to {MAX_GUIDANCE}: 1.5 is usual")
    return dict(guidance=weight, guidance_interval=[int(t) for t in interval] or None)


def default_guidance(args: argparse.Namespace) -> list[float]:
    """`--guidance` for samples of a model that is trained with these settings."""
    if not args.label_dropout:  # then no unconditional prediction is learned
        return [1.0]
    # With flow, guidance only at the middle timesteps is better by every measure (docs/recipe.md), and cheaper.
    return [2.0, 300.0, 800.0] if args.schedule == "flow" else [1.5]


def network_config(args: argparse.Namespace, data: Images, choose_patch: bool) -> DiTConfig:
    """The shape of the network for these images. choose_patch: take patches that fit them. Raises UsageError."""
    C, S, _ = data.pixels[0].shape
    if choose_patch and S % MODELS[args.model]["patch_size"]:
        args.model = args.model.split("/")[0] + "/8"  # 7 suits 28 pixels; other usual sizes are multiples of 8
    patch = MODELS[args.model]["patch_size"]
    if S % patch:
        sizes = f"{max(S // patch, 1) * patch} or {(S // patch + 1) * patch}"
        raise UsageError(f"{args.model} cuts images into patches of {patch} pixels, and these have {S}: "
                         f"use --image-size {sizes}, or a --model of other patches")
    shape = dict(image_size=S, in_channels=C, num_classes=len(data.classes), learn_sigma=args.learn_sigma)
    return DiTConfig(**MODELS[args.model], **shape)


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
