"""Measure generated digits: how many are what their label says, and how far their distribution is from real ones.

    python evaluate.py                                       the newest run or the bundled weights, 10,000 images
    python evaluate.py --checkpoint runs/mnist-1 --count 5000
    python evaluate.py --npz samples.npz                     images of any other model
    python evaluate.py --sweep steps                         quality against cost, as a picture and a table
    python evaluate.py --also memorization                   what needs MNIST on the disk

Features come from judge.py, whose files hold those of real images too: no network and no MNIST needed. In a space of
features the Fréchet distance (FD) is that between two Gaussians (arXiv 1706.08500). It grows where images are few, so
it is told as rho: the samples' FD to the test images over the mean one of as many real training images with the same
labels, which the judge has not learned from, so that 1 is real. Training images drawn at random are farther away, since
their labels are not quite those of the test set and the judge has learned from most: rho to them is told too, and is
smaller. (The usual Inception features are of colour photographs and say little of grey digits.) Precision is the share
of samples that lie among real images (arXiv 1904.06991), recall that of real images that lie among samples; below some
2,000 they are unsteady. Intervals are over the choice of the samples. Compare numbers of equal counts.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import dataset
import judge
from diffusion import Diffusion, spaced_timesteps
from inference import UsageError, add_model_flags, fail, grid, open_model, output_path, seeded, to_uint8

LEAST, MOST = 20, 10_000  # images that are compared; there are 10,000 real ones to compare with
SWEEPS = {
    "steps": ("--steps", [5, 8, 10, 15, 20, 30, 50]),
    "guidance": ("--guidance", [1.0, 1.25, 1.5, 1.75, 2.0, 3.0]),
    "sampler": ("--sampler and --steps", [
        ("dpm++", 5), ("dpm++", 10), ("dpm++", 20), ("ddim", 10), ("ddim", 20), ("ddim", 50),
        ("ddpm", 50), ("ddpm", 200),
    ]),
}

# ----------------------------------------------------------------------------------------------------------- metrics


def neighbourhoods(points: Tensor, k: int = 3) -> Tensor:
    """The distance (N,) of each of points (N, D) to its k-th neighbour among them."""
    parts = [torch.cdist(part, points).topk(k + 1, largest=False).values[:, -1] for part in points.split(1000)]
    return torch.cat(parts)  # k + 1: the nearest is the point itself


def share_within(points: Tensor, others: Tensor, radius: Tensor) -> float:
    """The share of points (N, D) that are within the radius (M,) of one of the others (M, D)."""
    within = torch.cat([(torch.cdist(part, others) <= radius).any(1) for part in points.split(1000)])
    return within.double().mean().item()


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share that was counted in n cases (Wilson's)."""
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def bootstrap(statistic: Callable[[Tensor], float], labels: Tensor, draws: int = 100) -> tuple[float, float]:
    """The 95% interval of statistic(indices) over the choice of the images, (N,) labels being what they are.

    The spread of the resampled values is laid around the estimate: a resample, with its duplicates, has a larger FD.
    """
    generator, values = seeded(0, len(labels)), []
    groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for _ in range(draws):
        resampled = [group[torch.randint(len(group), (len(group),), generator=generator)] for group in groups]
        values.append(statistic(torch.cat(resampled)))
    low, high = np.quantile(values, [0.025, 0.975]) - np.mean(values)
    estimate = statistic(torch.arange(len(labels)))
    return max(0.0, float(estimate + low)), float(estimate + high)


