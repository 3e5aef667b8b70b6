"""Distill a trained network into a shortcut model (shortcut.py), so that it samples in one step, or in a few.

    python distill.py                                        the bundled weights
    python distill.py runs/mnist-1
    python distill.py --resume runs/mnist-2
    python distill.py runs/mnist-3 --student runs/mnist-2 --steps 900 --lr 3e-4      more matching for distilled weights

A shortcut model learns from itself: one step should arrive where two of half the size do (arXiv 2410.12557, Eq. 4). In
the paper the smallest steps are learned from data in the same training. Here a trained network, the teacher, says where
they arrive, so that this is a distillation of a teacher into a student.

A long step tends to be blurred, because a squared error asks for the mean of all images that are possible. So in the
last part of the training, the images with which the student's paths of one, two and four steps end are compared with
the teacher's as a distribution, see `matching_loss`: Yin et al., "One-step Diffusion with Distribution Matching
Distillation" (DMD), arXiv 2311.18828, and "Improved Distribution Matching Distillation" (DMD2), arXiv 2405.14867. Only
the last step of such a path is trained. It begins where the student's own earlier steps lead, which are simulated, as
it does when the student is sampled from (DMD2, section 4.5). A real image with noise would be another beginning.
"""

import argparse
import copy
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import BUNDLED_WEIGHTS
from cli import Parser, UsageError, run_script, usage
from dataset import Images
from diffusion import Diffusion, guide, sample_timesteps
from optim import load_optimizers, make_optimizers, optimizer_states, take_step
from rundir import MAY_CHANGE, RunDir, distributed, local_part, to_device
from sampling import TrainedModel, guidance_settings, seeded
from shortcut import STEP_COUNTS, ShortcutDiT, ShortcutModel, shortcut_timesteps
from speed import autocast
from train import FIRST_INDEX, MAX_NORM, PRESETS, Trainer, add_training_flags, train

STEP_COUNT_CYCLE = (1, 1, 2, 4, 8, 16, 32, 32, 32, 32)  # of each 10 images, into how many steps the path is cut
MATCHING_BEGINS = 0.7       # the fraction of the training after which samples are matched
MATCHED_COUNTS = (1, 1, 2, 4)  # the number of steps in the path that each sample ends, of 4 samples
MATCHING_WEIGHT = 0.5       # of `matching_loss`, beside `shortcut_loss` for as many other images
# For each of these paths, the fraction of the teacher's guidance (its scale - 1) for the distribution to match. The
# steps before the last one are guided already, since the student learns them as shortcuts.
MATCHING_GUIDANCE = {1: 0.35, 2: 0.2, 4: 0.05}
FAKE_UPDATES = 3            # of the network `fake`, before each step of the student
FAKE_LR = 5e-4              # its learning rate
FAKE_ALONE = 400            # with --student, the first steps, in which only `fake` learns


# -------------------------------------------------------------------------------------------------------------- losses


