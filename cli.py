"""What the command lines share: errors that take one line, argument types, the choice of a device, new file names."""

import argparse
import errno
import io
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from tqdm import tqdm

from speed import out_of_memory, threads, unusable


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
MAX_COUNT = 2**31  # of anything that a command line counts
# What torch.distributed says of a process that is gone.
LOST_PROCESS = r"(?i)\bDist\w*Error|gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe"
FIXES = {  # of an OSError
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "it cannot be written, so name another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EEXIST: "give another name, or remove it first",
    errno.ENOENT: "give one that exists",
}
claimed: list[Path] = []  # new files of this process, see `output_path`


class UsageError(Exception):
    """The command line asks for something that cannot be done. The message is one line that names the fix."""

    exit_status = 2


class WorkError(Exception):
    """Work that had begun cannot continue. The message is one line."""

    exit_status = 1


@contextmanager
def usage() -> Iterator[None]:
    """Inside, a ValueError, whose message names the fix, is a UsageError: what was asked for does not fit."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


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

    The status is that of the exception, if it has an `exit_status`: 2 for bad usage, 1 for work that cannot continue.
    It is 130 for Ctrl-C. Other exceptions are faults in the code, and keep their traceback.

    memory: the fix where there is too little of it
    """
    name = Path(sys.argv[0]).name
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
    if not isinstance(sys.stderr, Output):
        sys.stderr = Output(sys.stderr)
    warnings.showwarning = lambda message, *_: tqdm.write(one_line(f"{name}: warning: {message}"), file=sys.stderr)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as a script sets it for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
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
    finally:
        remove_empty()
    print(f"{name}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def one_line(message: str) -> str:
    """The message as one line that commands no terminal, since names of files and classes may hold anything."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    return line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}"  # a file can hold a name of any length


def explain(error: Exception, memory: str) -> tuple[int, str]:
    """The exit status and the message for an exception, see `run_script`. Raises those that are faults in the code."""
    if hasattr(error, "exit_status"):
        return error.exit_status, str(error)
    if isinstance(error, FloatingPointError):
        return 1, str(error)
    if out_of_memory(error):
        return 1, f"there is too little memory: {memory}"
    if isinstance(error, OSError):
        fix = FIXES.get(error.errno, "name another place")
        return 1, f"cannot use {error.filename} ({error.strerror}): {fix}" if error.filename else str(error)
    if WORLD > 1 and isinstance(error, RuntimeError) and re.search(LOST_PROCESS, f"{type(error).__name__} {error}"):
        gone = f"process {RANK} of {WORLD} stops, since another is gone, which torchrun names"
        return 1, f"{gone} ({str(error)[:100]})"
    raise error


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, a UsageError, rather than a page of usage.

    presets: the defaults of a training that depend on the device: {"cpu": {"lr": 7e-3, ...}, ...}
    """

    def __init__(self, prog: str, description: str, presets: dict[str, dict] | None = None):
        super().__init__(prog, description=description)
        self.presets, self.defaults = presets or {}, {}

    def group(self, title: str) -> Callable[..., None]:
        """A group of flags, as a function that adds one: flag("--lr", default, help, **options of add_argument)."""
        group = self.add_argument_group(title)

        def flag(name: str, default: object, help: str, **options) -> None:
            key = name.lstrip("-").replace("-", "_")
            self.defaults[key] = default
            presets = {device: preset.get(key, default) for device, preset in self.presets.items()}
            shown = ", ".join(f"{value} on {device}" for device, value in presets.items() if value is not None)
            if len({str(value) for value in presets.values()}) < 2:
                shown = next(iter(presets.values()), default)
            if isinstance(default, bool):
                options["action"] = argparse.BooleanOptionalAction
            if "(default" not in help:
                help = f"{help} (default: {shown})"
            group.add_argument(name, default=argparse.SUPPRESS, help=help, **options)  # only what is given is kept

        return flag

    def given(self, argv: list[str] | None) -> dict:
        """The flags that the command line gives, and no others."""
        return vars(self.parse_args(argv))

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (\S+): is ", r"\1 is ", message) + " (see --help)")

    def settings(
        self, given: dict, saved: dict | None = None, may_change: set[str] = frozenset()
    ) -> tuple[argparse.Namespace, torch.device]:
        """The value of every flag, and the device. A flag that is given comes first, then the setting that a run to
        resume saved, then the preset of the device, then the default.

        given:      the flags of the command line, see `given`
        may_change: what a resumed run may do otherwise than it began

        Raises UsageError; ValueError for saved settings that no command line could have given.
        """
        saved = saved or {}
        unknown = sorted(saved.keys() - self.defaults.keys())
        if unknown and RANK == 0:
            warnings.warn(f"{self.prog} has no flags for these settings of the run: {', '.join(unknown)}", stacklevel=2)
        saved = {name: self.checked(name, value) for name, value in saved.items() if name in self.defaults}
        for name in sorted(given.keys() & saved.keys() - may_change):
            if given[name] != saved[name]:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} was {saved[name]} in this run and cannot change: leave it out")
        device = pick_device(given.get("device") or saved.get("device"))
        values = {**self.defaults, **self.presets.get(device.type, {}), **saved, **given}
        return argparse.Namespace(**values), device

    def checked(self, name: str, value: object) -> object:
        """The value of a flag, from a file. Raises ValueError where no command line could have given it."""
        action = next(action for action in self._actions if action.dest == name)
        several = action.nargs not in (None, "?", 0)
        values = value if several else [value]
        if value is None and self.defaults[name] is None:
            return None
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        if is_switch and type(value) is bool:
            return value
        fits = not is_switch and type(values) is list and all(type(v) in (int, float, str) for v in values)
        try:
            parsed = [self._get_value(action, str(v)) for v in values] if fits else []
        except (argparse.ArgumentError, UsageError):
            parsed = []
        fits = fits and [str(v) if isinstance(v, Path) else v for v in parsed] == values  # a file has paths as text
        if not fits or action.choices is not None and not set(parsed) <= set(action.choices):
            raise ValueError(f"the setting {name} cannot be {str(value)[:40]!r}")
        return parsed if several else parsed[0]


def number(kind: type, low: float, high: float = MAX_COUNT) -> Callable[[str], float]:
    """An argparse type: a number of this kind from low to high."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} or more" if value < low and high == MAX_COUNT else f"{low} to {high}"
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


def output_path(path: Path | None, default: str) -> Path:
    """Where to write a new file: `path`, else outputs/DEFAULT under the next free number.

    Makes its folder, and an empty file, so that no other process takes the name; `run_script` removes the file if it
    stays empty. Raises UsageError where a file is there already, or has another suffix than `default`.
    """
    stem, suffix = Path(default).stem, Path(default).suffix
    if path and path.suffix != suffix:
        raise UsageError(f"{path} must end in {suffix}")
    folder = path.parent if path else Path("outputs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            place = path or folder / f"{stem}-{number}{suffix}"
            with suppress(FileExistsError):
                open(place, "x").close()
                claimed.append(place)
                return place
            if path:
                raise UsageError(f"{path} is there already: give another name, or remove it first")
    except OSError as error:
        fix = FIXES.get(error.errno, "name another place")
        raise UsageError(f"cannot write into the folder {folder} ({error.strerror}): {fix}") from error


def remove_empty() -> None:
    """Remove the files that `output_path` made and nothing was written to."""
    for path in claimed:
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()
    claimed.clear()
