"""Distill a trained network, so that it samples in one step, or in a few.

    python distill.py                                        the bundled weights
    python distill.py runs/mnist-1
    python distill.py --resume runs/mnist-2

The path of the reverse process from noise to image is curved, and a diffusion model predicts only its direction at x_t,
so a large step has a large error. A shortcut model (Frans et al., "One Step Diffusion via Shortcut Models",
arXiv 2410.12557) also receives the size of the step, and predicts the x0_hat with which the step ends on the path. It
learns that from itself: one step should arrive where two of half the size do (the paper's Eq. 4). In the paper the
smallest steps are learned from data in the same training. Here a trained network, the teacher, says where they arrive,
so that this is a distillation of a teacher into a student.

A span (t, s) is a sampling step from timestep t to s < t, where s = -1 is the clean image, as in diffusion.py. Its size
is t - s, and a single step from noise to image has size T.

A long step tends to be blurred, because a squared error asks for the mean of all images that are possible. So in the
last part of the training, the images with which the student's paths of one, two and four steps end are compared with
the teacher's as a distribution, see `matching_loss`: Yin et al., "One-step Diffusion with Distribution Matching
Distillation" (DMD), arXiv 2311.18828, and "Improved Distribution Matching Distillation" (DMD2), arXiv 2405.14867. Only
the last step of such a path is taken, from a real image with noise, so that no path has to be simulated.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import checkpoint
from cli import BUNDLED_WEIGHTS, Parser, UsageError, guidance_settings, run_script
from diffusion import Diffusion, clip, guide, sample_timesteps
from dit import DiT, DiTConfig, TimestepEmbedder
from optim import load_optimizers, make_optimizers, take_step
from run import MAY_CHANGE, Run, distributed, local_part
from sampling import TrainedModel, seeded
from speed import autocast
from train import FIRST_INDEX, MAX_NORM, PRESETS, Trainer, add_training_flags, train

STEP_COUNTS = (1, 2, 4, 8, 16, 32)               # numbers of sampling steps that a shortcut model learns
STEP_COUNT_CYCLE = (1, 1, 2, 4, 8, 16, 32, 32, 32, 32)  # of each 10 images, into how many steps the path is cut
MATCHING_BEGINS = 0.7       # the fraction of the training after which samples are matched
MATCHED_COUNTS = (1, 1, 2, 4)  # the number of steps in the path that each sample ends, of 4 samples
MATCHING_WEIGHT = 0.5       # of `matching_loss`, beside `shortcut_loss` for as many other images
MATCHING_GUIDANCE = 0.35    # the fraction of the teacher's guidance (its scale - 1) for the distribution to match
FAKE_UPDATES = 3            # of the network `fake`, before each step of the student
FAKE_LR = 0.25              # its learning rate, as a fraction of the student's highest


# ------------------------------------------------------------------------------------------------ network and sampling


class ShortcutDiT(DiT):
    """A DiT that also receives the size t - s of the step to take: what DiT calls t is here spans (t, s), (B, 2)."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.d_embedder = TimestepEmbedder(config.hidden_size)
        nn.init.normal_(self.d_embedder.mlp[0].weight, std=0.02)
        nn.init.zeros_(self.d_embedder.mlp[0].bias)
        nn.init.zeros_(self.d_embedder.mlp[2].weight)  # at first, all step sizes are alike
        nn.init.zeros_(self.d_embedder.mlp[2].bias)

    def condition(self, spans: Tensor, y: Tensor) -> Tensor:
        t, s = spans.unbind(1)
        return super().condition(t, y) + self.d_embedder(t - s)


def shortcut_timesteps(T: int, steps: int) -> list[int]:
    """Timesteps from T - 1 on that cut the path to the clean image into 1, 2, 4, 8, 16 or 32 equal steps.

    Raises ValueError for other numbers.
    """
    if steps not in STEP_COUNTS:
        counts = ", ".join(map(str, STEP_COUNTS))
        raise ValueError(f"{steps} sampling steps: use {counts}, which a shortcut model learns")
    return [round(T * i / steps) - 1 for i in range(steps, 0, -1)]


