"""Claims about the data."""

import errno
import os
import re
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

import dataset
import folders
from conftest import ROOT
from dataset import DataError, Images, batches, from_folder, hold_out, index_batches, load, to_float
from sampling import to_uint8


def write_idx(folder, train: int = 20, test: int = 10) -> None:
    """Four IDX files of random images in the layout of torchvision."""
    folder.mkdir(parents=True)
    for prefix, n in (("train", train), ("t10k", test)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + pixels.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels.tobytes())


def test_pixels_survive_the_way_to_the_network_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_float(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)


def test_pixels_out_of_range_do_not_wrap_around():
    assert to_uint8(torch.tensor([-1.01, 1.01, -9.0, 9.0])).tolist() == [0, 255, 0, 255]


def test_each_epoch_shows_every_image_once():
    indices = torch.cat(list(islice(index_batches(10, 4, seed=0, start=0), 5)))
    assert sorted(indices[:10].tolist()) == list(range(10))
    assert sorted(indices[10:].tolist()) == list(range(10))
    assert indices[:10].tolist() != indices[10:].tolist()


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_batches_resume_at_any_step(batch_size):
    whole = list(islice(index_batches(10, batch_size, seed=1, start=0), 12))
    for start in (1, 5, 11):
        assert torch.equal(next(index_batches(10, batch_size, seed=1, start=start)), whole[start])


