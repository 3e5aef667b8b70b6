"""What surrounds a training loop: the folder of the run, its log and pictures, resuming, signals, several processes.

A run is a folder, by default runs/DATASET-N:

    checkpoint.pt               everything that is needed to go on, written every --save-every steps
    weights.safetensors         the averaged weights alone, written at the end
    log.jsonl                   a line for each step: its loss, the norm of its gradient, its learning rate
    loss.png, samples/*.png     how the loss fell, and what the network drew at each checkpoint
    events.out.tfevents.*       the log for TensorBoard

Under torchrun every process has a Run, and that of process 0 writes the files.
"""

import gc
import itertools
import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoint
import dataset
from cli import LOCAL_RANK, RANK, RUNS, WORLD, UsageError, WorkError
from dit import DiTConfig

LOG_EVERY = 10  # steps between two looks at the loss, because each look waits for the GPU


class Run:
    """A run that begins in the folder `new`, or that goes on from the checkpoint `resume`.

    state: what the checkpoint holds, {} for a new run
    step:  how many steps are done

    Nothing is written before `open`. Raises UsageError, CheckpointError.
    """

    def __init__(self, new: Path | None = None, resume: Path | None = None):
        if new and resume:
            raise UsageError("--resume goes on in the run's own folder: leave --run-dir out")
        if new and new.exists() and (not new.is_dir() or any(new.iterdir())):
            raise UsageError(f"{new} is there already: go on with it by --resume {new}, or give another --run-dir")
        self.folder, self.state = new, checkpoint.load(resume) if resume else {}
        if resume:
            missing = {*checkpoint.SHOULD_BE, "args", "model", "optimizers"} - {"interval", *self.state}
            if missing:
                fix = "resume from the folder of a run, or its checkpoint.pt"
                raise UsageError(f"{resume} lacks {', '.join(sorted(missing))}, or holds weights only: {fix}")
            self.folder = resume if resume.is_dir() else resume.parent
        self.step = self.saved_at = self.state.get("step", 0)
        self.is_new, self.signal, self.pending = not resume, 0, []

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step_{self.step:07d}.png"

    def is_finished(self) -> bool:
        """Whether a run that is resumed has written its weights after its last step, and not only its checkpoint."""
        with suppress(checkpoint.CheckpointError):
            return checkpoint.load(self.folder / "weights.safetensors").get("step") == self.step
        return False

    def join(self, device: torch.device) -> None:
        """Meet the other processes, if torchrun started several."""
        if WORLD > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
            self.gloo = dist.new_group(backend="gloo")  # for numbers on the CPU, which need not wait for a GPU

    def load_data(self, name: str | None, data_dir: str, image_size: int | None) -> dataset.Images:
        """The data set, see dataset.load. Of the processes of a machine, the first downloads while the others wait.

        Raises DataError; UsageError where a resumed run learned from other data.
        """
        if LOCAL_RANK > 0:
            dist.barrier()
        data = dataset.load(name, data_dir, image_size, download=LOCAL_RANK == 0)
        if WORLD > 1:
            if LOCAL_RANK == 0:
                dist.barrier()
            sources = [None] * WORLD
            dist.all_gather_object(sources, data.source)
            if len(set(sources)) > 1:
                found = ", ".join(sorted(set(sources)))
                raise dataset.DataError(f"processes found different data ({found}): give all the same --data-dir")
        if self.state and self.state["data"] != data.source:
            found = f"this run learned from {self.state['data']}, but here are {data.source}"
            raise UsageError(f"{found}: give its --dataset and --data-dir")
        return data

    def catch_signals(self) -> None:
        """From now on, Ctrl-C and SIGTERM end the loop between two steps. A second one ends the process at once."""
        def remember(number: int, frame) -> None:
            self.signal = self.signal or number
            if WORLD == 1:  # torchrun sends each signal twice
                signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, remember)

    @contextmanager
    def open(self, name: str, settings: dict, description: dict, announcement: str) -> Iterator[None]:
        """Make the folder, or go on in it, and tell the user what will happen there. Inside, steps can be logged.

        What a run that was killed has left half written goes, and what it owes after its last checkpoint will follow.

        name: of a new folder, runs/NAME-N; settings: see settings.py; description: see checkpoint.describe
        """
        self.settings, self.description, self.steps, self.state = settings, description, settings["steps"], {}
        if RANK == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.folder = self.folder or new_folder(name)
            (self.folder / "samples").mkdir(parents=True, exist_ok=not self.is_new)  # a run that is new is alone
            for half in self.folder.rglob("*.partial"):
                half.unlink()
            # A run that was killed has logged steps after its last checkpoint. They will be taken again.
            log = "".join(json.dumps(entry) + "\n" for entry in read_log(self.folder) if entry["step"] <= self.step)
            checkpoint.write_whole(self.folder / "log.jsonl", lambda file: file.write(log.encode()))
            self.tensorboard = SummaryWriter(self.folder, purge_step=self.step + 1)
            print(f"{self.folder}: {announcement}", flush=True)
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=RANK > 0)
        self.clock = time.perf_counter()
        try:
            yield
        finally:
            self.bar.close()
            if RANK == 0:
                self.tensorboard.close()

    def log(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Count a step as done. Its loss and the norm of its gradient, tensors of one number, are read later."""
        self.step += 1
        self.pending.append((loss, norm, lr))
        self.bar.update()
        if self.step % LOG_EVERY == 0:
            self.write_log()

    def write_log(self) -> None:
        """Read and write the steps since the last look. Raises WorkError where one of their numbers is not finite."""
        if not self.pending:
            return
        losses, norms, rates = zip(*self.pending, strict=True)
        losses, norms = torch.stack(losses).float(), torch.stack(norms).float()
        if WORLD > 1:  # the loss of a batch is the mean over its parts
            dist.all_reduce(losses)
            losses /= WORLD
        columns = zip(losses.tolist(), norms.tolist(), rates, strict=True)
        first = self.step - len(rates) + 1
        entries = [dict(step=n, loss=x, gradient_norm=g, lr=lr) for n, (x, g, lr) in enumerate(columns, first)]
        bad = [entry["step"] for entry in entries if not math.isfinite(entry["loss"] + entry["gradient_norm"])]
        if bad:
            self.diverged("loss or gradient", bad[0])
        if RANK == 0:
            log = self.folder / "log.jsonl"
            with checkpoint.writing(log), open(log, "a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
            for name in ("loss", "gradient_norm", "lr"):
                self.tensorboard.add_scalar(name, entries[-1][name], self.step)
        rate = self.settings["batch_size"] * len(entries) / (time.perf_counter() - self.clock)
        self.bar.set_postfix_str(f"loss {losses.mean():.4f}, {rate:.0f} img/s")
        self.pending, self.clock = [], time.perf_counter()

    def diverged(self, what: str, step: int) -> NoReturn:
        good = f"the checkpoint of step {self.saved_at} in {self.folder} is good"
        good = good if self.saved_at else "no checkpoint yet"
        raise WorkError(f"{what} not finite at step {step}; {good}: begin a new run with a lower --lr")

    def should_stop(self) -> bool:
        """Whether a signal asked any of the processes to stop. All of them get the same answer."""
        if WORLD > 1:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, self.gloo)
            self.signal = int(number)
        return self.signal > 0

    def save(self, state: dict) -> None:
        """Write checkpoint.pt: the state of training after the steps done, and what describes the run.

        Raises WorkError where weights are not finite; then the last checkpoint stays.
        """
        self.write_log()
        if not all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values()):
            self.diverged("weights", self.step)
        if RANK == 0:
            description = {**self.description, "step": self.step, "args": self.settings}
            checkpoint.save(self.folder / "checkpoint.pt", {**description, **state})
        self.saved_at = self.step

    def draw(self, samples: Callable[[], Image.Image]) -> None:
        """Write a picture of samples, and loss.png."""
        if RANK == 0:
            picture = samples()
            checkpoint.write_whole(self.picture, lambda file: picture.save(file, "PNG"))
            plot_loss(self.folder)
            gc.collect()  # a figure refers to itself, and left alone its memory would be freed late
            self.clock = time.perf_counter()  # this time does not belong to the speed of training

    def finish(self, weights: dict) -> int:
        """Write weights.safetensors, or say how a run that was stopped can go on. Returns the exit status."""
        stopped = self.step < self.steps
        if RANK == 0 and stopped:
            how = f"python train.py --resume {shlex.quote(str(self.folder))}"
            print(f"stopped after step {self.step}; go on with: {how}")
        elif RANK == 0:
            description = {**self.description, "step": self.step}
            checkpoint.save_weights(self.folder / "weights.safetensors", weights, description)
            print(self.folder / "checkpoint.pt", self.picture, sep="\n")
        if WORLD > 1:
            dist.destroy_process_group()
        return 128 + self.signal if stopped else 0


def check_belongs(saved: dict, trainer: object) -> None:
    """Raises CheckpointError unless a checkpoint has the form of a train.Trainer's own state after as many steps."""
    if DiTConfig(**saved["config"]) != trainer.config or saved["diffusion"] != trainer.diffusion.config:
        message = "the network of this checkpoint is another than its settings say"
        raise checkpoint.CheckpointError(f"{message}: use another checkpoint, or begin a new run")
    if saved["step"]:  # what an optimizer keeps comes with its first step, which is not taken along any gradient
        for p in (p for network in trainer.learners for p in network.parameters()):
            p.grad = torch.zeros_like(p)
        for optimizer in trainer.optimizers:
            optimizer.step()
    for name, own in trainer.state().items():
        compare(saved.get(name), own, name)
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
        optimizer.state.clear()


def compare(saved: object, own: object, name: str) -> None:
    """Raises CheckpointError unless a part of a checkpoint has the form of a trainer's own, and finite numbers."""
    if type(saved) in (list, tuple) and type(own) in (list, tuple):
        saved, own = dict(enumerate(saved)), dict(enumerate(own))
    if isinstance(own, Tensor):
        fits = checkpoint.numbers(saved) and saved.shape == own.shape and bool(saved.isfinite().all())
    elif isinstance(own, dict):
        fits = isinstance(saved, dict) and saved.keys() == own.keys()
    else:
        fits = type(saved) is type(own)
    if not fits:
        message = f"this checkpoint's {name} does not belong to its network and settings"
        raise checkpoint.CheckpointError(f"{message}: use another checkpoint, or begin a new run")
    for part in own if isinstance(own, dict) else ():
        if part != "param_groups":  # of optimizers; the settings say what is in them
            compare(saved[part], own[part], f"{name} {part}")


def new_folder(name: str) -> Path:
    """Make the next free runs/NAME-N."""
    for number in itertools.count(1):
        folder = RUNS / f"{name}-{number}"
        with suppress(FileExistsError):  # perhaps made by a run that began this very moment
            folder.mkdir(parents=True)
            return folder


def read_log(folder: Path) -> list[dict]:
    """The entries of log.jsonl. Lines that a crash or a full disk left incomplete are passed over."""
    log, entries = folder / "log.jsonl", {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            entries[int(entry["step"])] = {**entry, "loss": float(entry["loss"])}
    return [entry for _, entry in sorted(entries.items())]


def plot_loss(folder: Path) -> None:
    """Draw loss.png from log.jsonl, unless that is empty."""
    from matplotlib.figure import Figure

    entries = read_log(folder)
    if not entries:
        return
    losses, steps = torch.tensor([entry["loss"] for entry in entries]), [entry["step"] for entry in entries]
    window = min(len(losses), 100)
    axes = Figure(figsize=(7, 4), layout="constrained").add_subplot(
        xlabel="step", ylabel="loss", yscale="log", title=folder.name
    )
    axes.plot(steps, losses, alpha=0.3, linewidth=0.5, label="each batch")
    axes.plot(steps[window - 1 :], losses.unfold(0, window, 1).mean(1), label=f"mean of {window}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    checkpoint.write_whole(folder / "loss.png", lambda file: axes.figure.savefig(file, dpi=120))
