"""Measure generated images: how many show what their label says, and how far their distribution is from real ones.

    python evaluate.py                                       the newest run or the bundled weights, 10,000 digits
    python evaluate.py --checkpoint runs/mnist-1 --count 5000
    python evaluate.py --checkpoint runs/my-images-1 --dataset my-images
    python evaluate.py --npz samples.npz                     digits of any other model; with --dataset, other images
    python evaluate.py --also memorization                   what needs the training images, also for MNIST

This is the command line. The measures are explained at the top of metrics.py. For MNIST neither the data nor a network
connection is needed, because assets/ holds the features of real images. For another data set, the first call trains a
classifier. tools/sweep.py measures at several numbers of steps.
"""

import argparse
import json
import signal
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import numpy as np
import torch
from torch import Tensor

import checkpoint
import dataset
from classifier import MAX_COUNT, MIN_COUNT, DataReference
from cli import Parser, UsageError, number, output_path, run_script
from dataset import DATASETS, DIGITS, Images
from metrics import Reference, Table, bits_per_dimension, labels_as_in, measure, memorization
from model_flags import add_model_flags, open_model
from sampling import TrainedModel, seeded, to_uint8

MNIST = (1, 28, 28)                # the shape of its images
BUNDLED = ("mnist", "mnist-5000")  # the data sets whose reference is in assets/


def add_measure_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("what to measure").add_argument
    flag("--dataset", metavar="NAME", help=f"real images: {', '.join(DATASETS)}, mnist-5000, or a folder (default: "
         "mnist, for what was trained on it)")
    flag("--data-dir", default="data", help="where data sets are, or are downloaded to (default: data)")
    flag("--count", type=number(int, MIN_COUNT, MAX_COUNT),
         help=f"images (default: {MAX_COUNT}, or as many as there are real ones to compare with)")
    flag("--against", choices=["test", "held-out"], help="real images to compare with; held-out: training images, for "
         "tuning (default: test, or held-out where there are no test images)")
    flag("--output", type=Path, help="a new .json (default: a new name in outputs/)")
    add_model_flags(parser)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser("evaluate.py", "Measure the quality of generated images.")
    flag = parser.add_argument_group("what else to measure").add_argument
    flag("--npz", type=Path, metavar="FILE", help="images from here: arr_0 (uint8, NHWC), and labels or arr_1")
    flag("--also", nargs="+", default=[], choices=["memorization", "bits"],
         help="minutes more, with the training or test images themselves; MNIST must be in --data-dir")
    add_measure_flags(parser)
    args = parser.parse_args(argv)
    if args.npz and (args.checkpoint or args.model or args.steps or args.guidance or "bits" in args.also):
        raise UsageError("--npz holds images already: leave out the flags of model and sampling, and --also bits")
    return args


# ------------------------------------------------------------------------------------------------------ what to measure


def read_npz(path: Path, any_shape: bool = False) -> tuple[Tensor, np.ndarray | None]:
    """(images (N, C, S, S), uint8, labels or None) of a file, with labels as they are in it. Raises UsageError.

    any_shape: square images, grey or in colour, not only those of MNIST's shape
    """
    try:
        arrays = dataset.read_npz(path)
        images, labels = arrays["arr_0"], arrays.get("labels", arrays.get("arr_1"))
        _, H, W, C = images.shape if images.ndim != 3 else (*images.shape, 1)
    except Exception as error:  # a broken file can provoke any
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"cannot read {path} ({reason}): give an .npz as tools/sample_npz.py writes it") from error
    fits = H == W > 0 and C in (1, 3) if any_shape else (C, H, W) == MNIST
    if images.dtype != np.uint8 or not fits:
        shape = "square images (N, S, S, 1 or 3)" if any_shape else "images (N, 28, 28, 1), or name others by --dataset"
        raise UsageError(f"arr_0 of {path} is {images.dtype} {images.shape}: give uint8 {shape}")
    images = torch.from_numpy(images).view(-1, H, W, C).permute(0, 3, 1, 2)
    return images.clone(memory_format=torch.contiguous_format), labels


