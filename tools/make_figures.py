"""Make the figures of the pages, each from the code and the weights of this repository.

    python tools/make_figures.py                            all of them, about an hour on two CPU cores
    python tools/make_figures.py diffusion guidance         these two

`loss` trains a network for 5,000 steps in runs/figure first, and resumes this training run where it was interrupted. No
other figure needs a data set. `lab-1` to `lab-10` run the experiments of docs/lab.md.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import train  # noqa: E402
from checkpoint import ASSETS, BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, RUNS, load_model  # noqa: E402
from cli import Parser, UsageError, run_script  # noqa: E402
from dataset import DIGITS, MNIST_5000, bundled_digits, to_float  # noqa: E402
from diffusion import SCHEDULES, Diffusion, spaced_timesteps  # noqa: E402
from dit import MODELS, DiT, DiTConfig  # noqa: E402
from inference import half_mask, read_image  # noqa: E402
from metrics import Reference, labels_as_in, measure  # noqa: E402
from runlog import centred_median, read_log  # noqa: E402
from sampling import (  # noqa: E402
    TrainedModel,
    constrained,
    crossfade,
    ddim,
    grid,
    image_noise,
    slerp,
    to_uint8,
)

# Four colours that colour-blind readers tell apart (Okabe and Ito), a pale one to fill boxes with, and that of lines.
BLUE, ORANGE, GREEN, GREY, PALE, INK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#DCE9F3", "#222222"
WIDTH, DPI = 7.0, 220  # inches of every figure, so that letters have the same size in all of them, and dots an inch
SMALL = 9              # points of small letters; the others have 11
COUNT = 1000           # samples behind each number
LABELS = torch.arange(10)
NAMES = [str(digit) for digit in range(10)]
LAB = ROOT / "docs" / "lab.md"


def canvas(height: float) -> Figure:
    """An empty figure, `height` inches high."""
    rcParams.update({
        "font.size": 11, "axes.titlesize": 11, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "mathtext.fontset": "dejavusans",
    })
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.09)  # for the hats of formulas
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a figure, with the same narrow margin above and below whatever height its images have left empty."""
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]
    used, margin = (pixels < 250).any((1, 2)).nonzero()[0], DPI // 12
    top, bottom = max(0, used[0] - margin), used[-1] + margin
    Image.fromarray(pixels[top:bottom]).save(ASSETS / f"{name}.png", dpi=(DPI, DPI), optimize=True)


def mosaic(axes: Axes, images: Tensor, rows: list[str], columns: list[str], gap: int = 2) -> None:
    """Images (rows, columns, 1, S, S) in [-1, 1], in a frame where image (i, j) is the square from (j, i) on."""
    R, C, _, S, _ = images.shape
    picture = np.full((R * (S + gap), C * (S + gap)), 255, np.uint8)
    for i, j in np.ndindex(R, C):
        picture[i * (S + gap) :, j * (S + gap) :][:S, :S] = to_uint8(images[i, j, 0]).numpy()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(0, C, R, 0), interpolation="nearest")
    centre = S / (S + gap) / 2
    axes.set_xticks([j + centre for j in range(C)], columns)
    axes.set_yticks([i + centre for i in range(R)], rows)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], words: str = "", colour: str = INK) -> None:
    """An arrow, in coordinates of the data, with words across its middle."""
    style = dict(arrowstyle="-|>", color=colour, linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=style, annotation_clip=False, zorder=1)
    middle, white = np.add(start, end) / 2, dict(fc="white", ec="none", pad=3)
    axes.text(*middle, words, ha="center", va="center", size=SMALL, color=colour, bbox=white if words else None)


def sample_path(trained: TrainedModel, labels: Tensor, **options) -> tuple[list[int], Tensor, Tensor]:
    """The timesteps, x_t and x0_hat, each (steps, n, 1, S, S), of one batch along the reverse process."""
    path = []
    trained.sample(labels, len(labels), callback=lambda *step: path.append(step), **options)
    t, x_t, x0_hat = zip(*path, strict=True)
    return list(t), torch.stack(x_t), torch.stack(x0_hat)


# -------------------------------------------------------------------------------------------------------- the figures


