"""Draw the letters A to Z in every font of this machine, as images like those of MNIST: 28 x 28, white on black.

    python tools/letters.py                       letters/A/dejavu-sans-bold.png ... and letters-test/A/...
    python train.py --dataset letters --image-size 28

A tenth of the fonts, in whole families, goes to letters-test/, to test on shapes that training has not seen. Left out
are fonts that lack a letter, fonts of boxes or symbols, those whose lines are too fine for 28 pixels, and those that
look like another one.
"""

import io
import logging
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from fontTools.ttLib import TTCollection, TTFont
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import Parser, UsageError, run_script  # noqa: E402

SIZE, BOX = 28, 20  # pixels a side of an image, and of the square into which a letter is scaled
DRAWN = 160         # pixels of a line of text, in which letters are drawn before they are scaled
LEGIBLE = 16        # letters of the 26 that must look like themselves
SOLID = 0.75        # of the ink of a font, how white it must be: 1 where all pixels with ink are white
SAME = 25           # root mean square difference, of 255, below which two fonts look the same
FEW = 300           # fonts, below which it is said how to get more
PACKAGES = (        # of Debian and Ubuntu, free, and with many fonts
    "fonts-adf-gillius fonts-adf-switzera fonts-aenigma fonts-dustin fonts-freefont-otf fonts-inter fonts-junicode "
    "fonts-lato fonts-linex fonts-lmodern fonts-paratype fonts-roboto-unhinted"
)


def font_files(folder: Path | None) -> list[Path]:
    """The TrueType and OpenType files that come with matplotlib, of the system, and below `folder`."""
    places = [str(place) for place in (Path(get_data_path()) / "fonts" / "ttf", folder) if place]
    return sorted({Path(name) for name in font_manager.findSystemFonts() + font_manager.findSystemFonts(places)})


def draw_fonts(path: Path) -> list[tuple[str, str, np.ndarray]]:
    """(family, style, letters (26, 28, 28)) of each font in a file that has all letters. A broken file has none."""
    fonts = []
    try:
        content = path.read_bytes()
        tables = TTCollection(io.BytesIO(content)) if content.startswith(b"ttcf") else [TTFont(io.BytesIO(content))]
        for index, table in enumerate(tables):
            if set(map(ord, ascii_uppercase)) <= (table.getBestCmap() or {}).keys():
                font = ImageFont.truetype(io.BytesIO(content), DRAWN, index, layout_engine=ImageFont.Layout.BASIC)
                family, style = ((name or "").strip() or "unnamed" for name in font.getname())
                fonts.append((family, style, np.stack([draw(font, letter) for letter in ascii_uppercase])))
    except Exception:  # a broken font can provoke any
        return []
    return fonts


def draw(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray:
    """A letter as MNIST has its digits: scaled to the box, with its centre of mass at the centre, uint8 (28, 28).

    Raises ValueError where it is blank.
    """
    mask = font.getmask(letter, "L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    if not image.getbbox():
        raise ValueError(f"{letter} is blank")
    image = image.crop(image.getbbox())
    w, h = (max(1, round(n * BOX / max(image.size))) for n in image.size)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.BOX), dtype=float)
    pixels = pixels * (255 / pixels.max())  # thin lines are white, too
    y, x = ((np.indices((h, w)) + 0.5) * pixels).sum((1, 2)) / pixels.sum()
    top, left = (int(np.clip(round(SIZE / 2 - at), 0, SIZE - n)) for at, n in ((y, h), (x, w)))
    canvas = np.zeros((SIZE, SIZE), dtype=np.uint8)
    canvas[top : top + h, left : left + w] = pixels.round()
    return canvas


def legible(letters: np.ndarray) -> np.ndarray:
    """Which of n fonts (n, 26, 28, 28) have letters that look like letters, (n,).

    A letter does if it is nearer, in angle, to the mean of this letter over all fonts than to that of any other letter.
    """
    flat = letters.reshape(*letters.shape[:2], -1).astype(np.float32)
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    means = flat.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    nearest = (flat @ means.T).argmax(2)
    return (nearest == np.arange(len(ascii_uppercase))).sum(1) >= LEGIBLE


