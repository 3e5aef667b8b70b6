"""What is measured of generated images. Each measure is a row of a table, beside the value of real images.

accuracy   the fraction of samples that a classifier assigns to their label
FD         the Fréchet distance to the real test images, squared as in FID (arXiv 1706.08500): the distance of two
           Gaussians that have the mean and the covariance of each set, in some features. It grows where images are few.
rho        FD divided by the mean FD of as many real images with the same labels, on which the classifier was not
           trained. So real images have rho 1 at any count. "rho to random training images" divides by the FD of random
           ones, which is larger: their labels differ a little, and the classifier was trained on most of them.
precision  the fraction of samples that are nearer to some real image than its third-nearest real neighbour is, in the
           classifier's features (arXiv 1904.06991)
recall     the same with samples and real images exchanged. Both are unsteady below some 2,000 images.

There are two spaces of features (classifier.py): the last hidden layer of the classifier, and a network of random
filters. (The usual ones, of the Inception network, are made for colour photographs and say little of grey digits.)
For MNIST, assets/classifier.safetensors holds the classifier, assets/reference.safetensors the features of the 10,000
test images and of 10,000 training images on which it was not trained ("held out"); tools/train_classifier.py makes
both. So samples are measured without MNIST on the disk. For any other data set, both come from its images, see
classifier.py. Images without classes have no classifier, and only random features are compared.

Intervals are 95% intervals over the choice of the samples. Compare numbers of equal counts.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import checkpoint
import dataset
from checkpoint import ASSETS
from classifier import Classifier, DataReference, RandomFeatures, features
from dataset import DIGITS, DataError
from diffusion import Diffusion
from sampling import grid, seeded
from variance import LearnedVariance

CLASSIFIER = ASSETS / "classifier.safetensors"
REFERENCE = ASSETS / "reference.safetensors"
COUNTS = (20, 100, 1000, 3000, 10_000)  # sample sizes at which the reference holds the mean FD of real images
RESAMPLES = 100                         # of a bootstrap

Table = dict[str, dict]  # {"recall": {"generated": 0.85, "real": 0.87, "interval": (low, high)}, ...}


# ---------------------------------------------------------------------------------------------------------- real images


class Reference(DataReference):
    """That of MNIST, which is in assets/, with floors. Raises DataError without its files.

    tensors: classifier.test, classifier.held_out, random.test and random.held_out are features (10,000, 64),
             labels.test and labels.held_out (10,000,) their labels. classifier.floor and random.floor (5,) are the mean
             Fréchet distances of COUNTS random training images to the test images.
    """

    parts, classes, notes = ("test", "held_out"), DIGITS, ()

    def __init__(self):
        self.networks = dict(classifier=Classifier(), random=RandomFeatures())
        try:
            self.networks["classifier"].load_state_dict(load_file(CLASSIFIER))
            self.tensors = {name: tensor.float() for name, tensor in load_file(REFERENCE).items()}
            filters = {name: self.tensors.pop(f"filters.{name}") for name in self.networks["random"].state_dict()}
        except Exception as error:  # missing, cut short, or of another version of this file
            fix = "make them anew with python tools/train_classifier.py"
            raise DataError(f"cannot read {CLASSIFIER} and {REFERENCE}: {fix}") from error
        self.networks["random"].load_state_dict(filters)
        self.networks["classifier"].eval()


# ------------------------------------------------------------------------------------------------------------ measures


def measure(images: Tensor, labels: Tensor | None, reference: DataReference, against: str = "test") -> Table:
    """The measures above of images (N, C, S, S), uint8, N at most as many as the real ones, meant to show labels (N,).

    against: one of reference.parts, the real images to compare with. The other part gives the values of real images,
             by as many of them and with the same labels.
    """
    [other] = set(reference.parts) - {against}
    real = reference.tensors
    if "classifier" not in reference.networks:
        labels = None
    intended = labels_as_in(real[f"labels.{against}"], len(images)) if labels is None else labels
    choices = [with_same_labels(intended, real[f"labels.{other}"], choice) for choice in range(20)]
    generated = {space: features(network, images) for space, network in reference.networks.items()}
    table = {}
    if labels is not None:
        head = reference.networks["classifier"].head
        real_labelled = real[f"classifier.{against}"], real[f"labels.{against}"]
        what = "digit" if reference.classes == DIGITS else "class"
        table |= accuracies(head, dict(generated=(generated["classifier"], labels), real=real_labelled), what)
    groups = torch.zeros(len(images)) if labels is None else labels
    for space, f in generated.items():
        table |= distances(space, f, groups, real, against, other, choices)
    if "classifier" not in generated:
        return table
    target = real[f"classifier.{against}"]
    both = dict(generated=generated["classifier"], real=real[f"classifier.{other}"][choices[0]])
    radius = neighbour_distance(target)
    table["precision"] = {name: fraction_within(f, target, radius) for name, f in both.items()}
    table["recall"] = {name: fraction_within(target, f, neighbour_distance(f)) for name, f in both.items()}
    return table


def accuracies(head: Callable, groups: dict[str, tuple[Tensor, Tensor]], what: str = "digit") -> Table:
    """The accuracy on (features, labels) of each group, as a whole and by digit, or whatever the classes are called."""
    table = {"accuracy": {}, f"accuracy by {what}": {}}
    for name, (f, y) in groups.items():
        logits = head(f)
        right = (logits.argmax(1) == y).double()
        table["accuracy"][name] = right.mean().item()
        each = [right[y == k].mean().item() if (y == k).any() else None for k in range(logits.shape[1])]
        table[f"accuracy by {what}"][name] = each
        table["accuracy"].setdefault("interval", wilson_interval(right.mean().item(), len(right)))  # of the samples
    return table


def wilson_interval(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction p of n."""
    z = 1.959964
    centre, margin = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return (centre - margin) / (1 + z * z / n), (centre + margin) / (1 + z * z / n)


