"""Claims about a GPU. They are tested on a pretended one everywhere, and on a real one where there is one.

The pretended GPU is a wrapper around the CPU. Its tensors say that they are on "cuda", and do what tensors there do:
they meet no tensors and no random generators of the CPU, and some operations make the CPU wait until the GPU has
computed all that it was given. Those are counted. Kernels, their speed and torch.compile need the real one.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import checkpoint
import dataset
import distill
import inference
import sample_npz
import train
from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS
from conftest import TINY, assert_equal_states, losses, settings_of, trained
from dit import MODELS, DiT, DiTConfig
from sampling import TrainedModel
from test_dit import randomized
from variance import LearnedVariance

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ("cpu", "cuda")
SMALL = dict(hidden_size=16, depth=2, num_heads=2)
# The bundled weights are guided at some of the timesteps.
SAMPLERS = pytest.mark.parametrize(("sampler", "options"), [
    ("dpm++", {}), ("dpm++", dict(guidance=3.0, guidance_interval=None)), ("ddim", {}), ("ddim", dict(eta=1.0)),
    ("ddpm", dict(precision="bf16")), ("shortcut", {}),
])
TINY_ON_GPU = [*TINY[:-2], "--device", "cuda", "--batch-size", "50", "--save-every", "2"]


# ------------------------------------------------------------------------------------------------- the pretended device


class OnGpu(Tensor):
    """A tensor that says it is on a GPU. Its numbers are in `memory`, an ordinary tensor."""

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl
    waits = []  # the names of the operations that waited

    @staticmethod
    def __new__(cls, memory: Tensor) -> Tensor:
        layout = dict(strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype)
        return Tensor._make_wrapper_subclass(cls, memory.shape, **layout)

    def __init__(self, memory: Tensor):
        self.memory = memory

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Do an operation, of which at least one tensor is on the GPU, with the memory of its tensors."""
        name = operation._schema.name.removeprefix("aten::")
        values, structure = tree_flatten((args, kwargs or {}))
        cls.waits += [name] if meet(name, args, values) else []
        args_there, kwargs_there = tree_unflatten([x.memory if isinstance(x, OnGpu) else x for x in values], structure)
        result = operation(*args_there, **kwargs_there)
        if isinstance(result, Tensor):
            return args[0] if name.endswith("_") else OnGpu(result)  # with such a name it is done in place
        return tree_map_only(Tensor, OnGpu, result)


def meet(name: str, args: tuple, values: list) -> bool:
    """Whether the CPU waits for an operation with these values. Fails where tensors of both are among them."""
    waits = name in ("_local_scalar_dense", "equal", "masked_select", "nonzero")  # the first is .item() and bool()
    if name == "copy_":
        to, what, *non_blocking = args
        return to.is_cuda != what.is_cuda and non_blocking != [True]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and args[0].is_cuda:
        indices = [index for index in args[1] if index is not None]  # they may be on the CPU, and are copied
        waits = any(index.dtype == torch.bool or not index.is_cuda for index in indices)
        values = [args[0], *args[2:]]
    for x in values:  # single numbers of the CPU are passed to a kernel as such
        assert not isinstance(x, Tensor) or x.is_cuda or x.ndim == 0, f"{name} of a GPU and the CPU"
    return waits


class Generator(torch.Generator):
    """A random generator that says where it is."""

    device = property(lambda self: self.where)

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self