def choose(
    path: Path, images: Tensor, labels: np.ndarray | None, count: int | None, classes: tuple[str, ...] = DIGITS
) -> tuple[Tensor, Tensor | None]:
    """`count` images and labels (N,), or all up to MAX_COUNT, at random, of those that `read_npz` read of a file.

    Raises UsageError where the labels are not numbers of these classes, and where there are fewer images.
    """
    n, K = len(images), len(classes)
    if labels is not None and K and (labels.shape != (n,) or not np.isin(labels, range(K)).all()):
        what = "digits" if classes == DIGITS else "numbers"
        raise UsageError(f"the labels of {path} are not {n} {what} 0 to {K - 1}: leave them out, or correct them")
    if n < (count or MIN_COUNT):
        fix = f"give {count} or more, or lower --count" if count else f"give {MIN_COUNT} or more"
        raise UsageError(f"{path} holds {n} images: {fix}")
    some = torch.randperm(n, generator=seeded(0, n))[: count or MAX_COUNT]  # whatever the order in the file
    return images[some], None if labels is None or not K else torch.from_numpy(labels.astype(np.int64))[some]


def samples_shape(trained: TrainedModel) -> tuple[int, int, int]:
    """The shape (C, S, S) of a model's images. Raises UsageError for latents without a decoder."""
    if trained.autoencoder:
        size = trained.shape[-1] * trained.autoencoder.factor
        return 3, size, size
    if not trained.is_image:
        raise UsageError("this model makes latents: add --vae, and name the images that they are of by --dataset")
    return trained.shape


def name_of_data(args: argparse.Namespace, description: dict | None) -> str:
    """--dataset, or mnist where a model's description says that it was trained on it. Raises UsageError elsewhere.

    description: None for images of unknown origin
    """
    if args.dataset or description is None:
        return args.dataset or "mnist"
    data = description["data"]
    if tuple(description["classes"]) == DIGITS and "MNIST" in data.upper().split():
        return "mnist"
    raise UsageError(f"this model was trained on {data}, not on MNIST: name these images by --dataset FOLDER or NAME")


def load_real(
    args: argparse.Namespace, shape: tuple[int, int, int], description: dict | None = None
) -> tuple[Images | None, Images | None]:
    """(training images, test images) to measure samples of this shape (C, S, S) by, checked to fit them.

    The first are None where those of MNIST are not needed, the second also where the data set has none. Raises
    UsageError, DataError.
    """
    name, train, test = name_of_data(args, description), None, None
    bundled = name in BUNDLED and shape == MNIST
    if args.also or not bundled:
        load = partial(dataset.load, name, args.data_dir, shape[-1], download=bool(args.dataset))
        train, test = load(), load(train=False) if name in DATASETS else None
        if train.pixels.shape[1] != shape[0]:
            kinds = ("grey", "in colour") if shape[0] == 3 else ("in colour", "grey")
            raise UsageError(f"the {train.source} are {kinds[0]}, and the samples {kinds[1]}: name their own --dataset")
        if not test and ("bits" in args.also or args.against == "test" and not bundled):
            raise UsageError(f"{name} has no test images: leave out --also bits and --against test")
    classes = train.classes if train else DIGITS
    known = [str(i) for i in range(len(classes))] if args.model else list(classes)  # official weights number them
    if description and classes and description["classes"] not in ([], known):
        raise UsageError(f"the classes of {name} are not those of this model, which was trained on "
                         f"{description['data']}: name that data set by --dataset")
    return train, test


def open_reference(args: argparse.Namespace, train: Images | None, test: Images | None) -> DataReference:
    """The reference for what `load_real` loaded. Sets args.against to one of its parts, and args.count.

    Raises UsageError, DataError, CheckpointError.
    """
    if train is None or train.name in BUNDLED and train.pixels.shape[1:] == MNIST:
        reference = Reference()
    else:
        reference = DataReference(train, test)
    args.against = args.against.replace("-", "_") if args.against else reference.parts[0]
    most = len(reference.tensors[f"labels.{args.against}"])
    if (args.count or 0) > most:
        raise UsageError(f"--count is {args.count}, and there are {most} images to compare with: use {most} or less")
    args.count = args.count or most
    return reference


