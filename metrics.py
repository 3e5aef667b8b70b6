"""What is measured of generated digits. Each measure is a row of a table, beside what real images have.

accuracy   the share of samples that the classifier takes for what their label says
FD         the Fréchet distance to the real test images, in the features of judge.py. It grows where images are few.
rho        FD divided by the mean FD of as many real images with the same labels, from which the classifier has not
           learned. So real images have rho 1 at any count. "rho to random training images" divides by the FD of random
           ones, which is larger: their labels differ a little, and the classifier has learned from most of them.
precision  the share of samples that lie nearer to some real image than its third-nearest real neighbour does, in the
           classifier's features (arXiv 1904.06991)
recall     the same with samples and real images exchanged. Both are unsteady below some 2,000 images.

Intervals are 95% intervals over the choice of the samples. Compare numbers of equal counts.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from tqdm import tqdm

import checkpoint
import dataset
import judge
from diffusion import Diffusion
from sampling import grid, seeded

Table = dict[str, dict]  # {"recall": {"generated": 0.85, "real": 0.87, "interval": (low, high)}, ...}


def measure(images: Tensor, labels: Tensor | None, judges: tuple, against: str = "test") -> Table:
    """The measures above of images (N, 1, 28, 28), uint8, N at most 10,000, that are meant to show labels (N,).

    judges:  what judge.load returns
    against: test or held_out, the real images to compare with. The other kind gives the values of real images, by as
             many of them and with the same labels.
    """
    classifier, random, reference = judges
    other = "held_out" if against == "test" else "test"
    wanted = labels_as_in(reference[f"labels.{against}"], len(images)) if labels is None else labels
    yardsticks = [with_same_labels(wanted, reference[f"labels.{other}"], draw) for draw in range(20)]
    generated = dict(classifier=judge.features(classifier, images), random=judge.features(random, images))
    table = {}
    if labels is not None:
        real = reference[f"classifier.{against}"], reference[f"labels.{against}"]
        table |= accuracies(classifier.head, dict(generated=(generated["classifier"], labels), real=real))
    groups = torch.zeros(len(images)) if labels is None else labels
    for space, f in generated.items():
        table |= distances(space, f, groups, reference, against, other, yardsticks)
    target, real = reference[f"classifier.{against}"], reference[f"classifier.{other}"][yardsticks[0]]
    both, radius = dict(generated=generated["classifier"], real=real), neighbourhoods(target)
    table["precision"] = {who: share_within(f, target, radius) for who, f in both.items()}
    table["recall"] = {who: share_within(target, f, neighbourhoods(f)) for who, f in both.items()}
    return table


def accuracies(head: Callable, groups: dict[str, tuple[Tensor, Tensor]]) -> Table:
    """The accuracy on (features, labels) of each group, as a whole and by digit."""
    table = {"accuracy": {}, "accuracy by digit": {}}
    for who, (f, y) in groups.items():
        right = (head(f).argmax(1) == y).double()
        table["accuracy"][who] = right.mean().item()
        by_digit = [right[y == d].mean().item() if (y == d).any() else None for d in range(10)]
        table["accuracy by digit"][who] = by_digit
        counted = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        table["accuracy"].setdefault("interval", tuple(counted))  # of the samples, which come first
    return table


def distances(
    space: str, f: Tensor, labels: Tensor, reference: dict, against: str, other: str, yardsticks: list[Tensor]
) -> Table:
    """FD and rho of features f (N, D) in a space, see `measure`."""
    target, f = reference[f"{space}.{against}"].double(), f.double()
    distance = dict(
        generated=judge.frechet_distance(f, target),
        interval=bootstrap(lambda index: judge.frechet_distance(f[index], target), labels),
        real=judge.expected_distance(reference[f"{space}.{other}"], target, yardsticks),
    )
    floors = {f"rho, {space}": distance["real"]}
    if against == "test":  # between the COUNTS, the distance is about a power of the count: a straight line in logs
        floor = np.interp(math.log(len(f)), np.log(judge.COUNTS), reference[f"{space}.floor"].log())
        floors[f"rho to random training images, {space}"] = float(np.exp(floor))
    table = {f"FD, {space}": distance}
    for name, floor in floors.items():
        table[name] = {who: (np.array(value) / floor).tolist() for who, value in distance.items()}
    return table


def labels_as_in(reference: Tensor, n: int) -> Tensor:
    """n labels, int64, in the proportions of the reference's (M,)."""
    return reference.long().sort().values[((torch.arange(n) + 0.5) * len(reference) / n).long()]


