"""Train the classifier of MNIST, by which evaluate.py measures digits. (For other data, evaluate.py trains one itself.)

    python tools/train_classifier.py                         write its two files in assets/ anew
    python tools/train_classifier.py --npz samples.npz       train one on samples, to see what they teach

The second command prints the accuracy on real test images of a classifier that was trained only on these samples, and
beside it, of one that was trained on as many real images.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
import dataset  # noqa: E402
import metrics  # noqa: E402
from classifier import Classifier, RandomFeatures, features, fit  # noqa: E402
from cli import Parser, UsageError, run_script  # noqa: E402
from evaluate import choose, read_npz  # noqa: E402
from metrics import mean_distance  # noqa: E402
from sampling import seeded  # noqa: E402

HELD_OUT = 10_000  # training images that are kept from the classifier, to tune on and to compare with


def accuracy(classifier: Classifier, images: dataset.Images) -> float:
    predicted = classifier.head(features(classifier, images.pixels)).argmax(1)
    return (predicted == images.labels).double().mean().item()


def train_on_samples(path: Path, train: dataset.Images, test: dataset.Images) -> None:
    """Print the accuracy of a classifier that is trained on the samples in `path`, and on as many real images."""
    images, labels = choose(path, *read_npz(path), count=None)
    if labels is None:
        raise UsageError(f"{path} has no labels to train on: write it with tools/sample_npz.py")
    some = torch.randperm(len(train.labels), generator=seeded(0, 1))[: len(images)]
    for name, x, y in (("samples", images, labels), ("real images", train.pixels[some], train.labels[some])):
        print(f"trained on {len(x):,} {name}: accuracy {accuracy(fit(x, y, seed=1), test):.2%}")


def write_files(train: dataset.Images, test: dataset.Images) -> None:
    """Train the classifier, and write it and the features of real images to assets/."""
    order = torch.randperm(len(train.labels), generator=seeded(0, 0))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    classifier, random = fit(train.pixels, train.labels, rest), RandomFeatures()
    reference = {f"filters.{name}": filters for name, filters in random.state_dict().items()}
    for name, images in (
        ("test", test),
        ("held_out", dataset.Images(train.pixels[held_out], train.labels[held_out], train.classes, "")),
    ):
        reference[f"classifier.{name}"] = features(classifier, images.pixels).half()
        reference[f"random.{name}"] = features(random, images.pixels).half()
        reference[f"labels.{name}"] = images.labels.byte()
        print(f"{name}: accuracy {accuracy(classifier, images):.2%} of {len(images.labels):,} images")
    for name, network in (("classifier", classifier), ("random", random)):
        every, target, floors = features(network, train.pixels), reference[f"{name}.test"].float(), []
        for n in metrics.COUNTS:
            generator = seeded(0, 2)
            choices = [torch.randperm(len(every), generator=generator)[:n] for _ in range(20)]
            floors.append(mean_distance(every, target, choices))
        reference[f"{name}.floor"] = torch.tensor(floors)
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    for path, tensors in ((metrics.CLASSIFIER, weights), (metrics.REFERENCE, reference)):
        checkpoint.write_whole(path, lambda file, tensors=tensors: file.write(save(tensors)))


def main(argv: list[str] | None = None) -> None:
    """Raises UsageError, DataError."""
    parser = Parser("train_classifier.py", "Train the classifier of MNIST. Writes its files in assets/.")
    parser.add_argument("--npz", type=Path, metavar="FILE", help="train on these samples, and write no file")
    parser.add_argument("--data-dir", default="data", help="where MNIST is, or is downloaded to (default: data)")
    args = parser.parse_args(argv)
    train, test = (dataset.load("mnist", args.data_dir, train=part) for part in (True, False))
    if args.npz:
        train_on_samples(args.npz, train, test)
    else:
        write_files(train, test)


if __name__ == "__main__":
    run_script(main)