def labels_to_sample(args: argparse.Namespace, trained: TrainedModel, reference: DataReference) -> Tensor:
    """Labels (args.count,) in the proportions of the real images, or in turn where only the model knows classes."""
    if trained.description["classes"] and reference.classes:
        return labels_as_in(reference.tensors[f"labels.{args.against}"], args.count)
    return torch.arange(args.count) % max(1, len(trained.description["classes"]))


def sample_images(trained: TrainedModel, labels: Tensor, batch_size: int, **options) -> tuple[Tensor, float]:
    """(images (N, C, S, S), uint8, seconds) of the labels (N,), see TrainedModel.sample."""
    begin = time.perf_counter()
    samples = trained.sample(labels, batch_size, **{"progress": "sampling", **options})
    images = torch.cat([to_uint8(trained.to_images(part)) for part in samples.split(batch_size)])
    return images, time.perf_counter() - begin


# ------------------------------------------------------------------------------------------------------------- results


def format_table(table: Table) -> str:
    """The measures as a table in Markdown."""
    def cell(name: str, value: float | list | None) -> str:
        if value is None:
            return ""
        if isinstance(value, list) and len(value) > 20:
            return "in the file"
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


def also(
    args: argparse.Namespace, trained: TrainedModel | None, images: Tensor, train: Images | None, test: Images | None,
    picture: Path,
) -> Table:
    """The measures of these samples that --also asks for."""
    table = {}
    if "memorization" in args.also:
        table |= memorization(images, train.pixels, test and test.pixels, picture)
    if "bits" in args.also:
        labels = test.labels if trained.description["classes"] else torch.zeros_like(test.labels)
        table |= bits_per_dimension(trained.model, trained.diffusion, test.pixels, labels)
    return table


def evaluate(args: argparse.Namespace) -> Path:
    """Measure what the command line asks for, and print it. Returns the path of the JSON file.

    Raises UsageError, CheckpointError, DataError.
    """
    args.output = output_path(args.output, "evaluation.json")
    picture = args.output.with_suffix(".png")
    if picture.exists():
        raise UsageError(f"{picture} is there already: give another name by --output, or remove it first")
    if args.npz:
        trained, (images, labels) = None, read_npz(args.npz, any_shape=args.dataset is not None)
        shape, description = tuple(images.shape[1:]), None
    else:
        trained = open_model(args)
        shape, description = samples_shape(trained), trained.description
    if "bits" in args.also and trained.diffusion.config["schedule"] == "flow":  # never with --npz, see parse_args
        raise UsageError("the bound of flow is useless: --also bits is for the schedules linear and cosine")
    train, test = load_real(args, shape, description)
    if args.npz:
        images, labels = choose(args.npz, images, labels, args.count, train.classes if train else DIGITS)
    reference = open_reference(args, train, test)
    if args.npz:
        about, images = dict(images=str(args.npz)), images[: args.count]
        labels = None if labels is None else labels[: args.count]
    else:
        about = dict(checkpoint=str(args.checkpoint), **trained.settings)
        labels = labels_to_sample(args, trained, reference)
        images, about["seconds"] = sample_images(trained, labels, args.batch_size)
        labels = labels if description["classes"] else None
    table = measure(images, labels, reference, args.against) | also(args, trained, images, train, test, picture)
    result = dict(about, count=len(images), against=args.against, numbers=table)
    if reference.notes:
        result |= dict(dataset=args.dataset or train.name, classes=reference.classes, notes=reference.notes)
    if trained:
        result |= {name: description[name] for name in ("config", "diffusion", "data", "step")}
    content = json.dumps(result, indent=1).encode()
    checkpoint.write_whole(args.output, lambda file: file.write(content))
    how = ", ".join(f"{name} {value:.1f}" if name == "seconds" else f"{name} {value}" for name, value in about.items())
    what = f"{len(images):,} images against the {args.against.replace('_', '-')} images; {how}"
    print(what, format_table(table), *reference.notes, sep="\n")
    if picture.exists():
        print(picture)
    return args.output


if __name__ == "__main__":
    run_script(lambda: print(evaluate(parse_args())))
