"""What pre-trained weights are worth: letters, with the weights of the digits to begin with, and with new weights.

    python tools/letters.py                                  the letters, from the fonts of this machine
    python experiments/fine_tuning.py                        two hours on one CPU core; resumes where it stopped
    python experiments/fine_tuning.py --quick --dataset mnist-5000       in two minutes, with results that mean nothing

DiT-U/7 is trained for 400, 800, 1,600 and 3,200 steps, which take some 1 to 6 minutes on two cores. All
settings are the defaults. The learning rate falls to zero at the end, so each number of steps is a training run of its
own. Samples are guided as by default.
"""

from pathlib import Path

import numpy as np
import torch
from common import Store, hardware, measure_samples, parse_args, seconds_a_step, show_rows, train_to, trained_model
from PIL import Image

import checkpoint
import dataset
from checkpoint import BUNDLED_WEIGHTS
from classifier import DataReference
from cli import run_script
from dit import MODELS, DiT, DiTConfig
from metrics import Reference
from sampling import grid

MODEL = "DiT-U/7"  # that of the bundled weights
BEGINNINGS = {
    "new weights": ["--model", MODEL],
    "weights of the digits": ["--init-from", str(BUNDLED_WEIGHTS)],
}
COLOURS = dict(zip(BEGINNINGS, ("#D55E00", "#0072B2"), strict=True))


def picture_path(folder: Path, beginning: str, steps: int) -> Path:
    return folder / f"fine-tuning-{beginning.split()[0]}-{steps}.png"


def run_one(beginning: str, steps: int, seed: int, args, store: Store, reference: DataReference) -> None:
    """Train one network, measure it, and with seed 0 sample each class once."""
    what = dict(beginning=beginning, steps=steps, seed=seed)
    if store.find(**what):
        return
    flags = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--image-size", "28", "--seed", str(seed)]
    flags += [*BEGINNINGS[beginning], *args.flags]
    folder = args.runs / f"{beginning.split()[0]}-{steps}-{seed}"
    trained = trained_model(train_to(folder, DiT, flags, steps), DiT)
    if seed == 0:
        classes = len(reference.classes)
        picture = grid(trained.sample(torch.arange(classes)), columns=classes)
        path = picture_path(store.path.parent, beginning, steps)
        checkpoint.write_whole(path, lambda file: picture.save(file, "PNG"))
    store.save(dict(
        **what, hardware=hardware(), images=args.count, data=trained.description["data"],
        **measure_samples(trained, reference, args.count),
    ))


def plot(rows: list[dict], pictures: Path, path: Path) -> None:
    """Accuracy and rho against time, and under them the samples after each time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    times = sorted({(row["steps"], row["minutes"]) for row in rows})
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    panels = upper.subplots(1, 2)
    for beginning, colour in COLOURS.items():
        mine = [row for row in rows if row["beginning"] == beginning]
        for axes, measure in zip(panels, ("accuracy", "rho"), strict=True):
            axes.plot([row["minutes"] for row in mine], [row[measure] for row in mine], ".", color=colour)
            means = [np.mean([row[measure] for row in mine if row["steps"] == steps]) for steps, _ in times]
            axes.plot([minutes for _, minutes in times], means, "o-", color=colour, label=f"begun with {beginning}")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.1f}%"))
    panels[0].set_ylabel("accuracy")
    panels[1].set(ylabel="rho (1: real letters)", yscale="log")
    panels[1].yaxis.set(minor_formatter=FuncFormatter(lambda value, _: f"{value:g}"),
                        major_formatter=FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels:
        axes.set(xscale="log", xlabel="minutes of training on two cores")
        axes.set_xticks([minutes for _, minutes in times], [f"{minutes:.1f}" for _, minutes in times])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    upper.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    for axes, (beginning, colour) in zip(lower.subplots(2, 1), COLOURS.items(), strict=True):
        strips = {f"{m:.1f}": Image.open(picture_path(pictures, beginning, steps)) for steps, m in times}
        show_rows(axes, strips)
        axes.set_ylabel("minutes")
        axes.set_title(f"begun with {beginning}", color=colour, fontsize=10)
    checkpoint.write_whole(path, lambda file: figure.savefig(file, dpi=200))


def table(rows: list[dict]) -> str:
    lines = ["| begun with | steps | minutes | seed | accuracy | rho | rho, random features |",
             "|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda row: (row["steps"], row["beginning"], row["seed"])):
        lines.append(f"| {r['beginning']} | {r['steps']:,} | {r['minutes']:.1f} | {r['seed']} "
                     f"| {r['accuracy']:.2%} | {r['rho']:.2f} | {r['rho, random']:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args("fine_tuning", "Compare pre-trained weights with new ones.", argv, "letters")
    args.flags += ["--batch-size", "16"] if args.quick else []
    args.count, seeds = (20, [0]) if args.quick else (2000, [0, 1])
    steps = [2, 4] if args.quick else [400, 800, 1600, 3200]
    store = Store(args.results / "fine_tuning.json")
    data = dataset.load(args.dataset, args.data_dir, image_size=28)
    reference = Reference() if args.quick else DataReference(data)
    for n in steps:
        for seed in seeds:
            for beginning in BEGINNINGS:
                run_one(beginning, n, seed, args, store, reference)
    config = DiTConfig(**MODELS[MODEL])
    (seconds,) = seconds_a_step({MODEL: (DiT, config)}, args.flags, 1 if args.quick else 5).values()
    for row in store.rows:
        row["minutes"] = row["steps"] * seconds / 60
    store.save()
    plot(store.rows, store.path.parent, args.figures / "fine-tuning.png")
    print(table(store.rows))


if __name__ == "__main__":
    run_script(main)