def denoising() -> None:
    """denoising.gif: a hundred digits on their way out of noise."""
    trained = load_model(BUNDLED_WEIGHTS)
    labels = LABELS.repeat_interleave(10)
    _, x_t, x0_hat = sample_path(trained, labels)
    # Six levels of grey are enough here, and make the file a third as large.
    frames = [grid(images, 10).point(lambda value: round(value / 51) * 51).quantize(6) for images in (*x_t, x0_hat[-1])]
    durations = [120] * len(x_t) + [2500]
    frames[0].save(ASSETS / "denoising.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def digits() -> None:
    """digits.png: generated digits, seed 0, beside real ones that are not chosen either."""
    labels = LABELS.repeat(7)
    generated = load_model(BUNDLED_WEIGHTS).sample(labels, len(labels))
    real = bundled_digits()
    first = torch.stack([(real.labels == digit).nonzero()[:7, 0] for digit in range(10)], dim=1)  # (7, 10)
    figure = canvas(2.75)
    panels = figure.subplots(1, 2)
    both = generated, to_float(real.pixels[first.flatten()])
    for axes, images, title in zip(panels, both, ("generated", "real"), strict=True):
        mosaic(axes, images.view(7, 10, 1, 28, 28), [""] * 7, [""] * 10)
        axes.set_title(title, fontsize=9, pad=0)
    save(figure, "digits")


def diffusion() -> None:
    """diffusion.png: the forward process, the reverse process, and (alpha_t, sigma_t) of the schedules on one axis."""
    trained, digits = load_model(BUNDLED_WEIGHTS), bundled_digits()
    times = torch.tensor([*range(0, 1000, 100), 999])
    x0, eps = to_float(digits.pixels[(digits.labels == 5).nonzero()[1]]), image_noise(0, range(1), (1, 28, 28), "cpu")()
    forward = trained.diffusion.q_sample(x0.expand(len(times), -1, -1, -1), times, eps)
    _, reverse, _ = sample_path(trained, torch.tensor([5]), sampler="ddpm", steps=1000, seed=4)
    figure = canvas(5.3)
    *panels, lower = figure.subplots(3, 1, height_ratios=[1, 1, 3])
    rows = ("forward\nprocess", forward[None], True), ("reverse\nprocess", reverse[999 - times].transpose(0, 1), False)
    for axes, (name, images, rightward) in zip(panels, rows, strict=True):
        mosaic(axes, images, [name], [f"{t}" if rightward else "" for t in times.tolist()])
        axes.set_ylim(1.22, 0)
        ends = [(0.02, 1.1), (len(times) - 0.1, 1.1)]
        arrow(axes, *(ends if rightward else reversed(ends)))
    panels[0].set_title("timestep t")
    for schedule, colour in zip(SCHEDULES, (GREY, ORANGE, BLUE), strict=True):
        table = Diffusion(schedule, "x0", 1000).tables
        lower.plot(table["alpha"][:-1], color=colour, label=schedule, linewidth=2)
        lower.plot(table["sigma"][:-1], color=colour, linestyle=(0, (4, 2)), linewidth=2)
    lower.plot([], [], color=INK, label=r"$\alpha_t$ (image)")
    lower.plot([], [], color=INK, linestyle=(0, (4, 2)), label=r"$\sigma_t$ (noise)")
    lower.set(xlim=(-50, 1049), xticks=times.tolist(), xlabel="timestep t", ylabel="weight in $x_t$")
    lower.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize=SMALL, columnspacing=1.2)
    lower.grid(alpha=0.25)
    save(figure, "diffusion")


def inference_result() -> None:
    """inference-result.png: the noisy image, and the image that the network predicts, at each step."""
    trained = load_model(BUNDLED_WEIGHTS)
    times, x_t, x0_hat = sample_path(trained, LABELS, guidance=1.0)  # which would sharpen the prediction
    some = [0, 3, 6, 9, 12, 15, 17, 19]
    figure = canvas(5.2)
    panels = figure.subplots(1, 2)
    for axes, images, title in zip(panels, (x_t, x0_hat), ("$x_t$", r"$\hat x_0$"), strict=True):
        mosaic(axes, images[some].transpose(0, 1), [""] * 10, [f"{times[i]}" for i in some], gap=1)
        axes.set_title(f"{title} at timestep t", pad=10)
        axes.tick_params(axis="x", labelsize=SMALL)
        axes.set_ylim(10.7, 0)
        arrow(axes, (0, 10.4), (8, 10.4), "sampling")
    panels[0].set_yticks(panels[0].get_yticks(), NAMES)
    save(figure, "inference-result")


