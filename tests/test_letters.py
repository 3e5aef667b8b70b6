"""Claims about tools/letters.py: a data set of letters, drawn in the fonts that come with matplotlib."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path

import letters
from cli import UsageError
from dataset import load

FONTS = Path(get_data_path()) / "fonts" / "ttf"


@pytest.fixture(autouse=True)
def few_fonts(monkeypatch):
    """A machine with no fonts but matplotlib's, and those of --font-dir."""
    find = letters.font_manager.findSystemFonts
    monkeypatch.setattr(letters.font_manager, "findSystemFonts", lambda places=None: find(places) if places else [])


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """The letters of ten fonts, (10, 26, 28, 28)."""
    names = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneral",
             "STIXGeneralBol", "cmr10", "cmss10", "cmti10"]
    return np.stack([letters.draw_fonts(FONTS / f"{name}.ttf")[0][2] for name in names])


def test_the_letters_are_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    letters.main([])
    lines = capsys.readouterr().out.splitlines()
    train, test = (load(name, image_size=28) for name in ("letters", "letters-test"))
    for data, line in ((train, lines[1]), (test, lines[2])):
        assert data.classes == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ") and data.pixels.shape[1:] == (1, 28, 28)
        counts = data.labels.bincount()
        assert counts.min() == counts.max() >= 1
        assert f"{counts[0]} fonts, {len(data.labels)} images" in line
    assert len(train.labels) > 15 * 26 and "apt install fonts-" in lines[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "letters-test"]
    before = sorted(tmp_path.rglob("*"))
    for words in ([], ["--output", "letters-test"]):
        with pytest.raises(UsageError, match="is there already: give another name by --output"):
            letters.main(words)
    assert sorted(tmp_path.rglob("*")) == before


def test_letters_fill_the_box_and_are_centred_by_their_mass(drawn):
    assert drawn.dtype == np.uint8 and (drawn.max((2, 3)) == 255).all()
    at = np.arange(28) + 0.5
    for pixels in drawn.reshape(-1, 28, 28).astype(float):
        rows, columns = pixels.any(1).nonzero()[0], pixels.any(0).nonzero()[0]
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
        for axis, edge in ((1, rows), (0, columns)):
            centre = (pixels.sum(axis) @ at) / pixels.sum()
            assert abs(centre - 14) <= 0.51 or 0 in edge or 27 in edge


def test_symbols_and_boxes_are_not_letters(drawn):
    boxes = np.zeros_like(drawn[:1])
    boxes[..., 6:22, 6:22] = 255
    symbols = np.roll(drawn[:1], 5, axis=1)  # each letter drawn as another
    assert letters.legible(np.concatenate([drawn, boxes, symbols])).tolist() == [True] * 10 + [False] * 2
    (_, _, boxes), = letters.draw_fonts(FONTS / "LastResortHE-Regular.ttf")
    assert not letters.legible(np.concatenate([drawn, boxes[None]]))[-1]


def test_fonts_of_hairlines_are_not_solid(drawn):
    hairlines = np.where(np.indices((28, 28)).sum(0) % 4, drawn[:1] // 2, drawn[:1])  # half of a pixel wide, mostly
    assert letters.solid(np.concatenate([drawn, hairlines])).tolist() == [True] * 10 + [False]


def test_fonts_that_look_the_same_are_taken_once(drawn):
    moved = np.minimum(drawn[3:4], 240)
    assert letters.distinct(np.concatenate([drawn, drawn[:2], moved])) == list(range(10))


def test_a_family_is_either_for_training_or_for_testing():
    families = [f"Family{i} {kind}" for i in range(100) for kind in ("Sans", "Serif", "Sans")]
    is_test = letters.held_out(families)
    assert sum(is_test) == 30
    assert all(len(set(is_test[i : i + 3])) == 1 for i in range(0, 300, 3))
    for n in range(2, 12):
        assert 0 < sum(letters.held_out(families[: 3 * n])) < 3 * n


def test_fonts_without_letters_and_broken_files_are_passed_over(tmp_path):
    assert letters.draw_fonts(FONTS / "STIXSizOneSymReg.ttf") == []
    content = (FONTS / "DejaVuSans.ttf").read_bytes()
    for i, broken in enumerate((b"", b"no font", content[:1000], content[: len(content) // 2])):
        (tmp_path / f"{i}.ttf").write_bytes(broken)
        assert letters.draw_fonts(tmp_path / f"{i}.ttf") == []


def test_the_fonts_of_another_folder_are_found(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "new.ttf").write_bytes((FONTS / "cmr10.ttf").read_bytes())
    assert tmp_path / "deeper" / "new.ttf" in letters.font_files(tmp_path)
    with pytest.raises(UsageError, match="no folder .*: give one that holds fonts to --font-dir"):
        letters.main(["--output", str(tmp_path / "out"), "--font-dir", str(tmp_path / "none")])


def test_what_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    write = letters.write_images

    def stopped(folder, fonts):
        if folder.name == "out-test":
            raise KeyboardInterrupt
        write(folder, fonts[:1])

    monkeypatch.setattr(letters, "font_files", lambda _: [FONTS / f"{name}.ttf" for name in ("cmr10", "DejaVuSans")])
    monkeypatch.setattr(letters, "write_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        letters.main(["--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
