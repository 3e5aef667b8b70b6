"""Claims about distillation: long steps are learned from two halves, distributions are matched, runs resume."""

import copy
import shutil
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import pytest
import torch

import checkpoint
import distill
import train
from checkpoint import CheckpointError
from cli import UsageError
from conftest import TINY, assert_equal_states, losses, run_script
from diffusion import Diffusion, sample_timesteps
from distill import (
    FAKE_UPDATES,
    MATCHING_GUIDANCE,
    STEP_COUNT_CYCLE,
    DistillTrainer,
    build_parser,
    ddim_step,
    invert_ddim_step,
    last_spans,
    main,
    matched_counts,
    matching_loss,
    sample_spans,
    shortcut_loss,
    simulate_path,
    with_sizes_of,
)
from dit import DiT, DiTConfig
from rundir import RunDir, settings
from sampling import ddim
from shortcut import STEP_COUNTS, ShortcutDiT, ShortcutModel, shortcut_timesteps
from test_diffusion import T, every_schedule, gaussian, optimal_for_gaussian
from test_diffusion import images as random_images
from test_numerics import network


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_a_shortcut_network_begins_as_the_network_it_copies():
    torch.manual_seed(0)
    config = dict(image_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=1)
    plain, student = DiT(DiTConfig(**config)), ShortcutDiT(DiTConfig(**config))
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.2)
    missing = student.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing.missing_keys} == {"d_embedder"} and not missing.unexpected_keys
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999]), torch.tensor([0, 1, 2])
    whole, half = torch.stack([t, t - 1000], 1), torch.stack([t, t - 500], 1)
    for steps in (whole, half):
        assert torch.equal(student(x, steps, y), plain(x, t, y))
    torch.nn.init.normal_(student.d_embedder.mlp[2].weight)
    assert not torch.allclose(student(x, whole, y), student(x, half, y))


@every_schedule
def test_a_step_can_be_inverted_and_is_that_of_ddim(schedule):
    d, x0, x_t = Diffusion(schedule, "x0"), random_images(), gaussian(0)
    t, s = torch.tensor([999, 499, 30, 61]), torch.tensor([499, -1, -1, 30])
    x_s = ddim_step(d, x_t, x0, t, s)
    torch.testing.assert_close(invert_ddim_step(d, x_t, x_s, t, s), x0, rtol=0, atol=1e-3)
    torch.testing.assert_close(x_s[1:3], x0[1:3])
    middle = ddim_step(d, x_t, x0, torch.tensor(999), torch.tensor(499))
    expected = ddim(d, lambda x, t: x0, x_t, [999, 499])
    torch.testing.assert_close(ddim_step(d, middle, x0, t[1], s[1]), expected)


def test_steps_to_learn_are_those_that_the_sampler_takes():
    paths = {n: [*pairwise([*shortcut_timesteps(T, n), -1])] for n in STEP_COUNTS}
    spans = sample_spans(10_000, T, STEP_COUNT_CYCLE, torch.Generator().manual_seed(0))
    sampled = [tuple(span) for span in spans.tolist()]
    assert set(sampled) == {step for path in paths.values() for step in path}
    for i, n in enumerate([1, 1, 2, 4, 8, 16, 32, 32, 32, 32]):
        assert set(sampled[i::10]) == set(paths[n])
    starts = [sum(t == T - 1 for t, _ in sampled[i::10]) / 1000 for i in (5, 9)]
    assert starts == pytest.approx([0.3 + 0.7 / 16, 1 / 32], abs=0.05)
    ends = last_spans(matched_counts(6), T)
    assert ends.tolist() == [[999, -1], [999, -1], [499, -1], [249, -1], [999, -1], [999, -1]]


