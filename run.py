"""What surrounds a training loop: the folder of the run, its log and pictures, resuming, signals, several processes.

A run is a folder, by default runs/DATASET-N:

    checkpoint.pt               everything that is needed to resume, written every --save-every steps
    weights.safetensors         only the averaged weights, written at the end
    log.jsonl                   a line for each step: its loss, the norm of its gradient, its learning rate
    loss.png, samples/*.png     the curve of the loss, and samples at each checkpoint
    events.out.tfevents.*       the log for TensorBoard, where the package tensorboard is installed

Under torchrun every process has a Run, and that of process 0 writes the files.
"""

import gc
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import dataset
from cli import LOCAL_RANK, NOT_SETTINGS, RANK, WORLD, Parser, UsageError, WorkError, number
from dit import DiT
from latents import Autoencoder, load_latents
from optim import learning_rate
from sampling import grid
from speed import threads

RUNS = Path("runs")
LOG_EVERY = 10          # steps between two reads of the loss, because each read waits for the GPU
TIMED_STEPS = 100       # after which --minutes becomes a number of steps
TRAINING_TIME = 0.85    # the fraction of a run's time that its steps take; the rest is for checkpoints and samples
# What a resumed run may do otherwise than it began. All other settings stay as they were.
MAY_CHANGE = {
    "steps", "minutes", "save_every", "dataset", "data_dir", "device", "compile", "gradient_checkpointing", "guidance",
    "vae",
}


def add_run_flags(parser: Parser) -> None:
    """The flags for the data and the run, of every command that trains."""
    flag = parser.group("data")
    flag("--dataset", None, f"{', '.join(dataset.DATASETS)}, mnist-5000 (5,000 digits that need no network), or a "
         "folder of images (default: mnist; where it cannot be had, mnist-5000); or latents, see latents.py")
    flag("--vae", None, "for latents, the autoencoder that decodes samples, a folder or name (default: none)")
    flag("--data-dir", "data", "where data sets are, or are downloaded to")
    flag = parser.group("run")
    flag("--run-dir", None, "folder of a new run (default: the next free runs/DATASET-N)", type=Path)
    flag("--resume", None, "continue the run in this folder (default: a new run)", type=Path, metavar="RUN")
    flag("--save-every", 500, "steps between checkpoints, each with a grid of samples", type=number(int, 1))
    flag("--seed", 0, "of the weights, batches and noise", type=number(int, 0, 2**32 - 1))
    flag("--device", None, "(default: the best there is)", choices=list(parser.presets))
    flag("--precision", None, "of matrix products; fp32 on CUDA means TF32 (default: bf16 where the device has it)",
         choices=["fp32", "bf16"])
    flag("--compile", True, "compile the blocks, where that is possible")


