"""Four ways to condition a DiT on the timestep t and the label y: section 3.2 and Figure 5 of the paper, in miniature.

    python experiments/conditioning.py                       some 90 minutes on one CPU core; resumes where it stopped
    python experiments/conditioning.py --quick               the same in a minute, with results that mean nothing

    in-context        t and y are two more tokens of the sequence
    cross-attention   every block has a second attention, to a sequence of t and y
    adaLN             scale and shift of every layer norm come from t and y
    adaLN-Zero        so do gates, and all of this starts at zero: the DiT of dit.py

Each is a small subclass of DiT and trained alike: the same width, depth, batches, seeds and learning rate, which is
constant, as in the paper, so that each point of a curve is the end of a training of that length. No guidance.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    UNGUIDED,
    Store,
    gflops,
    hardware,
    measure_samples,
    parse_args,
    seconds_a_step,
    train_to,
    trained_model,
)
from torch import Tensor, nn

import checkpoint
from cli import run_script
from dit import MODELS, Attention, DiT, DiTBlock, DiTConfig, Mlp, modulate, unpatchify
from metrics import Reference

OBJECTIVES = {
    "flow, x0": ["--lr", "7e-3"],
    "linear, eps": "--schedule linear --prediction eps --timestep-distribution uniform --lr 3e-3".split(),
}
TITLES = {"flow, x0": "default: flow, predicts the image", "linear, eps": "paper: linear, predicts the noise"}


# -------------------------------------------------------------------------------------------------------- the networks


class PlainBlock(nn.Module):
    """A transformer block without conditioning. x: (B, N, D) -> (B, N, D); c is not used."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6), nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn, self.mlp = Attention(hidden_size, num_heads), Mlp(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens x (B, N, D) to a sequence c (B, M, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)                         # (B, heads, N, D/heads)
        k, v = self.kv(c).view(B, c.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, M, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class CrossAttentionBlock(PlainBlock):
    """A transformer block that also attends to c (B, 2, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.norm_cross, self.cross = nn.LayerNorm(hidden_size, eps=1e-6), CrossAttention(hidden_size, num_heads)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(DiTBlock):
    """A DiTBlock without gates."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c)[:, None].chunk(4, dim=2)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class PlainFinalLayer(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, P*P*C), without conditioning."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


def initialize(modules: nn.Module, last: nn.Linear) -> None:
    """As DiT does: Xavier for linear layers, zero for the last one."""
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(last.weight)


class AdaLNDiT(DiT):
    """Scale and shift from c = t + y, whose modulation does not start at zero."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        shape = config.hidden_size, config.num_heads, config.mlp_ratio
        self.blocks = nn.ModuleList(AdaLNBlock(*shape) for _ in range(config.depth))
        initialize(self.blocks, self.final_layer.linear)
        initialize(self.final_layer, self.final_layer.linear)


class CrossAttentionDiT(DiT):
    """c is a sequence (B, 2, D) of the embeddings of t and y, to which every block attends."""

    block = CrossAttentionBlock

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        shape = config.hidden_size, config.num_heads, config.mlp_ratio
        self.blocks = nn.ModuleList(self.block(*shape) for _ in range(config.depth))
        self.final_layer = PlainFinalLayer(config)
        initialize(self.blocks, self.final_layer.linear)
        initialize(self.final_layer, self.final_layer.linear)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.t_embedder(t), self.y_embedder(y)], dim=1)


class InContextDiT(CrossAttentionDiT):
    """The embeddings of t and y are two more tokens, which the blocks do not tell from the others."""

    block = PlainBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed               # (B, N, D)
        c = self.condition(t, y)                              # (B, 2, D)
        x = torch.cat([x, c.to(x.dtype)], dim=1)              # (B, N + 2, D)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x[:, :-2], c)                    # (B, N, P*P*C)
        return unpatchify(x, self.config.patch_size)


NETWORKS = {
    "in-context": InContextDiT, "cross-attention": CrossAttentionDiT, "adaLN": AdaLNDiT, "adaLN-Zero": DiT,
}
COLOURS = dict(zip(NETWORKS, ("#8A8A8A", "#009E73", "#D55E00", "#0072B2"), strict=True))


# ------------------------------------------------------------------------------------------------------ the experiment


def run_one(name: str, objective: str, seed: int, args, store: Store, reference: Reference) -> None:
    """Train one network, and measure it after each of args.steps."""
    folder = args.runs / f"{name}, {objective}, seed {seed}"
    flags = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--lr-schedule", "constant", "--seed", str(seed)]
    flags += args.flags
    for steps in args.steps:
        what = dict(conditioning=name, objective=objective, seed=seed, steps=steps)
        if store.find(**what):
            continue
        state = train_to(folder, NETWORKS[name], [*flags, *OBJECTIVES[objective]], steps)
        trained = trained_model(state, NETWORKS[name])
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-100:]
        store.save(dict(
            **what, loss=sum(entry["loss"] for entry in log) / len(log),
            parameters=sum(p.numel() for p in trained.model.parameters()),
            gflops=gflops(NETWORKS[name], trained.model.config), hardware=hardware(), images=args.count,
            **measure_samples(trained, reference, args.count, **UNGUIDED, precision=state["settings"]["precision"]),
        ))


def plot(rows: list[dict], steps: list[int], path: Path) -> None:
    """A row of panels for each objective: rho against steps, as the paper's Figure 5, and against time."""
    from matplotlib.figure import Figure

    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    figure = Figure(figsize=(8, 3.2 * len(objectives)), layout="constrained")
    panels = figure.subplots(len(objectives), 2, squeeze=False, sharey="row")
    for line, objective in zip(panels, objectives, strict=True):
        for name, colour in COLOURS.items():
            mine = [[r for r in rows if (r["conditioning"], r["objective"], r["steps"]) == (name, objective, n)]
                    for n in steps]
            mean = [sum(r["rho"] for r in group) / len(group) for group in mine]
            seconds = sum(r["seconds_a_step"] for r in mine[-1]) / len(mine[-1])
            for axes, x in ((line[0], steps), (line[1], [n * seconds / 60 for n in steps])):
                axes.plot(x, mean, "o-", color=colour, label=name)
                for group, at in zip(mine, x, strict=True):
                    axes.plot([at] * len(group), [r["rho"] for r in group], ".", color=colour, markersize=4)
        line[0].set(xlabel="training steps", ylabel="rho (1: real images)", title=TITLES[objective], yscale="log")
        line[1].set(xlabel="minutes of training", title="the same against time")
        line[0].yaxis.set_major_formatter("{x:g}")
        line[0].yaxis.set_minor_formatter("{x:g}")
        for axes in line:
            axes.grid(alpha=0.3, which="both")
    panels[0, 1].legend()
    checkpoint.write_whole(path, lambda file: figure.savefig(file, dpi=150))


def table(rows: list[dict], steps: list[int]) -> str:
    """The numbers after the last step, in Markdown: the mean over the seeds."""
    lines = ["| objective | conditioning | M parameters | GFLOPs | ms a step | loss | accuracy | rho | rho, random |",
             "|---|---|---|---|---|---|---|---|---|"]
    for objective in dict.fromkeys(row["objective"] for row in rows):
        for name in NETWORKS:
            group = [r for r in rows if (r["conditioning"], r["objective"], r["steps"]) == (name, objective, steps[-1])]

            def mean(key: str, group: list[dict] = group) -> float:
                return sum(r[key] for r in group) / len(group)

            lines.append(
                f"| {objective} | {name} | {mean('parameters') / 1e6:.2f} | {mean('gflops'):.4f} "
                f"| {1000 * mean('seconds_a_step'):.0f} | {mean('loss'):.4f} | {mean('accuracy'):.2%} "
                f"| {mean('rho'):.2f} | {mean('rho, random'):.2f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args("conditioning", "Compare four ways to condition a DiT.", argv)
    args.steps, args.count, seeds = ([4, 8], 20, [0]) if args.quick else ([500, 1000, 2000], 2000, [0, 1])
    reference, store = Reference(), Store(args.results / "conditioning.json")
    for seed in seeds:
        for objective in OBJECTIVES:
            for name in NETWORKS:
                run_one(name, objective, seed, args, store, reference)
    config = DiTConfig(**MODELS["DiT-N/7"])
    networks = {name: (network, config) for name, network in NETWORKS.items()}
    seconds = seconds_a_step(networks, args.flags, 1 if args.quick else 5)
    for row in store.rows:
        row["seconds_a_step"] = seconds[row["conditioning"]]
    store.save()
    plot(store.rows, args.steps, args.figures / "conditioning.png")
    print(table(store.rows, args.steps))


if __name__ == "__main__":
    run_script(main)
