"""Train a DiT.

    python train.py                                          MNIST, with what suits this machine
    python train.py --dataset cifar10 --steps 50000
    python train.py --resume runs/mnist-1
    torchrun --nproc-per-node=4 train.py                     the same, on four GPUs

From top to bottom: the settings, one training step, the loop. rundir.py has what surrounds the loop: the folder of the
run with its log and checkpoints, signals, several processes.
"""

import argparse
import copy
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
from PIL import Image
from torch import Tensor, nn

import checkpoint
import dataset
from cli import RANK, WORLD, Parser, UsageError, number, run_script, usage
from dataset import FOLDER_IMAGE_SIZE, Images
from diffusion import PREDICTIONS, SCHEDULES, TIMESTEP_DISTRIBUTIONS, Diffusion, drop_labels, sample_timesteps
from dit import MODELS, DiT, DiTConfig
from optim import learning_rate, load_optimizers, make_optimizers, optimizer_states, take_step, update_ema
from rundir import RunDir, add_run_flags, distributed, local_part, to_device
from sampling import TrainedModel, grid, guidance_settings, seeded
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
    flag("--init-from", None, "begin with the weights of this file or run, and with its network and diffusion process; "
         "for official weights with their --model (default: new weights)", metavar="CHECKPOINT")
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


def default_guidance(args: argparse.Namespace) -> list[float]:
    """`--guidance` for samples of a model that is trained with these settings."""
    if not args.label_dropout:  # then no unconditional prediction is learned
        return [1.0]
    # With flow, guidance only at the middle timesteps is better by every measure (docs/lab-notebook.md), and cheaper.
    return [2.0, 300.0, 800.0] if args.schedule == "flow" else [1.5]