def test_ranks_share_each_batch():
    data = Images(torch.arange(40).view(40, 1, 1, 1).byte(), torch.arange(40), (), "")
    _, whole = next(batches(data, 12, seed=0))
    parts = [next(batches(data, 12, seed=0, rank=rank, world=3))[1] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_flipped_images_are_mirrored_left_to_right_half_of_the_time():
    data = Images(torch.arange(12).view(1, 1, 3, 4).byte(), torch.zeros(1).long(), (), "")
    plain, flipped = (next(batches(data, 1000, seed=0, flip=flip))[0] for flip in (False, True))
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert ((flipped == plain).flatten(1).all(1) ^ mirrored).all()
    assert 450 < mirrored.sum() < 550


def test_flips_depend_only_on_the_seed_and_the_step():
    """So a run that is resumed, and one of several processes, see the same batches."""
    data = Images(torch.rand(40, 1, 4, 4), torch.arange(40), (), "")
    whole = [x for x, _ in islice(batches(data, 12, seed=3, flip=True), 6)]
    assert torch.equal(next(batches(data, 12, seed=3, start=5, flip=True))[0], whole[5])
    parts = [next(batches(data, 12, seed=3, start=4, rank=rank, world=3, flip=True))[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole[4])
    steps = [tuple(dataset.coins(12, seed, step).tolist()) for seed in range(3) for step in range(10)]
    assert len(set(steps)) == 30


def test_one_image_in_twenty_of_each_class_is_held_out():
    labels = torch.tensor([0] * 10 + [1] * 11 + [2] * 200)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    pixels = torch.arange(len(labels)).view(-1, 1, 1, 1).int()
    train, held_out = hold_out(Images(pixels.clone(), labels.clone(), ("a", "b", "c"), "221 images of folder"))
    assert held_out.labels.bincount().tolist() == [0, 1, 10]
    assert train.labels.bincount().tolist() == [10, 10, 190]
    for part in (train, held_out):
        assert torch.equal(part.labels, labels[part.pixels.flatten()])
    assert sorted([*train.pixels.flatten().tolist(), *held_out.pixels.flatten().tolist()]) == list(range(221))
    assert held_out.source == "11 of 221 images of folder" and train.source == "210 of 221 images of folder"
    again = hold_out(Images(pixels, labels, ("a", "b", "c"), ""))[1]
    assert torch.equal(again.pixels, held_out.pixels)


def test_small_classes_keep_all_their_images():
    train, held_out = hold_out(Images(torch.arange(10).view(10, 1, 1, 1), torch.zeros(10).long(), (), "10 images"))
    assert len(train.labels) == 10 and len(held_out.labels) == 0 and held_out.pixels.shape == (0, 1, 1, 1)


def test_another_seed_is_another_order():
    assert not torch.equal(next(index_batches(50, 50, 0, 0)), next(index_batches(50, 50, 1, 0)))


# ---------------------------------------------------------------------------------------------------------- downloads


def test_files_of_fashion_mnist_are_read(tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    data = load("fashion-mnist", tmp_path)
    assert data.pixels.shape == (20, 1, 28, 28)
    assert data.pixels.dtype == torch.uint8
    assert data.labels.tolist() == [i % 10 for i in range(20)]
    assert data.classes[9] == "ankle-boot"
    assert load("fashion-mnist", tmp_path, train=False).pixels.shape == (10, 1, 28, 28)
    assert load("fashion-mnist", tmp_path, image_size=32).pixels.shape == (20, 1, 32, 32)


@pytest.mark.parametrize("file", dataset.IDX_FILES)
def test_a_truncated_file_is_named(tmp_path, file):
    raw = tmp_path / "KMNIST" / "raw"
    write_idx(raw)
    (raw / file).write_bytes((raw / file).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{file} is corrupt or incomplete, delete it"):
        load("kmnist", tmp_path)


def test_an_mnist_of_other_bytes_is_not_trained_on(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    with pytest.raises(DataError, match="train-images-idx3-ubyte is corrupt or incomplete"):
        load("mnist", tmp_path)


class Mirror(BaseHTTPRequestHandler):
    """Answers every request with `status`, and with a body shorter than it says."""

    status = 404

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half a file")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status", [200, 403, 404, 503])
def test_a_mirror_that_fails_leaves_nothing_to_train_on(tmp_path, monkeypatch, status):
    """A real download, from a server here: an error, or a file that breaks off."""
    monkeypatch.setattr(Mirror, "status", status)
    with HTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        for _ in range(2):  # the second finds what the first left behind
            with pytest.raises(DataError, match=r"cannot get MNIST .*--data-dir"):
                load("mnist", tmp_path)
        server.shutdown()


FAILURES = [
    RuntimeError("Error downloading train-images-idx3-ubyte.gz"),
    RuntimeError("File not found or corrupted."),
    OSError("HTTP Error 403: Forbidden"),
    OSError("[SSL: CERTIFICATE_VERIFY_FAILED]"),
    EOFError("Compressed file ended before the end-of-stream marker was reached"),
    dataset.HTTPException("IncompleteRead"),
    TimeoutError(),
]


@pytest.fixture(params=FAILURES, ids=lambda e: f"{type(e).__name__} {e}"[:40])
def failing_download(request, monkeypatch):
    def fail(*_, **__):
        raise request.param

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    return request.param


def test_a_failed_download_says_what_to_put_where(failing_download, tmp_path):
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*dataset.IDX_FILES, str(tmp_path / "MNIST" / "raw"), "--data-dir", str(failing_download)):
        assert part in message


def test_the_default_falls_back_to_the_bundled_digits(failing_download, tmp_path):
    with pytest.warns(UserWarning, match="Using the bundled 5,000 digits of MNIST instead") as caught:
        data = load(None, tmp_path)
    assert sum("instead" in str(warning.message) for warning in caught) == 1
    assert data.pixels.shape == (5000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [500] * 10
    assert data.source == "the bundled 5,000 digits of MNIST"


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="mnist, fashion-mnist, kmnist, cifar10, mnist-5000, or the path of a folder"):
        load("no-such-thing")


# ------------------------------------------------------------------------------------------------------------ folders


def save(path, mode="RGB", size=(12, 10), color=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if color is not None else 0).save(path)


def test_class_folders_become_classes(images):
    data = load(str(images), image_size=8)
    assert data.classes == ("dark", "grey", "light")
    assert data.pixels.shape == (60, 1, 8, 8)
    brightness = [data.pixels[data.labels == label].float().mean() for label in range(3)]
    assert brightness[0] < brightness[1] < brightness[2]


def test_loose_images_have_no_classes(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", color=(200, 0, 0))
    data = load(str(tmp_path), image_size=8)
    assert data.classes == ()
    assert data.labels.tolist() == [0, 0, 0]
    assert data.pixels.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [255]), ("L", 100, [100]), ("LA", (100, 255), [100]), ("LA", (100, 0), [255]),
        ("I;16", 100 * 257, [100]), ("P", 0, [0]), ("P", 1, [1, 2, 3]),
        ("RGB", (1, 2, 3), [1, 2, 3]), ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 0), [255]), ("CMYK", (0, 0, 0, 255), [0]), ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
    ],
)
def test_images_of_any_mode_are_read(tmp_path, mode, color, expected):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "P":
        image = Image.new(mode, (12, 10), color)
        image.putpalette([0, 0, 0, 1, 2, 3])
        image.save(path)
    else:
        save(path, mode, color=color)
    assert from_folder(tmp_path, 4).pixels[0][:, 0, 0].tolist() == expected