def measure_samples(trained: TrainedModel, reference: Reference, what: str, **options) -> dict[str, float]:
    """Accuracy, recall and rho of COUNT samples, seed 0, with the labels of the test set."""
    labels = labels_as_in(reference.tensors["labels.test"], COUNT)
    table = measure(to_uint8(trained.sample(labels, 250, progress=what, **options)), labels, reference)
    measures = {"accuracy": "accuracy", "recall": "recall", "rho": "rho, classifier"}
    values = {name: table[row]["generated"] for name, row in measures.items()}
    tqdm.write(f"{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return values


def guidance() -> None:
    """guidance.png: the same noise under growing guidance scales, and accuracy and recall of many samples."""
    trained, reference = load_model(BUNDLED_WEIGHTS), Reference()
    settings = [dict(guidance=float(w), guidance_interval=None) for w in (0, 1, 2, 4, 8)]
    names = [f"w = {setting['guidance']:g}" for setting in settings]
    images = torch.stack([trained.sample(LABELS, 10, **setting) for setting in settings])
    values = [measure_samples(trained, reference, n, **setting) for n, setting in zip(names, settings, strict=True)]
    figure = canvas(2.8)
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    mosaic(left, images, names, NAMES, gap=1)
    rows = np.arange(len(names)) + 0.5
    for measured, colour in (("accuracy", BLUE), ("recall", ORANGE)):
        curve = [value[measured] for value in values]
        right.plot(curve, rows, "o-", color=colour, linewidth=2)
        right.text(curve[-1], len(rows) + 0.1, measured, color=colour, ha="center", va="top", size=SMALL)
    right.set(xlim=(0, 1.05), ylim=(len(rows), 0), yticks=rows, xticks=[0, 0.5, 1])
    right.set_yticklabels([])
    right.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    right.set_title(f"of {COUNT:,} samples")
    right.spines["bottom"].set_visible(False)
    right.spines["top"].set_visible(True)
    right.grid(alpha=0.25)
    save(figure, "guidance")


def steps() -> None:
    """steps.png: digits sampled in 1, 2, 4 ... 32 steps, and their distance to real ones."""
    counts, reference, limit = (1, 2, 4, 8, 16, 32), Reference(), 3.2
    figure = canvas(4.9)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1])
    panels, curve = upper.subplots(1, 2), lower.subplots()
    kinds = (("bundled weights, DPM-Solver++", BUNDLED_WEIGHTS, BLUE), ("distilled weights", DISTILLED_WEIGHTS, ORANGE))
    for axes, (name, path, colour) in zip(panels, kinds, strict=True):
        trained = load_model(path)
        shown = torch.stack([trained.sample(LABELS, 10, steps=count) for count in counts])
        mosaic(axes, shown, [str(count) for count in counts], [""] * 10, gap=1)
        axes.tick_params(axis="y", labelsize=SMALL)
        axes.set_title(name, color=colour)
        rho = [measure_samples(trained, reference, f"{name}, {count} steps", steps=count)["rho"] for count in counts]
        curve.plot(counts, [value if value < limit else np.nan for value in rho], "o-", color=colour, linewidth=2)
        for count, value in zip(counts, rho, strict=True):
            if value > limit:
                curve.annotate(f"{value:.0f}", (count, limit), (count, limit - 0.45), color=colour, ha="center",
                               arrowprops=dict(arrowstyle="-|>", color=colour))
    panels[0].set_ylabel("steps")
    curve.axhline(1, color=INK, linewidth=1, linestyle=":")
    curve.annotate("real images", (1, 1), xytext=(0, -5), textcoords="offset points", va="top", size=SMALL)
    curve.set(xscale="log", ylim=(0.7, limit), yticks=[1, 1.5, 2, 2.5, 3], xlabel="steps")
    curve.set_ylabel(f"rho, {COUNT:,} samples")
    curve.set_xticks(counts, [str(count) for count in counts])
    curve.set_xticks([], minor=True)
    curve.grid(alpha=0.25)
    save(figure, "steps")