def ddim_step(diffusion: Diffusion, x_t: Tensor, x0_hat: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
    """DDIM's step (arXiv 2010.02502, Eq. 12) from x_t with x0_hat to the noise level of s < t, each (B,) or one."""
    eps_hat = (x_t - diffusion.extract("alpha", t) * x0_hat) / diffusion.extract("sigma", t)
    return diffusion.extract("alpha", s) * x0_hat + diffusion.extract("sigma", s) * eps_hat


def invert_ddim_step(diffusion: Diffusion, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0_hat with which `ddim_step` leads from x_t to x_s."""
    ratio = diffusion.extract("sigma", s) / diffusion.extract("sigma", t)
    return (x_s - ratio * x_t) / (diffusion.extract("alpha", s) - ratio * diffusion.extract("alpha", t))


@torch.no_grad()
def shortcut(
    diffusion: Diffusion, predict: Callable, x: Tensor, timesteps: list[int], noise: Callable | None = None,
    constrain: Callable = clip,
) -> Tensor:
    """Shortcut models, arXiv 2410.12557, Algorithm 2: DDIM's steps, each predicted by predict(x_t, (t, s))."""
    for t, s in pairwise([*timesteps, -1]):
        x0_hat = constrain(diffusion.predict_x0(predict(x, (t, s)), x, t), x, t)
        x = ddim_step(diffusion, x, x0_hat, t, s)
    return x


class ShortcutModel(TrainedModel):
    """A trained ShortcutDiT. It has learned its teacher's guidance, and needs none."""

    samplers = {"shortcut": shortcut}
    default_steps = {"shortcut": 4}

    def predictor(self, labels: Tensor, guidance: float = 1.0, guidance_interval: list[int] | None = None) -> Callable:
        y = labels.to(self.device)

        def predict(x_t: Tensor, span: tuple[int, int]) -> Tensor:
            return self.model(x_t, torch.tensor(span, device=self.device).expand(len(y), 2), y).float()

        return predict

    def timesteps(self, sampler: str, steps: int) -> list[int]:
        return shortcut_timesteps(self.diffusion.T, steps)


# -------------------------------------------------------------------------------------------------------------- losses


def sample_spans(n: int, T: int, cycle: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """n spans (t, s) for a shortcut model to learn, as an int64 tensor (n, 2) on the CPU.

    cycle: into how many steps the path is cut for each span in turn, such as STEP_COUNT_CYCLE

    A span is the first of its path, from T - 1, with probability 0.3, since sampling in few steps needs that one most.
    Else, and for the smallest size, it is any of the path.
    """
    counts = torch.tensor(cycle).repeat(n // len(cycle) + 1)[:n]
    u = torch.rand(2, n, generator=generator, dtype=torch.float64)
    first = (u[0] < 0.3) & (counts < STEP_COUNTS[-1])
    position = torch.where(first, counts, (u[1] * counts).long() + 1)  # counted from the image: span 1 arrives there
    t = (T * position / counts).round().long() - 1
    s = (T * (position - 1) / counts).round().long() - 1
    return torch.stack([t, s], dim=1)


def shortcut_target(diffusion: Diffusion, predict: Callable, x_t: Tensor, y: Tensor, spans: Tensor) -> Tensor:
    """The x0_hat that leads along spans (B, 2) to where predict(x_t, spans, y) leads in two steps of half the size."""
    t, s = spans.unbind(1)
    middle = (t + s) // 2
    x = x_t
    for begin, end in ((t, middle), (middle, s)):
        out = predict(x, torch.stack([begin, end], dim=1), y).float()
        x = ddim_step(diffusion, x, diffusion.predict_x0(out, x, begin).clamp(-1, 1), begin, end)
    return invert_ddim_step(diffusion, x_t, x, t, s)


def shortcut_loss(
    diffusion: Diffusion, x0_hat: Tensor, ema: Callable, teacher: Callable, x_t: Tensor, y: Tensor, spans: Tensor
) -> Tensor:
    """The loss of each image, (B,): the error of the x0_hat for a span, against that of two spans of half the size.

    The halves are taken by the student's moving average, which is steadier than the student. Those of the smallest size
    are the teacher's. If it is guided, its guidance is learned with the rest, so that the student needs none.

    x0_hat:       what the student predicts at x_t, (B, C, H, W), for labels y (B,) and spans (B, 2)
    ema, teacher: the student's average, and the teacher, each (x_t, spans, y) -> output

    Targets are found as in progressive distillation (arXiv 2202.00512, Algorithm 2), which halves the number of steps
    of one network after another. The loss is the squared error of x0_hat over sigma_t. This is between the squared
    error of x0_hat, in which small t hardly count, and that of the velocity (over sigma_t^2), in which large t hardly
    count.
    """
    t, s = spans.unbind(1)
    with torch.no_grad():
        target = torch.empty_like(x_t)
        smallest = t - s < 1.5 * diffusion.T / STEP_COUNTS[-1]
        for predict, mask in ((teacher, smallest), (ema, ~smallest)):
            if mask.any():
                target[mask] = shortcut_target(diffusion, predict, x_t[mask], y[mask], spans[mask])
    return (x0_hat - target).square().flatten(1).mean(1) / diffusion.tables["sigma"][t]


def last_spans(n: int, T: int) -> Tensor:
    """The last spans (t, -1) of n paths in MATCHED_COUNTS steps, int64 (n, 2). They end at the samples to match."""
    t = torch.tensor([shortcut_timesteps(T, steps)[-1] for steps in MATCHED_COUNTS])
    t = t.repeat(n // len(t) + 1)[:n]
    return torch.stack([t, torch.full_like(t, -1)], dim=1)


def with_sizes_of(spans: Tensor, fake: Callable) -> Callable:
    """`fake` as a function (x_t, t, y) -> output, for samples at the end of spans (B, 2). It receives the size of each
    span as well, since a sample in one step has another distribution than one after the last of four.
    """
    size = spans[:, 0] - spans[:, 1]
    return lambda x_t, t, y: fake(x_t, torch.stack([t, t - size], dim=1), y)


def matching_loss(
    diffusion: Diffusion, sample: Tensor, teacher: Callable, fake: Callable, y: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    """A loss of each of the student's samples, (B,). Its value has no meaning, but its gradient moves the distribution
    of the samples towards the teacher's.

    sample:        (B, C, H, W), of labels y (B,)
    teacher, fake: networks (x_t, t, y) -> output, of which the second was trained on samples of the student
    t, eps:        timesteps (B,) and noise like sample, by which both see the samples

    The score of a distribution follows from the x0_hat of a network that was trained on it. The teacher gives the score
    of real images (and, where it is guided, of a sharper distribution), `fake` that of the student's samples. The
    gradient of the loss with respect to a sample, times the number of its values, is (fake_x0 - teacher_x0) / mean
    |sample - teacher_x0|. On average this is the gradient of the KL divergence of the student's noisy samples from the
    teacher's, with a weight at each t (DMD, Eq. 7 and 8, without the factor alpha_t, as in the code of DMD2). Guidance
    has a smaller scale here than for sampling: there it acts on one path, here on all samples, step after step, and a
    large scale reduces their diversity.
    """
    with torch.no_grad():
        x_t = diffusion.q_sample(sample, t, eps)
        fake_x0 = diffusion.predict_x0(fake(x_t, t, y).float(), x_t, t)
        teacher_x0 = diffusion.predict_x0(teacher(x_t, t, y).float(), x_t, t)
        distance = (sample - teacher_x0).abs().flatten(1).mean(1).clamp(min=1e-3).view(-1, 1, 1, 1)
        target = sample - (fake_x0 - teacher_x0) / distance
    return 0.5 * (sample - target).square().flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------------ training


class DistillTrainer(Trainer):
    """A student in training, and later the network `fake` beside it. They begin as copies of the teacher.

    First the student learns shortcuts. After a fraction MATCHING_BEGINS of the training, half of each batch is for that
    and the other half for samples that are matched. Before each of these steps, `fake` takes FAKE_UPDATES steps of its
    own, with fresh samples, so that it keeps up with the student (the two time scales of DMD2, section 4.2).
    """

    network = ShortcutDiT
    step_time = 1.9

    def __init__(self, teacher: TrainedModel, args, device: torch.device, state: dict | None = None):
        self.teacher = teacher
        super().__init__(teacher.model.config, args, device, state)

    def make_networks(self) -> None:
        teacher = self.teacher.model
        self.diffusion, self.label_dropout = self.teacher.diffusion, 0.0
        self.sampling_guidance = dict(guidance=1.0, guidance_interval=None)
        self.teacher_guidance = guidance_settings(self.args.guidance, self.diffusion.T)
        self.model = ShortcutDiT(self.config).to(self.device)
        self.model.load_state_dict(teacher.state_dict(), strict=False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.fake = copy.deepcopy(self.model)
        self.ddp_fake = distributed(self.fake)
        self.optimizers = make_optimizers(self.model, self.args)
        self.fake_optimizers = make_optimizers(self.fake, self.args)
        self.blocks = [block for network in (self.model, self.fake, self.ema, teacher) for block in network.blocks]

    def is_matching(self, step_index: int) -> bool:
        """Whether samples are matched in this step."""
        return self.args.steps is not None and step_index >= MATCHING_BEGINS * self.args.steps

    def step(self, step_index: int, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_matching(step_index):
            times, _, eps = (local_part(values, self.device) for values in self.randomness(step_index))
            for i in range(FAKE_UPDATES):
                self.update_fake(x0, y, times[:, 3 + i], eps[:, 2 + 2 * i :])
        return super().step(step_index, x0, y)

    def update_fake(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> None:
        """A training step of `fake` on samples of the student, with the ordinary loss."""
        n, spans = self.micro_batch_size, local_part(last_spans(self.args.batch_size, self.diffusion.T), self.device)
        self.fake.zero_grad()
        for i in range(self.args.grad_accum_steps):
            micro = slice(i * n, (i + 1) * n)
            self.ddp_fake.require_backward_grad_sync = i == self.args.grad_accum_steps - 1
            with autocast(self.device, self.args.precision):
                with torch.no_grad():
                    _, sample = self.predict(self.model, x0[micro], y[micro], spans[micro], eps[micro, 0])
                fake = with_sizes_of(spans[micro], self.ddp_fake)
                sample = sample.clamp(-1, 1)  # as it is shown: what is out of range there need not be matched
                loss = self.diffusion.training_loss(fake, sample, y[micro], t[micro], eps[micro, 1]).mean()
                (loss / self.args.grad_accum_steps).backward()
        nn.utils.clip_grad_norm_(self.fake.parameters(), MAX_NORM)
        take_step(self.fake_optimizers, FAKE_LR * self.args.lr)

    def randomness(self, step_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is random in a step: times (B, 3), u (B,), eps (B, 2, C, S, S).

        times holds the span (t, s) to learn, and the timestep of `matching_loss`, or -1 where an image is not matched;
        eps the noise for each of the two losses. While there is matching, times has one more column for each update of
        `fake`, its timestep, and eps two, the noise of the sample and that of its loss.
        """
        n, T, generator = self.args.batch_size, self.diffusion.T, seeded(self.args.seed, FIRST_INDEX + step_index)
        if self.is_matching(step_index):
            updates, spans = FAKE_UPDATES, torch.empty(n, 2, dtype=torch.long)
            spans[::2] = sample_spans(n - n // 2, T, STEP_COUNT_CYCLE[2:], generator)  # not the whole path
            spans[1::2] = last_spans(n // 2, T)
            t = torch.stack([sample_timesteps(n, T, "logit-normal", generator) for _ in range(1 + updates)], dim=1)
            t[::2, 0] = -1
        else:
            updates, spans = 0, sample_spans(n, T, STEP_COUNT_CYCLE, generator)
            t = torch.full((n, 1), -1)
        u = torch.rand(n, generator=generator)
        if self.device.type != "cpu":
            generator = seeded(self.args.seed, FIRST_INDEX + step_index, self.device)
        eps = torch.randn(n, 2 + 2 * updates, *self.shape, generator=generator, device=self.device)
        return torch.cat([spans, t], dim=1), u, eps

    def predict(self, student: nn.Module, x0: Tensor, y: Tensor, spans: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy images x_t (B, C, S, S) at which spans (B, 2) begin, and the student's x0_hat there."""
        t = spans[:, 0]
        x_t = self.diffusion.q_sample(x0, t, eps)
        return x_t, self.diffusion.predict_x0(student(x_t, spans, y).float(), x_t, t)

    def loss(self, x0: Tensor, y: Tensor, times: Tensor, eps: Tensor) -> Tensor:
        """The mean over the images of their `shortcut_loss` or, where they are matched, `matching_loss`."""
        spans, t, d = times[:, :2], times[:, 2], self.diffusion
        matched = (t >= 0).nonzero()[:, 0]
        others = (t < 0).nonzero()[:, 0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            x_t, x0_hat = self.predict(self.ddp_model, x0, y, spans, eps[:, 0])
            loss = shortcut_loss(
                d, x0_hat[others], self.ema, self.teach_spans, x_t[others], y[others], spans[others]
            ).sum()
            if len(matched):
                teacher = partial(self.teach, fraction=MATCHING_GUIDANCE)
                fake = with_sizes_of(spans[matched], self.fake)
                matching = matching_loss(d, x0_hat[matched], teacher, fake, y[matched], t[matched], eps[matched, 1])
                loss = loss + MATCHING_WEIGHT * matching.sum()
        return loss / len(x0)

    def teach(self, x_t: Tensor, t: Tensor, y: Tensor, fraction: float = 1.0) -> Tensor:
        """The teacher's prediction, with a fraction of its guidance."""
        scale = 1 + fraction * (self.teacher_guidance["guidance"] - 1)
        interval = self.teacher_guidance["guidance_interval"] or (0, self.diffusion.T)
        return guide(self.teacher.model, y, self.config.num_classes, scale, interval)(x_t, t)

    def teach_spans(self, x_t: Tensor, spans: Tensor, y: Tensor) -> Tensor:
        """The same for spans (B, 2), whose size the teacher does not know, since its own steps are small."""
        return self.teach(x_t, spans[:, 0], y)

    def state(self) -> dict:
        """Includes the teacher, whose file may be gone when the run is resumed."""
        teacher = {**self.teacher.description, "ema": self.teacher.model.state_dict()}
        optimizers = [optimizer.state_dict() for optimizer in self.fake_optimizers]
        return {**super().state(), "fake": self.fake.state_dict(), "fake_optimizers": optimizers, "teacher": teacher}

    def load(self, state: dict) -> None:
        super().load(state)
        checkpoint.check({**state, "ema": state["fake"]}, ShortcutDiT)
        self.fake.load_state_dict(state["fake"])
        has_learned = any(saved["state"] for saved in state["fake_optimizers"])
        load_optimizers(self.fake_optimizers, state["fake_optimizers"], has_learned)

    def trained_model(self) -> ShortcutModel:
        eager = ShortcutDiT(self.config).to(self.device)  # for batches of samples, faster than compiling self.ema again
        eager.load_state_dict(self.ema.state_dict())
        return ShortcutModel(eager, self.diffusion, self.sampling_guidance)


def build_parser() -> Parser:
    presets = {device: dict(compile=preset["compile"]) for device, preset in PRESETS.items()}
    parser = Parser("distill.py", "Distill a trained network, so that it samples in 1 to 32 steps.", presets)
    parser.add_argument("checkpoint", nargs="?", default=str(BUNDLED_WEIGHTS), help="what to distill, a file or the "
                        "folder of a run (default: the bundled weights)")
    parser.group("distillation")("--guidance", None, "scale to learn; with LOW HIGH, at these timesteps only (default: "
                                 "that of the weights)", type=float, nargs="+", metavar="W")
    add_training_flags(parser)
    parser.set_defaults(steps=7000, batch_size=160, lr=2e-3, ema_decay=0.998)
    return parser


def load_teacher(run: Run) -> TrainedModel:
    """The network to distill, or that of the run to resume. Raises UsageError, CheckpointError."""
    source = run.args.checkpoint
    state = run.state["teacher"] if run.state else checkpoint.load(source)
    if state.get("network") == ShortcutDiT.__name__:
        raise UsageError(f"{source} is distilled already: give the checkpoint that it was distilled from")
    teacher = TrainedModel(*checkpoint.build(state, run.device))
    if teacher.diffusion.prediction == "eps" or teacher.model.config.learn_sigma:
        # A predicted eps says nothing of x0 where there is only noise.
        raise UsageError("distill.py needs a network that predicts x0 or v, without --learn-sigma: train one like that")
    if not teacher.is_image:
        raise UsageError("distill.py needs a network of images, not of latents, since it clamps them")
    if 2 * STEP_COUNTS[-1] > teacher.diffusion.T:
        raise UsageError(f"distill.py needs a network of {2 * STEP_COUNTS[-1]} timesteps or more")
    return teacher


def main(argv: list[str] | None = None) -> int:
    """Distill as the command line says. Returns the exit status.

    Raises UsageError, DataError, CheckpointError, WorkError.
    """
    run = Run(build_parser(), argv, ShortcutDiT, MAY_CHANGE - {"guidance"})
    args = run.args
    if run.state and not isinstance(run.state.get("teacher"), dict):
        raise UsageError(f"{args.resume} lacks its teacher: begin a new run")
    teacher = load_teacher(run)
    config, about = teacher.model.config, teacher.description
    args.guidance = args.guidance or [about["guidance"], *(about["guidance_interval"] or ())]
    guidance_settings(args.guidance, teacher.diffusion.T)  # raises UsageError before the data is loaded
    data = run.load_data(config.image_size)
    C, S, _ = data.pixels[0].shape
    if (config.in_channels, config.image_size, about["classes"]) != (C, S, list(data.classes)):
        trained = f"{args.checkpoint} was trained on {about['data']}, and these are {data.source}"
        raise UsageError(f"{trained}, of other classes or size: give its --dataset")
    trainer = DistillTrainer(teacher, args, run.device, run.state)
    with run.open(trainer, data, f"{args.checkpoint}, distilled"):
        train(trainer, run, data)
    return run.finish(trainer.ema.state_dict())


if __name__ == "__main__":
    run_script(main, memory="raise --grad-accum-steps, or lower --batch-size")
