"""Measure generated digits: how many are what their label says, and how far their distribution is from real ones.

    python evaluate.py                                       the newest run or the bundled weights, 10,000 images
    python evaluate.py --checkpoint runs/mnist-1 --count 5000
    python evaluate.py --npz samples.npz                     images of any other model
    python evaluate.py --sweep steps                         quality against cost, as a picture and a table
    python evaluate.py --also memorization                   what needs MNIST on the disk

This is the command line. The measures are explained at the top of metrics.py. Neither MNIST nor a network is needed,
because judge.py keeps the features of real images in assets/.
"""

import argparse
import json
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import dataset
import judge
from cli import Parser, UsageError, add_model_flags, number, open_model, output_path, run_script
from metrics import Table, bits_per_dimension, labels_as_in, measure, memorization, train_on_samples
from sampling import TrainedModel, seeded, timesteps, to_uint8
from shortcut import SHORTCUTS

LEAST, MOST = 20, 10_000  # images that are compared; there are 10,000 real ones to compare with
# What each sweep sets: the flags in words, and the options of `sample` at each of its points.
SWEEPS = {
    "steps": ("--steps", [dict(steps=n) for n in (5, 8, 10, 15, 20, 30, 50)]),
    "guidance": ("--guidance", [dict(guidance=w) for w in (1.0, 1.25, 1.5, 1.75, 2.0, 3.0)]),
    "sampler": ("--sampler and --steps", [
        dict(sampler=sampler, steps=n)
        for sampler, counts in (("dpm++", (5, 10, 20)), ("ddim", (10, 20, 50)), ("ddpm", (50, 200)))
        for n in counts
    ]),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser(description="Measure the quality of generated MNIST digits.")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--npz", type=Path, metavar="FILE", help="images from here: arr_0 (uint8, NHWC), and labels")
    what.add_argument("--count", type=number(int, LEAST, MOST), help=f"images, at most {MOST} (default: {MOST})")
    what.add_argument("--sweep", choices=SWEEPS, help="vary this, and draw quality against cost")
    what.add_argument("--also", nargs="+", default=[], choices=["memorization", "bits", "train-on-samples"],
                      help="minutes more, with MNIST from --data-dir")
    what.add_argument("--against", default="test", choices=["test", "held-out"],
                      help="real images to compare with; held-out: training images, for tuning (default: test)")
    what.add_argument("--data-dir", default="data", help="where MNIST is (default: data)")
    what.add_argument("--output", type=Path, help="a new .json (default: a new name in outputs/)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.npz and (args.checkpoint or args.model or args.steps or args.guidance or args.sweep or "bits" in args.also):
        raise UsageError("--npz holds images already: leave out the flags of model and sampling, and --also bits")
    weight = args.guidance and len(args.guidance) == 1
    if args.sweep and (weight if args.sweep == "guidance" else args.steps is not None):
        raise UsageError(f"--sweep {args.sweep} sets {SWEEPS[args.sweep][0]} by itself: leave what it sets out")
    if args.sweep and args.also:
        raise UsageError("--sweep and --also are two measurements: leave one out")
    if args.sweep == "guidance":  # each point has its own weight, which acts throughout or at LOW HIGH of --guidance
        args.guidance = args.guidance or [1.0]
    return args


def read_npz(path: Path, count: int | None) -> tuple[Tensor, Tensor | None]:
    """(images (N, 1, 28, 28), uint8, labels (N,) or None) of a file, N of them at random. Raises UsageError."""
    try:
        with zipfile.ZipFile(path) as archive:  # a few bytes of it can hold endless zeros
            if sum(entry.file_size for entry in archive.infolist()) > dataset.MEMORY_LIMIT:
                raise ValueError("it does not fit in memory")
        with np.load(path) as file:
            images, labels = np.asarray(file["arr_0"]), file.get("labels")
        n, shape = images.shape[0], images.shape[1:]
    except Exception as error:  # a broken file can provoke any
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"cannot read {path} ({reason}): give an .npz as inference.py --npz writes it") from error
    if images.dtype != np.uint8 or shape not in ((28, 28, 1), (28, 28)):
        raise UsageError(f"arr_0 of {path} is {images.dtype} {images.shape}: give uint8 images (N, 28, 28, 1)")
    if labels is not None and (labels.shape != (n,) or not np.isin(labels, range(10)).all()):
        raise UsageError(f"the labels of {path} are not {n} digits 0 to 9: leave them out, or mend them")
    if n < (count or LEAST):
        raise UsageError(f"{path} holds {n} images: give {count or LEAST} or more" + ", or lower --count" * bool(count))
    some = torch.randperm(n, generator=seeded(0, n))[: count or MOST].numpy()  # whatever the order in the file
    images = torch.from_numpy(images[some]).view(-1, 1, 28, 28)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64)[some])


