"""Train a DiT.

    python train.py                                          MNIST, with what suits this machine
    python train.py --dataset cifar10 --steps 50000
    python train.py --resume runs/mnist-1
    torchrun --nproc-per-node=4 train.py                     the same, on four GPUs

This file goes from the whole to its parts: the loop, one training step, and what a step is made of. Around it, run.py
keeps the folder, the log and the checkpoints, and settings.py says what can be set.
"""

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import dataset
from cli import RANK, WORLD, UsageError, guidance_settings, pick_device, run_script
from diffusion import Diffusion, draw_timesteps, drop_labels, guide, training_loss
from dit import DiT, DiTConfig
from muon import Muon
from run import Run, check_belongs
from sampling import TrainedModel, grid, seeded
from settings import TIMESTEPS, load_teacher, network, parse_args, read_again, settle
from shortcut import HOLD, MATCHED, MATCHING, draw_steps, matching_loss, shortcut_loss
from speed import compile_blocks, fast_attention, make_deterministic

MAX_NORM = 1.0         # a longer gradient is shortened to this length
BESIDE_MUON = 3e-3     # AdamW's highest learning rate then; with a higher one the loss jumps
STEPS_SHARE = 0.85     # of the time of a run; the rest is for reading data, checkpoints and samples
FIRST_INDEX = 2**31    # training's generators are numbered from here, far from those of the images (0, 1, ...)


def train(trainer: "Trainer", run: Run, data: dataset.Images) -> None:
    """Take the steps that are left, or as many as there is time for before a signal asks the run to stop."""
    args = trainer.args
    batches = dataset.batches(data, args.batch_size, args.seed, run.step, RANK, WORLD, trainer.device)
    milestone = run.step == args.steps or run.step % args.save_every == 0
    if run.is_new:  # so that even a run that is killed in its first steps can go on, and a full disk shows now
        run.save(trainer.state())
    elif run.step and milestone and RANK == 0 and not run.picture.exists():  # killed while it drew
        run.draw(trainer.samples)
    for step in range(run.step, args.steps):
        try:
            x0, y = next(batches)                                            # (b, C, S, S) in [-1, 1], and (b,)
        except dataset.DataError:  # an image file that cannot be read: keep what was learned before it
            if WORLD == 1 and run.step > run.saved_at:
                run.save(trainer.state())
            raise
        loss, norm = trainer.step(step, x0, y)
        run.log(loss, norm, learning_rate(step, args))                       # from here on, run.step is step + 1

        finished = run.step == args.steps
        stop = not finished and run.should_stop()
        milestone = finished or run.step % args.save_every == 0
        if milestone or stop:
            run.save(trainer.state())
        if milestone:
            run.draw(trainer.samples)
        if stop:
            break