def distances(
    space: str, f: Tensor, labels: Tensor, real: dict[str, Tensor], against: str, other: str, choices: list[Tensor]
) -> Table:
    """FD and rho of features f (N, D) in a space, see `measure`."""
    target, f = real[f"{space}.{against}"].double(), f.double()
    distance = dict(
        generated=frechet_distance(f, target),
        interval=bootstrap(lambda index: frechet_distance(f[index], target), labels),
        real=mean_distance(real[f"{space}.{other}"], target, choices),
    )
    floors = {f"rho, {space}": distance["real"]}
    if f"{space}.floor" in real and against == "test":
        # Between the COUNTS, the distance is about a power of the count: a straight line in logs.
        floor = np.interp(math.log(len(f)), np.log(COUNTS), real[f"{space}.floor"].log())
        floors[f"rho to random training images, {space}"] = float(np.exp(floor))
    table = {f"FD, {space}": distance}
    for name, floor in floors.items():
        table[name] = {column: (np.array(value) / floor).tolist() for column, value in distance.items()}
    return table


def frechet_distance(f: Tensor, g: Tensor) -> float:
    """|mean f - mean g|^2 + tr(A + B - 2 (A B)^1/2) of features f (N, D) and g (M, D) with covariances A and B."""
    f, g = f.double(), g.double()
    A, B = f.T.cov(), g.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of A B are those of the symmetric matrix A^1/2 B A^1/2.
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((f.mean(0) - g.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def mean_distance(f: Tensor, target: Tensor, choices: list[Tensor]) -> float:
    """The mean Fréchet distance to `target` (M, D) of features f (N, D), taken at each of some choices of indices."""
    return sum(frechet_distance(f[index], target) for index in choices) / len(choices)


def labels_as_in(reference: Tensor, n: int) -> Tensor:
    """n labels, int64, in the proportions of the reference's (M,)."""
    return reference.long().sort().values[((torch.arange(n) + 0.5) * len(reference) / n).long()]


def with_same_labels(labels: Tensor, real: Tensor, choice: int = 0) -> Tensor:
    """Indices (N,), sorted by label, of as many real images of each label as labels (N,) has, another set by `choice`.

    real (M,) are the labels of the real images. Where it has too few of a label, some of those images are taken twice.
    """
    index, generator = [], seeded(1, choice)
    for label, n in enumerate(labels.bincount().tolist()):
        pool = (real == label).nonzero()[:, 0]
        pool = pool[torch.randperm(len(pool), generator=generator)]
        index.append(pool.repeat(n // len(pool) + 1)[:n])
    return torch.cat(index)


def neighbour_distance(points: Tensor) -> Tensor:
    """The distance (N,) of each of points (N, D) to its third neighbour among the others."""
    # Of the four nearest, the first is the point itself.
    return torch.cat([torch.cdist(part, points).topk(4, largest=False).values[:, 3] for part in points.split(1000)])


def fraction_within(points: Tensor, others: Tensor, radius: Tensor) -> float:
    """The fraction of points (N, D) that are within the radius (M,) of one of the others (M, D)."""
    within = torch.cat([(torch.cdist(part, others) <= radius).any(1) for part in points.split(1000)])
    return within.double().mean().item()


def bootstrap(statistic: Callable[[Tensor], float], labels: Tensor) -> tuple[float, float]:
    """The 95% interval of statistic(indices) over the choice of the images, where their labels (N,) stay as they are.

    Only the spread of the resampled values is used, and it is centred on the estimate: a resample holds duplicates,
    which makes its Fréchet distance too large.
    """
    generator, values = seeded(0, len(labels)), []
    groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for _ in range(RESAMPLES):
        resampled = [group[torch.randint(len(group), (len(group),), generator=generator)] for group in groups]
        values.append(statistic(torch.cat(resampled)))
    low, high = np.quantile(values, [0.025, 0.975]) - np.mean(values)
    estimate = statistic(torch.arange(len(labels)))
    return max(0.0, float(estimate + low)), float(estimate + high)


# ----------------------------------------------------------------------------- measures that need the images themselves


def nearest(images: Tensor, train: Tensor, k: int = 50, skip: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """For images (N, C, S, S), uint8, among training images: the distance to the nearest, its index, and the mean
    distance to the nearest k, each (N,). Distances are Euclidean, of pixels in 0 ... 1.

    skip: how many of the nearest do not count: 1 for images that are training images themselves
    """
    x, pool = images.flatten(1) / 255, train.flatten(1) / 255
    found = [torch.cdist(part, pool).topk(k + skip, largest=False) for part in x.split(500)]
    distances, index = torch.cat([f.values for f in found])[:, skip:], torch.cat([f.indices for f in found])[:, skip:]
    return distances[:, 0], index[:, 0], distances.mean(1)


def memorization(images: Tensor, train: Tensor, test: Tensor | None, picture: Path) -> Table:
    """Are samples copies of training images? Test images, of which none can be one, show what is usual. Where there are
    none, each training image is compared with the others.

    A near-duplicate is nearer to one training image than half its mean distance to the nearest 50, or to a twentieth of
    few images (after arXiv 2301.13188; here these are neighbours of the sample). The picture shows the ten samples that
    come closest to being one, each above its training image.
    """
    table = {"distance to the nearest training image, median": {}, "near-duplicates": {}}
    k = min(50, len(train) // 20)
    real, itself = (train, 1) if test is None else (test, 0)
    some = torch.randperm(len(real), generator=seeded(0, 3))[: len(images)]
    for name, x, skip in (("real", real[some], itself), ("generated", images, 0)):
        distance, index, usual = nearest(x, train, k, skip)
        table["distance to the nearest training image, median"][name] = distance.median().item()
        table["near-duplicates"][name] = int((distance < 0.5 * usual).sum())
    closest = (distance / usual).argsort()[:10]
    pairs = grid(dataset.to_float(torch.cat([images[closest], train[index[closest]]])), columns=10)
    checkpoint.write_whole(picture, lambda file: pairs.save(file, "PNG"))
    return table


@torch.no_grad()
def bits_per_dimension(
    model: Callable, diffusion: Diffusion, images: Tensor, labels: Tensor, batch: int = 100
) -> Table:
    """The variational bound on -log2 P(image | label) per pixel, DDPM Eq. 5, of images (N, C, S, S), uint8.

    It is the sum of T terms, each estimated from `batch` random images, and of the KL divergence of x_{T-1}, the
    noisiest, from N(0, I).
    """
    generator, total = seeded(0, 0), 0.0
    bound = LearnedVariance(**diffusion.config, device=diffusion.device)
    for t in tqdm(range(diffusion.T), desc="bits", unit="timestep", leave=False, dynamic_ncols=True):
        index = torch.randint(len(images), (batch,), generator=generator)
        x0 = dataset.to_float(images[index]).to(diffusion.device)
        times = torch.full((batch,), t, device=diffusion.device)
        x_t = diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=generator).to(diffusion.device))
        out = model(x_t, times, labels[index].to(diffusion.device))
        x0_hat = diffusion.predict_x0(out, x_t, times).clamp(-1, 1)
        mix = out[:, x0.shape[1] :]
        if not mix.shape[1]:  # the variance is not learned, and that of the posterior
            mix = torch.full_like(x0, -1)
        total += bound.variational_bound(x0, x0_hat, bound.log_variance(mix, times), times).mean().item()
    alpha, sigma = diffusion.alpha[-2], diffusion.sigma[-2]  # of T - 1, since the last entry is the clean image
    second_moment = dataset.to_float(images).square().mean().item()
    prior = 0.5 * (alpha**2 * second_moment + sigma**2 - 1 - 2 * math.log(sigma)) / math.log(2)
    return {"bits per dimension of real test images, at most": dict(generated=total + prior)}