@every_schedule
def test_shortcuts_are_learned_from_two_halves_down_to_the_teacher(schedule):
    """A model that takes each step as two halves, and the smallest as its teacher's, has no loss, and samples in one
    step what the teacher samples in 64. One whose x0_hat is off has a loss at each size.
    """
    d, y = Diffusion(schedule, "x0"), torch.zeros(64, dtype=torch.long)
    optimal = optimal_for_gaussian(d, 0.2, 0.1)

    def teacher(x, steps, y):
        return torch.cat([optimal(x[i : i + 1], t) for i, t in enumerate(steps[:, 0].tolist())])

    def model(x, steps, y):
        return torch.cat([one(x[i : i + 1], t, s) for i, (t, s) in enumerate(steps)])

    def one(x, t, s):
        middle, now = (t + s) // 2, x
        for a, b in ((t, middle), (middle, s)):
            half = optimal(now, int(a)) if t - s < 40 else one(now, a, b)
            now = ddim_step(d, now, half, a[None], b[None])
        return invert_ddim_step(d, x, now, t[None], s[None])

    spans = sample_spans(64, T, STEP_COUNT_CYCLE, torch.Generator().manual_seed(0))
    t = spans[:, 0]
    x_t = d.q_sample(0.2 + 0.1 * gaussian(2, 64)[:, :1, :1, :1], t, gaussian(1, 64)[:, :1, :1, :1])
    x0_hat = model(x_t, spans, y)
    assert shortcut_loss(d, x0_hat, model, teacher, x_t, y, spans).max() < 1e-5
    off = shortcut_loss(d, x0_hat + 0.1, model, teacher, x_t, y, spans)
    torch.testing.assert_close(off, 0.01 / d.tables["sigma"][t], rtol=0.01, atol=1e-4)

    x = gaussian(3, 1)[:, :1, :1, :1]
    one_step = ddim(d, lambda x, t: model(x, torch.tensor([[t, -1]]), None), x, shortcut_timesteps(T, 1))
    torch.testing.assert_close(one_step, ddim(d, lambda x, t: optimal(x, t), x, halves()), rtol=0, atol=1e-3)


