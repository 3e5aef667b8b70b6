"""One training step: what is drawn, what is minimized, and what the optimizers and the average do with the gradient.

Whatever is random in step k (the batch, its timesteps, noise and dropped labels) is drawn for the batch as a whole from
(seed, k). So a run that is resumed, or shared by several processes, takes the same steps as one that is not.
"""

import argparse
import copy
import math
import os
import time
import warnings
from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from diffusion import Diffusion, draw_timesteps, drop_labels, training_loss
from dit import DiT, DiTConfig
from inference import DEFAULT_GUIDANCE, grid, sample, seeded
from muon import Muon

FIRST_NUMBER = 2**31  # of the random numbers of step 0, far from those of the images that inference draws


def make_deterministic(device: torch.device) -> None:
    """On CUDA, for bit-exact resuming; the few operations that cannot be are named in a warning. Elsewhere all are."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def make_optimizers(model: DiT, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, if it is asked for, and AdamW for all else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    options = dict(lr=args.lr, weight_decay=args.weight_decay)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=rest[0].device.type != "mps", **options)
    return [Muon(matrices, **options), adamw] if matrices else [adamw]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of step 0, 1, ...: a linear rise over the warm-up, then level, or half a cosine down to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


@torch.no_grad()
def update_ema(average: DiT, model: DiT, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's; early on faster, for the first weights are not worth keeping."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


class Trainer:
    """The network, its average and its optimizers, and how they take one step."""

    def __init__(self, config: DiTConfig, args: argparse.Namespace, device: torch.device, rank: int, world: int):
        self.args, self.config, self.device = args, config, device
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.share = args.batch_size // world                    # images of a batch that are this rank's
        self.part = self.share // args.accumulate                # images that go through the network at once
        self.mine = slice(self.share * rank, self.share * (rank + 1))
        self.diffusion = Diffusion(args.schedule, args.prediction, device=device)
        torch.manual_seed(args.seed)
        self.model = DiT(config, args.gradient_checkpointing).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = make_optimizers(self.model, args)
        self.net = self.model
        self.compiled = bool(args.compile) and self.compile_blocks()
        if world > 1:  # gradients become the mean over the processes; `model` remains what is averaged and saved
            self.net = DistributedDataParallel(self.model, broadcast_buffers=False)

    def draw(self, step: int) -> list[Tensor]:
        """This rank's share of what is random in a step: timesteps (b,), uniform numbers (b,) to drop labels by, and
        noise (b, C, S, S)."""
        n, number = self.args.batch_size, FIRST_NUMBER + step
        generator = seeded(self.args.seed, number)
        t = draw_timesteps(n, self.diffusion.T, self.args.timestep_distribution, generator)
        u = torch.rand(n, generator=generator)
        if self.device.type != "cpu":
            generator = seeded(self.args.seed, number, self.device)
        eps = torch.randn(n, *self.shape, generator=generator, device=self.device)
        return [value[self.mine].to(self.device) for value in (t, u, eps)]

    def backward(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add the gradient of a part of a batch to what is there; the share of that part in the loss."""
        bf16 = self.args.precision == "bf16"
        # On a CPU fused attention in bfloat16 is ten times slower than matrix products and a softmax.
        attention = sdpa_kernel(SDPBackend.MATH) if bf16 and self.device.type == "cpu" else nullcontext()
        with attention:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = training_loss(self.diffusion, self.net, x0, y, t, eps, self.args.min_snr).mean()
            loss = loss / self.args.accumulate
            loss.backward()
        return loss.detach()

    def step(self, step: int, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Train on this rank's share of a batch; its loss and the norm of the gradient."""
        t, u, eps = self.draw(step)
        y = drop_labels(y, self.config.num_classes, self.args.label_dropout, u)
        total = 0.0
        for first in range(0, self.share, self.part):
            now = slice(first, first + self.part)
            last = now.stop == self.share  # the one after which processes exchange gradients
            with nullcontext() if last or self.net is self.model else self.net.no_sync():
                total = total + self.backward(x0[now], y[now], t[now], eps[now])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.args)
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.ema, self.model, step, self.args.ema)
        return total, norm

    def compile_blocks(self) -> bool:
        """Compile the blocks, all alike and so compiled once; whether that worked."""
        for block in self.model.blocks:
            block.compile(dynamic=False)
        try:
            self.rehearse()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, a GPU too old: whatever it is, eager execution works
            for block in self.model.blocks:
                block._compiled_call_impl = None
            reason = str(error).strip().splitlines()[0][:100]
            warnings.warn(f"torch.compile does not work here ({reason}): going on without, slower", stacklevel=2)
            return False
        return True

    def rehearse(self) -> float:
        """One pass forward and back on nothing, which changes nothing: the seconds of one step by that measure."""
        x0 = torch.zeros(self.part, *self.shape, device=self.device)
        y = torch.zeros(self.part, dtype=torch.long, device=self.device)
        begin = time.perf_counter()
        self.backward(x0, y, y, x0)
        sum(p.grad.sum() for p in self.model.parameters()).item()  # waits for the GPU
        self.model.zero_grad()
        return (time.perf_counter() - begin) * self.args.accumulate

    def state(self) -> dict:
        """All that training has changed. Random numbers follow from the seed and the step."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizers=optimizers)

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def samples(self) -> Image.Image:
        """Ten rows of the first ten classes, or of anything, by the averaged weights."""
        rows = torch.arange(10) % max(self.config.num_classes, 1)
        labels = rows.repeat_interleave(10)
        guidance = default_guidance(self.args)
        parts = [slice(i, i + self.part) for i in range(0, 100, self.part)]
        images = [
            sample(self.ema, self.diffusion, labels[part], indices=range(100)[part], **guidance)
            for part in parts
        ]
        return grid(torch.cat(images), columns=10)


def default_guidance(args: argparse.Namespace) -> dict:
    """guidance and interval, as `sample` takes them, to draw with unless told otherwise.

    With flow, guiding the middle of the way alone is better by every measure (assets/recipe.md), and cheaper.
    Without dropped labels there is no unconditional prediction to move away from.
    """
    if args.guidance is not None:
        return dict(guidance=args.guidance, interval=args.guidance_interval)
    if not args.label_dropout:
        return dict(guidance=1.0, interval=None)
    if args.schedule == "flow":
        return dict(guidance=2.0, interval=(300, 800))
    return dict(guidance=DEFAULT_GUIDANCE, interval=None)