class Run:
    """A new run, or with --resume the run that a folder or checkpoint belongs to.

    args, device: the settings, see cli.Parser.settings; given: only the flags that were given
    state:        what the checkpoint holds, {} for a new run
    step:         how many steps are done

    Nothing is written before `open`. Raises UsageError, CheckpointError.
    """

    def __init__(self, parser: Parser, argv: list[str] | None, network: type[DiT], may_change: set[str] = MAY_CHANGE):
        self.script, self.given = parser.prog, parser.parse_args(argv)
        new, resume = self.given.run_dir, self.given.resume
        if new and resume:
            raise UsageError("--resume continues in the run's own folder: leave --run-dir out")
        if new and new.exists() and (not new.is_dir() or any(new.iterdir())):
            raise UsageError(f"{new} is there already: continue it by --resume {new}, or give another --run-dir")
        self.folder, self.state, self.is_new = new, {}, not resume
        if resume:
            self.folder = resume if resume.is_dir() else resume.parent
            self.state = checkpoint.load(resume)
            self.check_state(network)
        self.args, self.device = parser.settings(argv, self.state.get("args"), may_change)
        if resume:
            self.lock()
        self.step = self.saved_at = self.state.get("step", 0)
        steps = self.args.steps
        if resume and steps and (self.step > steps or self.step == steps and self.is_finished()):
            raise UsageError(f"{self.folder} is at step {self.step} already: ask for more with --steps")
        self.signal, self.pending, self.intervals = 0, [], []

    def lock(self) -> None:
        """Keep other processes from continuing in this folder for as long as this one lives. Raises UsageError."""
        if RANK > 0 or not self.folder.is_dir():
            return
        self.file_lock = FileLock(self.folder / ".lock")
        try:
            self.file_lock.acquire(blocking=False)
        except Timeout as error:
            raise UsageError(f"another process is training in {self.folder}: wait until it ends, or stop it") from error

    def check_state(self, network: type[DiT]) -> None:
        """Raises UsageError or CheckpointError unless the checkpoint is of a run of this script."""
        resume = self.given.resume
        if not {"script", "args", "model", "optimizers"} <= self.state.keys():
            fix = "resume from the folder of a run, or its checkpoint.pt"
            raise UsageError(f"{resume} holds only weights, or lacks a part of a run: {fix}")
        with checkpoint.refusing(f"{resume} cannot be resumed"):
            if self.state["script"] != self.script:
                raise ValueError(f"it was not begun by {self.script}")
            if not isinstance(self.state["args"], dict):
                raise TypeError("its settings are damaged")
            for name in ("ema", "model"):
                checkpoint.check({**self.state, "ema": self.state[name]}, network)

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step_{self.step:07d}.png"

    def is_finished(self) -> bool:
        """Whether a run that is resumed has written its weights after its last step, and not only its checkpoint."""
        with suppress(checkpoint.CheckpointError):
            return checkpoint.load(self.folder / "weights.safetensors").get("step") == self.step
        return False

    def load_data(self, image_size: int | None) -> dataset.Images:
        """Meet the other processes, if torchrun started several, and load the data set, see dataset.load.

        Of the processes of a machine, the first downloads while the others wait. Raises DataError; UsageError where a
        resumed run was trained on other data.
        """
        args = self.args
        if self.state:
            image_size = self.state["config"]["image_size"]
        if WORLD > 1:
            if RANK > 0:
                warnings.simplefilter("ignore")  # one process says it for all
            gpu = dict(backend="nccl", device_id=torch.device("cuda", LOCAL_RANK))
            options = gpu if self.device.type == "cuda" else dict(backend="gloo")
            dist.init_process_group(timeout=timedelta(hours=1), **options)
            self.gloo = dist.new_group(backend="gloo")  # for numbers on the CPU, which need not wait for a GPU
        if LOCAL_RANK > 0:
            dist.barrier()
        if args.dataset and args.dataset.endswith(".npz"):
            data = load_latents(Path(args.dataset), image_size)
        else:
            data = dataset.load(args.dataset, args.data_dir, image_size, download=LOCAL_RANK == 0)
        self.fingerprint = data.fingerprint()
        if WORLD > 1:
            if LOCAL_RANK == 0:
                dist.barrier()
            fingerprints = [None] * WORLD
            dist.all_gather_object(fingerprints, self.fingerprint)
            if len(set(fingerprints)) > 1:
                raise dataset.DataError("processes found different data: give all the same --dataset and --data-dir")
        if self.state and self.state.get("fingerprint") != self.fingerprint:
            found = f"this run began with {self.state['data']}, and here are {data.source}"
            raise UsageError(f"{found}, with other images, labels or classes: give it the data that it began with")
        args.dataset = args.dataset or data.name
        self.load_autoencoder(data)
        return data

    def load_autoencoder(self, data: dataset.Images) -> None:
        """Load the autoencoder of --vae, which decodes samples. Raises UsageError where it does not fit the data."""
        self.autoencoder, vae = None, self.args.vae
        if vae and not data.pixels.is_floating_point():
            raise UsageError(f"--vae is for latents, and these are {data.source}: leave it out")
        if vae and RANK == 0:
            self.autoencoder = Autoencoder(vae, self.device)
            ours, theirs = data.pixels.shape[1], self.autoencoder.channels
            if ours != theirs:
                raise UsageError(f"--vae has latents of {theirs} channels, and these are {data.source}, of {ours}: "
                                 "leave it out, or use that with which they were encoded")

    def batches(self, data: dataset.Images) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batch of each step that is left, see dataset.batches, until a signal comes."""
        batches = dataset.batches(data, self.args.batch_size, self.args.seed, self.step, RANK, WORLD, self.device)
        while self.step != self.args.steps and not self.should_stop():
            yield next(batches)

    @contextmanager
    def open(self, trainer: object, data: dataset.Images, what: str) -> Iterator[None]:
        """Make the folder, or continue in it, and print what will happen there. Inside, steps can be logged.

        Half-written files and log lines after the last checkpoint, from a run that was killed, are removed. Ctrl-C and
        SIGTERM are remembered for `should_stop`; a second one ends the process at once.

        trainer: a train.Trainer; what: what is trained, in words
        """
        self.state = {}
        self.description = checkpoint.describe(
            trainer.network, trainer.config, trainer.diffusion, data.classes, data.source, self.step,
            **trainer.sampling_guidance,
        )
        if RANK == 0:
            self.folder = self.folder or new_folder(Path(self.args.dataset).resolve().name.removesuffix(".npz"))
            (self.folder / "samples").mkdir(parents=True, exist_ok=not self.is_new)  # only one new run has this folder
            for partial in self.folder.rglob("*.partial"):
                partial.unlink()
            log = "".join(json.dumps(entry) + "\n" for entry in read_log(self.folder) if entry["step"] <= self.step)
            if self.is_new:
                self.lock()
            checkpoint.write_whole(self.folder / "log.jsonl", lambda file: file.write(log.encode()))
            print(f"{self.folder}: {self.announcement(trainer, data.source, what)}", flush=True)
        self.tensorboard = tensorboard_writer(self.folder, self.step)
        self.bar = progress_bar(self.args.steps, self.step)
        self.started = self.clock = time.perf_counter()
        handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other may set them
            handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.begin(trainer)
            yield
            self.save(trainer)
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)
            self.bar.close()
            if self.tensorboard:
                self.tensorboard.close()

    def announcement(self, trainer: object, source: str, what: str) -> str:
        args = self.args
        parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        process = " ".join(trainer.diffusion.config[name] for name in ("schedule", "prediction"))
        length = f"{args.steps - self.step:,} steps" if args.steps else f"about {args.minutes:g} min"
        return (
            f"{what}, {parameters:.1f} M parameters; {process}, {args.optimizer}; {length} of {args.batch_size} images "
            f"from {source}; {self.device.type}, {args.precision}, {'compiled' if trainer.compiled else 'eager'}"
        )

    def on_signal(self, number: int, frame: object) -> None:
        self.signal = self.signal or number
        if WORLD == 1:  # torchrun sends each signal twice
            signal.signal(number, signal.SIG_DFL)

    def begin(self, trainer: object) -> None:
        """Save a new run, so that it can be resumed if it is killed in its first steps, and a full disk shows now.

        For a resumed run, write the samples that are missing if it was killed after its last checkpoint.
        """
        if self.is_new:
            self.save(trainer)
        elif self.step and self.is_milestone() and RANK == 0 and not self.picture.exists():
            self.save_samples(trainer)

    def is_milestone(self) -> bool:
        return self.step == self.args.steps or self.step % self.args.save_every == 0

    def after_step(self, trainer: object, loss: Tensor, norm: Tensor) -> None:
        """Count a step as done; log it, and save a checkpoint and samples when they are due.

        loss, norm: the loss and the norm of its gradient, tensors of one number, which are read later
        """
        self.pending.append((loss, norm, learning_rate(self.step, self.args)))
        self.step += 1
        self.bar.update()
        if self.device.type == "cpu":
            threads.adapt()
        planned = False
        if self.step % LOG_EVERY == 0:
            self.write_log()
            planned = self.args.steps is None and self.plan_steps(trainer.step_time)
        if planned or self.is_milestone():
            self.save(trainer)
        if self.is_milestone():
            self.save_samples(trainer)

    def write_log(self) -> None:
        """Read and write the pending steps. Raises WorkError where one of their numbers is not finite."""
        if not self.pending:
            return
        losses, norms, rates = zip(*self.pending, strict=True)
        losses, norms = torch.stack(losses).float(), torch.stack(norms).float()
        if WORLD > 1:  # the loss of a batch is the mean over the processes
            dist.all_reduce(losses)
            losses /= WORLD
        columns = zip(losses.tolist(), norms.tolist(), rates, strict=True)
        first = self.step - len(rates) + 1
        entries = [dict(step=n, loss=x, gradient_norm=g, lr=lr) for n, (x, g, lr) in enumerate(columns, first)]
        for entry in entries:
            if not math.isfinite(entry["loss"] + entry["gradient_norm"]):
                self.diverged("loss or gradient", entry["step"])
        if RANK == 0:
            log = self.folder / "log.jsonl"
            with checkpoint.writing(log), open(log, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        if self.tensorboard:
            for name in ("loss", "gradient_norm", "lr"):
                self.tensorboard.add_scalar(name, entries[-1][name], self.step)
        seconds = (time.perf_counter() - self.clock) / len(entries)
        self.intervals.append(seconds)
        self.bar.set_postfix_str(f"loss {losses.mean():.4f}, {self.args.batch_size / seconds:.0f} img/s", refresh=False)
        self.pending, self.clock = [], time.perf_counter()

    def diverged(self, what: str, step: int) -> NoReturn:
        good = f"the checkpoint of step {self.saved_at} in {self.folder} is good"
        good = good if self.saved_at else "no checkpoint yet"
        raise WorkError(f"{what} not finite at step {step}; {good}: begin a new run with a lower --lr")

    def plan_steps(self, step_time: float) -> bool:
        """Turn --minutes into a number of steps, once enough of them have been timed. Returns whether that is done.

        The seconds of a step are the median over intervals of LOG_EVERY steps, so that a busy moment does not count.
        step_time: the mean time of all steps of the training, relative to that of the first ones
        """
        budget = 60 * self.args.minutes * TRAINING_TIME
        elapsed = time.perf_counter() - self.started
        steps = None
        if len(self.intervals) > 3 and (self.step >= TIMED_STEPS or elapsed > 0.1 * budget):
            seconds = step_time * statistics.median(self.intervals[1:])  # the first one may have compiled
            steps = max(self.step, int(float(f"{budget / seconds:.2g}")))
        if WORLD > 1:  # all processes must agree
            shared = [steps]
            dist.broadcast_object_list(shared)
            steps = shared[0]
        if steps is None:
            return False
        self.args.steps, self.args.minutes = steps, None
        self.bar.total = steps
        return True

    def should_stop(self) -> bool:
        """Whether a signal asked any of the processes to stop. All of them get the same answer."""
        if WORLD > 1:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, self.gloo)
            self.signal = int(number)
        return self.signal > 0

    def save(self, trainer: object) -> None:
        """Write checkpoint.pt: the state of training after the steps done, and what describes the run.

        Raises WorkError where weights are not finite; then the last checkpoint stays.
        """
        if not self.is_new and self.saved_at == self.step:
            return
        self.write_log()
        state = trainer.state()
        for weights in (state["model"], state["ema"]):
            if not all(value.isfinite().all() for value in weights.values()):
                self.diverged("weights", self.step)
        if RANK == 0:
            settings = {name: value for name, value in vars(self.args).items() if name not in NOT_SETTINGS}
            about = dict(self.description, step=self.step, script=self.script, fingerprint=self.fingerprint)
            checkpoint.save(self.folder / "checkpoint.pt", {**about, "args": settings, **state})
        self.saved_at, self.is_new = self.step, False

    def save_samples(self, trainer: object) -> None:
        """Write a picture of samples, ten rows of a class each, and loss.png."""
        if RANK == 0:
            begin = time.perf_counter()
            trained = trainer.trained_model()
            labels = (torch.arange(10) % max(trained.model.config.num_classes, 1)).repeat_interleave(10)
            trained.autoencoder = self.autoencoder
            picture = grid(trained.to_images(trained.sample(labels, trainer.micro_batch_size)), columns=10)
            checkpoint.write_whole(self.picture, lambda file: picture.save(file, "PNG"))
            plot_loss(self.folder)
            gc.collect()  # a figure refers to itself, and left to itself its memory would be freed late
            self.clock = time.perf_counter()
            if not self.bar.disable:  # this time does not belong to the speed of training
                self.bar.start_t += self.clock - begin
                self.bar.last_print_t += self.clock - begin

    def finish(self, weights: dict) -> int:
        """Write weights.safetensors, or print how a run that was stopped can be resumed. Returns the exit status."""
        stopped = self.args.steps is None or self.step < self.args.steps
        if RANK == 0 and stopped:
            quote = shlex.quote if os.name == "posix" else lambda word: subprocess.list2cmdline([word])
            how = f"python {self.script} --resume {quote(str(self.folder))}"
            print(f"stopped after step {self.step}; resume with: {how}")
        elif RANK == 0:
            description = {**self.description, "step": self.step}
            checkpoint.save_weights(self.folder / "weights.safetensors", weights, description)
            print(self.folder / "checkpoint.pt", self.picture, sep="\n")
        if WORLD > 1:
            dist.destroy_process_group()
        return 128 + self.signal if stopped else 0


def local_part(batch: Tensor, device: torch.device) -> Tensor:
    """This process's part of what belongs to a whole batch, on its device."""
    size = len(batch) // WORLD
    # To CUDA, without waiting for what the GPU still has to do.
    return batch[size * RANK : size * (RANK + 1)].to(device, non_blocking=device.type == "cuda")


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