def solid(letters: np.ndarray) -> np.ndarray:
    """Which of n fonts (n, 26, 28, 28) have lines of a pixel or more, (n,): not hairlines, outlines or hatching."""
    ink = letters.reshape(len(letters), -1).astype(np.float32) / 255
    return np.square(ink).sum(1) / ink.sum(1) >= SOLID


def distinct(letters: np.ndarray) -> list[int]:
    """The indices of those of n fonts (n, 26, 28, 28) that look like none before them."""
    flat = letters.reshape(len(letters), -1).astype(np.float32)
    squares = np.square(flat).sum(1)
    distances = squares[:, None] + squares - 2 * flat @ flat.T
    kept = []
    for i, row in enumerate(distances):
        if (row[kept] > SAME**2 * flat.shape[1]).all():
            kept.append(i)
    return kept


def held_out(families: list[str]) -> list[bool]:
    """Which fonts are for testing: a tenth, in whole families. The first word of its name is taken for a font's family,
    since DejaVu Sans and DejaVu Serif have shapes in common.
    """
    words, seen, chosen = Counter(name.lower().split()[0] for name in families), 0, Counter()
    for word, count in sorted(words.items(), key=lambda item: (item[1], item[0])):  # the large ones last
        seen += count
        if chosen.total() < seen / 10:
            chosen[word] = count
    return [name.lower().split()[0] in chosen for name in families]


def write_images(folder: Path, fonts: list[tuple[str, str, np.ndarray]]) -> None:
    """Write FOLDER/LETTER/FONT.png for each letter of each font."""
    for i, letter in enumerate(tqdm(ascii_uppercase, desc=f"writing {folder.name}", unit="letter", leave=False)):
        (folder / letter).mkdir(parents=True)
        for number, (family, style, letters) in enumerate(fonts, 1):
            name = re.sub(r"\W+", "-", f"{family} {style} {number}".lower().strip(" ("))
            Image.fromarray(letters[i]).save(folder / letter / f"{name}.png")


def make(output: Path, font_dir: Path | None) -> None:
    """Write both folders of images. Raises UsageError."""
    test = output.with_name(f"{output.name}-test")
    for folder in (output, test):
        if folder.exists():
            raise UsageError(f"{folder} is there already: give another name by --output, or remove it first")
    if font_dir and not font_dir.is_dir():
        raise UsageError(f"no folder {font_dir}: give one that holds fonts to --font-dir")
    files = font_files(font_dir)
    drawn = [font for path in tqdm(files, desc="drawing", unit="file", leave=False) for font in draw_fonts(path)]
    drawn.sort(key=lambda font: font[:2])
    letters = np.stack([font[2] for font in drawn])
    readable = [font for font, fine in zip(drawn, legible(letters) & solid(letters), strict=True) if fine]
    fonts = [readable[i] for i in distinct(np.stack([font[2] for font in readable]))]
    parts = [[], []]
    for font, is_test in zip(fonts, held_out([font[0] for font in fonts]), strict=True):
        parts[is_test].append(font)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".letters-") as temporary:  # complete, or not at all
        for folder, part in zip((output, test), parts, strict=True):
            write_images(Path(temporary) / folder.name, part)
        for folder in (output, test):
            (Path(temporary) / folder.name).rename(folder)
    print(f"{len(files):,} font files: {len(drawn):,} fonts have all letters, {len(readable):,} of them can be read, "
          f"{len(fonts):,} are distinct")
    for folder, part in zip((output, test), parts, strict=True):
        print(f"{folder}: {len(part):,} fonts, {26 * len(part):,} images")
    if len(fonts) < FEW:
        print(f"For more, install fonts, on Debian and Ubuntu by sudo apt install {PACKAGES}, "
              "or give a folder of fonts to --font-dir")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("letters.py", "Draw the letters A to Z in every font of this machine.")
    parser.add_argument("--output", type=Path, default=Path("letters"), help="a new folder (default: letters)")
    parser.add_argument("--font-dir", type=Path, metavar="FOLDER", help="a folder of further fonts (default: none)")
    args = parser.parse_args(argv)
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it warns of oddities that do not matter here
    make(args.output, args.font_dir)


if __name__ == "__main__":
    run_script(main)