def alike(labels: Tensor, real: Tensor, draw: int = 0) -> Tensor:
    """Indices (N,) of real images that show the labels (N,) in some order, another choice for every `draw`; where too
    few do, some are taken twice."""
    index, generator = [], seeded(1, draw)
    for digit, n in enumerate(labels.bincount(minlength=10).tolist()):
        pool = (real == digit).nonzero()[:, 0]
        pool = pool[torch.randperm(len(pool), generator=generator)]
        index.append(pool.repeat(n // len(pool) + 1)[:n])
    return torch.cat(index)


def measure(images: Tensor, labels: Tensor | None, judges: tuple, against: str = "test") -> dict:
    """The numbers of generated images (N, 1, 28, 28), uint8, N at most 10,000, meant to show labels (N,).

    against: test or held_out, the real images to compare with. For each number, beside that of the samples
    ("generated"), the one of real images ("real"): for accuracy those of `against`, else as many of the other kind,
    with the same labels.
    """
    classifier, random, reference = judges
    n, other = len(images), "held_out" if against == "test" else "test"
    wanted = labels_as_in(reference[f"labels.{against}"], n) if labels is None else labels
    yardsticks = [alike(wanted, reference[f"labels.{other}"], draw) for draw in range(20)]
    generated = dict(classifier=judge.features(classifier, images), random=judge.features(random, images))
    table = {}
    if labels is not None:
        for who, f, y in (
            ("generated", generated["classifier"], labels),
            ("real", reference[f"classifier.{against}"], reference[f"labels.{against}"]),
        ):
            right = (classifier.head(f).argmax(1) == y).double()
            by_class = [right[y == d].mean().item() if (y == d).any() else None for d in range(10)]
            table.setdefault("accuracy", {})[who] = right.mean().item()
            table.setdefault("accuracy by digit", {})[who] = by_class
        table["accuracy"]["interval"] = wilson(table["accuracy"]["generated"], n)
    for space, f in generated.items():
        target, f = reference[f"{space}.{against}"].double(), f.double()
        groups = torch.zeros(n) if labels is None else labels
        table[f"FD, {space}"] = dict(
            generated=judge.frechet_distance(f, target),
            interval=bootstrap(lambda i, f=f, target=target: judge.frechet_distance(f[i], target), groups),
            real=judge.expected_distance(reference[f"{space}.{other}"], target, yardsticks),
        )
        floors = {f"rho, {space}": table[f"FD, {space}"]["real"]}
        if against == "test":
            floor = np.interp(math.log(n), np.log(judge.COUNTS), reference[f"{space}.floor"].log())
            floors[f"rho to random training images, {space}"] = float(np.exp(floor))
        for name, floor in floors.items():
            table[name] = {who: (np.array(value) / floor).tolist() for who, value in table[f"FD, {space}"].items()}
    target, real = reference[f"classifier.{against}"], reference[f"classifier.{other}"][yardsticks[0]]
    radius, table["precision"], table["recall"] = neighbourhoods(target), {}, {}
    for who, f in (("generated", generated["classifier"]), ("real", real)):
        table["precision"][who] = share_within(f, target, radius)
        table["recall"][who] = share_within(target, f, neighbourhoods(f))
    return table


# --------------------------------------------------------------------------- what needs the images of MNIST themselves


def nearest(images: Tensor, train: Tensor, k: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """For images (N, 1, 28, 28), uint8: the distance to the nearest of `train`, which one that is, and the mean
    distance of the nearest k; each (N,). Euclidean, of pixels in 0 ... 1."""
    train = train.flatten(1).float() / 255
    square = train.square().sum(1)
    found = []
    for part in tqdm(images.split(250), desc="neighbours", unit="batch", leave=False, dynamic_ncols=True):
        part = part.flatten(1).float() / 255
        squares = (square - 2 * part @ train.T).topk(k, largest=False)
        d = (squares.values + part.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        found.append((d[:, 0], squares.indices[:, 0], d.mean(1)))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def memorization(images: Tensor, train: Tensor, test: Tensor, picture: Path) -> dict:
    """Are samples copies of training images? Test images, of which none can be, show what is usual.

    A near-duplicate is nearer to one training image than half its mean distance to the nearest 50 (arXiv 2301.13188).
    Draws the ten samples that come closest to that, each above its training image.
    """
    table = {"distance to the nearest training image, median": {}, "near-duplicates": {}}
    some = torch.randperm(len(test), generator=seeded(0, 3))[: len(images)]
    for who, x in (("real", test[some]), ("generated", images)):
        distance, index, usual = nearest(x, train)
        table["distance to the nearest training image, median"][who] = distance.median().item()
        table["near-duplicates"][who] = int((distance < 0.5 * usual).sum())
    closest = (distance / usual).argsort()[:10]
    grid(dataset.to_float(torch.cat([images[closest], train[index[closest]]])), columns=10).save(picture)
    return table


@torch.no_grad()
def bits_per_dimension(model: Callable, diffusion: Diffusion, images: Tensor, labels: Tensor, batch: int = 100) -> dict:
    """The variational bound on -log2 P(image | label) per pixel, DDPM Eq. 5, of images (N, C, S, S), uint8: each of its
    T terms on `batch` of them, and the divergence of the noisiest x_T from N(0, I)."""
    generator, total = seeded(0, 0), 0.0
    C, device = images.shape[1], diffusion.tables["a"].device
    for t in tqdm(range(diffusion.T), desc="bits", unit="timestep", leave=False, dynamic_ncols=True):
        index = torch.randint(len(images), (batch,), generator=generator)
        x0 = dataset.to_float(images[index]).to(device)
        times = torch.full((batch,), t, device=device)
        x_t = diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=generator).to(device))
        out = model(x_t, times, labels[index].to(device))
        x0_hat = diffusion.predict_x0(out[:, :C], x_t, times).clamp(-1, 1)
        if out.shape[1] == 2 * C:
            log_variance = diffusion.learned_log_variance(out[:, C:], times)
        else:
            log_variance = diffusion.at("log_variance", times)
        total += diffusion.variational_bound(x0, x0_hat, log_variance, times).mean().item()
    a, s = diffusion.a[-2], diffusion.s[-2]
    second_moment = dataset.to_float(images).square().mean().item()
    prior = 0.5 * (a**2 * second_moment + s**2 - 1 - 2 * math.log(s)) / math.log(2)
    return {"bits per dimension of real test images, at most": dict(generated=total + prior)}


def train_on_samples(images: Tensor, labels: Tensor, train: dataset.Images, test: dataset.Images) -> dict:
    """The accuracy on real test images of a classifier that learned from samples; beside it, from as many real ones."""
    some = torch.randperm(len(train.labels), generator=seeded(0, 1))[: len(images)]
    accuracy = {}
    for who, x, y in (("real", train.pixels[some], train.labels[some]), ("generated", images, labels)):
        classifier = judge.fit(x, y, seed=1)
        predicted = classifier.head(judge.features(classifier, test.pixels)).argmax(1)
        accuracy[who] = (predicted == test.labels).double().mean().item()
    return {"accuracy of a classifier trained on these": accuracy}


# ------------------------------------------------------------------------------------------------------ command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the quality of generated MNIST digits.")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--npz", type=Path, metavar="FILE", help="images from here: arr_0 (uint8, NHWC), and labels")
    what.add_argument("--count", type=int, help=f"images, at most {MOST} (default: {MOST})")
    what.add_argument("--sweep", choices=SWEEPS, help="vary this, and draw quality against cost")
    what.add_argument("--also", nargs="+", default=[], choices=["memorization", "bits", "train-on-samples"],
                      help="minutes more, with MNIST from --data-dir")
    what.add_argument("--against", default="test", choices=["test", "held-out"],
                      help="real images to compare with; held-out: training images, for tuning (default: test)")
    what.add_argument("--data-dir", default="data", help="where MNIST is (default: data)")
    what.add_argument("--output", type=Path, help="a new .json (default: a new name in outputs/)")
    add_model_flags(parser)
    return parser.parse_args(argv)


def labels_as_in(reference: Tensor, n: int) -> Tensor:
    """n labels in the proportions of the reference's (M,), int64."""
    return reference.long().sort().values[((torch.arange(n) + 0.5) * len(reference) / n).long()]


def read_npz(path: Path, count: int | None) -> tuple[Tensor, Tensor | None]:
    """(images (N, 1, 28, 28), uint8, labels (N,) or None). Raises UsageError."""
    try:
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
    labels = None if labels is None else labels.astype(np.int64)
    some = torch.randperm(n, generator=seeded(0, n))[: count or MOST].numpy()  # whatever the order in the file
    images = torch.from_numpy(images[some]).view(-1, 1, 28, 28)
    return images, None if labels is None else torch.from_numpy(labels[some])


def generate(
    draw: Callable, labels: Tensor, batch_size: int, what: str = "sampling", **options
) -> tuple[Tensor, float]:
    """(images (N, 1, 28, 28), uint8, seconds) of the labels (N,)."""
    images, begin = [], time.perf_counter()
    with tqdm(total=len(labels), desc=what, unit="image", leave=False, dynamic_ncols=True) as bar:
        for first in range(0, len(labels), batch_size):
            part = labels[first : first + batch_size]
            images.append(to_uint8(draw(part, indices=range(first, first + len(part)), **options)).cpu())
            bar.update(len(part))
    return torch.cat(images), time.perf_counter() - begin


def rows_of(table: dict) -> list[str]:
    """The numbers as the lines of a table in Markdown."""
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
    return lines


def sweep(args: argparse.Namespace, draw: Callable, labels: Tensor, judges: tuple, keep: Callable) -> list[dict]:
    """Measure once for each setting of SWEEPS, print a table; keep(results) is called after each of its rows."""
    results = []
    flag, values = SWEEPS[args.sweep]
    print(f"| {flag} | calls of the network | seconds for {len(labels):,} | accuracy | rho, classifier | rho, random |")
    print("|---|---|---|---|---|---|", flush=True)
    for value in values:
        options = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance)
        sampler = args.sweep == "sampler"
        options |= dict(sampler=value[0], steps=value[1]) if sampler else {args.sweep: value}
        name = f"{value[0]} {value[1]}" if sampler else f"{value:g}"
        images, seconds = generate(draw, labels, args.batch_size, f"{args.sweep} {name}", **options)
        table = measure(images, labels, judges, args.against)
        low, high = args.guidance_interval or (0, math.inf)
        timesteps = spaced_timesteps(draw.args[1].T, options["steps"])
        calls = sum(2 if low <= t <= high and options["guidance"] not in (0, 1) else 1 for t in timesteps)
        results.append(dict(name=name, **options, calls=calls, seconds=seconds, numbers=table))
        keep(results)
        rho = [table[f"rho, {space}"]["generated"] for space in ("classifier", "random")]
        accuracy = table["accuracy"]["generated"]
        print(f"| {name} | {calls} | {seconds:.1f} | {accuracy:.2%} | {rho[0]:.2f} | {rho[1]:.2f} |", flush=True)
    return results


def draw_sweep(what: str, results: list[dict], path: Path) -> None:
    """Two panels, rho and accuracy: against the cost, or against the weight of guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    groups = sorted({r["sampler"] for r in results})
    for group in groups:
        points = [r for r in results if r["sampler"] == group]
        x = [r["guidance"] if what == "guidance" else r["calls"] for r in points]
        for space in ("classifier", "random"):
            y = [r["numbers"][f"rho, {space}"]["generated"] for r in points]
            style = dict(marker="o", linestyle="-" if space == "classifier" else ":")
            axes[0].plot(x, y, label=f"{group}, {space} features", **style)
        axes[1].plot(x, [100 * r["numbers"]["accuracy"]["generated"] for r in points], marker="o", label=group)
    for axis, name in zip(axes, ("rho (1: real images)", "accuracy, %"), strict=True):
        axis.set(xlabel="guidance" if what == "guidance" else "calls of the network for an image", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if what != "guidance":
            ticks = sorted({r["calls"] for r in results})
            axis.set_xscale("log")
            axis.set_xticks(ticks, ticks)
            axis.set_xticks([], minor=True)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> Path:
    """Measure what the command line asks for, print it; the path of the JSON file.

    Raises UsageError, CheckpointError, DataError.
    """
    if args.count is not None and not LEAST <= args.count <= MOST:
        raise UsageError(f"--count is {args.count}: use {LEAST} to {MOST}, which is how many real ones there are")
    idle = args.checkpoint or args.model or args.steps or args.guidance is not None or args.guidance_interval
    if args.npz and (idle or args.sweep or "bits" in args.also):
        raise UsageError("--npz holds images already: leave out the flags of model and sampling, and --also bits")
    if args.sweep and (args.guidance if args.sweep == "guidance" else args.steps) is not None:
        raise UsageError(f"--sweep {args.sweep} sets {SWEEPS[args.sweep][0]} by itself: leave what it sets out")
    if args.sweep and args.also:
        raise UsageError("--sweep and --also are two measurements: leave one out")
    path = output_path(args.output, f"sweep-{args.sweep}.json" if args.sweep else "evaluation.json")
    picture = path.with_suffix(".png")
    if picture.exists():
        raise UsageError(f"{picture} is there already: give another name by --output, or remove it first")
    args.against = args.against.replace("-", "_")
    judges = judge.load()
    result = dict(count=args.count or MOST, against=args.against)

    def keep(**more: object) -> None:
        result.update(more)
        checkpoint.write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))

    if args.npz:
        images, labels = read_npz(args.npz, args.count)
        if labels is None and "train-on-samples" in args.also:
            raise UsageError(f"{args.npz} has no labels to train on: add them, or leave --also train-on-samples out")
        result |= dict(images=str(args.npz), count=len(images))
        how = str(args.npz)
    else:
        if args.sweep == "guidance":
            args.guidance = 1.0  # each point has its own
        draw, diffusion, config, description = open_model(args)
        digits = description["classes"] == list(dataset.DATASETS["mnist"][1])
        if not digits or (config.in_channels, config.image_size) != (1, 28):
            learned = f"this model learned from {description['data']}"
            raise UsageError(f"the judge knows digits of 28 x 28 alone, and {learned}: give a checkpoint of MNIST")
        if "bits" in args.also and description["diffusion"]["schedule"] == "flow":
            raise UsageError("the bound of flow is loose beyond use: --also bits is for schedules linear and cosine")
        labels = labels_as_in(judges[2][f"labels.{args.against}"], args.count or MOST)
        settings = ("sampler", "steps", "eta", "guidance", "guidance_interval", "seed")
        result |= dict(checkpoint=str(args.checkpoint), **{name: getattr(args, name) for name in settings})
        result |= {name: description[name] for name in ("config", "diffusion", "data", "step")}
        how = f"{args.checkpoint}, {args.sampler}, {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}"
        if args.guidance_interval:
            how += ", guided at timesteps {} to {}".format(*args.guidance_interval)
    if args.also:
        train, test = (dataset.load("mnist", args.data_dir, train=which, download=False) for which in (True, False))
    if args.sweep:
        values = SWEEPS[args.sweep][1]
        most = max(value[1] for value in values) if args.sweep == "sampler" else max(values)
        if args.sweep != "guidance" and most > diffusion.T:
            raise UsageError(f"this sweep goes to {most} steps, the model knows {diffusion.T}: use --sweep guidance")
        results = sweep(args, draw, labels, judges, lambda results: keep(sweep=results))
        draw_sweep(args.sweep, results, picture)
    else:
        if not args.npz:
            images, seconds = generate(draw, labels, args.batch_size)
            how += f"; sampled in {seconds:.1f} s"
            result["seconds"] = seconds
        table = measure(images, labels, judges, args.against)
        if "memorization" in args.also:
            table |= memorization(images, train.pixels, test.pixels, picture)
        if "bits" in args.also:
            table |= bits_per_dimension(draw.args[0], diffusion, test.pixels, test.labels)
        if "train-on-samples" in args.also:
            table |= train_on_samples(images, labels, train, test)
        keep(numbers=table)
        print(f"{len(images):,} images against the {args.against.replace('_', '-')} images; {how}")
        print(*rows_of(table), sep="\n")
    if picture.exists():
        print(picture)
    return path


def main() -> None:
    try:
        print(run(parse_args()))
    except (UsageError, checkpoint.CheckpointError, dataset.DataError) as error:
        sys.exit(fail(error))
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(fail(error, status=1))
    except torch.OutOfMemoryError:
        sys.exit(fail("the GPU's memory is too small: lower --batch-size", status=1))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
