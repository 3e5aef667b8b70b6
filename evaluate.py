"""Measure generated digits: how many show what their label says, and how far their distribution is from real ones.

    python evaluate.py                                       the newest run or the bundled weights, 10,000 images
    python evaluate.py --checkpoint runs/mnist-1 --count 5000
    python evaluate.py --npz samples.npz                     images of any other model
    python evaluate.py --also memorization                   what needs MNIST on the disk

This is the command line. The measures are explained at the top of metrics.py. Neither MNIST nor a network connection is
needed, because assets/ holds the features of real images. tools/sweep.py measures at several numbers of steps.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint
import dataset
from cli import Parser, UsageError, number, output_path, run_script
from metrics import Reference, Table, bits_per_dimension, labels_as_in, measure, memorization
from model_flags import add_model_flags, open_model
from sampling import TrainedModel, seeded, to_uint8

MIN_COUNT, MAX_COUNT = 20, 10_000  # images that are compared; there are 10,000 real ones to compare with


def add_measure_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("what to measure").add_argument
    flag("--count", type=number(int, MIN_COUNT, MAX_COUNT), help=f"images (default: {MAX_COUNT})")
    flag("--against", default="test", choices=["test", "held-out"],
         help="real images to compare with; held-out: training images, for tuning (default: test)")
    flag("--output", type=Path, help="a new .json (default: a new name in outputs/)")
    add_model_flags(parser)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser("evaluate.py", "Measure the quality of generated MNIST digits.")
    flag = parser.add_argument_group("what else to measure").add_argument
    flag("--npz", type=Path, metavar="FILE", help="images from here: arr_0 (uint8, NHWC), and labels or arr_1")
    flag("--also", nargs="+", default=[], choices=["memorization", "bits"],
         help="minutes more, with MNIST from --data-dir")
    flag("--data-dir", default="data", help="where MNIST is (default: data)")
    add_measure_flags(parser)
    args = parser.parse_args(argv)
    if args.npz and (args.checkpoint or args.model or args.steps or args.guidance or "bits" in args.also):
        raise UsageError("--npz holds images already: leave out the flags of model and sampling, and --also bits")
    return args


def read_npz(path: Path, count: int | None) -> tuple[Tensor, Tensor | None]:
    """(images (N, 1, 28, 28), uint8, labels (N,) or None) of a file, N of them at random. Raises UsageError."""
    try:
        arrays = dataset.read_npz(path)
        images, labels = arrays["arr_0"], arrays.get("labels", arrays.get("arr_1"))
        n, shape = images.shape[0], images.shape[1:]
    except Exception as error:  # a broken file can provoke any
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"cannot read {path} ({reason}): give an .npz as inference.py --npz writes it") from error
    if images.dtype != np.uint8 or shape not in ((28, 28, 1), (28, 28)):
        raise UsageError(f"arr_0 of {path} is {images.dtype} {images.shape}: give uint8 images (N, 28, 28, 1)")
    if labels is not None and (labels.shape != (n,) or not np.isin(labels, range(10)).all()):
        raise UsageError(f"the labels of {path} are not {n} digits 0 to 9: leave them out, or correct them")
    if n < (count or MIN_COUNT):
        fix = f"give {count} or more, or lower --count" if count else f"give {MIN_COUNT} or more"
        raise UsageError(f"{path} holds {n} images: {fix}")
    some = torch.randperm(n, generator=seeded(0, n))[: count or MAX_COUNT].numpy()  # whatever the order in the file
    images = torch.from_numpy(images[some]).view(-1, 1, 28, 28)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64)[some])


def open_digits_model(args: argparse.Namespace) -> TrainedModel:
    """The model to measure. Raises UsageError where it does not make digits."""
    trained = open_model(args)
    if trained.description["classes"] != list(dataset.DIGITS) or trained.shape != (1, 28, 28):
        data = f"this model was trained on {trained.description['data']}"
        raise UsageError(f"the classifier knows only digits of 28 x 28, and {data}: give a checkpoint of MNIST")
    return trained


def sample_digits(trained: TrainedModel, labels: Tensor, batch_size: int, **options) -> tuple[Tensor, float]:
    """(images (N, 1, 28, 28), uint8, seconds) of the labels (N,), see TrainedModel.sample."""
    begin = time.perf_counter()
    images = to_uint8(trained.sample(labels, batch_size, **{"progress": "sampling", **options}))
    return images, time.perf_counter() - begin


def format_table(table: Table) -> str:
    """The measures as a table in Markdown."""
    def cell(name: str, value: float | list | None) -> str:
        if value is None:
            return ""
        if isinstance(value, list):
            return " ".join("-" if v is None else f"{100 * v:.1f}" for v in value)
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.2%}" if "accuracy" in name else f"{value:.3g}"

    lines = ["| | generated | 95% interval | real |", "|---|---|---|---|"]
    for name, row in table.items():
        between = " to ".join(cell(name, v) for v in row["interval"]) if "interval" in row else ""
        lines.append(f"| {name} | {cell(name, row['generated'])} | {between} | {cell(name, row.get('real'))} |")
    return "\n".join(lines)


def evaluate(args: argparse.Namespace) -> Path:
    """Measure what the command line asks for, and print it. Returns the path of the JSON file.

    Raises UsageError, CheckpointError, DataError.
    """
    args.output = output_path(args.output, "evaluation.json")
    picture = args.output.with_suffix(".png")
    if picture.exists():
        raise UsageError(f"{picture} is there already: give another name by --output, or remove it first")
    reference, against = Reference(), args.against.replace("-", "_")
    trained = None if args.npz else open_digits_model(args)
    if "bits" in args.also and trained.diffusion.config["schedule"] == "flow":  # never with --npz, see parse_args
        raise UsageError("the bound of flow is useless: --also bits is for the schedules linear and cosine")
    if args.also:  # before sampling, in case it is missing
        mnist = {train: dataset.load("mnist", args.data_dir, train=train, download=False) for train in (True, False)}
    if args.npz:
        about = dict(images=str(args.npz))
        images, labels = read_npz(args.npz, args.count)
    else:
        about = dict(checkpoint=str(args.checkpoint), **trained.settings)
        labels = labels_as_in(reference.tensors[f"labels.{against}"], args.count or MAX_COUNT)
        images, about["seconds"] = sample_digits(trained, labels, args.batch_size)
    table = measure(images, labels, reference, against)
    if "memorization" in args.also:
        table |= memorization(images, mnist[True].pixels, mnist[False].pixels, picture)
    if "bits" in args.also:
        table |= bits_per_dimension(trained.model, trained.diffusion, mnist[False].pixels, mnist[False].labels)
    result = dict(about, count=len(images), against=against, numbers=table)
    if not args.npz:
        result |= {name: trained.description[name] for name in ("config", "diffusion", "data", "step")}
    content = json.dumps(result, indent=1).encode()
    checkpoint.write_whole(args.output, lambda file: file.write(content))
    how = ", ".join(f"{name} {value:.1f}" if name == "seconds" else f"{name} {value}" for name, value in about.items())
    print(f"{len(images):,} images against the {args.against} images; {how}\n{format_table(table)}")
    if picture.exists():
        print(picture)
    return args.output


if __name__ == "__main__":
    run_script(lambda: print(evaluate(parse_args())))