# The training that loss.png shows: how it is started, and after which steps its averaged weights are kept.
TRAINING = ["--steps", "5000"]
MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class KeepingTrainer(train.Trainer):
    """Also keeps the averaged weights after MARKS."""

    def step(self, step: int, x0: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
        result, step = super().step(step, x0, y, lr), step + 1
        if step in MARKS:
            about = self.config, self.diffusion, DIGITS[: self.config.num_classes], "training images", step
            description = checkpoint.describe(DiT, *about, **self.guidance)
            checkpoint.save(RUNS / "figure" / f"step_{step}.safetensors", description, self.ema.state_dict())
        return result


def loss() -> None:
    """loss.png: the loss of a training, and samples of its averaged weights along the way."""
    folder = RUNS / "figure"
    if not (folder / "weights.safetensors").exists():
        begun = (folder / checkpoint.RUN_FILE).exists()
        how = ["--resume", str(folder)] if begun else ["--run-dir", str(folder), *TRAINING]
        status = train.main(how, KeepingTrainer)
        if status:
            raise SystemExit(status)
    reference, digits, shown, names = Reference(), torch.tensor([2, 3, 5]), [], []
    for step in MARKS:
        trained = load_model(folder / f"step_{step}.safetensors")
        shown.append(trained.sample(digits, len(digits)))
        values = measure_samples(trained, reference, f"step {step}")
        rho = round(values["rho"], 0 if values["rho"] > 10 else 1)
        names.append(f"{values['accuracy']:.1%}\n{rho:,g}")
    losses = torch.tensor([entry["loss"] for entry in read_log(folder)])
    steps, median = range(1, len(losses) + 1), centred_median(losses)
    figure = canvas(5.8)
    upper, lower = figure.subplots(2, 1, height_ratios=[1, 1.6])
    mosaic(upper, torch.stack(shown, 1), [str(digit) for digit in digits.tolist()], names)
    upper.tick_params(axis="x", labelsize=SMALL)
    upper.annotate("accuracy\nrho", (0, 1), (-4, 4), "axes fraction", "offset points", size=SMALL, ha="right")
    upper.set_title(f"samples of the averaged weights; accuracy and rho of {COUNT:,} samples")
    lower.plot(steps, losses, color=GREY, alpha=0.6, linewidth=0.6, label="each batch")
    lower.plot(steps, median, color=BLUE, linewidth=2, label="centred median")
    lower.plot(MARKS, median[[step - 1 for step in MARKS]], "o", color=ORANGE, label="samples above")
    ratio = (MARKS[-1] / MARKS[0]) ** (0.5 / (len(MARKS) - 1))  # so that each sample is above its step
    lower.set(xscale="log", yscale="log", xlim=(MARKS[0] / ratio, MARKS[-1] * ratio), xlabel="training step")
    lower.set_xticks(MARKS, [f"{step:,}" for step in MARKS], fontsize=SMALL)
    lower.set_xticks([], minor=True)
    lower.set_ylabel("loss")
    lower.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("{x:g}")
    lower.grid(alpha=0.25, which="both")
    lower.legend(fontsize=SMALL)
    save(figure, "loss")


def attention_maps(trained: TrainedModel, label: int, **options) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """The timesteps, x_t and x0_hat of one image along the reverse process, and who attends to whom.

    The last is (steps, depth, heads, N, N): at [..., i, j], how much token i takes from token j. It is computed from
    the queries and keys of each block, since the network itself uses a fused attention that does not show it.
    """
    config, kept = trained.model.config, []

    def look(module: torch.nn.Module, _, qkv: Tensor) -> None:  # of a batch, the first image, which has the label
        q, k, _ = qkv[:1].unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        kept.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)[0])

    hooks = [block.attn.qkv.register_forward_hook(look) for block in trained.model.blocks]
    times, x_t, x0_hat = sample_path(trained, torch.tensor([label]), **options)
    for hook in hooks:
        hook.remove()
    return times, x_t, x0_hat, torch.stack(kept).unflatten(0, (len(times), config.depth))