def test_images_are_resized_on_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60), np.uint8)
    pixels[:, 20:40] = 255  # a white square in the middle
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = from_folder(tmp_path, 10).pixels[0]
    assert image.shape == (1, 10, 10)
    assert image[:, 2:-2, 2:-2].min() == 255


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for path in ("a/1.png", "a/deeper/2.png", "b/3.PNG", "a/._1.png", "a/.cache/4.png", ".git/5.png", "__MACOSX/6.png"):
        save(tmp_path / path)
    data = load(str(tmp_path), image_size=4)
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 0, 1]


def test_links_to_folders_are_not_followed(tmp_path):
    save(tmp_path / "a" / "1.png")
    for link in ("one", "two"):
        (tmp_path / "a" / link).symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "nowhere.png")
    assert load(str(tmp_path), image_size=4).labels.tolist() == [0]


def test_a_long_thin_image_is_cropped_before_it_is_enlarged(tmp_path):
    save(tmp_path / "a.png", size=(2, 60_000))
    assert from_folder(tmp_path, 256).pixels[0].shape == (1, 256, 256)  # uncropped, it would be of 6 gigabytes


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))  # a white upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # which says: turn by 90 degrees to the right
    image.save(tmp_path / "a.png", exif=exif)
    pixels = from_folder(tmp_path, 8).pixels[0][0]
    assert pixels[:, 5:].min() == 255 and pixels[:, :3].max() == 0


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_broken_image_is_named(tmp_path, content):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.png .*delete or replace it"):
        load(str(tmp_path), image_size=4)


def test_a_truncated_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.png .*delete or replace it"):
        load(str(tmp_path), image_size=4)


def test_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        load(str(tmp_path))
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match=r"cats holds no images"):
        load(str(tmp_path))
    save(tmp_path / "cats" / "1.png")
    save(tmp_path / "2.png")
    with pytest.raises(DataError, match="both images and folders"):
        load(str(tmp_path))


def test_a_folder_that_does_not_fit_in_memory_names_the_size_that_fits(images, monkeypatch):
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 60 * 16 * 16)
    with pytest.raises(DataError, match="60 images of .* do not fit in memory: use --image-size 16 or less"):
        load(str(images))
    assert load(str(images), image_size=16).pixels.shape == (60, 1, 16, 16)


def test_what_is_not_free_is_not_filled(images, monkeypatch):
    """The kernel would end the process without a word."""
    monkeypatch.setattr(dataset, "free_memory", lambda: 60 * 16 * 16)
    with pytest.raises(DataError, match="60 images of .* do not fit in memory: use --image-size 16 or less"):
        load(str(images))
    with pytest.raises(DataError, match="bundled .* do not fit in memory: use --image-size"):
        load("mnist-5000", image_size=64)
    with pytest.raises(DataError, match="a step would take 3.0 GiB of memory, and 0.0 are free: make it shorter"):
        dataset.check_free(3 * 2**30, "a step", "make it shorter")
    dataset.check_free(60 * 16 * 16, "a step", "")


