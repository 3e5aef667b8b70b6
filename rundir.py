"""What surrounds a training loop: the folder of the run, its log and pictures, signals, several processes.

A run is a folder, by default runs/DATASET-N:

    checkpoint.safetensors      everything that is needed to resume, written every --save-every steps
    weights.safetensors         only the averaged weights, written at the end
    settings.json               the value of every flag, to be read by people
    log.jsonl                   a line for each step: loss, norm of its gradient, learning rate, loss by timestep
    loss.png, samples/*.png     the curves of the loss, and samples at each checkpoint
    events.out.tfevents.*       the log for TensorBoard, where the package tensorboard is installed

train.py decides what happens and when. Under torchrun every process has a RunDir, and that of process 0 writes.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn

import checkpoint
import dataset
from checkpoint import RUN_FILE, RUNS, WEIGHTS_FILE
from cli import LOCAL_RANK, RANK, WORLD, Parser, UsageError, WorkError, number, one_line
from latents import Autoencoder, load_latents
from runlog import Log, plot_loss, read_log
from speed import best_precision, threads

TIMEOUT = timedelta(hours=1)  # of processes that wait for each other: the first one may be downloading
NOT_SETTINGS = ("run_dir", "resume")  # flags that a run does not keep
NEWEST = "the newest run"  # what --resume stands for without a name
# What a resumed run may do otherwise than it began. All other settings stay as they were. With another precision or
# number of micro-batches, its steps are no longer the same to the bit.
MAY_CHANGE = {
    "steps", "minutes", "save_every", "dataset", "data_dir", "device", "compile", "gradient_checkpointing", "guidance",
    "vae", "precision", "grad_accum_steps",
}


def add_run_flags(parser: Parser) -> None:
    """The flags for the data and the run, of every command that trains."""
    flag = parser.group("data")
    flag("--dataset", None, f"{', '.join(dataset.DATASETS)}, mnist-5000 (5,000 digits that need no network), or a "
         "folder of images (default: mnist; where it cannot be had, mnist-5000); or latents, see latents.py")
    flag("--flip", False, "mirror images left to right at random; not for digits and letters")
    flag("--vae", None, "for latents, the autoencoder that decodes samples, a folder or name (default: none)")
    flag("--data-dir", "data", "where data sets are, or are downloaded to")
    flag = parser.group("run")
    flag("--run-dir", None, "folder of a new run (default: the next free runs/DATASET-N)", type=Path)
    flag("--resume", None, "continue the run in this folder, without a name the newest one (default: a new run)",
         type=Path, metavar="RUN", nargs="?", const=NEWEST)
    flag("--save-every", 500, "steps between checkpoints, each with a grid of samples", type=number(int, 1))
    flag("--seed", 0, "of the weights, batches and noise", type=number(int, 0, 2**32 - 1))
    flag("--device", None, "(default: the best there is)", choices=list(parser.presets))
    flag("--precision", None, "of matrix products; fp32 is TF32 on newer GPUs (default: bf16 where the device has it)",
         choices=["fp32", "bf16"])
    flag("--compile", True, "use torch.compile")


class RunDir:
    """The folder of a new run, or with --resume of one that exists.

    args, device: the settings, see cli.Parser.settings; given: only the flags that were given
    state:        what the checkpoint holds, {} for a new run
    step:         how many steps are done

    Nothing is written before `recording`. Raises UsageError, CheckpointError.
    """

    def __init__(self, parser: Parser, argv: list[str] | None, may_change: set[str] = MAY_CHANGE):
        self.script, self.given = parser.prog, parser.given(argv)
        new, resume = self.given.get("run_dir"), self.given.get("resume")
        if new and resume:
            raise UsageError("--resume continues in the run's own folder: leave --run-dir out")
        if new and new.exists() and (not new.is_dir() or any(new.iterdir())):
            fix = f"continue it with --resume {new}, or give" if (new / RUN_FILE).exists() else "give"
            raise UsageError(f"{new} is there already: {fix} another --run-dir")
        self.folder, self.state = new, {}
        if resume:
            resume = newest_run(self.script) if resume == Path(NEWEST) else resume
            self.folder = resume if resume.is_dir() else resume.parent
            self.state = checkpoint.load(resume)
            check_state(self.state, self.script, resume)
        self.args, self.device = settings(parser, self.given, self.state, may_change)
        self.signal, self.file_lock = 0, None
        if resume:
            self.lock()
        self.step, self.saved_at = self.state.get("step", 0), self.state.get("step", -1)
        steps = self.args.steps
        if resume and steps and (self.step > steps or self.step == steps and self.is_finished()):
            raise UsageError(f"{self.folder} is at step {self.step} already: ask for more with --steps")

    def lock(self) -> None:
        """Keep other processes from continuing in this folder for as long as this one lives. Raises UsageError."""
        if RANK > 0:
            return
        self.file_lock = FileLock(self.folder / ".lock")
        try:
            self.file_lock.acquire(blocking=False)
        except Timeout as error:
            raise UsageError(f"another process is training in {self.folder}: wait until it ends, or stop it") from error

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step_{self.step:07d}.png"

    def is_finished(self) -> bool:
        """Whether a run that is resumed has written its weights after its last step, and not only its checkpoint."""
        with suppress(checkpoint.CheckpointError):
            return checkpoint.load(self.folder / WEIGHTS_FILE).get("step") == self.step
        return False

    def load_data(self, image_size: int | None) -> dataset.Images:
        """Meet the other processes, and load the data of --dataset and the autoencoder of --vae. Raises DataError, and
        UsageError where a resumed run began with other data.
        """
        meet(self.device)
        data = load_data(self.args, image_size)
        self.fingerprint = data.fingerprint()
        if self.state and self.state.get("fingerprint") != self.fingerprint:
            found = f"this run began with {self.state['data']}, and here are {data.source}"
            raise UsageError(f"{found}, with other images, labels or classes: give it the data that it began with")
        if self.args.flip and data.pixels.is_floating_point():
            raise UsageError(f"--flip is for images, and these are {data.source}: leave it out")
        self.args.dataset = self.args.dataset or data.name
        self.autoencoder = load_autoencoder(self.args.vae, data, self.device)
        return data

    @contextmanager
    def recording(self, description: dict, announcement: str) -> Iterator[None]:
        """Make the folder, or continue in it, and print what will happen there. Inside, steps can be counted and saved.

        Half-written files and log lines after the last checkpoint, from a run that was killed, are removed. Ctrl-C and
        SIGTERM are remembered for `asked_to_stop`; a second one ends the process at once. One that is ignored, as
        Ctrl-C is in a shell's background jobs, stays ignored.

        description: of the checkpoints, see checkpoint.describe
        """
        self.state, self.description, self.log = {}, description, None
        handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other may set them
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    handlers[number] = signal.signal(number, self.on_signal)
        try:
            if RANK == 0:
                self.make_folder()
                print(one_line(f"{self.folder}: {announcement}"), flush=True)
            self.log = Log(self.folder, self.step, self.args.steps, self.args.batch_size, self.diverged)
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.log:
                self.log.close()
            if self.file_lock:
                self.file_lock.release()
                self.remove_unused_folder()

    def make_folder(self) -> None:
        is_new = self.saved_at < 0
        self.folder = self.folder or new_folder(Path(self.args.dataset).resolve().name.removesuffix(".npz"))
        (self.folder / "samples").mkdir(parents=True, exist_ok=not is_new)  # only one new run has this folder
        if is_new:
            self.lock()
        for partial in self.folder.rglob("*.partial"):
            partial.unlink()
        log = "".join(json.dumps(entry) + "\n" for entry in read_log(self.folder) if entry["step"] <= self.step)
        checkpoint.write_whole(self.folder / "log.jsonl", lambda file: file.write(log.encode()))

    def remove_unused_folder(self) -> None:
        """Remove the folder of a new run that could not write its first checkpoint, so that it can begin anew."""
        if self.saved_at < 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def on_signal(self, number: int, frame: object) -> None:
        self.signal = self.signal or number
        if WORLD == 1:  # torchrun sends each signal twice
            signal.signal(number, signal.SIG_DFL)

    def asked_to_stop(self) -> bool:
        """Whether a signal asked any of the processes to stop. All of them get the same answer."""
        if WORLD > 1:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, small_group())
            self.signal = int(number)
        return self.signal > 0

    def count(self, measured: dict[str, Tensor], lr: float) -> None:
        """One step more is done. measured: what train.Trainer.step returns, and more numbers. lr: the learning rate."""
        self.step += 1
        self.log.add(measured, lr)
        if self.device.type == "cpu":
            threads.adapt()

    def diverged(self, what: str, step: int) -> NoReturn:
        good = f"the checkpoint of step {self.saved_at} in {self.folder} is good"
        good = good if self.saved_at > 0 else "no checkpoint yet"
        raise WorkError(f"{what} not finite at step {step}; {good}: begin a new run with a lower --lr")

    def save(self, state: Callable[[], dict]) -> None:
        """Write the checkpoint of the steps done, unless it is there: state(), and what describes the run.

        Raises WorkError where weights are not finite; then the last checkpoint stays.
        """
        if self.saved_at == self.step:
            return
        self.log.write()
        tensors = state()
        for weights in (tensors["model"], tensors["ema"]):
            if not all(value.isfinite().all() for value in weights.values()):
                self.diverged("weights", self.step)
        if RANK == 0:
            settings = {name: value for name, value in vars(self.args).items() if name not in NOT_SETTINGS}
            text = json.dumps(settings, indent=1, default=str)  # a path as its name
            checkpoint.write_whole(self.folder / "settings.json", lambda file: file.write(text.encode()))
            about = dict(script=self.script, fingerprint=self.fingerprint, settings=json.loads(text), step=self.step)
            checkpoint.save(self.folder / RUN_FILE, {**self.description, **about}, tensors)
        self.saved_at = self.step

    def save_samples(self, picture: Callable[[], Image.Image]) -> None:
        """Write picture(), of samples, and loss.png, unless they are there."""
        if RANK > 0 or self.picture.exists():
            return
        begin = time.perf_counter()
        image = picture()
        checkpoint.write_whole(self.picture, lambda file: image.save(file, "PNG"))
        plot_loss(self.folder)
        gc.collect()  # a figure refers to itself, and left to itself its memory would be freed late
        self.log.leave_out(time.perf_counter() - begin)

    def finish(self, weights: Callable[[], dict]) -> int:
        """Write weights.safetensors, or print how a run that was stopped can be resumed. Returns the exit status."""
        self.log.close()
        stopped = self.args.steps is None or self.step < self.args.steps
        if RANK == 0 and stopped:
            quote = shlex.quote if os.name == "posix" else lambda word: subprocess.list2cmdline([word])
            how = f"python {self.script} --resume {quote(str(self.folder))}"
            print(f"stopped after step {self.step}; resume with: {how}")
        elif RANK == 0:
            checkpoint.save(self.folder / WEIGHTS_FILE, {**self.description, "step": self.step}, weights())
            print(self.folder / RUN_FILE, self.picture, sep="\n")
        if WORLD > 1:
            dist.destroy_process_group()
        return 128 + self.signal if stopped else 0


# ------------------------------------------------------------------------------------------------------------- settings


def newest_run(script: str) -> Path:
    """The folder of the run of this script that was saved last. Raises UsageError."""
    for file in sorted(RUNS.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(checkpoint.CheckpointError):
            if checkpoint.load(file).get("script") == script:
                return file.parent
    raise UsageError(f"no run of {script} in {RUNS}: name its folder after --resume, or leave that out")


def check_state(state: dict, script: str, resume: Path) -> None:
    """Raises UsageError or CheckpointError unless the checkpoint `resume` is of a run of this script."""
    if not {"script", "settings", "model"} <= state.keys():
        fix = "resume from the folder of a run that has its checkpoint, or begin a new one"
        raise UsageError(f"{resume} holds only weights, or lacks a part of a run: {fix}")
    if state["script"] != script:
        other = str(state["script"])[:40]
        raise UsageError(f"{resume} was begun by {other}: continue it with python {other} --resume {resume}")
    with checkpoint.refusing(f"{resume} cannot be resumed"):
        checkpoint.check(state)
        if not isinstance(state["settings"], dict):
            raise TypeError("its settings are damaged")


def settings(
    parser: Parser, given: dict, state: dict | None = None, may_change: set[str] = MAY_CHANGE
) -> tuple[argparse.Namespace, torch.device]:
    """The complete settings of a run, and its device, from the flags that are given and the checkpoint to resume.

    Raises UsageError for flags that do not go together, CheckpointError for damaged settings in the checkpoint.
    """
    with checkpoint.refusing("the settings in this checkpoint are damaged"):
        args, device = parser.settings(given, (state or {}).get("settings"), may_change)
    if given.get("minutes") and (given.get("steps") or state):
        fix = "a run that is resumed takes --steps" if state else "leave one out"
        raise UsageError(f"--minutes replaces --steps: {fix}")
    if given.get("minutes"):
        args.steps = None
    elif args.steps:
        args.minutes = None
    if not (args.steps or args.minutes):
        raise UsageError("this run does not say how long it is: give it --steps")
    best = best_precision(device)
    if args.precision == "bf16" and best == "fp32" and "precision" not in given and device.type == "cpu":
        warnings.warn("this CPU only emulates bf16, with which the run began: --precision fp32 is faster", stacklevel=2)
    args.precision = args.precision or best
    if args.batch_size % (WORLD * args.grad_accum_steps):
        divisor = f"--grad-accum-steps {args.grad_accum_steps}"
        divisor = f"{WORLD} processes x {divisor}" if WORLD > 1 else divisor
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of {divisor}: use one that is")
    return args, device


# -------------------------------------------------------------------------------------------------- data and processes


@functools.cache
def small_group() -> dist.ProcessGroup:
    """The processes, for numbers on the CPU, which need not wait for a GPU."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def meet(device: torch.device) -> None:
    """Join the other processes, if torchrun started several."""
    if WORLD > 1:
        if RANK > 0:
            warnings.simplefilter("ignore")  # one process says it for all
        gpu = dict(backend="nccl", device_id=torch.device("cuda", LOCAL_RANK))
        dist.init_process_group(timeout=TIMEOUT, **(gpu if device.type == "cuda" else dict(backend="gloo")))
        small_group()