def attention() -> None:
    """attention.png: how much one patch attends to each other, in five heads, at three timesteps."""
    trained = load_model(BUNDLED_WEIGHTS)
    config, some, heads = trained.model.config, (1, 9, 17), ((2, 5), (4, 5), (3, 1), (3, 2), (5, 4))
    side, patch, size = config.image_size // config.patch_size, 5, config.patch_size  # patch 5 is in row 1, column 1
    times, x_t, x0_hat, maps = attention_maps(trained, 8, seed=2)
    maps = maps[:, :, :, patch].unflatten(-1, (side, side))
    figure = canvas(3.6)
    panels = figure.subplots(len(some), 2 + len(heads))
    for row, i in zip(panels, some, strict=True):
        for axes, image in zip(row, (x_t[i], x0_hat[i]), strict=False):
            axes.imshow(to_uint8(image[0, 0]), cmap="gray", vmin=0, vmax=255)
        for axes, (block, head) in zip(row[2:], heads, strict=True):
            shown = axes.imshow(maps[i, block - 1, head - 1], cmap="magma", norm=PowerNorm(0.5, 0, 1))
        for axes, unit in zip(row, (size, size, *[1] * len(heads)), strict=True):  # the patch that attends
            corner = patch % side * unit - 0.5, patch // side * unit - 0.5
            axes.add_patch(FancyBboxPatch(corner, unit, unit, "square,pad=0", fill=False, ec=ORANGE, lw=1.5))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(f"t = {times[i]}")
    titles = [r"$x_t$", r"$\hat x_0$", *(f"block {block}\nhead {head}" for block, head in heads)]
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    bar = figure.colorbar(shown, ax=panels[:, 2:], ticks=[0, 0.1, 0.3, 0.6, 1], shrink=0.8, pad=0.02)
    bar.set_label("attention weight (square-root scale)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    finding = "In noise, four of these heads attend to a single patch; later, three attend to the whole image"
    figure.suptitle(finding, fontsize=10)
    save(figure, "attention")


def inpainting() -> None:
    """inpainting.png: half of an image is known, and the other half is sampled for each label."""
    trained, shown = load_model(BUNDLED_WEIGHTS), []
    halves = ("left", "right", "top", "bottom")
    for half in halves:
        image, mask = read_image(ROOT / "assets" / "three.png", trained), half_mask(half, trained.shape[1])
        known = torch.where(mask, image, torch.zeros(()))  # grey where nothing is known
        shown.append(torch.cat([known, trained.sample(LABELS, 10, inpaint=(image, mask))]))
    figure = canvas(3.2)
    left, right = figure.subplots(1, 2, width_ratios=[1, 10])
    shown = torch.stack(shown)
    mosaic(left, shown[:, :1], list(halves), ["known"], gap=1)
    mosaic(right, shown[:, 1:], [""] * len(halves), NAMES, gap=1)
    right.set_title("completed, by label")
    save(figure, "inpainting")


def interpolation() -> None:
    """interpolation.png: between two samples, by a mixture of pixels, and by one of noise and predictions."""
    trained, fractions, rows, names = load_model(BUNDLED_WEIGHTS), torch.linspace(0, 1, 10), [], []
    guidance = [trained.settings[name] for name in ("guidance", "guidance_interval")]
    for one, other, seed in ((3, 8, 0), (4, 9, 1), (1, 7, 2)):
        a, b = image_noise(seed, range(2), trained.shape, "cpu")()
        start = torch.stack([slerp(a, b, fraction) for fraction in fractions])
        how = trained.timesteps(trained.settings["steps"]), *guidance
        predict = crossfade(*(trained.predictor(torch.full((10,), y), *how) for y in (one, other)), fractions)
        images = trained.sample_batch(LABELS, start=start, predict=predict, **trained.settings)
        pixels = torch.lerp(images[:1], images[-1:], fractions.view(-1, 1, 1, 1))
        rows += [pixels, images]
        names += [f"{one} to {other},\n{what}" for what in ("pixels", "noise")]
    figure = canvas(4.4)
    mosaic(figure.subplots(), torch.stack(rows), names, [f"{fraction:.0%}" for fraction in fractions], gap=1)
    save(figure, "interpolation")


def shortcut() -> None:
    """shortcut.png: why one ordinary step fails. The data are the numbers -1 and 1, so the best x0_hat is known."""
    process = Diffusion("flow", "x0", 1000)

    def posterior_mean(x_t: Tensor, t: int) -> Tensor:
        return torch.tanh(process.alpha[t] / process.sigma[t] ** 2 * x_t)

    x = torch.special.ndtri((torch.arange(10) + 0.5) / 10).view(-1, 1, 1, 1)
    passed = []
    constrain, keep = constrained(clip=False), lambda t, x_t, _: passed.append(x_t.flatten())
    timesteps = spaced_timesteps(process.T, 200)
    end = ddim(process, posterior_mean, x, timesteps, None, constrain, keep).flatten()
    paths, one = torch.stack([*passed, end]), 7  # the path that is shown in colour
    figure = canvas(3.6)
    axes = figure.subplots()
    axes.plot([*timesteps, -1], paths, color=GREY, linewidth=1, alpha=0.7)
    axes.plot([*timesteps, -1], paths[:, one], color=BLUE, linewidth=2.5)
    start, white = (999, paths[0, one].item()), dict(fc="white", ec="none", pad=0)
    for where, colour, at, off, align, name in (
        (posterior_mean(x, 999)[one].item(), ORANGE, 0.45, -0.06, "top", "one step in the initial direction"),
        (end[one].item(), GREEN, 0.5, 0.06, "bottom", "the one step to be learned"),
    ):
        arrow(axes, start, (-1, where), colour=colour)
        slope = where - start[1]
        axes.text(start[0] - 1000 * at, start[1] + slope * at + off, name, color=colour, size=SMALL, bbox=white,
                  rotation=np.degrees(np.arctan2(-slope, 1000)), transform_rotates_text=True,
                  rotation_mode="anchor", ha="center", va=align)
    axes.text(140, 0.56, "many small steps", color=BLUE, size=SMALL, ha="center", bbox=white)
    axes.plot([-1, -1], [-1, 1], "o", color=INK, clip_on=False)
    for y in (-1, 1):
        axes.text(-25, y, "data", va="center", ha="right", size=SMALL)
    axes.set(xlim=(-110, 1000), xlabel="timestep t", ylabel=r"$x_t$", yticks=[-2, -1, 0, 1, 2])
    save(figure, "shortcut")


# ---------------------------------------------------------------------------------------------------- the architecture


class Diagram:
    """Boxes, arrows and words on a canvas of 14 columns, in units of half an inch. Learned layers are filled."""

    def __init__(self, height: float):
        self.figure = canvas(height / 2)
        self.figure.get_layout_engine().set(w_pad=0, h_pad=0)
        self.axes = self.figure.subplots()
        self.axes.set(xlim=(-0.05, 14.1), ylim=(height, 0))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, words: str, **options) -> None:
        self.axes.text(x, y, words, **{"va": "center", "ha": "center", "size": SMALL, **options})

    def box(self, x: float, y: float, title: str, parameters: int = 0, width: float = 2.3) -> None:
        """A box around (x, y). One with parameters is filled, and says how many they are."""
        shape = FancyBboxPatch((x - width / 2, y - 0.4), width, 0.8, "round,pad=0,rounding_size=0.1", ec=INK, zorder=2)
        shape.set_facecolor(PALE if parameters else "white")
        self.axes.add_patch(shape)
        self.text(x, y, f"{title}\n{parameters:,}" if parameters else title, zorder=3)

    def frame(self, left: float, top: float, right: float, bottom: float, title: str) -> None:
        corner, style = (left, top), "round,pad=0,rounding_size=0.15"
        self.axes.add_patch(FancyBboxPatch(corner, right - left, bottom - top, style, fc="none", ec=GREY))
        self.text(left + 0.3, top, title, ha="left", weight="bold", bbox=dict(fc="white", ec="none", pad=2))

    def line(self, *points: tuple[float, float], colour: str = INK) -> None:
        """An arrow through these points."""
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, zorder=1)
        arrow(self.axes, points[-2], points[-1], colour=colour)

    def plus(self, x: float, y: float) -> None:
        self.axes.plot(x, y, "o", markersize=13, markerfacecolor="white", markeredgecolor=INK, zorder=2)
        self.axes.plot(x, y, "+", markersize=7, color=INK, zorder=3)

    def image(self, x: float, y: float, pixels: Tensor, patch: int, side: float = 2.2, gap: float = 0.0) -> None:
        """An image (S, S) around (x, y), cut into patches of so many pixels, with a gap between them."""
        n, limits = len(pixels) // patch, (self.axes.get_xlim(), self.axes.get_ylim())
        size = (side - (n - 1) * gap) / n
        for i, j in np.ndindex(n, n):
            left, top = x - side / 2 + j * (size + gap), y - side / 2 + i * (size + gap)
            part = to_uint8(pixels)[i * patch :, j * patch :][:patch, :patch]
            box = (left, left + size, top + size, top)
            self.axes.imshow(part, cmap="gray", vmin=0, vmax=255, extent=box, interpolation="nearest", aspect="auto")
        self.axes.set(xlim=limits[0], ylim=limits[1])


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def draw_network(diagram: Diagram, model: DiT, shapes: dict[str, str], x_t: Tensor, x0_hat: Tensor) -> None:
    """The image passes from top to bottom, and the condition comes from the right."""
    text, box, line = diagram.text, diagram.box, diagram.line
    x, t, y, bus, patch = 1.35, 4.05, 6.6, 3.35, model.config.patch_size
    text(x, 0.4, "$x_t$  (B, 1, 28, 28)")
    diagram.image(x, 1.85, x_t, patch, gap=0.08)
    line((x, 3.0), (x, 3.5))
    box(x, 3.9, "PatchEmbed", count(model.x_embedder))
    line((x, 4.3), (x, 4.75))
    diagram.plus(x, 5.0)
    text(x + 0.35, 5.0, "pos_embed", ha="left")
    line((x, 5.25), (x, 6.25))
    text(x + 0.15, 5.7, shapes["x_embedder"], ha="left")
    box(x, 6.65, f"DiTBlock × {len(model.blocks)}", count(model.blocks))
    line((x, 7.05), (x, 8.05))
    text(x + 0.15, 7.5, shapes["blocks.0"], ha="left")
    box(x, 8.45, "FinalLayer", count(model.final_layer))
    line((x, 8.85), (x, 9.85))
    text(x + 0.15, 9.3, shapes["final_layer"], ha="left")
    box(x, 10.25, "unpatchify")
    line((x, 10.65), (x, 11.1))
    diagram.image(x, 12.3, x0_hat, patch)
    text(x, 13.75, rf"$\hat x_0$  {shapes['']}")
    middle = (t + y) / 2
    for where, name, title, module, width in (
        (t, "$t$", "TimestepEmbedder", model.t_embedder, 2.65), (y, "$y$", "LabelEmbedder", model.y_embedder, 2.25),
    ):
        text(where, 0.4, f"{name}  (B,)")
        line((where, 0.65), (where, 1.2))
        box(where, 1.6, title, count(module), width)
        line((where, 2.0), (where, 2.9), (middle + (0.25 if where > middle else -0.25), 2.9))
    diagram.plus(middle, 2.9)
    for end in (6.65, 8.45):
        line((middle, 3.15), (middle, 3.9), (bus, 3.9), (bus, end), (x + 1.15, end), colour=BLUE)
    text(middle + 0.15, 3.5, f"c  {shapes['t_embedder']}", ha="left", color=BLUE)


