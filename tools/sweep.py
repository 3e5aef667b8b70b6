"""Measure generated images at several settings of the sampler: quality against cost, as a table and a picture.

    python tools/sweep.py steps --count 2000
    python tools/sweep.py guidance
    python tools/sweep.py sampler
    python tools/sweep.py steps --checkpoint runs/my-images-1 --dataset my-images
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
from classifier import DataReference  # noqa: E402
from cli import Parser, UsageError, output_path, run_script  # noqa: E402
from evaluate import (  # noqa: E402
    add_measure_flags,
    labels_to_sample,
    load_real,
    open_reference,
    sample_images,
    samples_shape,
)
from metrics import measure  # noqa: E402
from model_flags import open_model  # noqa: E402
from sampling import TrainedModel  # noqa: E402
from shortcut import STEP_COUNTS, ShortcutModel  # noqa: E402

# What each sweep sets: the flags in words, and the options of `sample_batch` at each of its points.
SWEEPS = {
    "steps": ("--steps", [dict(steps=n) for n in (5, 8, 10, 15, 20, 30, 50)]),
    "guidance": ("--guidance", [dict(guidance=w) for w in (1.0, 1.25, 1.5, 1.75, 2.0, 3.0)]),
    "sampler": ("--sampler and --steps", [
        dict(sampler=sampler, steps=n)
        for sampler, counts in (("dpm++", (5, 10, 20)), ("ddim", (10, 20, 50)), ("ddpm", (50, 200)))
        for n in counts
    ]),
}
MEASURES = {"accuracy": ".2%", "rho, classifier": ".2f", "rho, random": ".2f"}  # of the table, where there are classes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser("sweep.py", "Measure generated images at several settings of the sampler.")
    parser.add_argument("what", choices=SWEEPS, help="what to vary")
    parser.set_defaults(also=[])  # which is for evaluate.py
    add_measure_flags(parser)
    args = parser.parse_args(argv)
    flag, points = SWEEPS[args.what]
    one_weight = args.guidance is not None and len(args.guidance) == 1
    given = args.steps is not None or args.what == "sampler" and (args.sampler or args.eta)
    if (one_weight if args.what == "guidance" else given):
        raise UsageError(f"this sweep sets {flag} by itself: leave it out")
    if args.what == "guidance":  # each point has its own weight, which acts throughout or at LOW HIGH of --guidance
        args.guidance = [2.0, *(args.guidance or [])[1:]]
    return args


def nfe(trained: TrainedModel, settings: dict) -> int:
    """The number of function evaluations: calls of the network for an image. A guided step has two."""
    low, high = settings["guidance_interval"] or (0, math.inf)
    timesteps = trained.timesteps(settings["steps"])
    has_labels = trained.model.config.num_classes > 0
    guided = sum(has_labels and settings["guidance"] != 1 and low <= t <= high for t in timesteps)
    return len(timesteps) + guided


def measure_points(
    args: argparse.Namespace, trained: TrainedModel, labels: Tensor, reference: DataReference, save: Callable
) -> list[dict]:
    """Measure at each point, print a table line by line, and save(results so far) after each line."""
    results, (flag, points) = [], SWEEPS[args.what]
    if isinstance(trained, ShortcutModel):
        points = [dict(steps=n) for n in STEP_COUNTS]
    intended = labels if trained.description["classes"] else None
    for options in points:
        settings = {**trained.settings, **options}
        name = " ".join(str(value) for value in options.values())
        images, seconds = sample_images(trained, labels, args.batch_size, progress=f"{args.what} {name}", **options)
        table = measure(images, intended, reference, args.against)
        columns = [row for row in MEASURES if row in table]
        if not results:
            print(f"| {flag} | NFE | seconds for {len(labels):,} | {' | '.join(columns)} |")
            print("|---" * (3 + len(columns)) + "|")
        results.append(dict(name=name, **settings, nfe=nfe(trained, settings), seconds=seconds, numbers=table))
        values = [format(table[row]["generated"], MEASURES[row]) for row in columns]
        print(f"| {name} | {results[-1]['nfe']} | {seconds:.1f} | {' | '.join(values)} |", flush=True)
        save(results)
    return results


def plot(what: str, results: list[dict], path: Path) -> None:
    """Two panels, rho and, where it was measured, accuracy: against the NFE, or against the guidance scale."""
    from matplotlib.figure import Figure

    panels = ["rho (1: real images)", "accuracy, %"][: 1 + ("accuracy" in results[0]["numbers"])]
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    x = "guidance" if what == "guidance" else "nfe"
    label = "guidance scale" if what == "guidance" else "NFE: calls of the network for an image"
    for sampler in sorted({r["sampler"] for r in results}):
        points = [r for r in results if r["sampler"] == sampler]
        for space, line in (("classifier", "o-"), ("random", "o:")):
            if f"rho, {space}" not in results[0]["numbers"]:
                continue
            rho = [r["numbers"][f"rho, {space}"]["generated"] for r in points]
            axes[0].plot([r[x] for r in points], rho, line, label=f"{sampler}, {space} features")
        if len(panels) == 2:
            accuracy = [100 * r["numbers"]["accuracy"]["generated"] for r in points]
            axes[1].plot([r[x] for r in points], accuracy, "o-", label=sampler)
    for axis, name in zip(axes, panels, strict=True):
        axis.set(xlabel=label, ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if what != "guidance":
            ticks = sorted({r["nfe"] for r in results})
            axis.set_xscale("log")
            axis.set_xticks(ticks, ticks)
            axis.set_xticks([], minor=True)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    checkpoint.write_whole(path, lambda file: figure.savefig(file, dpi=120))


def sweep(args: argparse.Namespace) -> Path:
    """Measure what the command line asks for. Returns the path of the JSON file. Raises UsageError, CheckpointError."""
    path = output_path(args.output, f"sweep-{args.what}.json")
    picture = path.with_suffix(".png")
    if picture.exists():
        raise UsageError(f"{picture} is there already: give another name by --output, or remove it first")
    trained = open_model(args)
    if isinstance(trained, ShortcutModel) and args.what != "steps":
        raise UsageError("distilled weights have one sampler and no guidance: sweep steps")
    most = max(options.get("steps", 1) for options in SWEEPS[args.what][1])
    if most > trained.diffusion.T:
        raise UsageError(f"this sweep goes to {most} steps, and the model knows {trained.diffusion.T}: sweep guidance")
    reference = open_reference(args, *load_real(args, samples_shape(trained), trained.description))
    labels = labels_to_sample(args, trained, reference)
    against = args.against.replace("_", "-")
    for note in reference.notes:
        print(note)

    def save(results: list[dict]) -> None:
        content = json.dumps(dict(checkpoint=str(args.checkpoint), against=against, sweep=results), indent=1)
        checkpoint.write_whole(path, lambda file: file.write(content.encode()))

    plot(args.what, measure_points(args, trained, labels, reference, save), picture)
    print(picture)
    return path


if __name__ == "__main__":
    run_script(lambda: print(sweep(parse_args())))