def load_data(args: argparse.Namespace, image_size: int | None) -> dataset.Images:
    """The data set of --dataset, see dataset.load. Of the processes of a machine, the first downloads while the others
    wait. Raises DataError, also where the processes found different data.
    """
    if LOCAL_RANK > 0:
        dist.barrier()
    if args.dataset and args.dataset.endswith(".npz"):
        data = load_latents(Path(args.dataset), image_size)
    else:
        data = dataset.load(args.dataset, args.data_dir, image_size, download=LOCAL_RANK == 0)
    if WORLD > 1:
        if LOCAL_RANK == 0:
            dist.barrier()
        fingerprints = [None] * WORLD
        dist.all_gather_object(fingerprints, data.fingerprint())
        if len(set(fingerprints)) > 1:
            raise dataset.DataError("processes found different data: give all the same --dataset and --data-dir")
    return data


def load_autoencoder(vae: str | None, data: dataset.Images, device: torch.device) -> Autoencoder | None:
    """The autoencoder of --vae, which decodes samples. Raises UsageError where it does not fit the data."""
    if vae and not data.pixels.is_floating_point():
        raise UsageError(f"--vae is for latents, and these are {data.source}: leave it out")
    if not vae or RANK > 0:
        return None
    autoencoder = Autoencoder(vae, device)
    ours, theirs = data.pixels.shape[1], autoencoder.channels
    if ours != theirs:
        raise UsageError(f"--vae has latents of {theirs} channels, and these are {data.source}, of {ours}: "
                         "leave it out, or use that with which they were encoded")
    return autoencoder


def local_part(batch: Tensor) -> Tensor:
    """This process's part of what belongs to a whole batch."""
    size = len(batch) // WORLD
    return batch[size * RANK : size * (RANK + 1)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU is not waited for, while it still has work to do."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def distributed(network: nn.Module) -> nn.Module:
    """The network, whose gradient becomes the mean over the processes where there are several."""
    if WORLD == 1:
        network.require_backward_grad_sync = True  # as DistributedDataParallel has it
        return network
    from torch.nn.parallel import DistributedDataParallel  # takes seconds, and only several processes need it

    # PyTorch's warning is of the strides of axes of length 1, which have no meaning.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # older versions of PyTorch know no other
    return DistributedDataParallel(network, broadcast_buffers=False)  # the positions never change


def new_folder(name: str) -> Path:
    """Make the next free runs/NAME-N."""
    for index in itertools.count(1):
        folder = RUNS / f"{name}-{index}"
        with suppress(FileExistsError):  # perhaps made by a run that began this very moment
            folder.mkdir(parents=True)
            return folder
