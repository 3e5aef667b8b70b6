"""Measure speed: the machine's matrix products, training, and sampling.

    python tools/benchmark.py                                      tables in Markdown, some ten minutes
    python tools/benchmark.py --models DiT-N/7 DiT-S/2

The speed of training is given in images a second, and as a fraction of the machine's peak: the floating-point
operations of the network, forward and back, over those that plain matrix products of the same precision reach here.
Whatever else a step does (the optimizer, the average, noise) takes time and does not count as work. All figures are
medians of several rounds, with their range.
"""

import copy
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import find_checkpoint, load_model  # noqa: E402
from cli import Parser, number, pick_device, run_script  # noqa: E402
from dit import MODELS, DiT, DiTConfig  # noqa: E402
from model_flags import DEFAULT_STEPS  # noqa: E402
from rundir import settings  # noqa: E402
from sampling import TrainedModel  # noqa: E402
from shortcut import STEP_COUNTS, ShortcutModel  # noqa: E402
from speed import best_precision  # noqa: E402
from train import PRESETS, Trainer, build_parser  # noqa: E402
from variance import LearnedVariance  # noqa: E402

# The model, the optimizer, and the batch size on a CPU.
CASES = [
    ("DiT-N/7", "muon", 128), ("DiT-N/7", "adamw", 128), ("DiT-N/7", "adamw", 256), ("DiT-N/4", "adamw", 128),
    ("DiT-N/2", "adamw", 32), ("DiT-T/7", "adamw", 128), ("DiT-T/4", "adamw", 64), ("DiT-S/4", "adamw", 32),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(work: Callable, device: torch.device, at_least: float = 1.0) -> float:
    """The seconds of one call of work(), averaged over as many calls as take about `at_least` seconds."""
    def clock() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()  # a GPU is still at work when a call returns
        return time.perf_counter()

    timer = timeit.Timer(work, timer=clock)
    one = timer.timeit(1)
    calls = int(at_least / one)
    return timer.timeit(calls) / calls if calls > 1 else one


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The operations a second of a plain product of two square matrices."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / seconds(lambda: a @ b, device, 0.5)


def flops(config: DiTConfig) -> int:
    """The floating-point operations of one image's way through the network, forward and back."""
    shape = (1, config.in_channels, config.image_size, config.image_size)
    one = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a fused one counts twice
        DiT(config)(torch.zeros(shape), one, one).sum().backward()
    return counter.get_total_flops()


def plain_step(config: DiTConfig, batch: int, device: torch.device) -> Callable:
    """A training step as in the official code: eager, fp32, AdamW, a learned variance, the average by a loop."""
    config = DiTConfig(**{**vars(config), "learn_sigma": True})
    model = DiT(config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    diffusion = LearnedVariance("linear", "eps", device=device)

    def step(x0: Tensor, y: Tensor) -> None:
        t = torch.randint(diffusion.T, (batch,), device=device)
        y = torch.where(torch.rand(batch, device=device) < 0.1, config.num_classes, y)
        loss = diffusion.training_loss(model, x0, y, t, torch.randn_like(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    return step


def show(values: list[float], form: str = ",.0f") -> str:
    """The median of the rounds, and their range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def train_row(precision: str, model: str, optimizer: str, batch: int, device: torch.device, rounds: int) -> str:
    """A line of the table of training: our step, and the plain step of the same network, in turn."""
    torch.compiler.reset()  # otherwise it would give up compiling after some networks of other shapes
    flags = f"--precision {precision} --model {model} --optimizer {optimizer} --batch-size {batch}"
    flags += f" --device {device.type}"
    parser = build_parser()
    args, _ = settings(parser, parser.given(flags.split()))
    trainer = Trainer(DiTConfig(**MODELS[model]), args, device)
    config = trainer.config
    x0, y = torch.randn(batch, 1, 28, 28, device=device), torch.arange(batch, device=device) % 10
    plain = plain_step(config, batch, device)
    for warm_up in range(3):
        trainer.step(warm_up, x0, y, args.lr)
        plain(x0, y)
    work, fraction, img_s, factor = flops(config), [], [], []
    for _ in range(rounds):
        peak = matmul_peak(device, DTYPES[precision])
        ours, theirs = seconds(lambda: trainer.step(0, x0, y, args.lr), device), seconds(lambda: plain(x0, y), device)
        img_s.append(batch / ours)
        fraction.append(100 * work * batch / ours / peak)
        factor.append(theirs / ours)
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    tokens = (config.image_size // config.patch_size) ** 2
    return (
        f"| {model} | {tokens} | {config.hidden_size} x {config.depth} | {parameters:.1f} "
        f"| {precision}, {optimizer}, {batch} "
        f"| {show(img_s)} | {show(fraction)}% | {show(factor, '.2f')} |"
    )


def sample_row(sampler: str, steps: int, trained: TrainedModel, device: torch.device, rounds: int) -> str:
    """A line of the table of sampling."""
    times = {n: [] for n in (1, 100)}
    for n, results in times.items():
        labels = torch.arange(n) % max(trained.model.config.num_classes, 1)
        settings = {**trained.settings, "sampler": sampler}
        trained.sample_batch(labels, **{**settings, "steps": 2})  # to warm up
        work = partial(trained.sample_batch, labels, **{**settings, "steps": steps})
        results += [seconds(work, device, 0.3) for _ in range(rounds)]
    rate = 100 / statistics.median(times[100])
    return f"| {sampler}, {steps} | {show(times[1], '.3f')} | {show(times[100], '.2f')} | {rate:,.0f} |"


def peak_memory(device: torch.device) -> str:
    """The most memory that the GPU, or else this process, has taken, in words."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
    if sys.platform == "win32":
        return "peak memory unknown"
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    return f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:,.0f} MiB"


def main(argv: list[str] | None = None) -> None:
    """Print the tables. Raises UsageError, CheckpointError."""
    parser = Parser("benchmark.py", "Measure the speed of training and sampling on this machine.")
    known = [name for name, shape in MODELS.items() if DiTConfig.image_size % shape["patch_size"] == 0]
    models = dict(nargs="+", choices=known, metavar="NAME")
    parser.add_argument("--models", **models, help=f"to train, of {', '.join(known)} (default: some)")
    parser.add_argument("--checkpoint", help="what to sample from (default: the newest run, else bundled)")
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="of measurement (default: 5)")
    parser.add_argument("--device", choices=list(PRESETS), help="(default: the best there is)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    weights = args.checkpoint or find_checkpoint()
    trained = load_model(weights, device)
    cases = [case for case in CASES if not args.models or case[0] in args.models]
    cases += [(name, "adamw", 64) for name in args.models or () if name not in {case[0] for case in CASES}]
    usual = best_precision(device)
    precisions = dict.fromkeys(["fp32", usual] if device.type == "cpu" else [usual])
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else threads}, PyTorch {torch.__version__}")
    for precision in precisions:
        peaks = [matmul_peak(device, DTYPES[precision]) / 1e9 for _ in range(args.rounds)]
        print(f"plain matrix product in {precision}: {show(peaks)} GFLOP/s")
    print("\n| network | tokens | width x depth | M parameters | precision, optimizer, batch "
          "| training, images a second | fraction of the peak | times the plain step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for precision, (model, optimizer, batch) in tqdm(list(product(precisions, cases)), unit="row", leave=False):
        batch *= 1 if device.type == "cpu" else 16
        tqdm.write(train_row(precision, model, optimizer, batch, device, args.rounds))
    print(f"\n{weights}:\n\n| sampler, steps | one digit, s | 100 digits, s | digits a second |")
    print("|---|---|---|---|", flush=True)
    rows = [(name, min(n, trained.diffusion.T)) for name, n in DEFAULT_STEPS.items() if name in trained.samplers]
    if isinstance(trained, ShortcutModel):
        rows = [("shortcut", n) for n in STEP_COUNTS]
    for sampler, steps in tqdm(rows, unit="row", leave=False):
        tqdm.write(sample_row(sampler, steps, trained, device, args.rounds))
    print(f"\n{peak_memory(device)}")


if __name__ == "__main__":
    run_script(main, memory="name smaller --models")
