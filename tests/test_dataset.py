"""Claims about the data."""

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
from dataset import DataError, Images, batches, from_folder, index_batches, load, to_float
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
        save(tmp_path / f"{i}.png")
    data = load(str(tmp_path), image_size=8)
    assert data.classes == ()
    assert data.labels.tolist() == [0, 0, 0]
    assert data.pixels.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [255]), ("L", 100, [100]), ("LA", (100, 255), [100]), ("LA", (100, 0), [255]),
        ("I;16", 100 * 257, [100]), ("P", 0, [0, 0, 0]),
        ("RGB", (1, 2, 3), [1, 2, 3]), ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 0), [255, 255, 255]), ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
    ],
)
def test_images_of_any_mode_are_read(tmp_path, mode, color, expected):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
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
    assert from_folder(tmp_path, 256).pixels[0].shape == (3, 256, 256)  # uncropped, it would be of 6 gigabytes


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


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 255)])
def test_pixels_whose_white_is_unknown_are_refused(tmp_path, mode, value):
    save(tmp_path / "a.tif", mode, color=value)
    with pytest.raises(DataError, match=r"a\.tif .*save it with 8 or 16 bits"):
        load(str(tmp_path), image_size=4)


def test_a_damaged_exif_tag_does_not_lose_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.jpg", exif=exif, quality=95)
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
