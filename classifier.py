"""The two networks whose features metrics.py compares, the training of one, and the features of any real images.

A small classifier learns the classes of a data set. Its last hidden layer is a space of features in which images that
look alike are close. assets/ has the classifier of MNIST. For any other data set it is trained once, and kept in
outputs/classifiers/ under the fingerprint of the images. Some images are kept out of its training, to compare with.

The other network, of random filters, is not trained, and so needs no classes.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import dataset
from dataset import DataError, Images
from sampling import seeded

CACHE = Path("outputs") / "classifiers"
FORMAT = "dit-from-scratch classifier 1"
MIN_COUNT, MAX_COUNT = 20, 10_000  # real images to compare with
SEEN = 60_000     # images that a training sees, with repetition, which takes one core a minute or two ...
MAX_EPOCHS = 200  # ... and how often it sees one of them, at most
LARGEST = 32      # pixels a side of what the second layer sees; the first one makes larger images smaller
SMALLEST = 8      # pixels a side, of which three poolings leave one


# ------------------------------------------------------------------------------------------------------------ networks


def conv(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(c_in, c_out, 2 * stride + 1, stride, padding=stride, bias=False)
    return [layer, nn.BatchNorm2d(c_out), nn.ReLU()]


class Classifier(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> logits (B, K) of K classes, from features (B, 64). Shapes here are MNIST's."""

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(
            *conv(channels, 24, -(-size // LARGEST)),            # (B, 24, 28, 28)
            *conv(24, 24), nn.MaxPool2d(2),                      # (B, 24, 14, 14)
            *conv(24, 48), *conv(48, 48), nn.MaxPool2d(2),       # (B, 48, 7, 7)
            *conv(48, 64), *conv(64, 64), nn.MaxPool2d(2),       # (B, 64, 3, 3)
            nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten()),  # for MNIST, 3 x 3 as they are
            nn.Linear(64 * 9, 64), nn.ReLU(),
        )
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class RandomFeatures(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> features (B, 64): three layers of random filters, without training.

    They see what a classifier learns to ignore: noise, contrast, the seams of patches.
    """

    def __init__(self, channels: int = 1):
        super().__init__()
        generator = seeded(0, 0)
        sizes = [(16, channels, 5, 5), (32, 16, 3, 3), (64, 32, 3, 3)]
        for i, size in enumerate(sizes):
            scale = (2 / (size[1] * size[2] * size[3])) ** 0.5
            self.register_buffer(f"filters{i}", torch.randn(size, generator=generator) * scale)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.filters0, stride=2, padding=2))  # (B, 16, 14, 14)
        x = F.relu(F.conv2d(x, self.filters1, stride=2, padding=1))  # (B, 32, 7, 7)
        x = F.conv2d(x, self.filters2, stride=2, padding=1)          # (B, 64, 4, 4)
        return x.square().mean((2, 3)).sqrt()                        # root mean square of each filter, (B, 64)


@torch.no_grad()
def features(network: Classifier | RandomFeatures, images: Tensor) -> Tensor:
    """Features (N, 64) of images (N, C, S, S), uint8."""
    at_once = max(1, 500 * 28**2 // images[0, 0].numel())
    return torch.cat([network.features(dataset.to_float(part)) for part in images.split(at_once)])


# ------------------------------------------------------------------------------------------------------------ training


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 10 degrees (0.175), sheared and scaled by up to 10 %, and moved by up to 1/14 of it.

    What comes in at an edge continues the pixels there.
    """
    u = torch.rand(6, len(x), generator=generator) * 2 - 1
    angle, shear, sx, sy = u[0] * 0.175, u[1] * 0.1, 1 + 0.1 * u[2], 1 + 0.1 * u[3]
    # The unit of affine_grid is half an image, so 1/7 of it are 2 of 28 pixels.
    top = torch.stack([sx * angle.cos(), shear - angle.sin(), u[4] / 7], 1)
    bottom = torch.stack([shear + angle.sin(), sy * angle.cos(), u[5] / 7], 1)
    coordinates = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, coordinates, padding_mode="border", align_corners=False)


def fit(
    pixels: Tensor, labels: Tensor, some: Tensor | None = None, classes: int = 10, epochs: float = 10,
    batch_size: int = 128, seed: int = 0,
) -> Classifier:
    """A classifier of images (N, C, S, S), uint8, and their labels (N,), trained with random distortions.

    some: indices (n,) of the images to train on (default: all)
    """
    some = torch.arange(len(labels)) if some is None else some
    torch.manual_seed(seed)
    _, C, S, _ = pixels.shape
    model, generator = Classifier(C, S, classes).to(memory_format=torch.channels_last), seeded(seed, 1)
    steps = max(1, int(epochs * len(some)) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    batches = islice(dataset.index_batches(len(some), batch_size, seed, 0), steps)
    for batch in tqdm(batches, total=steps, desc="classifier", unit="step", leave=False, dynamic_ncols=True):
        index = some[batch]
        x = jitter(dataset.to_float(pixels[index]), generator).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# ---------------------------------------------------------------------------------------------------- any real images


def kept_out(images: Images, parts: int) -> tuple[list[Tensor], Tensor]:
    """(indices of each of the parts that are kept out of the training, indices of the images that are left).

    A part has a quarter of each class, or less where that would be more than MAX_COUNT images. Raises DataError where
    that would be fewer than MIN_COUNT images, and where a class has fewer than 4, or there is only one.
    """
    if len(images.classes) == 1:
        raise DataError(f"the {images.source} are of one class, so there is nothing to classify: "
                        f"name the folder {images.classes[0]} itself, to measure without classes")
    fraction = min(1 / 4, MAX_COUNT / len(images.labels))
    chosen, generator = [[] for _ in range(parts + 1)], seeded(0, 0)
    for label in range(max(1, len(images.classes))):
        index = (images.labels == label).nonzero()[:, 0]
        if len(index) < 4:
            name = f"class {images.classes[label]}" if images.classes else "data set"
            raise DataError(f"the {name} has {len(index)} images, which is too few to measure by: add some")
        index = index[torch.randperm(len(index), generator=generator)]
        n = max(1, round(fraction * len(index)))
        for part, choice in zip(chosen, index.split([n] * parts + [len(index) - parts * n]), strict=True):
            part.append(choice)
    *kept, rest = [torch.cat(part) for part in chosen]
    if len(kept[0]) < MIN_COUNT:
        enough = -(-len(images.labels) * MIN_COUNT // len(kept[0]))
        raise DataError(f"the {images.source} leave {len(kept[0])} to compare with, which is too few: "
                        f"add some, to have about {enough}")
    return kept, rest


def check(weights: dict[str, Tensor], model: Classifier) -> None:
    """Raise some exception unless weights from a file are numbers of the types and shapes that this network has."""
    own = model.state_dict()
    if {name: (w.dtype, w.shape) for name, w in weights.items()} != {n: (w.dtype, w.shape) for n, w in own.items()}:
        raise ValueError("its weights are of another network")
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError("it holds numbers that are not finite")


def classifier_of(images: Images, index: Tensor) -> tuple[Classifier, Path]:
    """The classifier of a data set and its file, trained on the images `index` (n,) now, or on an earlier call.

    Raises DataError for images that are too small, CheckpointError where its file is damaged.
    """
    _, C, S, _ = images.pixels.shape
    if S < SMALLEST:
        raise DataError(f"{images.source} have {S} pixels a side: measure at {SMALLEST} or more, or without classes")
    about = dict(format=FORMAT, images=images.fingerprint(), count=len(index), data=images.source)
    path = CACHE / f"{about['images'][:32]}-{len(index)}.safetensors"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)  # before the work, in case it may not be written
        epochs = min(MAX_EPOCHS, SEEN / len(index))
        trained = fit(images.pixels, images.labels, index, len(images.classes), epochs)
        checkpoint.save(path, about, trained.state_dict())
    with checkpoint.refusing(f"{path} is damaged", "remove it, and the classifier is trained anew"):
        state = checkpoint.read_safetensors(path)
        if any(state[name] != about[name] for name in ("format", "images", "count")):
            raise ValueError("it is of other images")
        model = Classifier(C, S, len(images.classes))
        check(state["ema"], model)
        model.load_state_dict(state["ema"])
    return model.to(memory_format=torch.channels_last).eval(), path  # which takes half the time


class DataReference:
    """The networks of a data set, and the features of its real images.

    train:    the images that the model was trained on; the classifier is trained on most of them
    test:     images that it was not trained on, or None where the data set has none

    parts:    the names of the real images that samples are compared with, and of those that give the values of real
              images: "test" and "held_out". Without test images, both are parts of the training images on which at
              least the classifier was not trained, "held_out" and "others".
    classes:  their names, () for none
    networks: "classifier", unless there are no classes, and "random"
    tensors:  for each network and part, features (M, 64) such as "random.test", and the labels (M,) "labels.test"
    notes:    what has to be known of these numbers, in sentences

    Raises DataError where there is too little to measure by, CheckpointError where the classifier's file is damaged.
    """

    def __init__(self, train: Images, test: Images | None = None):
        kept, rest = kept_out(train, 1 if test else 2)
        held = [replace(train, pixels=train.pixels[index], labels=train.labels[index]) for index in kept]
        real = dict(test=test, held_out=held[0]) if test else dict(held_out=held[0], others=held[1])
        self.classes, self.parts, path = train.classes, tuple(real), None
        self.networks = dict(random=RandomFeatures(train.pixels.shape[1]))
        if train.classes:
            classifier, path = classifier_of(train, rest)
            self.networks = dict(classifier=classifier) | self.networks
        self.tensors = {f"labels.{part}": images.labels for part, images in real.items()}
        for space, network in self.networks.items():
            self.tensors |= {f"{space}.{part}": features(network, images.pixels) for part, images in real.items()}
        self.notes = [*self.remarks(train.source, len(rest), path)]

    def remarks(self, source: str, trained_on: int, path: Path | None) -> Iterator[str]:
        """The notes: how good the classifier is and where it is kept, and what stands in for test images."""
        labels = self.tensors["labels.held_out"]
        if self.classes:
            right = self.networks["classifier"].head(self.tensors["classifier.held_out"]).argmax(1) == labels
            yield (f"The classifier was trained on {trained_on:,} of the {source}, and is right on "
                   f"{right.double().mean():.2%} of {len(labels):,} others. It is kept in {path}.")
        else:
            yield "The images have no classes, so only random features are compared."
        if "test" not in self.parts:
            yield (f"There are no test images. Samples are compared with {len(labels):,} of the {source}, and as many "
                   "others give the values of real images. A copy of a training image counts as a good sample: look "
                   "for copies by --also memorization.")