def open_digits_model(args: argparse.Namespace) -> TrainedModel:
    """The model to measure. Raises UsageError where it does not draw digits, or cannot do what is asked."""
    trained = open_model(args)
    config, description, T = trained.model.config, trained.description, trained.diffusion.T
    digits = description["classes"] == list(dataset.DIGITS)
    if not digits or (config.in_channels, config.image_size) != (1, 28):
        learned = f"this model learned from {description['data']}"
        raise UsageError(f"the judge knows digits of 28 x 28 alone, and {learned}: give a checkpoint of MNIST")
    if "bits" in args.also and description["diffusion"]["schedule"] == "flow":
        raise UsageError("the bound of flow is loose beyond use: --also bits is for schedules linear and cosine")
    if config.shortcut and args.sweep == "sampler":
        raise UsageError("distilled weights have one sampler alone: use --sweep steps")
    most = max([options.get("steps", 1) for options in SWEEPS[args.sweep][1]]) if args.sweep else 1
    if most > T:
        raise UsageError(f"this sweep goes to {most} steps, the model knows {T}: use --sweep guidance")
    return trained


def show_table(table: Table) -> str:
    """The measures as a table in Markdown."""
    def show(name: str, value: float | list | None) -> str:
        if value is None:
            return ""
        if isinstance(value, list):
            return " ".join("-" if v is None else f"{100 * v:.1f}" for v in value)
        return f"{value:,}" if isinstance(value, int) else f"{value:.2%}" if "accuracy" in name else f"{value:.3g}"

    lines = ["| | generated | 95% interval | real |", "|---|---|---|---|"]
    for name, row in table.items():
        between = " to ".join(show(name, v) for v in row["interval"]) if "interval" in row else ""
        lines.append(f"| {name} | {show(name, row['generated'])} | {between} | {show(name, row.get('real'))} |")
    return "\n".join(lines)


def draw(trained: TrainedModel, labels: Tensor, *arguments, **options) -> tuple[Tensor, float]:
    """(images (N, 1, 28, 28), uint8, seconds) of the labels (N,), see TrainedModel.draw."""
    begin = time.perf_counter()
    images = to_uint8(trained.draw(labels, *arguments, **options))
    return images, time.perf_counter() - begin


def sweep(
    args: argparse.Namespace, trained: TrainedModel, labels: Tensor, judges: tuple, against: str
) -> Iterator[list[dict]]:
    """Measure at each point of a sweep, and print a table line by line. Yields the results so far after each point."""
    results, (flag, points) = [], SWEEPS[args.sweep]
    if trained.model.config.shortcut:
        points = [dict(steps=n) for n in SHORTCUTS]
    print(f"| {flag} | calls of the network | seconds for {len(labels):,} | accuracy | rho, classifier | rho, random |")
    print("|---|---|---|---|---|---|", flush=True)
    for options in points:
        settings = {**trained.settings, **options}
        low, high = settings["interval"] or (0, math.inf)
        way = timesteps(settings["sampler"], trained.diffusion.T, settings["steps"])
        guided = sum(settings["guidance"] not in (0, 1) and low <= t <= high for t in way)
        calls = len(way) + guided  # since a guided step calls the network twice
        name = " ".join(str(value) for value in options.values())
        images, seconds = draw(trained, labels, args.batch_size, f"{args.sweep} {name}", **options)
        table = measure(images, labels, judges, against)
        results.append(dict(name=name, **settings, calls=calls, seconds=seconds, numbers=table))
        rho = [table[f"rho, {space}"]["generated"] for space in ("classifier", "random")]
        line = f"| {name} | {calls} | {seconds:.1f} | {table['accuracy']['generated']:.2%}"
        print(f"{line} | {rho[0]:.2f} | {rho[1]:.2f} |", flush=True)
        yield results


