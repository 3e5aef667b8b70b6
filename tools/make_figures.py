"""Make the figures of the README, each from the code and the weights of this repository.

    python tools/make_figures.py                            all of them, some ten minutes on two CPU cores
    python tools/make_figures.py diffusion guidance         these two
    python tools/make_figures.py loss --run runs/mnist-1    the curve and the samples of this run

`loss` needs a run that kept its samples; without --run it trains one in runs/figure first, which takes another ten
minutes. No other figure needs a data set.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
from cli import ASSETS, BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, Parser, UsageError, run_script  # noqa: E402
from dataset import bundled_digits, to_float  # noqa: E402
from diffusion import SCHEDULES, Diffusion, ddim, spaced_timesteps  # noqa: E402
from dit import MODELS, DiT, DiTConfig  # noqa: E402
from inference import load_model  # noqa: E402
from metrics import Reference, labels_as_in, measure  # noqa: E402
from run import RUNS  # noqa: E402
from sampling import TrainedModel, constrained, grid, image_noise, to_uint8  # noqa: E402

# Four colours that colour-blind readers tell apart (Okabe and Ito), a pale one to fill boxes with, and that of lines.
BLUE, ORANGE, GREEN, GREY, PALE, INK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#E9F0F6", "#222222"
WIDTH = 7.0  # inches of every figure, so that letters have the same size in all of them
DIGITS = torch.arange(10)
COUNT = 1000  # samples behind each point of a curve


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
    figure.savefig(ASSETS / f"{name}.png", dpi=220)


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
    labels = DIGITS.repeat_interleave(10)
    _, x_t, x0_hat = sample_path(trained, labels)
    # Six levels of grey are enough here, and make the file a third as large.
    frames = [grid(images, 10).point(lambda value: round(value / 51) * 51).quantize(6) for images in (*x_t, x0_hat[-1])]
    durations = [120] * len(x_t) + [2500]
    frames[0].save(ASSETS / "denoising.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def digits() -> None:
    """digits.png: generated digits, seed 0, beside real ones that are not chosen either."""
    labels = DIGITS.repeat(7)
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
    trained = load_model(BUNDLED_WEIGHTS)
    process, shown = trained.diffusion, 9
    digits = bundled_digits()
    first = (digits.labels == 5).nonzero()[1]
    x0, eps = to_float(digits.pixels[first]), image_noise(0, range(1), (1, 28, 28), "cpu")()
    every, x_t, _ = sample_path(trained, torch.tensor([5]), steps=5 * (shown - 1) + 1, seed=4)
    times, x_t = torch.tensor(every[::5]).flip(0), x_t[::5].flip(0)
    forward = process.q_sample(x0.expand(shown, -1, -1, -1), times, eps)
    figure = canvas(5.0)
    upper, lower = figure.subplots(2, 1, height_ratios=[1, 1.25])
    mosaic(upper, torch.stack([forward, x_t[:, 0]]), ["forward", "reverse"], [f"{t}" for t in times.tolist()])
    for y, ends in ((0.47, (0.02, shown - 0.1)), (1.47, (shown - 0.1, 0.02))):
        arrow = dict(arrowstyle="-|>", color=INK, linewidth=1.2, shrinkA=0, shrinkB=0)
        upper.annotate("", (ends[1], y + 0.52), (ends[0], y + 0.52), arrowprops=arrow, annotation_clip=False)
    upper.set_ylim(2.1, 0)
    upper.set_title("timestep t", fontsize=11)
    for schedule, colour in zip(SCHEDULES, (GREY, ORANGE, BLUE), strict=True):
        table = Diffusion(schedule, "x0", 1000).tables
        lower.plot(table["alpha"][:-1], color=colour, label=schedule, linewidth=2)
        lower.plot(table["sigma"][:-1], color=colour, linestyle=(0, (4, 2)), linewidth=2)
    lower.plot([], [], color=INK, label=r"$\alpha_t$, of the image")
    lower.plot([], [], color=INK, linestyle=(0, (4, 2)), label=r"$\sigma_t$, of the noise")
    half = 999 / (shown - 1) / 2
    lower.set(xlim=(-half, 999 + half), xticks=times.tolist(), xlabel="timestep t", ylabel="factor")
    lower.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize=9, columnspacing=1.2)
    lower.grid(alpha=0.25)
    save(figure, "diffusion")


def inference_result() -> None:
    """inference-result.png: what the sampler holds, and what the network predicts, at each step."""
    trained = load_model(BUNDLED_WEIGHTS)
    times, x_t, x0_hat = sample_path(trained, DIGITS, guidance=1.0)  # which would sharpen the prediction
    some = [0, 3, 6, 9, 12, 15, 17, 19]
    figure = canvas(4.8)
    panels = figure.subplots(1, 2)
    for axes, images, title in zip(panels, (x_t, x0_hat), ("$x_t$", r"$\hat x_0$"), strict=True):
        mosaic(axes, images[some].transpose(0, 1), [""] * 10, [f"{times[i]}" for i in some], gap=1)
        axes.set_title(f"{title} at timestep t", pad=10)
        axes.tick_params(axis="x", labelsize=9)
    panels[0].set_yticks(panels[0].get_yticks(), [str(digit) for digit in range(10)])
    save(figure, "inference-result")


def guidance() -> None:
    """guidance.png: the same noise under growing weights of guidance, at all timesteps."""
    trained = load_model(BUNDLED_WEIGHTS)
    weights = (0.0, 1.0, 2.0, 4.0, 8.0)
    images = torch.stack([trained.sample(DIGITS, 10, guidance=w, guidance_interval=None) for w in weights])
    figure = canvas(3.4)
    mosaic(figure.subplots(), images, [f"w = {w:g}" for w in weights], [str(digit) for digit in range(10)], gap=1)
    save(figure, "guidance")


def steps() -> None:
    """steps.png: digits sampled in 1, 2, 4 ... 32 steps, and their distance to real ones."""
    counts, n = (1, 2, 4, 8, 16, 32), COUNT
    reference = Reference()
    labels = labels_as_in(reference.tensors["labels.test"], n)
    figure = canvas(5.4)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    panels, curve = upper.subplots(1, 2), lower.subplots()
    kinds = (("bundled weights, DPM-Solver++", BUNDLED_WEIGHTS, BLUE), ("distilled weights", DISTILLED_WEIGHTS, ORANGE))
    for axes, (name, path, colour) in zip(panels, kinds, strict=True):
        trained = load_model(path)
        shown = torch.stack([trained.sample(DIGITS, 10, steps=count) for count in counts])
        mosaic(axes, shown, [str(count) for count in counts], [""] * 10, gap=1)
        axes.set_title(name, color=colour)
        rho = []
        for count in counts:
            images = to_uint8(trained.sample(labels, 250, what=f"{count} steps", steps=count))
            rho.append(measure(images, labels, reference)["rho, classifier"]["generated"])
        curve.plot(counts, rho, "o-", color=colour, label=name, linewidth=2)
        print(name, *(f"{count}: {value:.2f}" for count, value in zip(counts, rho, strict=True)))
    panels[0].set_ylabel("steps")
    curve.axhline(1, color=INK, linewidth=1, linestyle=":")
    curve.annotate("real images", (counts[-1], 1), xytext=(0, -12), textcoords="offset points", ha="right", fontsize=10)
    curve.set(xscale="log", yscale="log", ylim=(0.4, 1000), xlabel="steps", ylabel=f"rho, {n:,} images")
    curve.set_xticks(counts, [str(count) for count in counts])
    curve.set_xticks([], minor=True)
    curve.yaxis.set_major_formatter("{x:g}")
    curve.grid(alpha=0.25)
    curve.legend(fontsize=10)
    save(figure, "steps")


def loss(run: Path | None = None) -> None:
    """loss.png: the loss of a run, and samples of its averaged weights along the way."""
    if run is None:
        run = RUNS / "figure"
        if not (run / "weights.safetensors").exists():
            begun = (run / "checkpoint.pt").exists()
            how = ["--resume", run] if begun else ["--run-dir", run, "--steps", "5000", "--save-every", "100"]
            subprocess.run([sys.executable, ROOT / "train.py", *map(str, how)], check=True)
    losses = torch.tensor([json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()])
    kept = {int(path.stem.split("_")[1]): path for path in (run / "samples").glob("step_*.png")}
    if not kept:
        raise UsageError(f"{run} has no samples: give a run of train.py by --run")
    first, last, columns = min(kept), len(losses), 9
    ratio = (last / first) ** (1 / (columns - 1))
    marks = [min(kept, key=lambda step, i=i: abs(step - first * ratio**i)) for i in range(columns)]
    rows, side = (2, 3, 5), checkpoint.load(run)["config"]["image_size"]  # the digits shown, and their pixels
    shown = []
    for step in marks:
        picture = np.asarray(Image.open(kept[step]))
        scale = picture.shape[0] // (10 * (side + 2) + 2)  # undo what sampling.grid does
        tiles = [picture[::scale, ::scale][2 + row * (side + 2) :, 2:][:side, :side] for row in rows]
        shown.append(torch.from_numpy(np.stack(tiles))[:, None])
    figure = canvas(5.2)
    upper, lower = figure.subplots(2, 1, height_ratios=[1, 1])
    mosaic(upper, to_float(torch.stack(shown, 1)), [str(row) for row in rows], [f"{step:,}" for step in marks])
    upper.set_title("samples of the averaged weights after so many steps")
    window = min(50, len(losses) // 2)  # a median, because single batches jump
    smooth = losses.unfold(0, window, 1).median(1).values
    lower.plot(range(1, last + 1), losses, color=GREY, alpha=0.5, linewidth=0.5, label="each batch")
    lower.plot(range(window, last + 1), smooth, color=BLUE, linewidth=2, label=f"median of {window}")
    lower.plot(marks, smooth[[step - window for step in marks]], "o", color=ORANGE, label="samples above")
    lower.set(xscale="log", xlim=(first / ratio**0.5, last * ratio**0.5), ylim=(0, 1.3 * smooth[first - window].item()))
    lower.set_xticks(marks, [f"{step:,}" for step in marks])
    lower.set_xticks([], minor=True)
    lower.set(xlabel="training step", ylabel="loss")
    lower.grid(alpha=0.25)
    lower.legend(fontsize=10)
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
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    finding = "In noise a head attends to one fixed patch; as the digit emerges, some attend to the whole image"
    figure.suptitle(finding, fontsize=10)
    save(figure, "attention")


def shortcut() -> None:
    """shortcut.png: why one ordinary step fails. The data are the numbers -1 and 1, so the best x0_hat is known."""
    process = Diffusion("flow", "x0", 1000)

    def posterior_mean(x_t: Tensor, t: int) -> Tensor:
        return torch.tanh(process.alpha[t] / process.sigma[t] ** 2 * x_t)

    x = torch.special.ndtri((torch.arange(10) + 0.5) / 10).view(-1, 1, 1, 1)
    passed = []
    constrain = constrained(clip=False, callback=lambda t, x_t, _: passed.append(x_t.flatten()))
    end = ddim(process, posterior_mean, x, spaced_timesteps(process.T, 200), None, constrain).flatten()
    paths = torch.stack([*passed, end])
    times = [*spaced_timesteps(process.T, 200), -1]
    figure = canvas(3.2)
    axes = figure.subplots()
    axes.plot(times, paths, color=GREY, linewidth=1)
    one = 7
    axes.plot(times, paths[:, one], color=BLUE, linewidth=2.5, label="the reverse process: many small steps")
    for where, colour, name in (
        (posterior_mean(x, 999).flatten()[one], ORANGE, "one step in the direction of its start"),
        (end[one], GREEN, "the one step to be learned"),
    ):
        axes.annotate("", (-1, where), (999, paths[0, one]), arrowprops=dict(arrowstyle="-|>", color=colour, lw=2))
        axes.plot([], [], color=colour, linewidth=2, label=name)
    axes.plot([-1, -1], [-1, 1], "o", color=INK, label="the data", clip_on=False)
    axes.set(xlim=(1000, -30), xlabel="timestep t", ylabel=r"$x_t$", yticks=[-2, -1, 0, 1, 2])
    axes.legend(fontsize=9.5, loc="lower center", bbox_to_anchor=(0.48, 1), ncols=2)
    save(figure, "shortcut")


def dit_architecture() -> None:
    """dit_architecture.png: the network, and one block opened beside it. Shapes and counts are those of a real one."""
    name = "DiT-N/7"
    model = DiT(DiTConfig(**MODELS[name]))
    shapes, B = {}, "B"
    for path, module in model.named_modules():
        def look(module, _, out, path=path):
            shapes[path] = f"({', '.join([B, *map(str, out.shape[1:])])})"
        module.register_forward_hook(look)
    model(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.zeros(2, dtype=torch.long))

    def count(*modules: torch.nn.Module) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()):,}"

    figure = canvas(6.5)
    axes = figure.subplots()
    axes.set(xlim=(0, 14), ylim=(13, 0))
    axes.set_axis_off()

    def text(x: float, y: float, words: str, size: float = 8.5, **options) -> None:
        axes.text(x, y, words, fontsize=size, **{"va": "center", "ha": "center", **options})

    def box(x: float, y: float, title: str, note: str = "", width: float = 2.4, colour: str = PALE) -> None:
        """A box around (x, y) with a name, and below it what there is to say."""
        corner = (x - width / 2, y - 0.4)
        axes.add_patch(FancyBboxPatch(corner, width, 0.8, "round,pad=0,rounding_size=0.1", fc=colour, ec=INK, zorder=2))
        text(x, y - 0.15 * bool(note), title, 9 if len(title) < 15 else 8)
        text(x, y + 0.2, note, 7, color="#555555")

    def line(*points: tuple[float, float], colour: str = INK) -> None:
        """An arrow through these points."""
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, zorder=1)
        head = dict(arrowstyle="-|>", color=colour, linewidth=1.2, shrinkA=0, shrinkB=0)
        axes.annotate("", points[-1], points[-2], arrowprops=head, zorder=1)

    def plus(x: float, y: float) -> None:
        axes.plot(x, y, "o", markersize=13, markerfacecolor="white", markeredgecolor=INK, zorder=2)
        text(x, y, "+", 11)

    # The network: the image passes from top to bottom, the condition comes from the left.
    x, left, block = 4.4, 1.25, model.blocks[0]
    text(x, 0.5, "$x_t$   (B, 1, 28, 28)")
    line((x, 0.75), (x, 1.5))
    box(x, 1.9, "PatchEmbed", count(model.x_embedder))
    line((x, 2.3), (x, 3.0))
    plus(x, 3.25)
    text(x + 0.35, 3.25, "pos_embed", 7.5, ha="left")
    line((x, 3.5), (x, 4.8))
    text(x + 0.15, 4.15, shapes["x_embedder"], 8, ha="left")
    for shift in (0.2, 0.1, 0):
        box(x + shift, 5.2 - shift, "DiTBlock" * (not shift), count(block) * (not shift))
    text(x + 1.5, 5.2, f"× {len(model.blocks)}", 10, ha="left")
    line((x, 5.6), (x, 7.2))
    text(x + 0.15, 6.4, shapes["blocks.0"], 8, ha="left")
    box(x, 7.6, "FinalLayer", count(model.final_layer))
    line((x, 8.0), (x, 9.2))
    text(x + 0.15, 8.6, shapes["final_layer"], ha="left")
    box(x, 9.6, "unpatchify", colour="white")
    line((x, 10.0), (x, 10.9))
    text(x, 11.2, rf"$\hat x_0$   {shapes['']}")
    text(left, 0.5, "$t$   (B,)")
    line((left, 0.75), (left, 1.5))
    box(left, 1.9, "TimestepEmbedder", count(model.t_embedder), 2.3)
    line((left, 2.3), (left, 4.95))
    plus(left, 5.2)
    text(left, 9.0, "$y$   (B,)")
    line((left, 8.7), (left, 8.0))
    box(left, 7.6, "LabelEmbedder", count(model.y_embedder), 2.3)
    line((left, 7.2), (left, 5.45))
    line((left + 0.25, 5.2), (3.2, 5.2), colour=BLUE)
    line((2.8, 5.2), (2.8, 7.6), (3.2, 7.6), colour=BLUE)
    text(left + 0.3, 4.75, f"c  {shapes['t_embedder']}", ha="left", color=BLUE)
    text(left - 1.15, 12.1, f"{name}: {count(model)} parameters", 9, ha="left")

    # One block, opened.
    axes.add_patch(FancyBboxPatch((6.8, 0.2), 7.1, 12.65, "round,pad=0,rounding_size=0.15", fc="none", ec=GREY))
    for corner, y in ((4.7, 0.3), (5.6, 12.7)):
        axes.plot([6.0, 6.8], [corner, y], color=GREY, linewidth=0.8, linestyle=":")
    x, bus, side = 8.7, 12.2, 7.15
    text(x, 0.55, f"tokens   {shapes['blocks.0']}")
    text(bus, 0.55, f"c   {shapes['t_embedder']}", color=BLUE)
    line((bus, 0.8), (bus, 1.5), colour=BLUE)
    box(bus, 1.9, "adaLN_modulation", f"SiLU, Linear: {count(block.adaLN_modulation)}", 2.9)
    axes.plot([bus, bus], [2.3, 10.8], color=ORANGE, linewidth=1.2, zorder=1)
    parts = (("Attention", block.attn, 0.8), ("Mlp", block.mlp, 6.45))
    for i, (part, module, top) in enumerate(parts, 1):
        line((x, top), (x, top + 0.7))
        line((x, top + 0.3), (side, top + 0.3), (side, top + 5.4), (x - 0.25, top + 5.4))
        box(x, top + 1.1, "LayerNorm", "no weights")
        line((x, top + 1.5), (x, top + 1.8))
        box(x, top + 2.2, "modulate")
        line((x, top + 2.6), (x, top + 2.9))
        box(x, top + 3.3, part, count(module))
        line((x, top + 3.7), (x, top + 4.0))
        box(x, top + 4.35, "× gate", colour="white")
        line((x, top + 4.75), (x, top + 5.15))
        plus(x, top + 5.4)
        for y, words in ((top + 2.2, f"shift{i}, scale{i}"), (top + 4.35, f"gate{i}")):
            line((bus, y), (x + 1.2, y), colour=ORANGE)
            text((bus + x + 1.2) / 2, y - 0.22, words, 8, color=ORANGE)
    line((x, 12.1), (x, 12.6))
    text(bus, 11.7, "six vectors (B, 128),\nall zero at first: then\nthe block changes nothing", 8, color=ORANGE)
    save(figure, "dit_architecture")


FIGURES: dict[str, Callable] = {
    "digits": digits, "denoising": denoising, "diffusion": diffusion, "dit_architecture": dit_architecture,
    "loss": loss, "inference-result": inference_result, "guidance": guidance, "attention": attention, "steps": steps,
    "shortcut": shortcut,
}


def main() -> None:
    parser = Parser("make_figures.py", "Make the figures of the README.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--run", type=Path, help="for loss: the folder of a run (default: trained in runs/figure)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        raise UsageError(f"no figure {unknown[0]!r}: use {', '.join(FIGURES)}")
    for name in tqdm(args.names or FIGURES, unit="figure"):
        FIGURES[name](args.run) if name == "loss" else FIGURES[name]()
        tqdm.write(next(ASSETS.glob(f"{name}.*")).name)


if __name__ == "__main__":
    run_script(main)
