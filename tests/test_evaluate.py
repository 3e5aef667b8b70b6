"""Claims about the numbers: the classifier knows digits, and each measure does what its name says."""

import ast
import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import classifier
import dataset
import evaluate
import metrics
from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, CheckpointError, load_model
from classifier import Classifier, RandomFeatures
from cli import UsageError
from conftest import ROOT
from dataset import DataError, Images
from diffusion import Diffusion
from dit import DiT, DiTConfig
from metrics import Reference
from sampling import to_uint8
from variance import LearnedVariance


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Few resamples; and what was computed of the same tensor, such as the real images, is not computed again."""
    known = {}

    def once(compute: Callable, *arguments: object) -> torch.Tensor:
        *networks, x = arguments
        tensors = [tensor for network in networks for tensor in network.state_dict().values()]
        digests = [hashlib.sha256(tensor.contiguous().numpy()).digest() for tensor in (*tensors, x)]
        key = compute, x.shape, *digests
        if key not in known:
            known[key] = compute(*arguments)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 5)
        patch.setattr(metrics, "neighbour_distance", partial(once, metrics.neighbour_distance))
        patch.setattr(metrics, "features", partial(once, metrics.features))
        yield


@pytest.fixture(scope="module")
def measured(reference, digits) -> metrics.Table:
    """The measures of real digits."""
    return metrics.measure(digits.pixels, digits.labels, reference)


def run(*arguments: object) -> dict:
    path = evaluate.evaluate(evaluate.parse_args([str(a) for a in arguments]))
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------------ the classifier


def test_the_classifier_is_right_on_more_than_99_5_percent_of_the_test_images_and_small(reference):
    real, head = reference.tensors, reference.networks["classifier"].head
    for name in ("test", "held_out"):
        predicted = head(real[f"classifier.{name}"]).argmax(1)
        assert (predicted == real[f"labels.{name}"]).double().mean() >= 0.995
    assert metrics.CLASSIFIER.stat().st_size < 1_000_000


def test_real_digits_are_at_the_floor(measured):
    assert measured["accuracy"]["generated"] > 0.99
    for space in ("classifier", "random"):
        assert 0.5 < measured[f"rho, {space}"]["generated"] < 1.5
        assert 0 < measured[f"rho to random training images, {space}"]["generated"] < 1.5
    for name in ("precision", "recall"):
        assert abs(measured[name]["generated"] - measured[name]["real"]) < 0.05


def test_wrong_labels_cost_only_accuracy(reference, digits, measured):
    wrong = metrics.measure(digits.pixels, (digits.labels + 1) % 10, reference)
    assert wrong["accuracy"]["generated"] < 0.01
    assert wrong["FD, classifier"]["generated"] == measured["FD, classifier"]["generated"]


def test_missing_digits_cost_recall_and_noise_costs_precision(reference, digits, measured):
    few = metrics.measure(digits.pixels[digits.labels < 5], None, reference)
    noisy = metrics.measure(torch.randint_like(digits.pixels[:300], 256), None, reference)
    assert "accuracy" not in few
    assert few["recall"]["generated"] < 0.7 * measured["recall"]["generated"]
    assert few["precision"]["generated"] > 0.7
    assert noisy["precision"]["generated"] < 0.05
    assert min(few["rho, classifier"]["generated"], noisy["rho, classifier"]["generated"]) > 20


def test_random_features_see_what_the_classifier_ignores(reference, digits):
    dim = (digits.pixels[:500].float() * 0.85).byte()
    table = metrics.measure(dim, digits.labels[:500], reference)
    assert table["accuracy"]["generated"] > 0.99
    assert table["rho, random"]["generated"] > 5


def test_without_its_files_it_says_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "REFERENCE", tmp_path / "none")
    with pytest.raises(DataError, match="python tools/train_classifier.py"):
        Reference()
    (tmp_path / "none").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match="python tools/train_classifier.py"):
        Reference()


# -------------------------------------------------------------------------------------------------------- the measures


def test_frechet_distance_is_that_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance 1
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    y = (x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 2.0])) @ rotation
    assert metrics.frechet_distance(x, y) == pytest.approx(5 + 0 + 1 + 4, rel=1e-5)
    assert metrics.frechet_distance(y, x) == pytest.approx(10, rel=1e-5)
    assert metrics.frechet_distance(y, y) == pytest.approx(0, abs=1e-6)


def test_precision_counts_points_inside_the_neighbourhoods():
    others = torch.arange(10.0)[:, None]  # the third neighbour is 2 away, that of both ends 3
    points = torch.tensor([[4.5], [-2.9], [-3.1], [20.0]])
    assert metrics.fraction_within(points, others, metrics.neighbour_distance(others)) == 0.5


def test_the_interval_of_a_fraction_stays_below_one():
    def interval(right: int) -> tuple[float, float]:
        labels = torch.arange(1000) % 10
        seen = torch.where(torch.arange(1000) < right, labels, (labels + 1) % 10)
        groups = dict(generated=(torch.eye(10)[seen], labels), real=(torch.eye(10)[labels], labels))
        table = metrics.accuracies(lambda features: features, groups)
        assert table["accuracy"]["generated"] == right / 1000 and table["accuracy"]["real"] == 1
        return table["accuracy"]["interval"]

    low, high = interval(900)
    assert low == pytest.approx(0.9 - 1.96 * (0.09 / 1000) ** 0.5, abs=2e-3)
    assert high == pytest.approx(0.9 + 1.96 * (0.09 / 1000) ** 0.5, abs=2e-3)
    low, high = interval(1000)
    assert 0.995 < low < 1 and high == pytest.approx(1)


def test_the_bootstrap_knows_the_spread_of_a_mean_of_labelled_values(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 10
    x = torch.randn(1000, generator=generator) + 5 * labels  # between the labels they differ, which labels are kept
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    low, high = metrics.bootstrap(lambda i: x[i].mean().item(), labels)
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.2)


def test_labels_have_the_proportions_of_the_reference(reference):
    real = reference.tensors["labels.test"]
    assert torch.equal(metrics.labels_as_in(real, 10_000).bincount(), real.long().bincount())
    fraction = metrics.labels_as_in(real, 1000).bincount() / 1000
    assert (fraction - real.long().bincount() / 10_000).abs().max() < 1e-3


def test_real_images_to_compare_with_have_the_labels_of_the_samples(reference):
    real = reference.tensors["labels.held_out"]
    labels = torch.tensor([3] * 40 + [1] * 1200)  # of ones there are fewer
    some, others = metrics.with_same_labels(labels, real), metrics.with_same_labels(labels, real, 1)
    assert torch.equal(real[some].long().bincount(), labels.bincount()) and not torch.equal(some, others)


def test_copies_are_found_and_new_digits_are_not(digits, tmp_path):
    train, new = digits.pixels[:800], digits.pixels[800:]
    samples = torch.cat([train[:7], new[:93]])
    table = metrics.memorization(samples, train, new, tmp_path / "closest.png")
    assert table["near-duplicates"]["generated"] >= 7
    assert table["near-duplicates"]["generated"] - 7 <= table["near-duplicates"]["real"] + 3
    with Image.open(tmp_path / "closest.png") as picture:
        assert picture.width > 4 * picture.height  # ten pairs


def test_the_nearest_neighbour_is_the_nearest(digits):
    train, images = digits.pixels[:300], digits.pixels[300:320]
    distance, index, usual = metrics.nearest(images, train, k=5)
    every = torch.cdist(images.flatten(1).double() / 255, train.flatten(1).double() / 255)
    assert torch.equal(index, every.argmin(1))
    torch.testing.assert_close(distance.double(), every.min(1).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(usual.double(), every.sort(1).values[:, :5].mean(1), atol=1e-4, rtol=0)


def test_bits_of_a_model_that_knows_the_image_are_those_of_the_prior_and_the_last_step():
    diffusion = Diffusion("linear", "eps", 100)
    image = torch.full((1, 1, 4, 4), 64, dtype=torch.uint8)
    x0 = dataset.to_float(image)

    def oracle(x_t, t, y):
        return (x_t - diffusion.extract("alpha", t) * x0) / diffusion.extract("sigma", t)

    def guesses(x_t, t, y):
        return torch.zeros_like(x_t)

    label = torch.zeros(1, dtype=torch.long)
    known = metrics.bits_per_dimension(oracle, diffusion, image, label, batch=10)
    unknown = metrics.bits_per_dimension(guesses, diffusion, image, label, batch=10)
    name = "bits per dimension of real test images, at most"
    # Each of the T Gaussian steps is exact; a Gaussian cut into bins is not narrower than its last step.
    std = LearnedVariance(**diffusion.config).tables["min_log_variance"][0].mul(0.5).exp().item()
    last = -np.log2(np.tanh((2 / np.pi) ** 0.5 * (z := 1 / 255 / std) * (1 + 0.044715 * z**2)))
    assert known[name]["generated"] == pytest.approx(last, abs=0.01)
    assert unknown[name]["generated"] > known[name]["generated"] + 1


# ---------------------------------------------------------------------------------------------------- the command line


def test_a_checkpoint_is_measured_and_the_numbers_saved(weights, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    result = run("--checkpoint", weights, "--count", 40, "--steps", 2, "--device", "cpu")
    assert result["count"] == 40 and result["steps"] == 2 and result["guidance"] == 1.5
    assert result["numbers"]["rho, classifier"]["generated"] > 1.5  # from noise
    printed = capsys.readouterr().out
    assert "40 images" in printed and "rho, random" in printed


@pytest.mark.parametrize(("weights", "steps"), [(BUNDLED_WEIGHTS, 20), (DISTILLED_WEIGHTS, 4), (DISTILLED_WEIGHTS, 1)])
def test_the_bundled_weights_sample_digits(reference, weights, steps):
    assert weights.stat().st_size < 10_000_000
    classifier, labels = reference.networks["classifier"], torch.arange(10).repeat(20)
    images = to_uint8(load_model(weights).sample(labels, 200, steps=steps))
    assert (classifier.head(metrics.features(classifier, images)).argmax(1) == labels).double().mean() >= 0.97


def test_samples_of_another_program_are_measured_too(digits, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=digits.pixels[:300, 0].numpy(), labels=digits.labels[:300].numpy())
    np.savez("b.npz", digits.pixels.permute(0, 2, 3, 1).numpy())  # no labels
    np.savez("c.npz", digits.pixels.permute(0, 2, 3, 1).numpy(), digits.labels.numpy())  # as the official evaluation
    labelled, unlabelled = run("--npz", "a.npz"), run("--npz", "b.npz", "--count", 100, "--output", "b.json")
    official = run("--npz", "c.npz", "--count", 100, "--output", "c.json")
    assert official["numbers"]["accuracy"]["generated"] > 0.97
    assert labelled["count"] == 300 and labelled["numbers"]["accuracy"]["generated"] > 0.99
    assert unlabelled["count"] == 100 and "accuracy" not in unlabelled["numbers"]


def test_a_part_of_a_file_is_a_fair_sample_of_it(tmp_path):
    for name, labels in (("in turn", np.arange(5000) % 10), ("sorted", np.arange(5000) // 500)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros((5000, 28, 28), np.uint8), labels=labels)
        path = tmp_path / f"{name}.npz"
        counts = evaluate.choose(path, *evaluate.read_npz(path), 1000)[1].bincount()
        assert counts.min() > 70 and counts.max() < 130


def test_wilsons_interval_is_that_of_the_tables():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                (1, 29, 0.0061, 0.1718)):
        assert metrics.wilson_interval(right / n, n) == pytest.approx((low, high), abs=1e-4)


def test_at_the_ends_of_wilsons_interval_the_fraction_is_1_96_standard_deviations_away():
    p, n, z = 0.9938, 10_000, 1.959964
    interval = metrics.wilson_interval(p, n)
    assert interval == pytest.approx((0.992061, 0.995160), abs=1e-6)  # the formula, by hand
    for end, sign in zip(interval, (1, -1), strict=True):
        assert p - end == pytest.approx(sign * z * (end * (1 - end) / n) ** 0.5, rel=1e-9)


def test_the_third_neighbour_is_that_of_a_loop():
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    expected = [sorted((p - q).norm().item() for j, q in enumerate(points) if j != i)[2] for i, p in enumerate(points)]
    torch.testing.assert_close(metrics.neighbour_distance(points), torch.tensor(expected))


def test_bad_requests_are_refused_before_any_work(weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    np.savez("large.npz", np.zeros((30, 32, 32, 1), np.uint8))
    np.savez("few.npz", np.zeros((3, 28, 28, 1), np.uint8))
    np.savez("float.npz", np.zeros((30, 28, 28, 1), np.float32))
    np.savez("labels.npz", arr_0=np.zeros((30, 28, 28, 1), np.uint8), labels=np.full(30, 12))
    np.savez("number.npz", arr_0=np.uint8(3))
    state = checkpoint.load(weights)
    flow = state | dict(diffusion=dict(schedule="flow", prediction="v", timesteps=50))
    tensors = flow.pop("ema")
    checkpoint.save(tmp_path / "flow.safetensors", flow, tensors)
    config = DiTConfig(image_size=8, patch_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=2)
    about = checkpoint.describe(DiT, config, Diffusion(), ("a", "b"), "others", 0, 1.0)
    checkpoint.save(tmp_path / "others.safetensors", about, DiT(config).state_dict())
    with open("array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "there.png").write_text("mine")
    for arguments, message in (
        (["--count", 1], "--count is 1: use 20"),
        (["--count", 20_000], "to 10000"),
        (["--checkpoint", "others.safetensors"], "trained on others, not on MNIST: name these images by --data"),
        (["--checkpoint", weights, "--steps", 0], "0 sampling steps: use 1 to 50"),
        (["--npz", "a.npz", "--also", "bits"], "leave out the flags"),
        (["--checkpoint", "flow.safetensors", "--also", "bits"], "for the schedules linear and cosine"),
        (["--npz", "none.npz"], "cannot read none.npz"),
        (["--npz", "text.npz"], "cannot read text.npz"),
        (["--npz", "array.npz"], "cannot read array.npz"),
        (["--npz", "number.npz"], "cannot read number.npz"),
        (["--npz", "few.npz", "--steps", 7], "leave out the flags"),
        (["--checkpoint", weights, "--output", "there.json"], "there.png is there already"),
        (["--npz", "large.npz"], "32, 32, 1"),
        (["--npz", "few.npz"], "holds 3 images"),
        (["--npz", "float.npz"], "float32"),
        (["--npz", "labels.npz"], "not 30 digits"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments)
    with pytest.raises(DataError, match="--data-dir"):
        run("--checkpoint", weights, "--also", "bits", "--data-dir", tmp_path)


# ------------------------------------------------------------------------------------------------------ any other data

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    """A folder of 3 classes of 40 pictures of 8 x 8: a disc of the class's colour at a random place, and noise."""
    root = tmp_path_factory.mktemp("discs")
    generator = np.random.default_rng(0)
    for label, name in enumerate(COLOURS):
        (root / name).mkdir()
        for i in range(40):
            y, x = np.mgrid[:8, :8] - generator.uniform(2, 5, (2, 1, 1))
            pixels = generator.uniform(0, 60, (8, 8, 3))
            pixels[..., 2 - label] += 160 * (y**2 + x**2 < 6)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pictures(discs) -> Images:
    return dataset.load(str(discs), image_size=8)


