"""The judge of generated digits: two spaces of features, a distance in them, and how real images look in both.

    python judge.py              train the classifier anew, and write the two files below

The first space is the last hidden layer of a classifier, the second a network of random filters. The distance of two
sets of images is the Fréchet distance (FD), squared as in FID (arXiv 1706.08500): that of two Gaussians which have the
mean and the covariance of each set. (The usual features, of the Inception network, are made for colour photographs and
say little of grey digits.)

assets/classifier.safetensors holds the classifier. assets/reference.safetensors holds the features of the 10,000 test
images, and of 10,000 training images that the classifier never saw. So samples are judged without MNIST at hand.
"""

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import dataset
from cli import Parser, UsageError, run_script
from sampling import seeded

CLASSIFIER = Path(__file__).parent / "assets" / "classifier.safetensors"
REFERENCE = Path(__file__).parent / "assets" / "reference.safetensors"
HELD_OUT = 10_000  # training images kept from the classifier: what to tune on, and to compare with
COUNTS = (20, 100, 1000, 3000, 10_000)  # sample sizes at which the reference holds the mean FD of real images


def conv(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


class Classifier(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10), by way of features (B, 64)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *conv(1, 24), *conv(24, 24), nn.MaxPool2d(2),        # (B, 24, 14, 14)
            *conv(24, 48), *conv(48, 48), nn.MaxPool2d(2),       # (B, 48, 7, 7)
            *conv(48, 64), *conv(64, 64), nn.MaxPool2d(2),       # (B, 64, 3, 3)
            nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class RandomFeatures(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> features (B, 64): three layers of random filters that nobody trained.

    They know nothing of digits, and see what a classifier learns to overlook: noise, contrast, the seams of patches.
    """

    def __init__(self):
        super().__init__()
        generator = seeded(0, 0)
        sizes = [(16, 1, 5, 5), (32, 16, 3, 3), (64, 32, 3, 3)]
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
    """Features (N, 64) of images (N, 1, 28, 28), which are uint8 or float in [-1, 1]."""
    parts = images.split(500)
    return torch.cat([network.features(part if part.is_floating_point() else dataset.to_float(part)) for part in parts])


def frechet_distance(f: Tensor, g: Tensor) -> float:
    """|mean f - mean g|^2 + tr(A + B - 2 (A B)^1/2) of features f (N, D) and g (M, D) with covariances A and B."""
    f, g = f.double(), g.double()
    A, B = f.T.cov(), g.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of A B are those of the symmetric matrix A^1/2 B A^1/2.
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((f.mean(0) - g.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def expected_distance(f: Tensor, target: Tensor, choices: list[Tensor]) -> float:
    """The mean Fréchet distance to `target` (M, D) of features f (N, D), taken at each of some choices of indices."""
    return sum(frechet_distance(f[index], target) for index in choices) / len(choices)


def load() -> tuple[Classifier, RandomFeatures, dict[str, Tensor]]:
    """The classifier, the random network, and what they make of real images. Raises UsageError.

    The last is a dict. classifier.test, classifier.held_out, random.test and random.held_out are features (10,000, 64),
    labels.test and labels.held_out (10,000,) their labels. classifier.floor and random.floor (5,) are the mean Fréchet
    distances of COUNTS random training images to the test images: what samples as good as real images would have.
    """
    classifier, random = Classifier(), RandomFeatures()
    try:
        classifier.load_state_dict(load_file(CLASSIFIER))
        reference = {name: tensor.float() for name, tensor in load_file(REFERENCE).items()}
        filters = {name: reference.pop(f"filters.{name}") for name in random.state_dict()}
    except Exception as error:  # missing, cut short, or of another version of this file
        raise UsageError(f"cannot read {CLASSIFIER} and {REFERENCE}: make them anew with python judge.py") from error
    random.load_state_dict(filters)
    return classifier.eval(), random, reference


# ------------------------------------------------------------------------------------------------------ how it is made


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 10 degrees (0.175), sheared and scaled by up to 10 %, and moved by up to 2 pixels."""
    u = torch.rand(6, len(x), generator=generator) * 2 - 1
    angle, shear, sx, sy = u[0] * 0.175, u[1] * 0.1, 1 + 0.1 * u[2], 1 + 0.1 * u[3]
    # The unit of affine_grid is 14 pixels, so 1/7 of it are 2 pixels.
    top = torch.stack([sx * angle.cos(), shear - angle.sin(), u[4] / 7], 1)
    bottom = torch.stack([shear + angle.sin(), sy * angle.cos(), u[5] / 7], 1)
    where = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, where, align_corners=False) - 1  # it fills in 0, so 0 must be black


def fit(pixels: Tensor, labels: Tensor, epochs: int = 10, batch_size: int = 128, seed: int = 0) -> Classifier:
    """A classifier of images (N, 1, 28, 28), uint8, trained with random distortions."""
    torch.manual_seed(seed)
    model, generator = Classifier().to(memory_format=torch.channels_last), seeded(seed, 1)
    steps = epochs * len(labels) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    indices = islice(dataset.index_batches(len(labels), batch_size, seed, 0), steps)
    for index in tqdm(indices, total=steps, desc="classifier", unit="step", leave=False, dynamic_ncols=True):
        x = jitter(dataset.to_float(pixels[index]), generator).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> None:
    """Train the classifier and write both files. Raises UsageError, DataError."""
    parser = Parser(description="Train the judge of evaluate.py. Writes its files in assets/.")
    parser.add_argument("--data-dir", default="data", help="where MNIST is, or is downloaded to (default: data)")
    data_dir = parser.parse_args().data_dir
    train, test = dataset.load("mnist", data_dir), dataset.load("mnist", data_dir, train=False)
    order = torch.randperm(len(train.labels), generator=seeded(0, 0))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    classifier, random = fit(train.pixels[rest], train.labels[rest]), RandomFeatures()
    reference = {f"filters.{name}": filters for name, filters in random.state_dict().items()}
    for name, pixels, labels in (
        ("test", test.pixels, test.labels), ("held_out", train.pixels[held_out], train.labels[held_out])
    ):
        reference[f"classifier.{name}"] = features(classifier, pixels).half()
        reference[f"random.{name}"] = features(random, pixels).half()
        reference[f"labels.{name}"] = labels.byte()
        logits = classifier.head(reference[f"classifier.{name}"].float())
        print(f"{name}: accuracy {(logits.argmax(1) == labels).double().mean():.2%} of {len(labels):,} images")
    for name, network in (("classifier", classifier), ("random", random)):
        every, target, floors = features(network, train.pixels), reference[f"{name}.test"].float(), []
        for n in COUNTS:
            generator = seeded(0, 2)
            choices = [torch.randperm(len(every), generator=generator)[:n] for _ in range(20)]
            floors.append(expected_distance(every, target, choices))
        reference[f"{name}.floor"] = torch.tensor(floors)
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    for path, tensors in ((CLASSIFIER, weights), (REFERENCE, reference)):
        checkpoint.write_whole(path, lambda file, tensors=tensors: file.write(save(tensors)))


if __name__ == "__main__":
    run_script(main, dataset.DataError)