def test_free_memory_is_what_the_kernel_and_the_container_allow(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "max"
    meminfo.write_text("MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:  5000 kB\n")
    assert dataset.free_memory(meminfo, limit) == 5000 * 1024
    for text, free in (("max\n", 5000 * 1024), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert dataset.free_memory(meminfo, limit) == free
    assert dataset.free_memory(tmp_path / "none", limit) == float("inf")
    assert dataset.free_memory() > 2**20


def memory(field: str) -> int:
    """Bytes that this process has in memory (VmRSS), or had at most (VmHWM) since clear_refs was written."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", open("/proc/self/status").read())[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the peak of memory anew")
@pytest.mark.parametrize("what", ["folder", "resized"])
def test_pixels_are_held_once_while_they_are_made(tmp_path, monkeypatch, what):
    monkeypatch.setattr(dataset, "RESIZE_AT_ONCE", 2**20)
    save(tmp_path / "0.png", "L", (8, 8))
    for i in range(1, 1000):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    small = from_folder(tmp_path, 8)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = memory("VmRSS")
    data = from_folder(tmp_path, 256) if what == "folder" else dataset.resized(small, 256)
    assert data.pixels.numel() == 1000 * 256**2
    assert memory("VmHWM") - before < 1.6 * data.pixels.numel()


def test_the_bundled_digits_are_500_of_each(monkeypatch, tmp_path):
    data = load("mnist-5000")
    assert data.pixels.shape == (5000, 1, 28, 28) and data.pixels.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [500] * 10 and data.labels.dtype == torch.int64
    assert data.classes == tuple("0123456789")
    assert data.pixels.float().mean().item() == pytest.approx(33.3, abs=1)  # as that of all of MNIST
    licence = " ".join(dataset.MNIST_5000.with_suffix(".txt").read_text().split())
    assert "of the training set of MNIST" in licence and "Creative Commons Attribution-Share Alike 3.0" in licence
    monkeypatch.setattr(dataset, "MNIST_5000", tmp_path / "none.npz")
    with pytest.raises(DataError, match="--data-dir"):
        load("mnist-5000")


def test_class_folders_are_sorted_as_people_count(tmp_path):
    for name in ("10", "9", "1", "2", "b", "a"):
        save(tmp_path / name / "1.png")
    assert load(str(tmp_path), image_size=4).classes == ("1", "2", "9", "10", "a", "b")


def test_a_class_name_is_the_same_however_its_accent_is_written(tmp_path):
    save(tmp_path / "cafe\u0301" / "1.png")
    assert load(str(tmp_path), image_size=4).classes == ("caf\u00e9",)


def test_one_colour_image_among_many_grey_ones_keeps_its_colour(tmp_path):
    for i in range(256):
        save(tmp_path / f"{i:03}.png", *(("RGB", (4, 4), (255, 0, 0)) if i % 2 else ("L", (4, 4), 128)))
    pixels = load(str(tmp_path), image_size=4).pixels
    assert pixels[1, :, 0, 0].tolist() == [255, 0, 0] and pixels[0, :, 0, 0].tolist() == [128] * 3


GREY = ["grey.png", "grey.gif", "palette.png", "grey.jpg"]


def save_grey(folder) -> None:
    """The same grey image in formats of colour."""
    folder.mkdir(exist_ok=True)
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for name in GREY:
        image.convert("P" if name.startswith("palette") else "RGB").save(folder / name)


def test_images_that_look_grey_have_one_channel_in_any_format(tmp_path):
    save_grey(tmp_path)
    pixels = load(str(tmp_path), image_size=8).pixels
    assert pixels.shape == (4, 1, 8, 8) and pixels.is_contiguous()
    for image in pixels[torch.tensor([0, 1, 3])]:  # sorted by name, the photograph is second
        assert (image.flatten() - torch.arange(64)).abs().max() <= 4
    save(tmp_path / "colour.png", size=(8, 8), color=(3, 2, 1))
    assert load(str(tmp_path), image_size=8).pixels.shape == (5, 3, 8, 8)


@pytest.mark.parametrize(("largest", "bits"), [(255, 8), (1023, 10), (4000, 12), (2**14 - 1, 14), (40_000, 16)])
def test_files_of_16_bits_need_not_use_them_all(tmp_path, largest, bits):
    """The largest value of the whole set decides, so that images keep their brightness relative to each other."""
    for name, value in (("dark.png", largest // 4), ("bright.tif", largest), ("big-endian.tif", largest)):
        mode, order = ("I;16B", "big") if name.startswith("big") else ("I;16", "little")
        Image.frombytes(mode, (8, 8), value.to_bytes(2, order) * 64).save(tmp_path / name)
    data = load(str(tmp_path), image_size=4)
    white = 255 / (2**bits - 1)
    assert data.pixels.shape == (3, 1, 4, 4)
    assert data.pixels[:, 0, 0, 0].tolist() == [round(v * white) for v in (largest, largest, largest // 4)]
    assert f"{bits} of the 16 bits of their files are used" in data.summary


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 255)])
def test_pixels_whose_white_is_unknown_are_refused(tmp_path, mode, value):
    save(tmp_path / "a.tif", mode, color=value)
    with pytest.raises(DataError, match=r"a\.tif .*save it with 8 or 16 bits"):
        load(str(tmp_path), image_size=4)


def test_a_damaged_exif_tag_does_not_lose_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8), (200, 9, 9)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    at, read = content.index(b"Exif"), 0
    for i in range(at + 6, at + 32):  # the header and the tag: type, count, value
        for value in (0, 2, 5, 255):
            damaged = bytearray(content)
            damaged[i] = value
            (tmp_path / "a.jpg").write_bytes(damaged)
            assert load(str(tmp_path), image_size=8).pixels.shape == (1, 3, 8, 8)
            read += 1
    assert read > 50


def test_the_idx_files_may_lie_in_the_folder_itself(tmp_path):
    write_idx(tmp_path / "files")
    data = load("fashion-mnist", tmp_path / "files")
    assert data.labels.tolist() == [i % 10 for i in range(20)]


def test_a_fingerprint_sees_pixels_labels_and_names():
    data = Images(torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 1]), ("a", "b"), "")
    others = [
        Images(torch.ones(2, 1, 4, 4).byte(), data.labels, data.classes, ""),
        Images(data.pixels, torch.tensor([1, 0]), data.classes, ""),
        Images(data.pixels, data.labels, ("b", "a"), ""),
        Images(torch.zeros(1, 2, 4, 4).byte(), data.labels, data.classes, ""),
    ]
    same = Images(data.pixels.clone(), data.labels.clone(), ("a", "b"), "elsewhere")
    assert same.fingerprint() == data.fingerprint()
    assert len({data.fingerprint(), *(other.fingerprint() for other in others)}) == 5


# ------------------------------------------------------------------------------------------- what is no class, in words


OUTPUTS = ("evaluation-1.json", "evaluation-1.png", "grid-1.png", "guidance-12.png", "denoising-2.gif",
           "trajectory-1.png", "interpolation-1.png", "interpolation-1.gif", "latents-1.npz", "sweep-steps-1.png")


@pytest.mark.parametrize("classes", [["cats", "dogs"], [""]])
@pytest.mark.parametrize("place", ["", "runs", "tries", "cats", "runs/conditioning"])
def test_a_run_inside_its_data_is_no_class(tiny_run, tmp_path, monkeypatch, classes, place):
    for name in classes:
        save(tmp_path / name / "1.png", color=(9, 0, 0))
    before = from_folder(tmp_path, 8)
    for i in (1, 2):
        shutil.copytree(tiny_run, tmp_path / place / f"images-{i}")
    monkeypatch.chdir(tmp_path)
    after = load(".", image_size=8)
    assert after.classes == before.classes and after.fingerprint() == before.fingerprint()
    if place == "runs":
        save(tmp_path / "runs" / "comparison.png")
        assert load(".", image_size=8).fingerprint() == before.fingerprint()


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_inside_a_folder_are_no_class(tmp_path, name):
    save(tmp_path / "cats" / "1.png")
    save(tmp_path / "outputs" / "mine.png")
    assert load(str(tmp_path), image_size=4).classes == ("cats", "outputs")  # which may be a class of its own
    (tmp_path / "outputs" / name).write_bytes(b"")
    assert load(str(tmp_path), image_size=4).classes == ("cats",)


def test_every_name_that_our_commands_give_is_known():
    stems = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        for call in re.findall(r"output_path\(args.*\)", path.read_text()):
            stems |= {name.replace("{args.what}", "steps") for name in re.findall(r'"([^"]+\.\w+)"', call)}
    assert len(stems) >= 8
    for name in stems:
        assert folders.OUTPUT_FILE.fullmatch(name.replace(".", "-1.")), name


def test_a_class_may_be_called_runs(tmp_path):
    for name in ("runs", "walks"):
        save(tmp_path / name / "further" / "1.png")
        save(tmp_path / name / "2.png")
    assert load(str(tmp_path), image_size=4).classes == ("runs", "walks")


@pytest.mark.parametrize("above", ["", "archive/data"])
def test_class_folders_one_level_down_are_pointed_at(tmp_path, above):
    for part, n in (("test", 3), ("train", 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                save(tmp_path / above / part / name / f"{i}.png")
    with pytest.raises(DataError, match=rf"no images themselves.*: use {tmp_path / above / 'train'} if") as caught:
        load(str(tmp_path), image_size=4)
    assert "\n" not in str(caught.value)
    assert load(str(tmp_path / above / "train"), image_size=4).classes == ("cat", "dog")
    (tmp_path / above / "train").rename(tmp_path / above / "first")
    with pytest.raises(DataError, match=rf"use {tmp_path / above / 'test'} if"):  # which has the most images
        load(str(tmp_path), image_size=4)


def test_a_summary_names_the_classes_and_their_sizes(tmp_path, images):
    assert from_folder(images, 8).summary == f"60 images of {images.name} (3 classes of 20 images: dark, grey, light)"
    for i, name in enumerate("abcdefg"):
        for j in range(i + 1):
            save(tmp_path / "many" / name / f"{j}.png")
    assert from_folder(tmp_path / "many", 4).summary == (
        "28 images of many (7 classes of 1 to 7 images: a, b, c, d, e ...)"
    )
    assert from_folder(tmp_path / "many" / "b", 4).summary == "2 images of b (no classes)"
    save(tmp_path / "one" / "cats" / "1.png")
    data = from_folder(tmp_path / "one", 4)
    assert data.summary == "1 images of one (1 class of 1 image: cats)" and data.source == "1 images of one"


# -------------------------------------------------------------------------------------------------------- what is wrong


def fail_at(name: str, error: OSError):
    """A function of the system, or of Pillow, that fails at the file or folder of this name."""
    def wrap(function):
        def attempt(path, *arguments, **options):
            if os.path.basename(path) == name:
                error.filename = str(path)
                raise error
            return function(path, *arguments, **options)

        return attempt

    return wrap


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "may not be read: give yourself the permission"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "is not there: check its name, and whether another program"),
        (OSError(errno.EIO, "Input/output error"), r"\(Input/output error\): copy it to another disk"),
    ],
)
@pytest.mark.parametrize("name", ["1.png", "deeper", "cats"])
def test_what_the_system_refuses_is_not_called_a_broken_image(tmp_path, monkeypatch, error, sentence, name):
    for path in ("cats/1.png", "cats/deeper/2.png", "dogs/3.png"):
        save(tmp_path / path)
    monkeypatch.setattr(folders.Image, "open", fail_at(name, error)(folders.Image.open))
    monkeypatch.setattr(folders.os, "scandir", fail_at(name, error)(os.scandir))
    with pytest.raises(DataError, match=rf"{name} {sentence}|cannot read \S*{name} {sentence}") as caught:
        load(str(tmp_path), image_size=4)
    assert "delete" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_image_is_not_to_be_deleted(tmp_path):
    with pytest.raises(DataError, match=r"no\.png is not there: check its name"):
        folders.read_image(tmp_path / "no.png", "L", 4)
    with pytest.raises(DataError, match="is a folder: name an image file"):
        folders.read_image(tmp_path, "L", 4)