@pytest.fixture
def elsewhere(monkeypatch, tmp_path, discs):
    """An empty folder to work in. The classifier of the discs is elsewhere, and trained for a few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier, "MAX_EPOCHS", 60)
    monkeypatch.setattr(classifier, "CACHE", discs.parent / "classifiers")
    return tmp_path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """untrained(classes): the file of a network of 8 x 8 colour images that was never trained."""
    def make(classes: tuple[str, ...] = COLOURS, **shape) -> Path:
        shape = dict(image_size=8, patch_size=4, in_channels=3) | shape
        config = DiTConfig(hidden_size=8, depth=1, num_heads=1, num_classes=len(classes), **shape)
        makes = "images" if config.in_channels == 3 else "latents"
        process = Diffusion("linear", "eps", 20)
        about = checkpoint.describe(DiT, config, process, classes, "120 images of discs", 0, 1.0, makes=makes)
        path = tmp_path_factory.mktemp("untrained") / "weights.safetensors"
        checkpoint.save(path, about, DiT(config).state_dict())
        return path

    return make


def save_npz(path: Path, images: Images, labelled: bool = True) -> None:
    labels = dict(labels=images.labels.numpy()) if labelled else {}
    np.savez(path, arr_0=images.pixels.permute(0, 2, 3, 1).numpy(), **labels)


def test_own_images_are_measured_by_a_classifier_that_is_trained_once(
    discs, untrained, elsewhere, monkeypatch, capsys
):
    monkeypatch.setattr(classifier, "CACHE", Path("new") / "classifiers")
    words = ["--checkpoint", untrained(), "--dataset", discs, "--steps", 2, "--device", "cpu"]
    result = run(*words)
    assert result["count"] == 30 and result["against"] == "held_out" and result["classes"] == list(COLOURS)
    assert len(result["numbers"]["accuracy by class"]["real"]) == 3
    assert result["numbers"]["accuracy"]["real"] > 0.9
    assert min(result["numbers"][f"rho, {space}"]["generated"] for space in ("classifier", "random")) > 3  # of noise
    assert result["numbers"]["precision"]["generated"] < 0.2 < result["numbers"]["precision"]["real"]
    [file] = Path("new/classifiers").iterdir()
    printed = capsys.readouterr().out
    for note in (f"kept in {file}", "trained on 60 of the 120 images of discs0, and is right on", "no test images",
                 "with 30 of the 120"):
        assert note in printed and note in " ".join(result["notes"])
    monkeypatch.setattr(classifier, "fit", None)
    assert run(*words)["numbers"] == result["numbers"]


def test_own_images_are_at_their_own_floor(discs, pictures, elsewhere):
    real = classifier.DataReference(pictures)
    one, two = ([real.tensors[f"{name}.{part}"] for name in ("labels", "random")] for part in real.parts)
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
    save_npz(elsewhere / "real.npz", pictures)
    save_npz(elsewhere / "wrong.npz", dataclasses.replace(pictures, labels=(pictures.labels + 1) % 3))
    good, wrong = (run("--npz", f"{name}.npz", "--dataset", discs) for name in ("real", "wrong"))
    assert good["numbers"]["accuracy"]["generated"] > 0.9 and wrong["numbers"]["accuracy"]["generated"] < 0.1
    for space in ("classifier", "random"):
        assert 0.3 < good["numbers"][f"rho, {space}"]["generated"] < 2
        assert good["numbers"][f"rho, {space}"]["real"] == 1
        assert f"rho to random training images, {space}" not in good["numbers"]  # which only MNIST has


def test_images_without_classes_are_compared_in_random_features_only(discs, untrained, elsewhere):
    (elsewhere / "all").mkdir()
    for i, picture in enumerate(discs.glob("*/*.png")):
        (elsewhere / "all" / f"{i}.png").write_bytes(picture.read_bytes())
    words = ["--steps", 2, "--device", "cpu", "--dataset", "all", "--count", 20]
    for classes in ((), COLOURS):  # what the model knows does not matter
        result = run("--checkpoint", untrained(classes), *words, "--output", f"{len(classes)}.json")
        assert result["numbers"].keys() == {"FD, random", "rho, random"}
        assert "only random features" in result["notes"][0]
    assert not list(elsewhere.glob("**/*.safetensors"))


def test_a_model_without_labels_is_measured_on_images_with_classes(discs, untrained, elsewhere):
    table = run("--checkpoint", untrained(()), "--dataset", discs, "--steps", 2, "--device", "cpu")["numbers"]
    assert "accuracy" not in table and {"rho, classifier", "precision", "recall"} < table.keys()


def test_a_data_set_with_test_images_is_compared_with_these(pictures, untrained, elsewhere, monkeypatch):
    def small(name, root, train, download):
        assert (name, root, download) == ("cifar10", Path("data"), True)
        some = slice(None, None, 2) if train else slice(1, None, 2)
        return dataclasses.replace(pictures, pixels=pictures.pixels[some], labels=pictures.labels[some])

    monkeypatch.setattr(dataset, "from_torchvision", small)
    monkeypatch.setattr(classifier, "MIN_COUNT", 10)
    words = ["--checkpoint", untrained(), "--dataset", "cifar10", "--steps", 2, "--device", "cpu"]
    result = run(*words, "--also", "memorization", "bits")
    assert result["count"] == 60 and result["against"] == "test" and len(result["notes"]) == 1
    assert result["numbers"]["bits per dimension of real test images, at most"]["generated"] > 0
    assert result["numbers"]["near-duplicates"]["generated"] == 0
    with pytest.raises(UsageError, match="use 15 or less"):
        run(*words, "--against", "held-out", "--count", 20)


def test_copies_are_found_where_there_are_no_test_images(pictures, discs, elsewhere):
    save_npz(elsewhere / "copies.npz", pictures, labelled=False)
    table = run("--npz", "copies.npz", "--dataset", discs, "--also", "memorization")["numbers"]
    distance = table["distance to the nearest training image, median"]
    assert table["near-duplicates"]["generated"] == 30 and distance["generated"] < 0.01
    assert table["near-duplicates"]["real"] < 5 and distance["real"] > 0.1  # to another image than itself


def test_the_parts_that_are_kept_out_have_a_quarter_of_each_class_and_no_image_twice(monkeypatch):
    labels = torch.tensor([0] * 40 + [1] * 80 + [2] * 4)
    images = Images(torch.zeros(124, 1, 8, 8), labels, COLOURS, "124 images")
    parts, rest = classifier.kept_out(images, 2)
    assert torch.cat([*parts, rest]).sort().values.tolist() == list(range(124))
    assert [labels[part].bincount().tolist() for part in (*parts, rest)] == [[10, 20, 1], [10, 20, 1], [20, 40, 2]]
    monkeypatch.setattr(classifier, "MAX_COUNT", 25)
    [part], rest = classifier.kept_out(images, 1)
    assert labels[part].bincount().tolist() == [8, 16, 1] and len(rest) == 99


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 28), (3, 32), (1, 33), (3, 64), (3, 100)])
def test_both_networks_take_images_of_any_size_in_grey_and_in_colour(channels, size):
    images = torch.randint(256, (3, channels, size, size), dtype=torch.uint8)
    network = Classifier(channels, size, 5).eval()
    assert network(dataset.to_float(images)).shape == (3, 5)
    assert network.body[0](dataset.to_float(images)).shape[-1] <= 32  # so that larger images take little more time
    for features in (network, RandomFeatures(channels)):
        assert classifier.features(features, images).shape == (3, 64)
    assert max(module.numel() for module in network.parameters()) == 64 * 64 * 9  # at any size


def test_a_classifier_that_is_not_as_it_was_written_is_refused(pictures, elsewhere, monkeypatch):
    classifier.DataReference(pictures)
    [path] = classifier.CACHE.glob("*-60.safetensors")
    content, state = path.read_bytes(), checkpoint.read_safetensors(path)
    monkeypatch.setattr(classifier, "CACHE", elsewhere)
    monkeypatch.setattr(classifier, "fit", None)
    path = elsewhere / path.name
    weights = state.pop("ema")
    name = "head.weight"
    wrong = [content[:-9], content[:-9] + b"x" + content[-8:], b"", bytes(100)]
    for about, tensors in (
        (state | dict(images="f" * 64), weights), (state | dict(count=7), weights), (state | dict(format="x"), weights),
        ({}, weights), (state, {}), (state, weights | {name: weights[name].double()}),
        (state, weights | {name: weights[name][:2]}), (state, weights | {name: weights[name] * torch.nan}),
    ):
        checkpoint.save(path, about, tensors)
        wrong.append(path.read_bytes())
    for damaged in wrong:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged \(.*remove it"):
            classifier.DataReference(pictures)
    path.write_bytes(content)
    assert classifier.DataReference(pictures).notes


def test_a_training_that_is_stopped_leaves_no_file(pictures, elsewhere, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "CACHE", elsewhere / "outputs")
    monkeypatch.setattr(classifier, "jitter", stop)
    with pytest.raises(KeyboardInterrupt):
        classifier.DataReference(pictures)
    assert not list((elsewhere / "outputs").iterdir())


def test_too_little_data_names_the_fix(pictures, elsewhere):
    def some(index, classes=COLOURS) -> Images:
        labels = pictures.labels[index] if len(classes) > 1 else torch.zeros(len(pictures.labels[index]))
        return Images(pictures.pixels[index], labels.long(), classes, "images of discs")

    for images, fix in (
        (some(slice(None, None, 3)), "leave 10 to compare with, which is too few: add some, to have about 80"),
        (some(slice(0, 83)), "class red has 3 images"),
        (some(slice(0, 40), ("blue",)), "name the folder blue itself"),
        (some(slice(0, 3), ()), "data set has 3 images"),
        (dataclasses.replace(pictures, pixels=pictures.pixels[..., :4, :4]), "have 4 pixels a side"),
    ):
        with pytest.raises(DataError, match=fix):
            classifier.DataReference(images)
    assert classifier.DataReference(some(slice(0, 80), ())).tensors["random.others"].shape == (20, 64)


def test_what_does_not_fit_the_data_is_refused_before_any_work(
    discs, pictures, images, untrained, elsewhere, monkeypatch
):
    monkeypatch.setattr(evaluate, "DataReference", None)
    np.savez("digits.npz", arr_0=np.zeros((30, 32, 32), np.uint8))
    np.savez("wide.npz", np.zeros((30, 8, 9, 3), np.uint8))
    np.savez("labels.npz", arr_0=np.zeros((30, 8, 8, 3), np.uint8), labels=np.full(30, 3))
    np.savez("few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez("grey.npz", arr_0=np.zeros((30, 8, 8), np.uint8))
    model = ["--checkpoint", untrained(), "--steps", 2, "--device", "cpu"]
    for arguments, message in (
        (model, "trained on 120 images of discs, not on MNIST: name these images by --dataset FOLDER or NAME"),
        ([*model, "--dataset", "nowhere"], "no data set or folder 'nowhere'"),
        ([*model, "--dataset", images], "are grey, and the samples in colour: name their own --dataset"),
        ([*model, "--dataset", discs, "--against", "test"], "has no test images: leave out"),
        ([*model, "--dataset", discs, "--also", "bits"], "has no test images: leave out"),
        (["--checkpoint", untrained(("a", "b", "c")), "--dataset", discs], "classes of .* are not those of this model"),
        (["--checkpoint", untrained(in_channels=4), "--dataset", discs], "makes latents: add --vae"),
        (["--npz", "wide.npz", "--dataset", discs], "give uint8 square images"),
        (["--npz", "grey.npz", "--dataset", discs], "are in colour, and the samples grey"),
        (["--npz", "labels.npz", "--dataset", discs], "not 30 numbers 0 to 2"),
        (["--npz", "few.npz", "--dataset", discs], "holds 3 images"),
        (["--npz", "digits.npz", "--dataset", "mnist-5000", "--against", "test"], "mnist-5000 has no test images"),
    ):
        with pytest.raises((UsageError, DataError), match=message):
            run(*arguments)


def test_more_samples_than_real_images_are_refused(discs, untrained, elsewhere):
    with pytest.raises(UsageError, match="--count is 31, and .* 30 images to compare with: use 30 or less"):
        run("--checkpoint", untrained(), "--dataset", discs, "--count", 31)


@pytest.mark.parametrize("name", ["metrics", "classifier", "latents"])
def test_what_measures_and_decodes_knows_no_command_line(name):
    nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
    assert "cli" not in [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert "cli" not in [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