def draw_attention(diagram: Diagram, attn: torch.nn.Module, tokens: str) -> None:
    """The attention of one block, opened."""
    text, box, line, x, left = diagram.text, diagram.box, diagram.line, 5.65, 4.65
    heads, per_head = attn.num_heads, attn.proj.in_features // attn.num_heads
    diagram.frame(3.7, 4.6, 7.6, 14.0, "Attention")
    diagram.axes.plot([7.6, 8.5], [4.9, 4.55], color=GREY, linewidth=1.2, linestyle="--", zorder=0)  # to its box
    text(x, 5.05, tokens)
    line((x, 5.3), (x, 5.75))
    box(x, 6.15, "qkv: Linear", count(attn.qkv), 3.4)
    for where, end, name in ((4.25, 7.65, "q"), (5.05, 7.65, "k"), (7.05, 10.6, "v")):
        line((where, 6.55), (where, end))
        text(where - 0.1, 6.85, f"${name}$", ha="right")
    text(6.05, 7.25, f"(B, {heads}, 16, {per_head})")
    box(left, 8.05, rf"$q k^T / \sqrt{{{per_head}}}$", width=1.6)
    line((left, 8.45), (left, 8.9))
    box(left, 9.3, "softmax", width=1.6)
    line((left, 9.7), (left, 10.6))
    text(left + 0.15, 10.15, f"(B, {heads}, 16, 16)", ha="left")
    box(x, 11.0, "weights × $v$", width=3.4)
    line((x, 11.4), (x, 12.0))
    box(x, 12.4, "proj: Linear", count(attn.proj), 3.4)
    line((x, 12.8), (x, 13.3))
    text(x, 13.6, tokens)