def halves() -> list[int]:
    """The timesteps of the reverse process, cut in two six times."""
    path = [T - 1, -1]
    for _ in range(6):
        path = [n for t, s in pairwise(path) for n in (t, (t + s) // 2)] + [-1]
    return path[:-1]


@every_schedule
def test_the_loss_of_a_shortcut_model_is_finite_for_every_step(schedule):
    student, teacher, diffusion = network(ShortcutDiT), network(), Diffusion(schedule, "x0", T)
    y, spans = torch.arange(64) % 3, sample_spans(64, T, STEP_COUNT_CYCLE, torch.Generator().manual_seed(0))
    for level in (-1.0, 1.0):
        x_t = diffusion.q_sample(torch.full((64, 1, 8, 8), level), spans[:, 0], torch.randn(64, 1, 8, 8))
        x0_hat = student(x_t, spans, y)
        assert shortcut_loss(
            diffusion, x0_hat, student, lambda x, spans, y: teacher(x, spans[:, 0], y), x_t, y, spans
        ).isfinite().all()


@every_schedule
def test_matching_leads_the_student_to_the_distribution_of_its_teacher(schedule):
    """A student that samples N(m, c^2), with m and c to be learned, while `fake` knows at each time what it samples."""
    d, generator = Diffusion(schedule, "x0"), torch.Generator().manual_seed(0)
    m, c = torch.tensor(-0.5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    y, optimizer = torch.zeros(500, dtype=torch.long), torch.optim.SGD([m, c], lr=0.05)

    def optimal(m, c):
        def predict(x, t, y):
            a, s = d.extract("alpha", t), d.extract("sigma", t)
            return m + a * c**2 / (a**2 * c**2 + s**2) * (x - a * m)  # E[x0 | x_t] of N(m, c^2)

        return predict

    teacher = optimal(0.2, 0.1)
    for _ in range(500):
        x = m + c * torch.randn(500, 1, 1, 1, generator=generator)
        t = sample_timesteps(500, T, "logit-normal", generator)
        noise = torch.randn(500, 1, 1, 1, generator=generator)
        loss = matching_loss(d, x, teacher, optimal(m.detach(), c.detach()), y, t, noise)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert [m.item(), c.item()] == pytest.approx([0.2, 0.1], abs=0.03)
    loss = matching_loss(d, x, teacher, teacher, y, t, noise)
    assert loss.max() == 0  # where the two networks agree, nothing is left to learn


@pytest.mark.parametrize("steps", [2, 4])
def test_a_simulated_path_is_that_of_the_sampler_without_its_last_step(steps):
    """From where it ends, the last step leads to the sample."""
    student, d, eps, y = network(ShortcutDiT), Diffusion("flow", "x0"), torch.randn(3, 1, 8, 8), torch.arange(3)
    description = dict(guidance=1.0, guidance_interval=None)
    sample = ShortcutModel(student, d, description).sample_batch(y, start=eps, sampler="shortcut", steps=steps)
    x_t = simulate_path(d, student, eps, y, steps)
    spans = last_spans(torch.full((3,), steps), T)
    with torch.no_grad():
        torch.testing.assert_close(student(x_t, spans, y).clamp(-1, 1), sample)


def test_the_network_fake_knows_in_how_many_steps_a_sample_was_made():
    seen = []
    fake = with_sizes_of(last_spans(matched_counts(4), T), lambda x, spans, y: seen.append(spans))
    fake(None, torch.tensor([9, 8, 7, 6]), None)
    assert seen[0].tolist() == [[9, -991], [8, -992], [7, -493], [6, -244]]


@pytest.mark.parametrize("steps", [0, 3, 64])
def test_other_numbers_of_shortcuts_are_refused(steps):
    with pytest.raises(ValueError, match="use 1, 2, 4, 8, 16, 32"):
        shortcut_timesteps(T, steps)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("stop", [3, 8])  # before samples are matched, and after
def test_a_distilled_run_resumes_to_the_bit_without_its_teacher(tiny_run, images, tmp_path, monkeypatch, stop):
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(tiny_run / "weights.safetensors", teacher)
    arguments = [teacher, "--dataset", images, "--batch-size", 16, "--warmup", 2, "--no-compile"]
    arguments += ["--device", "cpu", "--steps", 10]
    assert run(*arguments, "--run-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "asked_to_stop", lambda self: self.step == stop)
        assert run(*arguments, "--run-dir", tmp_path / "parts") == 128
    teacher.unlink()
    assert run("--resume", tmp_path / "parts") == 0
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "ema", "fake", "optimizers", "fake_optimizers", "teacher", "config", "guidance"):
        assert_equal_states(whole[part], parts[part])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in ("final_layer.linear.weight", "blocks.0.attn.qkv.weight"):  # of a network that began as its copy
        assert not torch.equal(whole["fake"][name], whole["teacher"]["ema"][name])
    assert whole["network"] == "ShortcutDiT" and whole["guidance"] == 1.0
    assert whole["settings"]["guidance"] == [2.0, 300, 800]


@pytest.mark.parametrize("stop", [2, 5])  # while only `fake` learns, and after
@pytest.mark.parametrize("other", [False, True])
def test_a_run_that_begins_with_a_student_resumes_to_the_bit(tiny_run, images, tmp_path, monkeypatch, other, stop):
    """Also where the teacher is a network of another shape than that from which the student was distilled."""
    monkeypatch.setattr(distill, "FAKE_ALONE", 3)
    small = ["--dataset", images, "--batch-size", 16, "--warmup", 2, "--no-compile", "--device", "cpu"]
    assert run(tiny_run, *small, "--steps", 2, "--run-dir", tmp_path / "student") == 0
    teacher = tiny_run
    if other:
        model, teacher = network(), tmp_path / "other.safetensors"
        description = {**checkpoint.load_model(tiny_run).description, "config": asdict(model.config)}
        checkpoint.save(teacher, description, model.state_dict())
    arguments = [teacher, "--student", tmp_path / "student", *small, "--steps", 6]
    assert run(*arguments, "--run-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "asked_to_stop", lambda self: self.step == stop)
        assert run(*arguments, "--run-dir", tmp_path / "parts") == 128
    stopped, student = (checkpoint.load(tmp_path / name) for name in ("parts", "student"))
    names = ("final_layer.linear.weight", "blocks.0.attn.qkv.weight")
    for name in names:  # the student has moved only in steps after those of `fake` alone
        assert torch.equal(stopped["model"][name], student["ema"][name]) == (stop == 2)
        assert not torch.equal(stopped["fake"][name], stopped["teacher"]["ema"][name])
    assert run("--resume", tmp_path / "parts") == 0
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "ema", "fake", "optimizers", "fake_optimizers"):
        assert_equal_states(whole[part], parts[part])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_distilled_run_is_not_resumed_as_another(tiny_run, images, tmp_path):
    small = ["--dataset", images, "--batch-size", 16, "--no-compile", "--device", "cpu", "--steps", 6]
    assert run(tiny_run, *small, "--run-dir", tmp_path / "parts") == 0
    parts = checkpoint.load(tmp_path / "parts")
    with pytest.raises(UsageError, match="--guidance was .* in this run and cannot change"):
        run("--resume", tmp_path / "parts", "--steps", 7, "--guidance", 3)
    with pytest.raises(UsageError, match="is distilled already"):
        run(tmp_path / "parts", "--dataset", images)
    with pytest.raises(UsageError, match="was not distilled for these images and this schedule"):
        run(tiny_run, "--student", tiny_run, "--dataset", images)
    for command, folder in ((train.main, tmp_path / "parts"), (main, tiny_run)):  # each resumes its own runs
        with pytest.raises(UsageError, match=r"was begun by .*: continue it with python"):
            command(["--resume", str(folder), "--steps", "30"])
    for part, error, fix in (
        ("teacher", UsageError, "lacks its teacher: begin a new run"),
        ("fake", CheckpointError, "does not fit its settings"),
    ):
        kept = {name: value for name, value in parts.items() if name != part}
        names = ("model", "ema", "optimizers", "fake", "fake_optimizers")
        tensors = {name: kept.pop(name) for name in names if name in kept}
        if "teacher" in kept:
            tensors["teacher"] = {"ema": kept["teacher"].pop("ema")}
        checkpoint.save(tmp_path / "parts" / "checkpoint.safetensors", kept, tensors)
        with pytest.raises(error, match=fix):
            run("--resume", tmp_path / "parts", "--steps", 7)


def new_trainer(tiny_run, *more: str) -> DistillTrainer:
    words = [str(tiny_run), *more, "--no-compile", "--device", "cpu", "--batch-size", "20", "--precision", "fp32"]
    parser = build_parser()
    args, device = settings(parser, parser.given([*words, "--guidance", "3", "300", "800", "--steps", "10"]))
    return DistillTrainer(checkpoint.load_model(tiny_run), args, device)


@pytest.fixture
def trainer(tiny_run) -> DistillTrainer:
    return new_trainer(tiny_run)


@pytest.mark.parametrize("matching", [False, True])  # from the first step, as from distilled weights
def test_a_dry_run_of_distilling_changes_nothing(tiny_run, matching):
    more = ["--student", "a run"] if matching else []
    trainer, other = new_trainer(tiny_run, *more), new_trainer(tiny_run, *more)
    before = copy.deepcopy(trainer.state())
    trainer.dry_run()
    assert_equal_states(trainer.state(), before)
    x0, y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    for one in (trainer, other):
        one.step(0, x0, y, 1e-3)
    assert_equal_states(trainer.state(), other.state())


def test_while_samples_are_matched_the_other_images_learn_steps_of_all_sizes_but_the_largest(tiny_run):
    trainer = new_trainer(tiny_run, "--student", "a run")
    sizes = set()
    for step in range(20):
        random = trainer.randomness(step)
        t, s = random["spans"][random["counts"] == 0].double().unbind(1)
        sizes |= set((trainer.diffusion.T / (t - s)).log2().round().exp2().tolist())
    assert sizes == set(STEP_COUNTS) - {1}


def test_fake_learns_only_while_samples_are_matched_and_from_them_alone(trainer):
    x0, y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    before = copy.deepcopy(trainer.fake.state_dict())
    trainer.step(6, x0, y, 1e-3)
    assert_equal_states(trainer.fake.state_dict(), before)
    student = copy.deepcopy(trainer.model.state_dict())
    random = trainer.randomness(7)
    assert random["fake_t"].shape == (20, FAKE_UPDATES) and random["fake_eps"].shape == (20, FAKE_UPDATES, 1, 8, 8)
    trainer.update_fake(y, random["fake_t"][:, 0], random["path_eps"][:, 0], random["fake_eps"][:, 0])
    assert_equal_states(trainer.model.state_dict(), student)
    after = trainer.fake.state_dict()
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {"pos_embed", "d_embedder.mlp.0.weight", "d_embedder.mlp.0.bias"}  # behind a layer of zeros at first


def test_steps_are_learned_from_the_guided_teacher_and_the_distribution_from_one_less_guided(trainer):
    x, y, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.tensor([299, 300, 800])
    conditional, unconditional = trainer.teacher.model(x, t, y), trainer.teacher.model(x, t)

    def guided(weights):
        return unconditional + torch.tensor(weights).view(3, 1, 1, 1) * (conditional - unconditional)

    torch.testing.assert_close(trainer.teach_spans(x, torch.stack([t, t - 31], 1), y), guided([1.0, 3.0, 3.0]))
    torch.testing.assert_close(trainer.teach(x, t, y, fraction=0.4), guided([1.0, 1.8, 1.8]))


@pytest.mark.parametrize("step", [0, 9])
def test_the_loss_of_a_batch_is_the_mean_of_its_images_however_they_are_divided(trainer, step):
    """First the shortcut loss; later, for every other image, half of its matching loss."""
    trainer.ddp_model.require_backward_grad_sync = True  # as a step sets it
    torch.nn.init.normal_(trainer.fake.d_embedder.mlp[2].weight)
    random = trainer.randomness(step)
    for name in ("u", "fake_t", "path_eps", "fake_eps"):
        random.pop(name, None)
    x0, y = torch.rand(20, 1, 8, 8) * 2 - 1, torch.arange(20) % 3
    expected = []
    for i in range(20):
        n, d = slice(i, i + 1), trainer.diffusion
        spans, eps = random["spans"][n], random["eps"][n]
        x_t = d.q_sample(x0[n], spans[:, 0], eps)
        if step and i % 2:
            x_t = simulate_path(d, trainer.ema, eps, y[n], int(random["counts"][i]))
        x0_hat = trainer.model(x_t, spans, y[n])
        if step and i % 2:
            teacher = partial(trainer.teach, fraction=MATCHING_GUIDANCE[int(random["counts"][i])])
            fake = with_sizes_of(spans, trainer.fake)
            loss = 0.5 * matching_loss(d, x0_hat, teacher, fake, y[n], random["match_t"][n], random["match_eps"][n])
        else:
            loss = shortcut_loss(d, x0_hat, trainer.ema, trainer.teach_spans, x_t, y[n], spans)
        expected.append(loss.item())
    for size in (20, 5, 1):
        parts = [slice(i, i + size) for i in range(0, 20, size)]
        means = [trainer.losses(x0[n], y[n], **{k: v[n] for k, v in random.items()}).mean().item() for n in parts]
        assert sum(means) / len(means) == pytest.approx(sum(expected) / 20, rel=1e-4)


@pytest.mark.slow
def test_two_processes_distill_as_one(tiny_run, images, tmp_path):
    arguments = [tiny_run, "--dataset", images, "--batch-size", 16, "--steps", 4, "--lr", 1e-3]
    arguments += ["--no-compile", "--device", "cpu", "--precision", "fp32"]
    assert run(*arguments, "--run-dir", tmp_path / "one") == 0
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    for accumulate in (1, 2):
        there = ("--grad-accum-steps", accumulate, "--run-dir", f"two-{accumulate}")
        result = run_script("distill.py", *arguments, *there, cwd=tmp_path, python=torchrun)
        assert result.returncode == 0, result.stderr
        assert losses(tmp_path / there[-1]) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_distilled_network_samples_in_one_step_what_its_teacher_samples_in_many(images, tmp_path):
    """Dark, grey and light images: those of each class have the same mean."""
    small = ["--dataset", images, *TINY, "--batch-size", 32, "--save-every", 1000]
    assert train.main([str(a) for a in (*small, "--steps", 400, "--run-dir", tmp_path / "teacher")]) == 0
    small = ["--dataset", images, "--no-compile", "--device", "cpu", "--batch-size", 32, "--save-every", 1000]
    assert run(tmp_path / "teacher", *small, "--steps", 400, "--run-dir", tmp_path / "student") == 0
    teacher, student = (checkpoint.load_model(tmp_path / name) for name in ("teacher", "student"))
    labels = torch.tensor([0, 1, 2]).repeat_interleave(8)
    means = [trained.sample(labels, 24).view(3, -1).mean(1) for trained in (teacher, student)]
    one = student.sample(labels, 24, steps=1).view(3, -1).mean(1)
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=0.06)
    torch.testing.assert_close(one, means[0], rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--model", "DiT-N/4"], "unrecognized arguments: --model"),
        (["--min-snr", 5], "unrecognized arguments: --min-snr"),
        (["--student", "a run", "--steps", 400], "the network fake learns alone for 400 steps: give more --steps"),
        (["--student", "a run", "--minutes", 5], "the network fake learns alone for 400 steps: give more --steps"),
        (["--dataset", "mnist-5000"], "of other classes or size: give its --dataset"),
    ],
)
def test_what_cannot_be_distilled_names_the_fix(tiny_run, images, tmp_path, arguments, fix):
    with pytest.raises(UsageError, match=fix):
        run(tiny_run, "--dataset", images, "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prediction", "timesteps", "learn_sigma", "fix"),
    [
        ("eps", T, False, "a network that predicts x0 or v, without --learn-sigma"),
        ("x0", T, True, "a network that predicts x0 or v, without --learn-sigma"),
        ("v", 63, False, "64 timesteps or more: this network has 63"),
    ],
)
def test_networks_that_cannot_be_distilled_are_refused(tmp_path, prediction, timesteps, learn_sigma, fix):
    model, process = network(learn_sigma=learn_sigma), Diffusion("linear", prediction, timesteps)
    description = checkpoint.describe(DiT, model.config, process, ("a", "b", "c"), "nothing", 0, 1.0)
    checkpoint.save(tmp_path / "weights.safetensors", description, model.state_dict())
    with pytest.raises(UsageError, match=fix):
        run(tmp_path / "weights.safetensors", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
