"""More parameters or more tokens: section 5 and Figures 6 to 9 of the DiT paper, in miniature.

    python experiments/scaling.py                            some hours on one CPU core; resumes where it stopped
    python experiments/scaling.py --quick                    the same in a minute, with results that mean nothing

Networks of three sizes, each with patches of 14, 7 and 4 pixels, are trained for the same number of steps on the same
images, with a constant learning rate, so that each point of a curve is the end of a training of that length. The paper
finds that sample quality follows the GFLOPs of a forward pass, however they are spent. No guidance.
"""

import math
from pathlib import Path

import torch
from common import (
    UNGUIDED,
    Store,
    gflops,
    hardware,
    measure_samples,
    parse_args,
    seconds_a_step,
    show_rows,
    train_to,
    trained_model,
)
from PIL import Image

import checkpoint
from cli import run_script
from dit import MODELS, DiT, DiTConfig
from metrics import Reference
from sampling import grid

SIZES = {"N": "#8A8A8A", "U": "#D55E00", "T": "#0072B2"}  # and their colours
PATCHES = {14: "s", 7: "o", 4: "^"}                        # and their markers
BATCH_SIZE = 128


def run_one(size: str, patch: int, args, store: Store, reference: Reference) -> None:
    """Train one network, measure it after each of args.steps, and sample ten digits, of the same noise as all others.
    """
    model = f"DiT-{size}/{patch}"
    folder, picture = args.runs / f"{size}{patch}", store.path.parent / f"scaling-{size}{patch}.png"
    flags = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--lr-schedule", "constant", "--model", model]
    flags += ["--batch-size", str(BATCH_SIZE), "--lr", "4e-3", *args.flags]
    for steps in args.steps:
        what = dict(model=model, size=size, patch=patch, steps=steps)
        if store.find(**what):
            continue
        state = train_to(folder, DiT, flags, steps)
        trained = trained_model(state, DiT)
        samples = grid(trained.sample(torch.arange(10), 10, **UNGUIDED), columns=10)
        checkpoint.write_whole(picture, lambda file, samples=samples: samples.save(file, "PNG"))
        store.save(dict(
            **what, hardware=hardware(), images=args.count,
            parameters=sum(p.numel() for p in trained.model.parameters()), gflops=gflops(DiT, trained.model.config),
            **measure_samples(trained, reference, args.count, **UNGUIDED, precision=state["settings"]["precision"]),
        ))


def correlation(x: list[float], y: list[float]) -> float:
    """Pearson's, of log x and y, as in the paper's Figure 8."""
    x, y = torch.tensor([x, y], dtype=torch.float64)
    return torch.corrcoef(torch.stack([x.log(), y]))[0, 1].item()


def plot(rows: list[dict], path: Path) -> None:
    """rho after the last step against GFLOPs (Figure 8), against training compute (Figure 9), and against time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    last = max(row["steps"] for row in rows)
    final = [row for row in rows if row["steps"] == last]
    r = correlation([row["gflops"] for row in final], [row["rho"] for row in final])
    for size, colour in SIZES.items():
        for patch, marker in PATCHES.items():
            mine = [row for row in rows if (row["size"], row["patch"]) == (size, patch)]
            if not mine:
                continue
            style = dict(color=colour, marker=marker, label=f"{size}/{patch}")
            panels[0].plot(mine[-1]["gflops"], mine[-1]["rho"], linestyle="", **style)
            # A training step costs about three forward passes (the paper, section 4).
            compute = [3 * row["gflops"] * BATCH_SIZE * row["steps"] for row in mine]
            panels[1].plot(compute, [row["rho"] for row in mine], **style)
            minutes = [row["seconds_a_step"] * row["steps"] / 60 for row in mine]
            panels[2].plot(minutes, [row["rho"] for row in mine], **style)
    panels[0].set(xlabel="GFLOPs of a forward pass", title=f"after {last:,} steps (correlation {r:.2f})")
    panels[1].set(xlabel="GFLOPs of the training so far", title="by compute, during the training")
    panels[2].set(xlabel="minutes of training", title="by time, during the training")
    panels[0].set_ylabel("rho (1: real images)")
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0].yaxis.set(  # of all panels, which share it
        major_locator=LogLocator(subs=(1, 2, 4)), major_formatter="{x:g}", minor_formatter=NullFormatter()
    )
    panels[0].legend(ncols=3, fontsize="small")
    checkpoint.write_whole(path, lambda file: figure.savefig(file, dpi=150))


def plot_samples(pictures: dict[str, Image.Image], path: Path) -> None:
    """A row of digits for each network (Figure 7), beside its name."""
    from matplotlib.figure import Figure

    width, height = next(iter(pictures.values())).size
    figure = Figure(figsize=(7, 7 * len(pictures) * height / width), layout="constrained")
    show_rows(figure.subplots(), pictures, interpolation="nearest")
    checkpoint.write_whole(path, lambda file: figure.savefig(file, dpi=150))


def table(rows: list[dict]) -> str:
    lines = ["| model | M parameters | tokens | GFLOPs | ms a step | steps | accuracy | rho | rho, random |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        tokens = math.ceil(28 / r["patch"]) ** 2
        lines.append(
            f"| {r['model']} | {r['parameters'] / 1e6:.2f} | {tokens} | {r['gflops']:.4f} "
            f"| {1000 * r['seconds_a_step']:.0f} | {r['steps']:,} | {r['accuracy']:.2%} | {r['rho']:.2f} "
            f"| {r['rho, random']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args("scaling", "Compare DiTs of several sizes and patches.", argv)
    args.steps, args.count = ([2, 4], 20) if args.quick else ([250, 500, 1000], 2000)
    sizes = list(SIZES)[:2] if args.quick else list(SIZES)
    patches = list(PATCHES)[:2] if args.quick else list(PATCHES)
    reference, store = Reference(), Store(args.results / "scaling.json")
    for size in sizes:
        for patch in patches:
            run_one(size, patch, args, store, reference)
    configs = {f"DiT-{s}/{p}": (DiT, DiTConfig(**MODELS[f"DiT-{s}/{p}"])) for s in sizes for p in patches}
    seconds = seconds_a_step(configs, args.flags, 1 if args.quick else 3)
    for row in store.rows:
        row["seconds_a_step"] = seconds[row["model"]]
    store.save()
    plot(store.rows, args.figures / "scaling.png")
    pictures = {f"{s}/{p}": Image.open(store.path.parent / f"scaling-{s}{p}.png") for s in sizes for p in patches}
    plot_samples(pictures, args.figures / "scaling-samples.png")
    print(table(store.rows))


if __name__ == "__main__":
    run_script(main)
