"""Train a DiT.

    python train.py                                          MNIST, with what suits this machine
    python train.py --dataset cifar10 --steps 50000
    python train.py --resume runs/mnist-1
    torchrun --nproc-per-node=4 train.py                     the same, on four GPUs

From top to bottom: the settings, one training step, the loop. Around the loop, run.py keeps the folder, the log and the
checkpoints.
"""

import argparse
import copy
from dataclasses import asdict

import torch
from torch import Tensor, nn

from checkpoint import refusing
from cli import WORLD, Parser, UsageError, default_guidance, guidance_settings, network_config, number, run_script
from dataset import FOLDER_IMAGE_SIZE, Images
from diffusion import PREDICTIONS, SCHEDULES, TIMESTEP_DISTRIBUTIONS, Diffusion, drop_labels, sample_timesteps
from dit import MODELS, DiT, DiTConfig
from optim import learning_rate, load_optimizers, make_optimizers, take_step, update_ema
from run import Run, add_run_flags, distributed, local_part
from sampling import TrainedModel, seeded
from speed import checkpoint_blocks, compile_blocks, fast_attention
from variance import LearnedVariance

PRESETS = {  # the defaults that depend on the device
    "cpu": dict(model="DiT-N/7", minutes=9.0, batch_size=128, lr=7e-3, timestep_mean=0.4, compile=True),
    "cuda": dict(model="DiT-T/4", steps=20000, batch_size=256, lr=2e-3, timestep_mean=0.0, compile=True),
    "mps": dict(model="DiT-T/4", steps=20000, batch_size=256, lr=2e-3, timestep_mean=0.0, compile=False),
}
TIMESTEPS = 1000       # T, as in DDPM
MAX_NORM = 1.0         # gradients are clipped to this norm
FIRST_INDEX = 2**31    # training's random generators are numbered from here, those of sampled images from 0


def add_training_flags(parser: Parser) -> None:
    """The flags of every training. Where PRESETS has a value for the device, it replaces the default here."""
    flag = parser.group("optimization")
    flag("--steps", None, "how many training steps, in all", type=number(int, 1))
    flag("--minutes", None, "as many steps as fit in this time, in place of --steps", type=number(float, 0.01, 1e6))
    flag("--batch-size", 128, "images in a step, over all processes", type=number(int, 1))
    flag("--grad-accum-steps", 1, "micro-batches of a batch, to save memory", type=number(int, 1))
    flag("--optimizer", "muon", "muon is for the matrices of the blocks, beside adamw", choices=["adamw", "muon"])
    flag("--lr", 2e-3, "highest learning rate", type=number(float, 0, 100))
    flag("--warmup", 100, "steps in which the learning rate rises to that", type=number(int, 0))
    flag("--lr-schedule", "cosine", "the learning rate after that", choices=["cosine", "constant"])
    flag("--ema-decay", 0.999, "of the averaged weights, which are used for sampling", type=number(float, 0, 1))
    flag("--gradient-checkpointing", False, "use less memory, and a third more time")
    add_run_flags(parser)


def build_parser() -> Parser:
    parser = Parser("train.py", "Train a Diffusion Transformer.", PRESETS)
    flag = parser.group("network")
    flag("--model", None, f"DiT-SIZE/PATCH, one of {', '.join(MODELS)}", choices=MODELS, metavar="NAME")
    flag("--image-size", None, f"pixels (default: its own; {FOLDER_IMAGE_SIZE} for folders)", type=number(int, 1, 4096))
    flag("--learn-sigma", False, "also predict the variance of the reverse steps")
    flag = parser.group("diffusion")
    flag("--schedule", "flow", "how the noise grows with the timestep", choices=list(SCHEDULES))
    flag("--prediction", "x0", "what the network predicts", choices=PREDICTIONS)
    flag("--timestep-distribution", "logit-normal", "of the training timesteps", choices=TIMESTEP_DISTRIBUTIONS)
    flag("--timestep-mean", 0.0, "of logit-normal; above 0 for more noise", type=number(float, -5, 5))
    flag("--min-snr", None, "weight the loss by min(SNR, this) (default: off)", type=number(float, 1e-9, 1e9))
    flag("--label-dropout", 0.1, "fraction of the labels that is dropped, for guidance", type=number(float, 0, 1))
    flag("--guidance", None, "scale for sampling; with LOW HIGH, at these timesteps only (default: 2 at 300 to 800 for "
         "flow, else 1.5; 1 without label dropout)", type=number(float, 0, TIMESTEPS), nargs="+", metavar="W")
    add_training_flags(parser)
    return parser


