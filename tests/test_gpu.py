"""Claims about a GPU. They are tested on a pretended one everywhere, and on a real one where there is one.

The pretended GPU is a wrapper around the CPU. Its tensors say that they are on "cuda", and do what tensors there do:
they meet no tensors and no random generators of the CPU, and some operations make the CPU wait until the GPU has
computed all that it was given. Those are counted. Kernels, their speed and torch.compile need the real one.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch._dynamo
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import checkpoint
import dataset
import distill
import inference
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

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.memory.__reduce_ex__(protocol)  # a file holds the numbers

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Do an operation, of which at least one tensor is on the GPU, with the memory of its tensors."""
        name, kwargs = operation._schema.name.removeprefix("aten::"), kwargs or {}
        meeting, waits = tree_leaves((args, kwargs)), False
        if name == "copy_":
            to, what, *non_blocking = args
            meeting, waits = [], isinstance(to, OnGpu) != isinstance(what, OnGpu) and non_blocking != [True]
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if isinstance(args[0], OnGpu):  # then indices may be on the CPU, and are copied
                meeting = tree_leaves((args[0], args[2:]))
            waits = any(index.dtype == torch.bool or not isinstance(index, OnGpu) for index in indices)
        elif name in ("_local_scalar_dense", "equal", "masked_select", "nonzero"):  # the first is .item() and bool()
            waits = True
        for x in meeting:  # single numbers of the CPU are passed to a kernel as such
            assert isinstance(x, OnGpu) or not isinstance(x, Tensor) or x.ndim == 0, f"{name} of a GPU and the CPU"
        cls.waits += [name] if waits else []
        inner_args, inner_kwargs = tree_map_only(OnGpu, lambda x: x.memory, (args, kwargs))
        result = operation(*inner_args, **inner_kwargs)
        in_place = name.endswith("_") and isinstance(result, Tensor)
        return args[0] if in_place else tree_map_only(Tensor, OnGpu, result)


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

    def move(self, name: str, x: Tensor, *words, device=None, dtype=None, non_blocking=False, **_) -> Tensor:
        """x.to(...), x.cpu() and x.cuda(), in all their forms. A copy waits, unless it is from the CPU and need not."""
        device = device or next((w for w in words if isinstance(w, torch.device | str)), None if name == "to" else name)
        dtype = dtype or next((w for w in words if isinstance(w, torch.dtype)), x.dtype)
        device, x = torch.device(device or x.device), Tensor.to(x, dtype)
        if device.type == x.device.type:
            return x
        there = device.type == "cuda"
        OnGpu.waits += [] if there and (non_blocking or True in words) else [name]
        return OnGpu(x.detach().clone()) if there else x.detach().memory.clone()


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
    def one_group(lists: list[list[Tensor]], *_, **__) -> dict:
        return {(lists[0][0].device, lists[0][0].dtype): (lists, [*range(len(lists[0]))])}

    # PyTorch groups tensors in C++, where these are on the CPU.
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", one_group)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
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


@pytest.mark.parametrize(("sampler", "options"), [
    ("dpm++", {}), ("ddim", {}), ("ddim", dict(eta=1.0)), ("ddpm", {}), ("ddpm", dict(precision="bf16")),
    ("dpm++", dict(guidance=3.0, guidance_interval=None)), ("shortcut", {}),
])
def test_a_seed_gives_the_same_images_on_a_gpu(gpu, sampler, options):
    """The bundled weights are guided at some of the timesteps."""
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


@pytest.mark.parametrize("sampler", [
    "dpm++", "ddim", "shortcut",
])
def test_a_sampling_step_does_not_wait_for_the_gpu(gpu, sampler):
    """The end of sampling does, for all steps at once."""
    sample = partial(load(sampler, "cuda").sample, torch.arange(3), 3, sampler=sampler)
    four, eight = (gpu(lambda steps=steps: sample(steps=steps)) for steps in (4, 8))
    assert four == eight


@pytest.mark.parametrize("words", [
    "--per-class 1 --guidance 2 300 800", "--trajectory --labels 3", "--compare-guidance 0 1 2 --labels 3",
    "--interpolate 3 8", "--gif --per-class 1", "--inpaint left picture.png --per-class 1",
])
def test_each_command_of_inference_samples_on_a_gpu(gpu, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (28, 28)).save("picture.png")
    words = ["--device", "cuda", "--checkpoint", str(BUNDLED_WEIGHTS), "--steps", "2", *words.split()]
    assert inference.generate(inference.parse_args(words)).stat().st_size > 0


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