def ddim_step(diffusion: Diffusion, x_t: Tensor, x0_hat: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
    """DDIM's step (arXiv 2010.02502, Eq. 12) from x_t with x0_hat to the noise level of s < t, each (B,) or one."""
    eps_hat = (x_t - diffusion.extract("alpha", t) * x0_hat) / diffusion.extract("sigma", t)
    return diffusion.extract("alpha", s) * x0_hat + diffusion.extract("sigma", s) * eps_hat


def invert_ddim_step(diffusion: Diffusion, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0_hat with which `ddim_step` leads from x_t to x_s."""
    ratio = diffusion.extract("sigma", s) / diffusion.extract("sigma", t)
    return (x_s - ratio * x_t) / (diffusion.extract("alpha", s) - ratio * diffusion.extract("alpha", t))


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

    x0_hat:       what the student predicts at x_t, (B, C, H, W), for labels y (B,) and spans (B, 2) on the CPU
    ema, teacher: the student's average, and the teacher, each (x_t, spans, y) -> output

    Targets are found as in progressive distillation (arXiv 2202.00512, Algorithm 2), which halves the number of steps
    of one network after another. The loss is the squared error of x0_hat over sigma_t. This is between the squared
    error of x0_hat, in which small t hardly count, and that of the velocity (over sigma_t^2), in which large t hardly
    count.
    """
    smallest = spans[:, 0] - spans[:, 1] < 1.5 * diffusion.T / STEP_COUNTS[-1]
    target = torch.empty_like(x_t)
    with torch.no_grad():
        for network, mask in ((teacher, smallest), (ema, ~smallest)):
            some = mask.nonzero()[:, 0]  # on the CPU, so that nothing waits for a GPU
            if len(some):
                there = to_device(some, x_t.device)
                target[there] = shortcut_target(
                    diffusion, network, x_t[there], y[there], to_device(spans[some], x_t.device)
                )
    error = (x0_hat - target).square().flatten(1).mean(1)
    return error / diffusion.tables["sigma"][to_device(spans[:, 0], x_t.device)]


def matched_counts(n: int) -> Tensor:
    """The number of steps in the path that each of n samples ends, (n,), int64."""
    return torch.tensor(MATCHED_COUNTS).repeat(n // len(MATCHED_COUNTS) + 1)[:n]


def last_spans(counts: Tensor, T: int) -> Tensor:
    """The last spans (t, -1) of paths in counts (n,) steps, int64 (n, 2). They end at the samples to match."""
    t = torch.tensor([shortcut_timesteps(T, steps)[-1] for steps in counts.tolist()], dtype=torch.int64)
    return torch.stack([t, torch.full_like(t, -1)], dim=1)


@torch.no_grad()
def simulate_path(diffusion: Diffusion, network: Callable, eps: Tensor, y: Tensor, steps: int) -> Tensor:
    """The noisy images (B, C, H, W) at which the last of this many steps begins, as the network takes them from eps."""
    x = eps
    for t, s in pairwise(shortcut_timesteps(diffusion.T, steps)):
        spans = torch.stack([torch.full_like(y, t), torch.full_like(y, s)], dim=1)
        x0_hat = diffusion.predict_x0(network(x, spans, y).float(), x, t).clamp(-1, 1)
        x = ddim_step(diffusion, x, x0_hat, t, s)
    return x


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
    own, with fresh samples, so that it keeps up with the student (the two time scales of DMD2, section 4.2). Where the
    student begins with distilled weights, `fake` learns alone for FAKE_ALONE steps, and then samples are matched. In
    that case the teacher, and `fake` with it, may be a network of another shape than the student.
    """

    network = ShortcutDiT
    step_time = 1.9

    def __init__(
        self, teacher: TrainedModel, args: argparse.Namespace, device: torch.device, state: dict | None = None,
        student: ShortcutModel | None = None,
    ):
        self.teacher, self.student = teacher, student
        super().__init__((student or teacher).model.config, args, device, state)

    def make_networks(self) -> None:
        teacher = self.teacher.model
        self.diffusion, self.label_dropout = self.teacher.diffusion, 0.0
        self.guidance = dict(guidance=1.0, guidance_interval=None)
        self.teacher_guidance = guidance_settings(self.args.guidance, self.diffusion.T)
        self.fake, self.fake_alone = ShortcutDiT(teacher.config).to(self.device), FAKE_ALONE if self.args.student else 0
        self.fake.load_state_dict(teacher.state_dict(), strict=False)
        self.model = copy.deepcopy(self.student.model if self.student else self.fake)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.ddp_fake = distributed(self.fake)
        self.optimizers = make_optimizers(self.model, self.args)
        self.fake_optimizers = make_optimizers(self.fake, self.args)
        self.blocks = [block for network in (self.model, self.fake, self.ema, teacher) for block in network.blocks]

    def randomness(self, step: int) -> dict[str, Tensor]:
        """What is random in a step, for n images: their spans (n, 2), t (n,), u (n,) and eps (n, C, S, S), as for any
        training, and counts (n,), in how many steps the path goes that the span ends where its sample is matched, or 0.

        While there is matching, also match_t (n,) and match_eps like eps, for `matching_loss`, and for each update of
        `fake` the same as fake_t (n, updates) and fake_eps, and path_eps, from which its samples are made.
        """
        n, T, generator = self.args.batch_size, self.diffusion.T, seeded(self.args.seed, FIRST_INDEX + step)
        matching = bool(self.args.student) or bool(self.args.steps) and step >= MATCHING_BEGINS * self.args.steps
        random = dict(spans=sample_spans(n, T, STEP_COUNT_CYCLE, generator), counts=torch.zeros(n, dtype=torch.long))
        if matching:
            random["counts"][1::2] = matched_counts(n // 2)
            random["spans"][1::2] = last_spans(random["counts"][1::2], T)
            random["spans"][::2] = sample_spans(n - n // 2, T, STEP_COUNT_CYCLE[2:], generator)  # not the whole path
            times = [sample_timesteps(n, T, "logit-normal", generator) for _ in range(1 + FAKE_UPDATES)]
            random |= dict(match_t=times[0], fake_t=torch.stack(times[1:], dim=1))
        random |= dict(t=random["spans"][:, 0], u=torch.rand(n, generator=generator))
        noise = self.noise(step, (n, 2 + 2 * FAKE_UPDATES if matching else 1, *self.shape), generator)
        random["eps"] = noise[:, 0]
        if matching:
            random |= dict(match_eps=noise[:, 1], path_eps=noise[:, 2::2], fake_eps=noise[:, 3::2])
        return random

    def step(self, step: int, x0: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
        """As for any training, except where only `fake` learns. It begins as a copy of the teacher, and until it has
        learned the samples of a student that is distilled already, it gives a wrong score of them.
        """
        if step >= self.fake_alone:
            return super().step(step, x0, y, lr)
        random = {name: local_part(values) for name, values in self.randomness(step).items()}
        losses, norm = self.prepare(x0, y, random)
        return dict(losses=losses, t_of_T=random["fake_t"][:, -1] / self.diffusion.T, gradient_norm=norm)

    def prepare(self, x0: Tensor, y: Tensor, random: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Train `fake` on fresh samples of the student, while there is matching. Returns what its last step did."""
        if "fake_t" not in random:
            return None
        t, path_eps, eps = (random[name] for name in ("fake_t", "path_eps", "fake_eps"))
        for i in range(FAKE_UPDATES):
            done = self.update_fake(y, to_device(t[:, i], self.device), path_eps[:, i], eps[:, i])
        return done

    def update_fake(self, y: Tensor, t: Tensor, path_eps: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """A training step of `fake` with the ordinary loss, on samples of the student from the noise path_eps.

        Returns the losses (b,), and the norm of the gradient.
        """
        n, counts, losses = self.micro_batch_size, matched_counts(len(y)), []
        spans = to_device(last_spans(counts, self.diffusion.T), self.device)
        self.fake.zero_grad()
        for i in range(self.args.grad_accum_steps):
            micro = slice(i * n, (i + 1) * n)
            self.ddp_fake.require_backward_grad_sync = i == self.args.grad_accum_steps - 1
            with autocast(self.device, self.args.precision):
                with torch.no_grad():
                    x_t = self.path_starts(path_eps[micro], y[micro], counts[micro])
                    out = self.model(x_t, spans[micro], y[micro]).float()
                    sample = self.diffusion.predict_x0(out, x_t, spans[micro, 0])
                sample = sample.clamp(-1, 1)  # as it is shown: what is out of range there need not be matched
                fake = with_sizes_of(spans[micro], self.ddp_fake)
                loss = self.diffusion.training_loss(fake, sample, y[micro], t[micro], eps[micro])
            (loss.mean() / self.args.grad_accum_steps).backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.fake.parameters(), MAX_NORM)
        take_step(self.fake_optimizers, FAKE_LR)
        return torch.cat(losses), norm

    def path_starts(self, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        """x (b, C, S, S), where it is noise from which a path of counts (b,) steps begins replaced by the beginning of
        the path's last step. Where the count is 0, x stays.
        """
        x = x.clone()
        for steps in set(MATCHED_COUNTS) - {1}:  # the only step of a path begins with the noise itself
            some = to_device((counts == steps).nonzero()[:, 0], self.device)
            if len(some):
                x[some] = simulate_path(self.diffusion, self.ema, x[some], y[some], steps)
        return x

    def losses(
        self, x0: Tensor, y: Tensor, t: Tensor, spans: Tensor, counts: Tensor, eps: Tensor,
        match_t: Tensor | None = None, match_eps: Tensor | None = None, **of_fake: Tensor,
    ) -> Tensor:
        """The `shortcut_loss` of each image or, where it is matched, the `matching_loss`, (b,).

        of_fake: the randomness that is for `prepare`
        """
        d, on_device = self.diffusion, partial(to_device, device=self.device)
        groups = [(counts == steps).nonzero()[:, 0] for steps in (0, *MATCHING_GUIDANCE)]
        others, *matched = groups
        parts = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            x_t = d.q_sample(x0, on_device(t), eps)
            if len(others) < len(counts):
                x_t = torch.where(on_device(counts).view(-1, 1, 1, 1) > 0, self.path_starts(eps, y, counts), x_t)
            x0_hat = d.predict_x0(self.ddp_model(x_t, on_device(spans), y).float(), x_t, on_device(t))
            if len(others):
                some = on_device(others)
                parts.append(
                    shortcut_loss(d, x0_hat[some], self.ema, self.teach_spans, x_t[some], y[some], spans[others])
                )
            for chosen, fraction in zip(matched, MATCHING_GUIDANCE.values(), strict=True):
                if len(chosen):
                    some, t = on_device(chosen), on_device(match_t[chosen])
                    teacher = partial(self.teach, fraction=fraction)
                    fake = with_sizes_of(on_device(spans[chosen]), self.fake)
                    part = matching_loss(d, x0_hat[some], teacher, fake, y[some], t, match_eps[some])
                    parts.append(MATCHING_WEIGHT * part)
        order = torch.cat(groups).argsort()
        return torch.cat(parts)[on_device(order)]

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
        fake, teacher = self.fake.state_dict(), dict(ema=self.teacher.model.state_dict())
        return {
            **super().state(), "fake": fake, "fake_optimizers": optimizer_states(self.fake_optimizers),
            "teacher": teacher,
        }

    def load(self, state: dict) -> None:
        super().load({**state, "step": max(0, state["step"] - self.fake_alone)})  # the steps that the student has taken
        checkpoint.check_weights(ShortcutDiT, self.teacher.model.config, state["fake"])
        if "fake_optimizers" in state:  # not before the matching
            load_optimizers(self.fake_optimizers, state["fake_optimizers"])
        self.fake.load_state_dict(state["fake"])

    def describe(self, data: Images) -> dict:
        return {**super().describe(data), "teacher": self.teacher.description}

    def trained_model(self, data: Images) -> ShortcutModel:
        eager = ShortcutDiT(self.config).to(self.device)  # for batches of samples, faster than compiling self.ema again
        eager.load_state_dict(self.ema.state_dict())
        return ShortcutModel(eager, self.diffusion, self.describe(data))


def build_parser() -> Parser:
    same = dict(steps=7000, batch_size=160, lr=2e-3, ema_decay=0.998)
    presets = {device: dict(same, compile=preset["compile"]) for device, preset in PRESETS.items()}
    parser = Parser("distill.py", "Distill a trained network, so that it samples in 1 to 32 steps.", presets)
    flag = parser.group("distillation")
    flag("checkpoint", str(BUNDLED_WEIGHTS), "what to distill, a file or the folder of a run (default: the bundled "
         "weights)", nargs="?")
    flag("--student", None, "distilled weights to begin with, for the same images and schedule; then the distributions "
         f"are matched from step {FAKE_ALONE} on, and the network fake learns before (default: the student begins as "
         "its teacher)")
    flag("--guidance", None, "scale to learn; with LOW HIGH, at these timesteps only (default: that of the weights)",
         type=float, nargs="+", metavar="W")
    add_training_flags(parser)
    return parser


def load_teacher(run: RunDir) -> TrainedModel:
    """The network to distill, or that of the run to resume. Raises UsageError, CheckpointError."""
    source = run.args.checkpoint
    if run.state and not isinstance(run.state.get("teacher"), dict):
        raise UsageError(f"{run.folder} lacks its teacher: begin a new run")
    teacher = checkpoint.build(run.state["teacher"] if run.state else checkpoint.load(source), run.device)
    if isinstance(teacher, ShortcutModel):
        raise UsageError(f"{source} is distilled already: give the checkpoint that it was distilled from")
    if teacher.diffusion.prediction == "eps" or teacher.model.config.learn_sigma:
        # A predicted eps says nothing of x0 where there is only noise.
        raise UsageError("distill.py needs a network that predicts x0 or v, without --learn-sigma: train one like that")
    if not teacher.is_image:
        raise UsageError("distill.py clamps its samples, so it needs a network of images: these are latents")
    if (T := teacher.diffusion.T) < 2 * STEP_COUNTS[-1]:
        raise UsageError(f"distill.py needs {2 * STEP_COUNTS[-1]} timesteps or more: this network has {T}")
    return teacher


def load_student(run: RunDir, teacher: TrainedModel) -> ShortcutModel | None:
    """The student of the run to resume, or the weights to begin with, if --student names some.

    Raises UsageError, CheckpointError.
    """
    source = run.args.student
    if source and (run.args.steps or 0) <= FAKE_ALONE:  # or --minutes, whose steps are not known yet
        raise UsageError(f"with --student the network fake learns alone for {FAKE_ALONE} steps: give more --steps")
    if run.state:
        return checkpoint.build(run.state, run.device)
    if not source:
        return None
    student = checkpoint.load_model(source, run.device)
    purpose, of_teacher = ((x.shape, x.description["classes"], x.diffusion.config) for x in (student, teacher))
    if not isinstance(student, ShortcutModel) or purpose != of_teacher:
        raise UsageError(f"{source} was not distilled for these images and this schedule: leave --student out")
    return student


def main(argv: list[str] | None = None) -> int:
    """Distill as the command line says. Returns the exit status.

    Raises UsageError, DataError, CheckpointError, WorkError.
    """
    run = RunDir(build_parser(), argv, MAY_CHANGE - {"guidance"})
    args = run.args
    teacher = load_teacher(run)
    student = load_student(run, teacher)
    about = teacher.description
    args.guidance = args.guidance or [about["guidance"], *(about["guidance_interval"] or ())]
    with usage():
        guidance_settings(args.guidance, teacher.diffusion.T)
    if args.guidance[0] != 1 and not about["null_class"]:
        raise UsageError(f"{args.checkpoint} had no dropped labels, which guidance needs: set --guidance 1")
    data = run.load_data(teacher.model.config.image_size)
    if (teacher.shape, about["classes"]) != (tuple(data.pixels[0].shape), list(data.classes)):
        trained = f"{args.checkpoint} was trained on {about['data']}, and these are {data.source}"
        raise UsageError(f"{trained}, of other classes or size: give its --dataset")
    trainer = DistillTrainer(teacher, args, run.device, run.state, student)
    return train(trainer, run, data, f"{args.checkpoint}, distilled")


if __name__ == "__main__":
    run_script(main, memory="raise --grad-accum-steps, or lower --batch-size")