def progress_bar(steps: int | None, step: int) -> tqdm:
    """A progress bar; where the output is no terminal, a line a minute."""
    terminal = sys.stderr.isatty()
    rarely = {} if terminal else dict(mininterval=60, maxinterval=60, bar_format="{l_bar}{bar:20}{r_bar}\n")
    return tqdm(total=steps, initial=step, unit="step", dynamic_ncols=terminal, disable=RANK > 0, **rarely)


def tensorboard_writer(folder: Path, step: int) -> object | None:
    """A SummaryWriter for steps after `step`, or None in other processes than the first, and without tensorboard."""
    if RANK > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def read_log(folder: Path) -> list[dict]:
    """The entries of log.jsonl. Lines that a crash or a full disk left incomplete are skipped."""
    log, entries = folder / "log.jsonl", {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            entry = json.loads(line)
            step = int(entry["step"])
            entries[step] = {**entry, "step": step, "loss": float(entry["loss"])}
    return [entry for _, entry in sorted(entries.items())]


def centred_median(values: Tensor, reach: int = 50) -> Tensor:
    """The median (n,) of each of values (n,) and its neighbours: as many on either side, `reach` or what there is.

    Loss falls steeply at first, and a median of unequal sides would be that of other steps. Only at the end, where it
    is almost flat, are there fewer neighbours on the right.
    """
    windows = (values[i - min(i, reach) : i + min(i, reach) + 1] for i in range(len(values)))
    return torch.stack([window.median() for window in windows])


def plot_loss(folder: Path) -> None:
    """Plot loss.png from log.jsonl, unless that is empty."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    entries = read_log(folder)
    if not entries:
        return
    losses, steps = torch.tensor([entry["loss"] for entry in entries]), [entry["step"] for entry in entries]
    axes = Figure(figsize=(7, 4), layout="constrained").add_subplot(
        xlabel="training step", ylabel="loss", xscale="log", yscale="log"
    )
    axes.set_title(folder.name, parse_math=False)
    axes.plot(steps, losses, alpha=0.3, linewidth=0.5, label="each batch")
    axes.plot(steps, centred_median(losses), label="centred median")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks, such as Chinese ones
        checkpoint.write_whole(folder / "loss.png", lambda file: axes.figure.savefig(file, dpi=120))
