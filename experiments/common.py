"""What the experiments share: train a network to a number of steps, and measure its samples there."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
import train  # noqa: E402
from classifier import DataReference  # noqa: E402
from cli import Parser  # noqa: E402
from dit import DiT, DiTConfig  # noqa: E402
from metrics import labels_as_in, measure  # noqa: E402
from rundir import settings  # noqa: E402
from sampling import TrainedModel, to_uint8  # noqa: E402

UNGUIDED = dict(guidance=1.0, guidance_interval=None)  # options of `TrainedModel.sample`


def parse_args(name: str, description: str, argv: list[str] | None, dataset: str = "mnist") -> argparse.Namespace:
    """The command line of the experiment `name`. With --quick, nothing is mixed with the results that are measured."""
    parser = Parser(f"{name}.py", description)
    parser.add_argument("--quick", action="store_true", help="a few steps, for a test")
    parser.add_argument("--dataset", default=dataset, help=f"as of train.py (default: {dataset})")
    parser.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to (default: data)")
    parser.add_argument("--runs", type=Path, help=f"(default: runs/{name}, or runs/{name}-quick)")
    parser.add_argument("--output", type=Path, help="folder of all results (default: experiments and assets, or with "
                        f"--quick outputs/{name}-quick)")
    args = parser.parse_args(argv)
    name += "-quick" if args.quick else ""
    if args.quick and not args.output:
        args.output = Path("outputs") / name
        args.output.mkdir(parents=True, exist_ok=True)
    args.runs = args.runs or Path("runs") / name
    args.results, args.figures = args.output or Path(__file__).parent, args.output or checkpoint.ASSETS
    args.flags = ["--no-compile"] if args.quick else []
    return args


class Store:
    """The measured numbers of an experiment, rows of a JSON file. What is in it already is not trained again."""

    def __init__(self, path: Path):
        self.path, self.rows = path, json.loads(path.read_text()) if path.exists() else []

    def find(self, **what) -> dict | None:
        """The row with these values, if there is one."""
        return next((row for row in self.rows if what.items() <= row.items()), None)

    def save(self, *rows: dict) -> None:
        """Add these rows, and write the file."""
        self.rows += rows
        content = json.dumps(self.rows, indent=1).encode()
        checkpoint.write_whole(self.path, lambda file: file.write(content))


def train_to(folder: Path, network: type[DiT], flags: list[str], steps: int) -> dict:
    """Train a run in this folder until it has done so many steps, resuming what is there. Returns its checkpoint."""
    trainer_class = type("ExperimentTrainer", (train.Trainer,), {"network": network})
    done = checkpoint.load(folder)["step"] if (folder / checkpoint.RUN_FILE).exists() else -1
    if done < steps:
        run = ["--run-dir", str(folder), *flags] if done < 0 else ["--resume", str(folder)]
        status = train.main([*run, "--steps", str(steps), "--save-every", str(steps)], trainer_class)
        if status:
            raise SystemExit(status)
    return checkpoint.load(folder)


def trained_model(state: dict, network: type[DiT]) -> TrainedModel:
    return checkpoint.build(state, network=network)


def measure_samples(trained: TrainedModel, reference: DataReference, count: int, **options) -> dict[str, float]:
    """Accuracy and rho of so many samples, in 20 steps of DPM-Solver++, seed 0, with these options of `sample`."""
    against = reference.parts[0]
    labels = labels_as_in(reference.tensors[f"labels.{against}"], count)
    table = measure(to_uint8(trained.sample(labels, 250, **options)), labels, reference, against)
    return {
        "accuracy": table["accuracy"]["generated"],
        "FD": table["FD, classifier"]["generated"],
        "rho": table["rho, classifier"]["generated"],
        "rho, random": table["rho, random"]["generated"],
    }


def show_rows(axes: Axes, pictures: dict[str, Image.Image], **options) -> None:
    """Pictures of the same size, one under the other, each beside its name. options: of `imshow`"""
    rows = [np.asarray(picture) for picture in pictures.values()]
    axes.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=255, **options)
    axes.set_xticks([])
    axes.set_yticks([(i + 0.5) * len(rows[0]) for i in range(len(rows))], pictures)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def gflops(network: type[DiT], config: DiTConfig) -> float:
    """The floating-point operations of a forward pass of one image, in 10^9, as torch.utils.flop_counter counts them: a
    multiplication and an addition of a matrix product are two.
    """
    one = torch.zeros(1, dtype=torch.long)
    x = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a fused one counts twice
        network(config)(x, one, one)
    return counter.get_total_flops() / 1e9


def seconds_a_step(
    networks: dict[str, tuple[type[DiT], DiTConfig]], flags: list[str], rounds: int
) -> dict[str, float]:
    """The seconds of a training step of each network, with the default settings and these flags: the median of rounds
    in turn, so that whatever else the machine does slows all of them alike.
    """
    trainers = {}
    for name, (network, config) in networks.items():
        parser = train.build_parser()
        args, device = settings(parser, parser.given(flags))
        trainer_class = type("ExperimentTrainer", (train.Trainer,), {"network": network})
        trainers[name] = trainer_class(config, args, device)
    x0 = torch.zeros(args.batch_size, *trainers[name].shape, device=device)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    times = {name: [] for name in networks}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            # The first step of a round fills the caches, and .item() waits for a GPU.
            trainer.step(0, x0, y, args.lr)["gradient_norm"].item()
            begin = time.perf_counter()
            for _ in range(5):
                norm = trainer.step(0, x0, y, args.lr)["gradient_norm"]
            norm.item()
            times[name].append((time.perf_counter() - begin) / 5)
    return {name: statistics.median(values) for name, values in times.items()}


def hardware() -> str:
    """The machine and its threads, in words, for the figures of a table."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