def draw_block(diagram: Diagram, block: torch.nn.Module, shapes: dict[str, str]) -> None:
    """One block, opened."""
    text, box, line, x, bus, side = diagram.text, diagram.box, diagram.line, 9.65, 12.6, 8.2
    diagram.frame(7.9, 0.25, 13.95, 14.0, "DiTBlock")
    text(x, 0.75, f"tokens  {shapes['blocks.0']}")
    text(bus, 0.75, f"c  {shapes['t_embedder']}", color=BLUE)
    line((bus, 1.0), (bus, 1.6), colour=BLUE)
    box(bus, 2.0, "adaLN_modulation", count(block.adaLN_modulation), 2.55)
    diagram.axes.plot([bus, bus], [2.4, 12.1], color=ORANGE, linewidth=1.2, zorder=1)
    for i, (part, module, top) in enumerate((("Attention", block.attn, 1.0), ("Mlp", block.mlp, 7.35)), 1):
        line((x, top), (x, top + 0.75))
        line((x, top + 0.3), (side, top + 0.3), (side, top + 6.1), (x - 0.25, top + 6.1))
        box(x, top + 1.15, "LayerNorm")
        line((x, top + 1.55), (x, top + 1.95))
        box(x, top + 2.35, "modulate")
        line((x, top + 2.75), (x, top + 3.15))
        box(x, top + 3.55, part, count(module))
        line((x, top + 3.95), (x, top + 4.35))
        box(x, top + 4.75, "× gate")
        line((x, top + 5.15), (x, top + 5.85))
        diagram.plus(x, top + 6.1)
        for y, words in ((top + 2.35, f"shift{i}, scale{i}"), (top + 4.75, f"gate{i}")):
            line((bus, y), (x + 1.15, y), colour=ORANGE)
            text((bus + x + 1.15) / 2, y - 0.22, words, color=ORANGE)
    line((x, 13.7), (x, 14.25))
    text(bus - 0.2, 12.95, "six vectors (B, 128),\nzero at initialization", color=ORANGE)