class Placement(TorchFunctionMode):
    """Inside, a tensor that is made on "cuda", or moved there, is an OnGpu."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, dict(kwargs or {})
        if name in ("to", "cpu", "cuda"):
            return self.move(name, *args, **kwargs)
        if name in ("tolist", "__format__", "__repr__") and isinstance(args[0], OnGpu):
            OnGpu.waits.append(name)
            return function(args[0].memory, *args[1:], **kwargs)
        device = kwargs.pop("device", None) or next((x.device for x in args if isinstance(x, Tensor)), "cpu")
        device, generator = torch.device(device), kwargs.get("generator")
        assert not generator or generator.device.type == device.type, f"{name} on {device}, by another one's generator"
        result = function(*args, **kwargs)
        if device.type != "cuda" or not isinstance(result, Tensor) or isinstance(result, OnGpu):
            return result
        if name in ("tensor", "as_tensor"):  # numbers of the CPU, which are copied
            OnGpu.waits.append(name)
        return OnGpu(result)

    def move(self, name: str, x: Tensor, *words, device=None, dtype=None, non_blocking=False, copy=False, **layout):
        """x.to(...), x.cpu() and x.cuda(), in all their forms. A copy waits, unless it is from the CPU and need not."""
        device = device or next((w for w in words if isinstance(w, torch.device | str)), None if name == "to" else name)
        dtype = dtype or next((w for w in words if isinstance(w, torch.dtype)), x.dtype)
        there = torch.device(device or x.device).type == "cuda"
        if there == x.is_cuda:
            return Tensor.to(x, dtype, copy=copy, **layout)
        OnGpu.waits += [] if there and (non_blocking or True in words) else [name]
        memory = Tensor.to(x.detach() if there else x.detach().memory, dtype, copy=True, **layout)
        return OnGpu(memory) if there else memory


def pretended_waits(work: Callable[[], object]) -> list[str]:
    """The operations of work() that waited for the GPU."""
    OnGpu.waits.clear()
    work()
    return [*OnGpu.waits]


def real_waits(work: Callable[[], object]) -> list[str]:
    """The same for a real GPU, as PyTorch tells it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in said if "synchronizing" in str(warning.message)]


def one_group(lists: list[list[Tensor]], with_indices: bool = False) -> dict:
    """Gradients by their device and type. PyTorch's own does not see the devices that tensors pretend."""
    (gradients,) = lists
    return {(gradients[0].device, gradients[0].dtype): (lists, [])}


@pytest.fixture
def pretended(monkeypatch) -> Iterator[Callable]:
    """A pretended GPU called "cuda"."""
    answers = dict(is_available=True, device_count=1, get_device_capability=(8, 0), set_device=None)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _, *args, **options: autocast("cpu", *args, **options))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # by module.to(device)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", one_group)
    with Placement():
        yield pretended_waits


@pytest.fixture(params=["pretended", pytest.param("real", marks=NO_GPU)])
def gpu(request) -> Callable:
    """A GPU called "cuda". The fixture is the function that lists what waits for it."""
    return real_waits if request.param == "real" else request.getfixturevalue("pretended")


# ------------------------------------------------------------------------------------------------------------- claims


def test_the_pretended_gpu_does_not_mix_with_the_cpu(pretended):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    mask = there > 0
    assert (there + torch.tensor(1.0)).is_cuda and there.is_cuda and not there.cpu().is_cuda
    for mixed in (
        lambda: here + there, lambda: there * here, lambda: torch.cat([there, here]), lambda: here[there.long()],
        lambda: torch.where(mask, here, there), lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.randn(3, generator=torch.Generator("cuda")),
    ):
        with pytest.raises(AssertionError, match="GPU|cuda"):
            mixed()
    waiting = (
        there[0].item, lambda: bool(mask.all()), there.tolist, there.cpu, lambda: there[mask], mask.nonzero,
        lambda: here.to("cuda"), lambda: torch.tensor([1.0], device="cuda"), lambda: here.copy_(there),
    )
    assert [len(pretended(work)) for work in waiting] == [1] * len(waiting)
    free = (
        lambda: there + 1, lambda: there[1:], lambda: there[there.long()], lambda: torch.where(mask, there, 0.0),
        lambda: here.to("cuda", non_blocking=True), lambda: torch.full((3,), 7.0, device="cuda"), there.cuda,
    )
    assert [pretended(work) for work in free] == [[]] * len(free)