class Trainer:
    """A network in training, its moving average, and its optimizers.

    config: of the network, args: the settings (see settings.py), device: where to train, teacher: what to distill
    saved:  a checkpoint that `load` will get, if it belongs to all these. Raises CheckpointError where it does not

    Everything random in a step (timesteps, noise, hidden labels) is drawn for the whole batch, from the seed and the
    number of the step alone. So a run that is resumed, or shared by several processes, takes the same steps as one that
    is not.
    """

    def __init__(
        self, config: DiTConfig, args: argparse.Namespace, device: torch.device, teacher: TrainedModel | None = None,
        saved: dict | None = None,
    ):
        self.config, self.args, self.device, self.teacher = config, args, device, teacher
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.share = args.batch_size // WORLD        # images of each batch that are this process's
        self.part = self.share // args.accumulate    # images that pass through the network at a time
        self.diffusion = teacher.diffusion if teacher else Diffusion(args.schedule, args.prediction, TIMESTEPS, device)
        torch.manual_seed(args.seed)
        self.model = DiT(config, args.gradient_checkpointing).to(device)
        if teacher:  # the student begins as a copy
            self.model.load_state_dict(teacher.model.state_dict(), strict=False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)  # the average, which will draw the samples
        self.learners = [self.model]
        if teacher:  # a second network learns from what the student draws, see shortcut.matching_loss
            self.learners.append(copy.deepcopy(teacher.model).requires_grad_(True))
        self.optimizers = [optimizer for network in self.learners for optimizer in make_optimizers(network, args)]
        self.nets = self.learners  # what the images pass through: the networks, perhaps wrapped
        if saved:
            check_belongs(saved, self)
        networks = self.learners + ([self.ema, teacher.model] if teacher else [])
        blocks = [block for network in networks for block in network.blocks]
        self.compiled = args.compile and compile_blocks(blocks, self.rehearse)
        if WORLD > 1:  # this wrapper makes each gradient the mean over the processes
            # Its warning is of the strides of axes of length 1, which have no meaning.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.nets = [DistributedDataParallel(network) for network in self.learners]

    def step(self, number: int, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One training step, DDPM Algorithm 1. Returns the loss and the norm of its gradient, tensors of one number.

        number: of the step, from 0 on
        x0, y:  this process's share of the batch: images (b, C, S, S) in [-1, 1] and their labels (b,)
        """
        args = self.args
        t, u, eps = self.randomness(number)                                  # (b,), (b,), (b, C, S, S)
        y = drop_labels(y, self.config.num_classes, args.label_dropout, u)   # so that guidance will be possible
        total = 0.0
        for part in self.parts():                                            # only one, unless --accumulate is given
            loss = self.loss(x0[part], y[part], t[part], eps[part]) / args.accumulate
            loss.backward()
            total = total + loss.detach()
        norm, *_ = [nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM) for network in self.learners]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * learning_rate(number, args)
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.ema, self.model, number, args.ema)
        return total, norm

    def loss(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean loss of some images, with the network's products in the precision that was asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            if not self.teacher:
                return training_loss(self.diffusion, *self.nets, x0, y, t, eps, self.args.min_snr).mean()
            (student, fake), steps, (eps, noise) = self.nets, t[:, :2], eps.unbind(1)
            loss, x0_hat = shortcut_loss(self.diffusion, student, self.ema, self.teach, x0, y, steps, eps)
            whole = steps[:, 0] - steps[:, 1] == self.diffusion.T  # the images that are drawn in one step
            drawn = x0_hat[whole], y[whole], t[whole, 2], noise[whole]
            match, fake_loss = matching_loss(self.diffusion, partial(self.teach, share=MATCHED), fake, *drawn)
            return torch.where(whole, HOLD * loss, loss).mean() + (MATCHING * match + fake_loss).sum() / len(x0)

    def teach(self, x_t: Tensor, t: Tensor, y: Tensor, d: Tensor | None = None, share: float = 1.0) -> Tensor:
        """What the teacher predicts, with a share of its guidance. It knows no size d of steps: its own are small."""
        weight, interval = guidance_settings(self.args.guidance, self.diffusion.T).values()
        return guide(self.teacher.model, y, self.config.num_classes, 1 + share * (weight - 1), interval)(x_t, t)

    def randomness(self, number: int) -> list[Tensor]:
        """This process's share of what is random in a step.

        t (b,) are timesteps, u (b,) uniform numbers that say whose label is hidden, and eps (b, C, S, S) is noise. With
        a teacher, t is (b, 3): a step from one timestep to another, and the timestep at which its result is compared
        with what the teacher draws. Then eps is (b, 2, C, S, S), and the second noise is for that comparison.
        """
        args, n = self.args, self.args.batch_size
        generator = seeded(args.seed, FIRST_INDEX + number)
        if self.teacher:
            compare_at = draw_timesteps(n, self.diffusion.T, "logit-normal", generator)
            t = torch.cat([draw_steps(n, self.diffusion.T, generator), compare_at[:, None]], dim=1)
        else:
            t = draw_timesteps(n, TIMESTEPS, args.timestep_distribution, generator, args.timestep_mean)
        u = torch.rand(n, generator=generator)
        if self.device.type != "cpu":
            generator = seeded(args.seed, FIRST_INDEX + number, self.device)
        shape = (n, 2, *self.shape) if self.teacher else (n, *self.shape)
        eps = torch.randn(shape, generator=generator, device=self.device)
        return [value[self.share * RANK : self.share * (RANK + 1)].to(self.device) for value in (t, u, eps)]

    def parts(self) -> Iterator[slice]:
        """The slices of this process's share that pass through the network one after another, forward and back.

        While the caller works on a slice, the fastest kind of attention is switched on. Processes exchange gradients in
        the last slice only, because one exchange for each step is enough.
        """
        for first in range(0, self.share, self.part):
            last = first + self.part == self.share
            with fast_attention(self.device, self.args.precision), ExitStack() as stack:
                if WORLD > 1 and not last:
                    for net in self.nets:
                        stack.enter_context(net.no_sync())
                yield slice(first, first + self.part)

    def state(self) -> dict:
        """Everything that training has changed, for `load`. Random numbers need not be kept, see above."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizers=optimizers)
        if self.teacher:  # whose file may be gone when the run goes on
            state["fake"] = self.learners[1].state_dict()
            state["teacher"] = {**self.teacher.description, "ema": self.teacher.model.state_dict()}
        return state

    def load(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        if self.teacher:
            self.learners[1].load_state_dict(state["fake"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})

    def rehearse(self, steps: int = 1) -> float:
        """The seconds of a step, the median of some on blank images, whose changes to the network are undone."""
        x0 = torch.zeros(self.share, *self.shape, device=self.device)
        y = torch.zeros(self.share, dtype=torch.long, device=self.device)
        parameters = [p for network in (*self.learners, self.ema) for p in network.parameters()]
        before = [p.detach().to("cpu", copy=True) for p in parameters]
        times = []
        try:
            for _ in range(steps):
                begin = time.perf_counter()
                _, norm = self.step(0, x0, y)
                norm.item()  # waits for the GPU
                times.append(time.perf_counter() - begin)
        finally:
            for network in self.learners:
                network.zero_grad()
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
            for optimizer in self.optimizers:
                optimizer.state.clear()
        return statistics.median(times)

    def samples(self) -> Image.Image:
        """Ten rows of images by the averaged weights, a class each."""
        labels = (torch.arange(10) % max(self.config.num_classes, 1)).repeat_interleave(10)
        trained = TrainedModel(self.ema, self.diffusion, self.guidance())
        with torch.compiler.set_stance("force_eager"):  # which is faster than compiling for these batches
            return grid(trained.draw(labels, self.part), columns=10)

    def guidance(self) -> dict:
        """The guidance with which the averaged weights draw. That of a teacher is learned, and not needed again."""
        return guidance_settings([1.0] if self.teacher else self.args.guidance, self.diffusion.T)


def make_optimizers(model: DiT, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, if it is asked for, and AdamW for all other parameters."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    fused = others[0].device.type != "mps"
    share = BESIDE_MUON / max(args.lr, BESIDE_MUON) if matrices else 1.0
    groups = [dict(params=others, share=share)]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    return [Muon([dict(params=matrices, share=1.0)], lr=args.lr), adamw] if matrices else [adamw]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of step 0, 1, ...: a linear rise, then a constant, or half a cosine that falls to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


@torch.no_grad()
def update_ema(average: DiT, model: DiT, step: int, decay: float) -> None:
    """Move the averaged weights a little towards the model's, and more so early on, when the old ones are worthless."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def plan(trainer: Trainer) -> float:
    """Settle how many steps there will be, if --minutes is to say it. Returns the seconds of a step, by rehearsal."""
    args = trainer.args
    trainer.rehearse()  # the first step is slower than all others
    seconds = trainer.rehearse(20 if args.minutes else 2)
    if WORLD > 1:  # all processes must agree
        shared = [seconds]
        dist.broadcast_object_list(shared)
        seconds = shared[0]
    if args.minutes:
        steps = max(1, int(args.minutes * 60 * STEPS_SHARE / seconds))
        args.steps, args.minutes = int(float(f"{steps:.2g}")), None
    return seconds


def announcement(trainer: Trainer, source: str, steps: int, seconds: float) -> str:
    """What was chosen, and how long these steps will take, each so many seconds."""
    args = trainer.args
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    what = f"{args.distill}, distilled" if args.distill else args.model
    process = " ".join(trainer.diffusion.config[name] for name in ("schedule", "prediction"))
    how = f"{trainer.device.type}, {args.precision}, {'compiled' if trainer.compiled else 'eager'}"
    minutes = steps * seconds / STEPS_SHARE / 60
    return (
        f"{what}, {parameters:.1f} M parameters; {process}, {args.optimizer}; "
        f"{steps:,} steps of {args.batch_size} from {source}; {how}: about {math.ceil(minutes)} min"
    )


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit status.

    Raises UsageError, DataError, CheckpointError, WorkError.
    """
    if RANK > 0:
        warnings.simplefilter("ignore")  # one process says it for all
    given = parse_args(argv)
    run = Run(given.run_dir, given.resume)
    if run.state:
        run.state["args"] = read_again(run.state)
    device = pick_device(given.device or run.state.get("args", {}).get("device"))
    make_deterministic(device)
    teacher = load_teacher(given, run.state, device)
    args = settle(given, device, run.state, teacher and teacher.description)
    if run.state and (run.step > args.steps or run.step == args.steps and run.is_finished()):
        raise UsageError(f"{given.resume} is at step {run.step} already: ask for more with --steps")
    run.join(device)
    data = run.load_data(args.dataset, args.data_dir, teacher.model.config.image_size if teacher else args.image_size)
    args.dataset = args.dataset or data.name
    config = network(args, data, teacher, choose=not given.model and not run.state)

    run.catch_signals()
    trainer = Trainer(config, args, device, teacher, run.state)
    seconds = plan(trainer)
    if run.state:
        trainer.load(run.state)
    description = checkpoint.describe(
        config, trainer.diffusion, data.classes, data.source, run.step, **trainer.guidance()
    )
    what = announcement(trainer, data.source, args.steps - run.step, seconds)
    with run.open(Path(args.dataset).resolve().name, vars(args), description, what):
        train(trainer, run, data)
    return run.finish(trainer.ema.state_dict())


if __name__ == "__main__":
    run_script(main, dataset.DataError, memory="raise --accumulate, or lower --batch-size")