def dit_architecture() -> None:
    """dit_architecture.png: the network, one block, and its attention. Shapes and counts are those of a real one."""
    name, shapes, trained = "DiT-N/7", {}, load_model(BUNDLED_WEIGHTS)
    model = DiT(DiTConfig(**MODELS[name]))
    for path, module in model.named_modules():
        def look(module, _, out, path=path):
            shapes[path] = f"({', '.join(['B', *map(str, out.shape[1:])])})"
        module.register_forward_hook(look)
    model(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    digits = bundled_digits()
    x0 = to_float(digits.pixels[(digits.labels == 5).nonzero()[1]])
    t, y = torch.tensor([400]), torch.tensor([5])
    x_t = trained.diffusion.q_sample(x0, t, image_noise(0, range(1), (1, 28, 28), "cpu")())
    with torch.no_grad():
        x0_hat = trained.model(x_t, t, y)
    diagram = Diagram(14.9)
    draw_network(diagram, model, shapes, x_t[0, 0], x0_hat[0, 0])
    draw_attention(diagram, model.blocks[0].attn, shapes["blocks.0"])
    draw_block(diagram, model.blocks[0], shapes)
    diagram.text(0.1, 14.55, f"{name}: {count(model):,} parameters", ha="left")
    for x, colour, words in ((6.3, PALE, "learned, with its parameters"), (11.3, "white", "operation")):
        diagram.axes.add_patch(FancyBboxPatch((x, 14.4), 0.4, 0.3, "round,pad=0,rounding_size=0.1", fc=colour, ec=INK))
        diagram.text(x + 0.55, 14.55, words, ha="left")
    save(diagram.figure, "dit_architecture")


@cache
def run_changed(diff: str, commands: str) -> list[Image.Image]:
    """The pictures that command lines make in a copy of the code, changed as a block on docs/lab.md says."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (*ROOT.glob("*.py"), MNIST_5000, BUNDLED_WEIGHTS):
            to = Path(folder) / path.relative_to(ROOT)
            to.parent.mkdir(exist_ok=True)
            shutil.copy(path, to)
        if diff:
            file, old, new = re.fullmatch(r"--- ([\w.]+), .*\n-(.*)\n\+(.*)\n", diff).groups()
            (Path(folder) / file).write_text((ROOT / file).read_text().replace(f"{old}\n", f"{new}\n"))
        for line in commands.splitlines():
            subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=folder, check=True)
        return [Image.open(path).copy() for path in sorted(Path(folder).glob("*.png"))]


def lab(number: int) -> None:
    """lab-1.png ...: the digits of the code as it is, and those with a change of docs/lab.md, made by its commands."""
    section = re.compile(r"^## .*?(?:```diff\n(.*?)```\n+)?```bash\n(.*?)```", re.DOTALL | re.MULTILINE)
    (_, unchanged), *exercises = section.findall(LAB.read_text())
    diff, commands = exercises[number - 1]
    before, after = run_changed("", unchanged), run_changed(diff, commands)[0]
    pictures = before["train.py" not in commands], after
    figure = canvas(1.6)
    for axes, picture, title in zip(figure.subplots(1, 2), pictures, ("the code as it is", "changed"), strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=SMALL, pad=3)
        axes.set_axis_off()
    save(figure, f"lab-{number}")


FIGURES: dict[str, Callable] = {
    "digits": digits, "denoising": denoising, "diffusion": diffusion, "dit_architecture": dit_architecture,
    "loss": loss, "inference-result": inference_result, "guidance": guidance, "attention": attention,
    "inpainting": inpainting, "interpolation": interpolation, "steps": steps, "shortcut": shortcut,
    **{f"lab-{number}": partial(lab, number) for number in range(1, 11)},
}


def main() -> None:
    parser = Parser("make_figures.py", "Make the figures of the pages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (default: all)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        raise UsageError(f"no figure {unknown[0]!r}: use {', '.join(FIGURES)}")
    for name in tqdm(args.names or FIGURES, unit="figure"):
        FIGURES[name]()
        tqdm.write(next(ASSETS.glob(f"{name}.*")).name)


if __name__ == "__main__":
    run_script(main)