def network_config(args: argparse.Namespace, data: Images, model_is_given: bool = True) -> DiTConfig:
    """The shape of the network for these images. If the model was not given, its patches are chosen to fit them.

    Raises UsageError.
    """
    C, S, _ = data.pixels[0].shape
    if not model_is_given and S % MODELS[args.model]["patch_size"]:
        args.model = args.model.split("/")[0] + "/8"  # 7 suits 28 pixels; other usual sizes are multiples of 8
    patch = MODELS[args.model]["patch_size"]
    if S % patch:
        sizes = " or ".join(dict.fromkeys(str(n * patch) for n in (max(S // patch, 1), S // patch + 1)))
        raise UsageError(f"{args.model} cuts images into patches of {patch} pixels, and these have {S}: "
                         f"use --image-size {sizes}, or a --model of other patches")
    shape = dict(image_size=S, in_channels=C, num_classes=len(data.classes), learn_sigma=args.learn_sigma)
    return DiTConfig(**MODELS[args.model], **shape)


def check_memory(config: DiTConfig, args: argparse.Namespace) -> None:
    """Raises DataError where a training step on the CPU needs more memory than is free, by a low estimate.

    For the backward pass a block keeps some 16 numbers of each token and unit of width, and the attention of each token
    to each other, all of two bytes or more.
    """
    tokens, images = (config.image_size // config.patch_size) ** 2, args.batch_size // (WORLD * args.grad_accum_steps)
    block = 2 * images * (16 * tokens * config.hidden_size + config.num_heads * tokens**2)
    blocks = 1 if args.gradient_checkpointing else config.depth
    fix = "raise --grad-accum-steps, lower --batch-size or --image-size, or take a --model of larger patches"
    dataset.check_free(block * blocks, f"a training step of {images} images of {tokens:,} tokens", fix)


def load_source(args: argparse.Namespace, given: dict) -> dict:
    """The checkpoint of --init-from. The settings in args become those of its network and its diffusion process.

    given: the flags that were given. Raises UsageError where one contradicts the checkpoint, CheckpointError.
    """
    source = checkpoint.load(args.init_from, given.get("model"))
    with checkpoint.refusing(f"no run can begin with {args.init_from}"):
        checkpoint.check(source)
    config, process, makes = source["config"], source["diffusion"], source["makes"]
    if (makes == "latents") != str(args.dataset).endswith(".npz"):
        other = "images, not latents" if makes == "images" else "latents, not images"
        raise UsageError(f"{args.init_from} makes {other}: give a --dataset of these, or other weights")
    model = next((name for name, shape in MODELS.items() if shape.items() <= config.items()), None)
    found = dict(model=model, learn_sigma=config["learn_sigma"], schedule=process["schedule"])
    for name, value in dict(found, prediction=process["prediction"]).items():
        if given.get(name, value) != value:
            flag, was = "--" + name.replace("_", "-"), "" if value is None else f" ({value})"
            raise UsageError(f"{flag} contradicts {args.init_from}, which was trained otherwise{was}: leave it out")
        setattr(args, name, value)
    if makes == "images":
        args.image_size = args.image_size or config["image_size"]
    return source


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
            with checkpoint.refusing("the state of this run does not fit its settings and networks"):
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
        self.guidance = guidance_settings(args.guidance or default_guidance(args), TIMESTEPS)
        self.label_dropout = args.label_dropout
        self.model = self.network(self.config).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = make_optimizers(self.model, args)
        self.blocks = list(self.model.blocks)  # to compile

    def dry_run(self) -> None:
        """A forward and a backward pass of blank images, whose gradients the next step removes."""
        n = self.micro_batch_size
        random = {name: values[:n] for name, values in self.randomness(0).items() if name != "u"}
        x0, y = torch.zeros(n, *self.shape, device=self.device), torch.zeros(n, dtype=torch.long, device=self.device)
        with fast_attention(self.device, self.args.precision):
            self.losses(x0, y, **random).mean().backward()

    def randomness(self, step: int) -> dict[str, Tensor]:
        """What is random in a step: timesteps t (B,), uniform u (B,) for label dropout, noise eps (B, C, S, S).

        All but the noise is on the CPU.
        """
        args, n = self.args, self.args.batch_size
        generator = seeded(args.seed, FIRST_INDEX + step)
        t = sample_timesteps(n, self.diffusion.T, args.timestep_distribution, generator, args.timestep_mean)
        u = torch.rand(n, generator=generator)
        return dict(t=t, u=u, eps=self.noise(step, (n, *self.shape), generator))

    def noise(self, step: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The noise of a step. It is large, so on a GPU it is sampled there, with a generator of its own."""
        if self.device.type != "cpu":
            generator = seeded(self.args.seed, FIRST_INDEX + step, self.device)
        return torch.randn(shape, generator=generator, device=self.device)

    def step(self, step: int, x0: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
        """One training step, DDPM Algorithm 1: forward, backward, clip, optimizers, average of the weights.

        step:  its number, 0 for the first one
        x0, y: this process's part of the batch: images (b, C, S, S) in [-1, 1] and their labels (b,)
        lr:    the learning rate

        Returns the losses (b,), the timesteps over T (b,) to which they belong, and the norm of the gradient.
        """
        args, n = self.args, self.micro_batch_size
        random = {name: local_part(values) for name, values in self.randomness(step).items()}
        u = to_device(random.pop("u"), self.device)
        y = drop_labels(y, self.config.num_classes, self.label_dropout, u)           # for guidance
        self.prepare(x0, y, random)
        self.model.zero_grad()
        losses = []
        for i in range(args.grad_accum_steps):
            micro = slice(i * n, (i + 1) * n)
            self.ddp_model.require_backward_grad_sync = i == args.grad_accum_steps - 1
            with fast_attention(self.device, args.precision):  # backward too, for --gradient-checkpointing
                loss = self.losses(x0[micro], y[micro], **{name: v[micro] for name, v in random.items()})
                (loss.mean() / args.grad_accum_steps).backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        take_step(self.optimizers, lr)
        update_ema(self.ema, self.model, step, args.ema_decay)
        return dict(losses=torch.cat(losses), t_of_T=random["t"] / self.diffusion.T, gradient_norm=norm)

    def prepare(self, x0: Tensor, y: Tensor, random: dict[str, Tensor]) -> None:
        """What a subclass does before each step, with this process's part of the batch and of the randomness."""

    def losses(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each image, (b,), with the network's matrix products in the chosen precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return self.diffusion.training_loss(self.ddp_model, x0, y, to_device(t, self.device), eps)

    @torch.no_grad()
    def average_loss(self, images: Images, count: int = 500) -> float:
        """The mean loss of the averaged weights for `count` of the images, with the same timesteps and noise each time.
        Where there are fewer, each is taken several times.

        Where it is higher for images that were held out than for training images, the network begins to overfit.
        """
        n, args, generator = len(images.labels), self.args, seeded(0, 0)
        t = sample_timesteps(count, self.diffusion.T, args.timestep_distribution, generator, args.timestep_mean)
        eps = torch.randn(count, *self.shape, generator=generator)
        some = torch.randperm(max(n, count), generator=generator)[:count] % n
        x0, y = dataset.to_float(images.pixels[some]), images.labels[some]
        micro = (values.to(self.device).split(self.micro_batch_size) for values in (x0, y, t, eps))  # as much memory
        losses = [self.diffusion.training_loss(self.ema, *values) for values in zip(*micro, strict=True)]
        return torch.cat(losses).mean().item()

    def state(self) -> dict:
        """All weights and optimizer states. Random numbers need not be kept, since they follow from the step."""
        optimizers = optimizer_states(self.optimizers)
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), optimizers=optimizers)

    def load(self, state: dict) -> None:
        """Resume from a checkpoint, `state` with its description. Raises some exception where it does not fit."""
        if state["diffusion"] != self.diffusion.config:
            raise ValueError("it describes another diffusion process")
        if state.get("network", self.network.__name__) != self.network.__name__:
            raise ValueError(f"it holds a {state['network'][:40]}, not a {self.network.__name__}")
        for name in ("model", "ema"):
            checkpoint.check_weights(self.network, self.config, state[name])
        if state["step"]:
            load_optimizers(self.optimizers, state.get("optimizers", {}))
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])

    def describe(self, data: Images) -> dict:
        makes = "latents" if data.pixels.is_floating_point() else "images"
        return checkpoint.describe(
            self.network, self.config, self.diffusion, data.classes, data.source, 0, **self.guidance,
            null_class=self.label_dropout > 0, makes=makes,
        )

    def trained_model(self, data: Images) -> TrainedModel:
        return TrainedModel(self.ema, self.diffusion, self.describe(data))


def announcement(trainer: Trainer, run: RunDir, data: Images, what: str) -> str:
    """What a run will do, in a line."""
    args, process = trainer.args, trainer.diffusion.config
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    length = f"{args.steps - run.step:,} steps" if args.steps else f"about {args.minutes:g} min"
    return (
        f"{what}, {parameters:.1f} M parameters; {process['schedule']} {process['prediction']}, {args.optimizer}; "
        f"{length} of {args.batch_size} images from {data.summary}; {trainer.device.type}, {args.precision}, "
        f"{'compiled' if trainer.compiled else 'eager'}"
    )


def sample_picture(trained: TrainedModel, batch_size: int) -> Image.Image:
    """A picture of samples, ten rows of a class each."""
    labels = (torch.arange(10) % max(trained.model.config.num_classes, 1)).repeat_interleave(10)
    return grid(trained.to_images(trained.sample(labels, batch_size)), columns=10)


def train(trainer: Trainer, run: RunDir, data: Images, what: str, held_out: Images | None = None) -> int:
    """Train to the last step, or until a signal asks the run to stop. Returns the exit status.

    run.step counts the steps that are done, and a run that is resumed begins where it was. `run` writes the files.
    what:     what is trained, in words
    held_out: images that are not trained on, whose loss is logged now and then
    """
    args = trainer.args
    batches = dataset.batches(data, args.batch_size, args.seed, run.step, RANK, WORLD, trainer.device, args.flip)

    def is_due(step: int) -> bool:
        return step > 0 and (step == args.steps or step % args.save_every == 0)

    def picture() -> Image.Image:
        trained = trainer.trained_model(data)
        trained.autoencoder = run.autoencoder
        return sample_picture(trained, trainer.micro_batch_size)

    with run.recording(trainer.describe(data), announcement(trainer, run, data, what)):
        run.save(trainer.state)                              # at once, so that a full disk shows now
        while True:
            if is_due(run.step):
                run.save(trainer.state)
                run.save_samples(picture)
            if run.step == args.steps or run.asked_to_stop():
                break
            x0, y = next(batches)                            # (b, C, S, S) in [-1, 1], and (b,)
            lr = learning_rate(run.step, args)
            measured = trainer.step(run.step, x0, y, lr)
            if held_out and is_due(run.step + 1):
                images = dict(training_images=data, held_out_images=held_out)
                measured |= {name: trainer.average_loss(some) for name, some in images.items()}
            run.count(measured, lr)                          # and log them, now and then
            if args.steps is None:                           # --minutes becomes a number of steps
                args.steps = run.log.steps_within(args.minutes, trainer.step_time)
                if args.steps:
                    args.minutes = None
                    run.save(trainer.state)
        run.save(trainer.state)
        return run.finish(trainer.ema.state_dict)            # here, since torchrun sends a signal twice


def main(argv: list[str] | None = None, trainer_class: type[Trainer] = Trainer) -> int:
    """Train as the command line says. Returns the exit status, and raises the errors of cli.run_script."""
    parser = build_parser()
    if trainer_class is not Trainer:
        parser.prog = Path(sys.argv[0]).name  # a script with a network or loss of its own resumes its own runs only
    run = RunDir(parser, argv)
    args, state = run.args, run.state
    source = load_source(args, run.given) if args.init_from and not state else None
    if "timestep_mean" in run.given and args.timestep_distribution != "logit-normal":
        raise UsageError("--timestep-mean is for logit-normal timesteps: leave it out")
    with usage():
        guidance_settings(args.guidance or default_guidance(args), TIMESTEPS)
    if args.guidance and args.guidance[0] != 1 and not args.label_dropout:
        raise UsageError("guidance needs dropped labels: leave out --guidance, or --label-dropout 0")
    data = run.load_data(state["config"]["image_size"] if state else args.image_size)
    if source:
        state = checkpoint.start_from(source, trainer_class.network, data.pixels.shape[1:], data.classes)
    config = DiTConfig(**state["config"]) if state else network_config(args, data, "model" in run.given)
    if run.device.type == "cpu":
        check_memory(config, args)
    held_out = None
    if not data.name and not data.pixels.is_floating_point():  # images of one's own
        data, held_out = dataset.hold_out(data)
    trainer = trainer_class(config, args, run.device, state)
    what = " from ".join(filter(None, (args.model or "a network", args.init_from)))
    return train(trainer, run, data, what, held_out if held_out and len(held_out.labels) else None)


if __name__ == "__main__":
    run_script(main, memory="raise --grad-accum-steps, or lower --batch-size")
