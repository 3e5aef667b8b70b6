"""The log of a run: a line for each step, a progress bar, and the curves of the loss."""

import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
from cli import RANK, WORLD

LOG_EVERY = 10          # steps between two reads of the loss, because each read waits for the GPU
TIMED_STEPS = 100       # after which --minutes becomes a number of steps
TRAINING_TIME = 0.85    # the fraction of a run's time that its steps take; the rest is for checkpoints and samples
BINS = 5                # of timesteps, in which the log has the loss: 0 to 20% of T, 20 to 40%, ...

# Where images are held out: losses of the averaged weights, and what they are called in loss.png.
HELD_OUT = {"training_images": "average, training images", "held_out_images": "average, held-out images"}


class Log:
    """log.jsonl in the folder of a run, the same for TensorBoard, and a progress bar. Process 0 writes.

    step, total: the steps that are done, and those to do in all (None: not known yet)
    diverged:    called with what is not finite, and the number of the step, where that is a loss or a gradient
    """

    def __init__(self, folder: Path, step: int, total: int | None, batch_size: int, diverged: Callable):
        self.folder, self.step, self.batch_size, self.diverged = folder, step, batch_size, diverged
        self.pending, self.intervals = [], []
        self.tensorboard, self.bar = tensorboard_writer(folder, step), progress_bar(total, step)
        self.started = self.clock = time.perf_counter()

    def add(self, measured: dict[str, Tensor], lr: float) -> None:
        """Count a step. measured: tensors that are read later, the losses (b,) of this process's images, their
        timesteps t_of_T (b,) as a fraction of T, gradient_norm, and whatever numbers there are. lr: the learning rate
        """
        losses, times, norm = (measured.pop(name) for name in ("losses", "t_of_T", "gradient_norm"))
        self.pending.append((losses, times, norm, dict(lr=lr, **measured)))
        self.step += 1
        self.bar.update()
        if self.step % LOG_EVERY == 0:
            self.write()

    def write(self) -> None:
        """Read and write the pending steps."""
        if not self.pending:
            return
        entries = log_entries(self.step - len(self.pending), *zip(*self.pending, strict=True))
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
        mean, speed = sum(entry["loss"] for entry in entries) / len(entries), self.batch_size / seconds
        self.bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} img/s", refresh=False)
        self.pending, self.clock = [], time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """The last seconds were not for training, and do not belong to its speed."""
        self.clock = time.perf_counter()
        if not self.bar.disable:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def steps_within(self, minutes: float, step_time: float) -> int | None:
        """How many steps fit in this time, or None while too few of them have been timed.

        The seconds of a step are the median over intervals of LOG_EVERY steps, so that a busy moment does not count.
        step_time: the mean time of all steps of the training, relative to that of the first ones
        """
        if self.step % LOG_EVERY:
            return None
        budget = 60 * minutes * TRAINING_TIME
        elapsed = time.perf_counter() - self.started
        steps = None
        if len(self.intervals) > 3 and (self.step >= TIMED_STEPS or elapsed > 0.1 * budget):
            seconds = step_time * statistics.median(self.intervals[1:])  # the first one may have compiled
            steps = max(self.step, int(float(f"{budget / seconds:.2g}")))
        if WORLD > 1:  # all processes must agree
            shared = [steps]
            dist.broadcast_object_list(shared)
            steps = shared[0]
        self.bar.total = steps
        return steps

    def close(self) -> None:
        self.bar.close()
        if self.tensorboard:
            with suppress(OSError):  # of a full disk, which log.jsonl tells of
                self.tensorboard.close()


def log_entries(
    done: int, losses: list[Tensor], times: list[Tensor], norms: list[Tensor], numbers: list[dict[str, float]]
) -> list[dict]:
    """The lines of the log after `done` steps. For each step there are the losses (b,) of this process's images, their
    timesteps over T, (b,), the norm of the gradient and other numbers.

    All are read together, so that a GPU is waited for once. The loss of a batch is the mean over the processes.
    """
    steps = torch.arange(len(losses), device=losses[0].device).repeat_interleave(losses[0].numel())
    index = steps * BINS + (torch.cat(times) * BINS).long().to(steps.device)
    sums = torch.zeros(2, len(losses) * BINS, device=steps.device)  # of losses, and of images
    values = torch.cat(losses).float()
    sums.index_add_(1, index, torch.stack([values, torch.ones_like(values)]))
    means, norms = torch.stack([loss.float().mean() for loss in losses]), torch.stack(norms).float()
    if WORLD > 1:
        dist.all_reduce(means)
        dist.all_reduce(sums)
        means /= WORLD
    by_bin = (sums[0] / sums[1]).view(-1, BINS).tolist()  # without images it is not a number
    columns = zip(means.tolist(), norms.tolist(), by_bin, numbers, strict=True)
    return [
        dict(step=n, loss=loss, gradient_norm=norm, **others,
             loss_by_timestep=[round(x, 6) if math.isfinite(x) else None for x in by_bin])
        for n, (loss, norm, by_bin, others) in enumerate(columns, done + 1)
    ]


def read_log(folder: Path) -> list[dict]:
    """The entries of log.jsonl. Lines that a crash or a full disk left incomplete are skipped."""
    log, entries = folder / "log.jsonl", {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            entry = json.loads(line)
            step = int(entry["step"])
            entries[step] = {**entry, "step": step, "loss": float(entry["loss"])}
    return [entry for _, entry in sorted(entries.items())]


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
    with checkpoint.writing(folder):
        return SummaryWriter(folder, purge_step=step + 1)


def centred_median(values: Tensor, reach: int = 50) -> Tensor:
    """The median (n,) of each of values (n,) and its neighbours: as many on either side, `reach` or what there is.

    Loss falls steeply at first, and a median of unequal sides would be that of other steps. Only at the end, where it
    is almost flat, are there fewer neighbours on the right.
    """
    windows = (values[i - min(i, reach) : i + min(i, reach) + 1] for i in range(len(values)))
    return torch.stack([window.median() for window in windows])


def plot_loss(folder: Path) -> None:
    """Plot loss.png from log.jsonl, unless that is empty: the loss, and beside it the loss by timestep."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    entries = read_log(folder)
    if not entries:
        return
    losses, steps = torch.tensor([entry["loss"] for entry in entries]), [entry["step"] for entry in entries]
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(folder.name, parse_math=False)
    whole, parts = figure.subplots(1, 2)
    whole.plot(steps, losses, alpha=0.3, linewidth=0.5, label="each batch")
    whole.plot(steps, centred_median(losses), label="centred median")
    for name, label in HELD_OUT.items():
        some = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if some:
            whole.plot(*zip(*some, strict=True), "o-", markersize=3, label=label)
    for i in range(BINS):
        some = [(n, entry["loss_by_timestep"][i]) for n, entry in zip(steps, entries, strict=True)
                if "loss_by_timestep" in entry and entry["loss_by_timestep"][i] is not None]
        if some:
            some_steps, values = zip(*some, strict=True)
            label = f"timesteps {i * 100 // BINS} to {(i + 1) * 100 // BINS}% of T"
            parts.plot(some_steps, centred_median(torch.tensor(values)), color=f"C{i + 1}", label=label)
    for axes in (whole, parts):
        axes.set(xlabel="training step", ylabel="loss", xscale="log", yscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks, such as Chinese ones
        checkpoint.write_whole(folder / "loss.png", lambda file: figure.savefig(file, dpi=120))