class Trainer:
    """A network in training, its moving average, and its optimizers.

    config: of the network, args: the settings, device: where to train, state: of a run to resume, see `state`

    Everything random in a step depends only on the seed and the number of the step, and is sampled for the whole batch.
    So a run that is resumed takes the same steps as one that is not.
    """

    network = DiT
    step_time = 1.0  # the mean time of a step, relative to that of the first steps

    def __init__(self, config: DiTConfig, args: argparse.Namespace, device: torch.device, state: dict | None = None):
        self.config, self.args, self.device = config, args, device
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.micro_batch_size = args.batch_size // (WORLD * args.grad_accum_steps)
        torch.manual_seed(args.seed)
        self.make_networks()
        if state:
            with refusing("the state of this run does not fit its settings"):
                self.load(state)
        if args.gradient_checkpointing:
            checkpoint_blocks(self.model.blocks)
        self.ddp_model = distributed(self.model)
        self.compiled = args.compile and compile_blocks(self.blocks, self.dry_run)

    def make_networks(self) -> None:
        """The diffusion process, the network, the average of its weights (used for sampling), the optimizers."""
        args = self.args
        diffusion_class = LearnedVariance if self.config.learn_sigma else Diffusion
        self.diffusion = diffusion_class(args.schedule, args.prediction, TIMESTEPS, self.device, args.min_snr)
        self.sampling_guidance, self.label_dropout = guidance_settings(args.guidance, TIMESTEPS), args.label_dropout
        self.model = self.network(self.config).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = make_optimizers(self.model, args)
        self.blocks = list(self.model.blocks)  # to compile

    def dry_run(self) -> None:
        """A forward and a backward pass of blank images, whose gradients the next step removes."""
        n = self.micro_batch_size
        t, _, eps = (values[:n].to(self.device) for values in self.randomness(0))
        x0, y = torch.zeros(n, *self.shape, device=self.device), torch.zeros(n, dtype=torch.long, device=self.device)
        with fast_attention(self.device, self.args.precision):
            self.loss(x0, y, t, eps).backward()

    def step(self, step_index: int, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One training step, DDPM Algorithm 1. Returns the loss and the norm of its gradient, tensors of one number.

        step_index: 0 for the first step
        x0, y:      this process's part of the batch: images (b, C, S, S) in [-1, 1] and their labels (b,)
        """
        args, n = self.args, self.micro_batch_size
        t, u, eps = (local_part(values, self.device) for values in self.randomness(step_index))
        y = drop_labels(y, self.config.num_classes, self.label_dropout, u)        # for guidance
        self.model.zero_grad()
        total = 0.0
        for i in range(args.grad_accum_steps):
            micro = slice(i * n, (i + 1) * n)
            self.ddp_model.require_backward_grad_sync = i == args.grad_accum_steps - 1
            with fast_attention(self.device, args.precision):  # backward too, for --gradient-checkpointing
                loss = self.loss(x0[micro], y[micro], t[micro], eps[micro]) / args.grad_accum_steps
                loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        take_step(self.optimizers, learning_rate(step_index, args))
        update_ema(self.ema, self.model, step_index, args.ema_decay)
        return total, norm

    def randomness(self, step_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is random in a step: timesteps t (B,), uniform u (B,) for label dropout, noise eps (B, C, S, S)."""
        args, n = self.args, self.args.batch_size
        generator = seeded(args.seed, FIRST_INDEX + step_index)
        t = sample_timesteps(n, self.diffusion.T, args.timestep_distribution, generator, args.timestep_mean)
        u = torch.rand(n, generator=generator)
        if self.device.type != "cpu":  # the noise is large, so it is sampled on the device
            generator = seeded(args.seed, FIRST_INDEX + step_index, self.device)
        return t, u, torch.randn(n, *self.shape, generator=generator, device=self.device)

    def loss(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean loss of some images, with the network's matrix products in the chosen precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return self.diffusion.training_loss(self.ddp_model, x0, y, t, eps).mean()

    def state(self) -> dict:
        """All weights and optimizer states. Random numbers need not be kept, since they follow from the step."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizers=optimizers)

    def load(self, state: dict) -> None:
        """Resume from a checkpoint, `state` with what run.py adds. Raises some exception where it does not fit."""
        if (state["config"], state["diffusion"]) != (asdict(self.config), self.diffusion.config):
            raise ValueError("it describes another network or diffusion process")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        load_optimizers(self.optimizers, state["optimizers"], state["step"])

    def trained_model(self) -> TrainedModel:
        return TrainedModel(self.ema, self.diffusion, self.sampling_guidance)


def train(trainer: Trainer, run: Run, data: Images) -> None:
    """Take the steps that are left, or as many as there is time for before a signal asks the run to stop."""
    for x0, y in run.batches(data):                                      # (b, C, S, S) in [-1, 1], and (b,)
        loss, norm = trainer.step(run.step, x0, y)
        run.after_step(trainer, loss, norm)                              # counts the step, logs, saves, samples


def main(argv: list[str] | None = None, trainer_class: type[Trainer] = Trainer) -> int:
    """Train as the command line says. Returns the exit status, and raises the errors of cli.run_script."""
    run = Run(build_parser(), argv, trainer_class.network)
    args = run.args
    if run.given.timestep_mean and args.timestep_distribution != "logit-normal":
        raise UsageError("--timestep-mean is for logit-normal timesteps: leave it out")
    args.guidance = args.guidance or default_guidance(args)
    guidance_settings(args.guidance, TIMESTEPS)  # raises UsageError before the data is loaded
    data = run.load_data(args.image_size)
    config = network_config(args, data, choose_patch=run.is_new and not run.given.model)
    trainer = trainer_class(config, args, run.device, run.state)
    with run.open(trainer, data, args.model):
        train(trainer, run, data)
    return run.finish(trainer.ema.state_dict())


if __name__ == "__main__":
    run_script(main, memory="raise --grad-accum-steps, or lower --batch-size")