def with_same_labels(labels: Tensor, real: Tensor, draw: int = 0) -> Tensor:
    """Indices (N,), sorted by digit, of as many real images of each digit as labels (N,) has. Each `draw` chooses anew.

    real (M,) are the labels of the real images. Where it has too few of a digit, some of those images are taken twice.
    """
    index, generator = [], seeded(1, draw)
    for digit, n in enumerate(labels.bincount(minlength=10).tolist()):
        pool = (real == digit).nonzero()[:, 0]
        pool = pool[torch.randperm(len(pool), generator=generator)]
        index.append(pool.repeat(n // len(pool) + 1)[:n])
    return torch.cat(index)


def neighbourhoods(points: Tensor) -> Tensor:
    """The distance (N,) of each of points (N, D) to its third neighbour among the others."""
    distances, _ = NearestNeighbors(n_neighbors=3).fit(points).kneighbors()
    return torch.from_numpy(distances[:, -1]).to(points.dtype)


def share_within(points: Tensor, others: Tensor, radius: Tensor) -> float:
    """The share of points (N, D) that are within the radius (M,) of one of the others (M, D)."""
    within = torch.cat([(torch.cdist(part, others) <= radius).any(1) for part in points.split(1000)])
    return within.double().mean().item()


def bootstrap(statistic: Callable[[Tensor], float], labels: Tensor, draws: int = 100) -> tuple[float, float]:
    """The 95% interval of statistic(indices) over the choice of the images, where their labels (N,) stay as they are.

    Only the spread of the resampled values is used, and it is centred on the estimate: a resample holds duplicates,
    which makes its Fréchet distance too large.
    """
    generator, values = seeded(0, len(labels)), []
    groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for _ in range(draws):
        resampled = [group[torch.randint(len(group), (len(group),), generator=generator)] for group in groups]
        values.append(statistic(torch.cat(resampled)))
    low, high = np.quantile(values, [0.025, 0.975]) - np.mean(values)
    estimate = statistic(torch.arange(len(labels)))
    return max(0.0, float(estimate + low)), float(estimate + high)


def nearest(images: Tensor, train: Tensor, k: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """For images (N, 1, 28, 28), uint8, among training images: the distance to the nearest, its index, and the mean
    distance to the nearest k, each (N,). Distances are Euclidean, of pixels in 0 ... 1."""
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train.flatten(1) / 255)
    distances, index = map(torch.from_numpy, neighbours.kneighbors(images.flatten(1) / 255))
    return distances[:, 0], index[:, 0], distances.mean(1)


def memorization(images: Tensor, train: Tensor, test: Tensor, picture: Path) -> Table:
    """Are samples copies of training images? Test images, of which none can be one, show what is usual.

    A near-duplicate is nearer to one training image than half its mean distance to the nearest 50 (after arXiv
    2301.13188; here these 50 are neighbours of the sample). The picture shows the ten samples that come closest to
    being one, each above its training image.
    """
    table = {"distance to the nearest training image, median": {}, "near-duplicates": {}}
    some = torch.randperm(len(test), generator=seeded(0, 3))[: len(images)]
    for who, x in (("real", test[some]), ("generated", images)):
        distance, index, usual = nearest(x, train)
        table["distance to the nearest training image, median"][who] = distance.median().item()
        table["near-duplicates"][who] = int((distance < 0.5 * usual).sum())
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
    C, device = images.shape[1], diffusion.tables["a"].device
    for t in tqdm(range(diffusion.T), desc="bits", unit="timestep", leave=False, dynamic_ncols=True):
        index = torch.randint(len(images), (batch,), generator=generator)
        x0 = dataset.to_float(images[index]).to(device)
        times = torch.full((batch,), t, device=device)
        x_t = diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=generator).to(device))
        out = model(x_t, times, labels[index].to(device))
        x0_hat = diffusion.predict_x0(out[:, :C], x_t, times).clamp(-1, 1)
        log_variance = diffusion.reverse_log_variance(out[:, C:], times)
        total += diffusion.variational_bound(x0, x0_hat, log_variance, times).mean().item()
    a, s = diffusion.a[-2], diffusion.s[-2]  # of timestep T - 1, since the last entry is the clean image
    second_moment = dataset.to_float(images).square().mean().item()
    prior = 0.5 * (a**2 * second_moment + s**2 - 1 - 2 * math.log(s)) / math.log(2)
    return {"bits per dimension of real test images, at most": dict(generated=total + prior)}


def train_on_samples(images: Tensor, labels: Tensor, train: dataset.Images, test: dataset.Images) -> Table:
    """The accuracy on real test images of a classifier that learned from samples, beside one of as many real images."""
    some = torch.randperm(len(train.labels), generator=seeded(0, 1))[: len(images)]
    accuracy = {}
    for who, x, y in (("real", train.pixels[some], train.labels[some]), ("generated", images, labels)):
        classifier = judge.fit(x, y, seed=1)
        predicted = classifier.head(judge.features(classifier, test.pixels)).argmax(1)
        accuracy[who] = (predicted == test.labels).double().mean().item()
    return {"accuracy of a classifier trained on these": accuracy}