def draw_sweep(what: str, results: list[dict], path: Path) -> None:
    """Two panels, rho and accuracy: against the cost, or against the weight of guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    x, words = ("guidance",) * 2 if what == "guidance" else ("calls", "calls of the network for an image")
    for sampler in sorted({r["sampler"] for r in results}):
        points = [r for r in results if r["sampler"] == sampler]
        for space, line in (("classifier", "o-"), ("random", "o:")):
            rho = [r["numbers"][f"rho, {space}"]["generated"] for r in points]
            axes[0].plot([r[x] for r in points], rho, line, label=f"{sampler}, {space} features")
        accuracy = [100 * r["numbers"]["accuracy"]["generated"] for r in points]
        axes[1].plot([r[x] for r in points], accuracy, "o-", label=sampler)
    for axis, name in zip(axes, ("rho (1: real images)", "accuracy, %"), strict=True):
        axis.set(xlabel=words, ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if what != "guidance":
            axis.set_xscale("log")
            axis.set_xticks(ticks := sorted({r["calls"] for r in results}), ticks)
            axis.set_xticks([], minor=True)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    checkpoint.write_whole(path, lambda file: figure.savefig(file, dpi=120))


def more(args: argparse.Namespace, images: Tensor, labels: Tensor, trained: TrainedModel, mnist: tuple) -> Table:
    """The measures of --also. mnist: the training and the test set."""
    table, (train, test) = {}, mnist
    if "memorization" in args.also:
        table |= memorization(images, train.pixels, test.pixels, args.output.with_suffix(".png"))
    if "bits" in args.also:
        table |= bits_per_dimension(trained.model, trained.diffusion, test.pixels, test.labels)
    if "train-on-samples" in args.also:
        table |= train_on_samples(images, labels, train, test)
    return table


def evaluate(args: argparse.Namespace) -> Path:
    """Measure what the command line asks for, and print it. Returns the path of the JSON file.

    Raises UsageError, CheckpointError, DataError.
    """
    args.output = output_path(args.output, f"sweep-{args.sweep}.json" if args.sweep else "evaluation.json")
    picture = args.output.with_suffix(".png")
    if picture.exists():
        raise UsageError(f"{picture} is there already: give another name by --output, or remove it first")
    judges, against = judge.load(), args.against.replace("-", "_")
    if args.npz:
        trained, result, (images, labels) = None, dict(images=str(args.npz)), read_npz(args.npz, args.count)
        if labels is None and "train-on-samples" in args.also:
            raise UsageError(f"{args.npz} has no labels to train on: add them, or leave --also train-on-samples out")
    else:
        trained, images = open_digits_model(args), None
        labels = labels_as_in(judges[2][f"labels.{against}"], args.count or MOST)
        result = dict(checkpoint=str(args.checkpoint), **trained.settings)
    how = ", ".join(f"{name} {value}" for name, value in result.items() if name != "clip")
    result |= dict(count=len(labels if images is None else images), against=against)
    if trained:
        result |= {name: trained.description[name] for name in ("config", "diffusion", "data", "step")}

    def save(**numbers: object) -> None:
        content = json.dumps(result | numbers, indent=1).encode()
        checkpoint.write_whole(args.output, lambda file: file.write(content))

    if args.sweep:
        for results in sweep(args, trained, labels, judges, against):
            save(sweep=results)
        draw_sweep(args.sweep, results, picture)
    else:
        parts = (True, False) if args.also else ()
        mnist = [dataset.load("mnist", args.data_dir, train=train, download=False) for train in parts]
        if trained:
            images, seconds = draw(trained, labels, args.batch_size)
            result |= dict(seconds=seconds)
            how += f"; sampled in {seconds:.1f} s"
        table = measure(images, labels, judges, against) | (more(args, images, labels, trained, mnist) if mnist else {})
        save(numbers=table)
        print(f"{len(images):,} images against the {args.against} images; {how}\n{show_table(table)}")
    if picture.exists():
        print(picture)
    return args.output


def main() -> None:
    print(evaluate(parse_args()))


if __name__ == "__main__":
    run_script(main, dataset.DataError)