@pytest.mark.parametrize("flags", [
    "--precision bf16", "--precision fp32 --learn-sigma --prediction eps --gradient-checkpointing --grad-accum-steps 2",
])
def test_a_run_on_a_gpu_continues_as_if_it_had_never_stopped(gpu, tiny_network, images, tmp_path, flags):
    arguments = ["--dataset", str(images), *TINY_ON_GPU, *flags.split(), "--lr-schedule", "constant"]
    assert train.main([*arguments, "--steps", "2", "--run-dir", str(tmp_path / "parts")]) == 0
    assert train.main(["--resume", str(tmp_path / "parts"), "--steps", "4"]) == 0
    assert train.main([*arguments, "--steps", "4", "--run-dir", str(tmp_path / "whole")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizers"):
        assert_equal_states(whole[part], parts[part])


def test_a_training_step_does_not_wait_for_the_gpu(gpu, digits):
    args, device = settings_of([*TINY_ON_GPU, "--steps", "9", "--guidance", "1"])
    trainer = train.Trainer(DiTConfig(**SMALL), args, device)
    batches = dataset.batches(digits, args.batch_size, 0, device=device)
    trainer.step(0, *next(batches), 1e-3)  # makes the state of the optimizers
    assert gpu(lambda: trainer.step(1, *next(batches), 1e-3)) == []


def test_a_network_is_distilled_on_a_gpu(gpu, images, tiny_run, tmp_path):
    """In four steps, of which the last one matches distributions."""
    arguments = [str(tiny_run), "--dataset", str(images), "--device", "cuda", "--no-compile", "--batch-size", "50"]
    assert distill.main([*arguments, "--steps", "4", "--run-dir", str(tmp_path / "run")]) == 0
    assert len(losses(tmp_path / "run")) == 4


def load(sampler: str, device: str) -> TrainedModel:
    """The bundled network that has this sampler."""
    return checkpoint.load_model(DISTILLED_WEIGHTS if sampler == "shortcut" else BUNDLED_WEIGHTS, device)


@SAMPLERS
def test_a_seed_gives_the_same_images_on_a_gpu(gpu, sampler, options):
    options = dict(steps=4, **options)
    here, there = (load(sampler, device).sample(torch.arange(3), 2, sampler=sampler, **options) for device in DEVICES)
    assert not there.is_cuda
    assert (here - there).abs().mean() < 0.01


def test_a_learned_variance_gives_the_same_images_on_a_gpu(gpu):
    samples = []
    for device in DEVICES:
        model = randomized(DiT(DiTConfig(**SMALL, learn_sigma=True))).to(device)
        model = trained(model, LearnedVariance("linear", "eps", 50, device), 2.0, [10, 40])
        samples.append(model.sample(torch.arange(3), 3, sampler="ddpm", steps=4))
    assert (samples[0] - samples[1]).abs().mean() < 0.01


@SAMPLERS
def test_a_sampling_step_does_not_wait_for_the_gpu(gpu, sampler, options):
    """The end of sampling does, for all steps at once."""
    sample = partial(load(sampler, "cuda").sample, torch.arange(3), 3, sampler=sampler, **options)
    four, eight = (gpu(lambda steps=steps: sample(steps=steps)) for steps in (4, 8))
    assert four == eight


@pytest.mark.parametrize("words", [
    "--per-class 1 --guidance 2 300 800", "--trajectory --labels 3", "--compare-guidance 0 1 2 --labels 3",
    "--interpolate 3 8", "--gif --per-class 1", "--inpaint left picture.png --per-class 1",
    "--from picture.png --labels 3",
])
def test_each_command_of_inference_samples_on_a_gpu(gpu, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (28, 28)).save("picture.png")
    words = ["--device", "cuda", "--checkpoint", str(BUNDLED_WEIGHTS), "--steps", "2", *words.split()]
    assert inference.generate(inference.parse_args(words)).stat().st_size > 0


def test_many_images_are_sampled_on_a_gpu(gpu, tmp_path):
    words = ["--device", "cuda", "--checkpoint", str(BUNDLED_WEIGHTS), "--steps", "2", "--count", "3"]
    sample_npz.main([str(tmp_path / "new.npz"), *words])
    assert np.load(tmp_path / "new.npz")["arr_0"].shape == (3, 28, 28, 1)


# --------------------------------------------------------------------------------------------------- a real GPU alone


@NO_GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_is_compiled(images, tmp_path, capsys, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16")
    arguments = ["--dataset", str(images), *TINY_ON_GPU, "--compile", "--gradient-checkpointing", "--steps", "4"]
    torch._dynamo.utils.counters.clear()
    assert train.main([*arguments, "--precision", precision, "--run-dir", str(tmp_path / "run")]) == 0
    assert f"cuda, {precision}, compiled" in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@NO_GPU
def test_checkpointed_blocks_take_less_memory_on_a_gpu():
    peaks = []
    for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        words = ["--device", "cuda", "--no-compile", "--model", "DiT-S/4", "--steps", "5", "--guidance", "1", flag]
        args, device = settings_of(words)
        trainer = train.Trainer(DiTConfig(**MODELS["DiT-S/4"]), args, device)
        x0, y = torch.zeros(256, 1, 28, 28, device=device), torch.zeros(256, dtype=torch.long, device=device)
        torch.cuda.reset_peak_memory_stats()
        trainer.step(0, x0, y, 1e-3)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.5 * peaks[0]
