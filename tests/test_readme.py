"""Claims about the README: its commands run as they are written there, in their order, with fewer steps and images;
its list of files is an order in which they can be read; the code that it quotes stands in the files; its pictures are
there; and README.zh-CN.md says the same in Chinese."""

import ast
import re
import shlex
import shutil
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from PIL import Image

import dataset
import distill
import evaluate
import inference
import metrics
import rundir
import runlog
import sample_npz
import train
from conftest import ROOT
from sampling import TrainedModel

PAGES = ("README", "docs/tutorial", "docs/how-to", "docs/own-images", "docs/guarantees")  # which are also in Chinese
FRONT = (ROOT / "README.md").read_text()
README = "\n".join((ROOT / f"{page}.md").read_text() for page in PAGES)
COMMANDS = [
    shlex.split(part, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    for part in line.split(" && ")
    if part.strip() and not part.startswith("#")
]
# Appended, and so stronger than what stands before.
FEWER = {
    "train.py": "--steps 2 --batch-size 8 --no-compile --device cpu",
    "inference.py": "--steps 3 --device cpu",
    "evaluate.py": "--count 20 --device cpu",
    "distill.py": "--steps 2 --batch-size 10 --no-compile --device cpu",
    "tools/letters.py": "",
    "tools/sample_npz.py": "--steps 3 --device cpu --count 25",
    "tools/sweep.py": "",
    "tools/benchmark.py": "",
    "tools/train_classifier.py": "",
    "tools/make_figures.py": "",
}


@pytest.fixture
def downloads(monkeypatch):
    """Small data sets in place of those of torchvision."""
    def small(name, root, train, download):
        channels, size = (3, 32) if name == "cifar10" else (1, 28)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (60, channels, size, size), dtype=torch.uint8, generator=generator)
        return dataset.Images(pixels, torch.arange(60) % 10, dataset.DIGITS, f"60 images of {name}")

    monkeypatch.setattr(dataset, "from_torchvision", small)


def test_every_command_runs(downloads, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "RESAMPLES", 5)
    monkeypatch.setattr(runlog, "LOG_EVERY", 2)  # after some of these, --minutes become steps
    # Each training ends with a grid of samples and a curve, which test_train.py checks.
    monkeypatch.setattr(TrainedModel, "default_steps", {"dpm++": 1})
    monkeypatch.setattr(rundir, "plot_loss", lambda folder: None)
    folders = {"my-images/circle": "RGB", "my-images/square": "RGB", "letters/A": "L", "letters/B": "L"}
    for folder, mode in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(45):
            Image.new(mode, (40, 32), 5 * i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "assets").mkdir()
    for name in ("three.png", "dit-mnist.safetensors"):
        shutil.copy(ROOT / "assets" / name, tmp_path / "assets")
    ran = resumed = 0
    for command in COMMANDS:
        script = next((i for i, word in enumerate(command) if word in FEWER), None)
        if script is None:
            assert command[0] in ("git", "cd", "python3", ".venv/bin/pip") or "pytest" in command, command
            continue
        name, arguments = command[script], command[script + 1 :]
        fewer = FEWER[name].split()
        if "--minutes" in arguments:
            fewer = [*fewer[2:], "--minutes", "0.01"]
        if "shortcut" in arguments:
            fewer = fewer[2:]
        if "--resume" in arguments:
            resumed += 1
            fewer = ["--steps", str(2 + resumed)]
        print(*command)
        # These take minutes even so: test_tools and test_figures run them.
        if name.startswith("tools/") and not fewer:
            continue
        if name == "tools/sample_npz.py":
            sample_npz.main([*arguments, *fewer])
        elif name == "train.py":
            assert train.main([*arguments, *fewer]) == 0
        elif name == "distill.py":
            assert distill.main([*arguments, *fewer]) == 0
        elif name == "evaluate.py":
            fewer += [] if "--npz" in arguments else ["--steps", "2"]
            assert evaluate.evaluate(evaluate.parse_args([*arguments, *fewer])).exists()
        else:
            assert inference.generate(inference.parse_args([*arguments, *fewer])).exists()
        ran += 1
    assert ran >= 8


def test_every_flag_in_the_readme_exists():
    folders = ("", "tools/", "web/", "tests/")
    helps = "".join(path.read_text() for folder in folders for path in ROOT.glob(f"{folder}*.py"))
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    assert flags
    for flag in flags:
        assert f'"{flag.replace("--no-", "--")}"' in helps, flag


def test_both_single_line_commands_make_their_own_environment():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert any(line.endswith("-m pytest") for line in lines)
    assert any("train.py" in line and "inference.py" in line for line in lines)


def test_the_file_map_names_every_file():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        assert f"`{path.name}`" in README
    for path in ROOT.glob("web/*.py"):
        assert f"`web/{path.name}`" in README


def test_each_file_imports_only_files_that_the_readme_names_before_it():
    order = re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE)
    assert sorted(order) == sorted(path.stem for path in ROOT.glob("*.py"))
    for i, name in enumerate(order):
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        ours = modules & set(order)
        assert ours <= set(order[:i]), name
        assert not ours & {"inference", "evaluate"} or name == "evaluate", f"{name} imports a command line"
        assert not ours or name not in ("dit", "diffusion", "folders", "optim", "speed"), f"{name} stands alone"
        assert ours <= {"folders"} or name != "dataset", "dataset needs only folders"


def source_of(place: str) -> str:
    """The source of a function: "diffusion.py, Diffusion.q_sample"."""
    file, names = place.split(", ")
    source = (ROOT / file).read_text()
    node = ast.parse(source)
    for name in names.split("."):
        node = next(part for part in node.body if getattr(part, "name", None) == name)
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def stands_in(quote: str, source: str) -> bool:
    """Whether the lines of a quote follow one another in a source, at whatever indentation."""
    lines, wanted = source.splitlines(), dedent(quote).splitlines()
    windows = ("\n".join(lines[i : i + len(wanted)]) for i in range(len(lines)))
    return any(dedent(window).splitlines() == wanted for window in windows)


def test_quoted_code_stands_in_the_files():
    """Each quote begins with a comment that names its file and function. Three dots stand for what is left out."""
    quotes = re.findall(r"```python\n# ([\w./]+\.py, [\w.]+)\n(.*?)```", README, re.DOTALL)
    assert len(quotes) == README.count("```python") > 14
    for place, code in quotes:
        source = source_of(place)
        for part in re.split(r"^\.\.\.\n", code, flags=re.MULTILINE):
            assert stands_in(part, source), (place, part)
    assert not stands_in("return x0", source_of("diffusion.py, Diffusion.q_sample"))


PICTURE = re.compile(r"!\[([^]]*)\]\(([^)]*)\)")


def test_the_pictures_are_there_and_have_words_for_those_who_cannot_see_them():
    pictures = [(words, (ROOT / page).parent / path) for page in PAGES
                for words, path in PICTURE.findall((ROOT / f"{page}.md").read_text())]
    assert len(pictures) > 9
    for words, path in pictures:
        assert len(words) > 20, path
        assert path.resolve().is_file(), path
    assert (ROOT / "assets" / "denoising.gif").stat().st_size < 1_500_000


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_a_heading_or_a_file():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert len(pages) >= 10
    for page in pages:
        for target in re.findall(r"\]\(([^)]*)\)", page.read_text()):
            if not target.startswith("http"):
                file, _, anchor = target.partition("#")
                path = (page.parent / file).resolve() if file else page
                assert path.exists(), (page, target)
                assert not anchor or anchor in anchors(path), (page, target)


def test_the_use_from_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```py\n(.*?)```", FRONT, re.DOTALL)
    exec(code, {})
    assert Image.open("three.png").size == (28, 28)


def test_each_change_of_the_lab_fits_one_line_of_the_code():
    page = (ROOT / "docs" / "lab.md").read_text()
    changes = re.findall(r"```diff\n--- ([\w.]+), ([\w.]+)\n-(.*)\n\+(.*)\n```\n", page)
    assert len(changes) == page.count("```diff") == 7
    for file, function, old, new in changes:
        assert old in source_of(f"{file}, {function}").splitlines() and new != old
        assert (ROOT / file).read_text().splitlines().count(old) == 1
    assert len(re.findall(r"^## \d+\.", page, re.MULTILINE)) == 10
    assert all((ROOT / "assets" / f"lab-{n}.png").exists() and f"assets/lab-{n}.png" in page for n in range(1, 11))
    assert len(page.split()) <= 1500


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def test_readme_and_core_are_short():
    core, further = TUTORIAL.split("\n## Further\n")
    assert len(FRONT.split()) <= 1400
    assert len(core.split()) <= 3500
    assert further


def test_each_chapter_begins_with_what_it_needs_and_ends_with_a_question_that_is_answered():
    lessons, rest = TUTORIAL.split("\n## Answers\n")
    chapters = re.findall(r"^### (?:\d\. )?(.*?)\n(.*?)(?=^##|\Z)", lessons, re.DOTALL | re.MULTILINE)
    assert len(chapters) == 14
    assert [name for name, _ in chapters] == re.findall(r"^- \*(.*?)\.?\*", rest.split("\n## ")[0], re.MULTILINE)
    for name, text in chapters:
        first, *_, last = [part for part in text.split("\n\n") if part.strip()]
        assert first.strip().startswith("*Needs: "), name
        assert last.strip().startswith("*Question: "), name


@pytest.mark.parametrize("page", PAGES)
def test_the_chinese_page_says_the_same(page):
    """The same headings, code, commands and pictures, and in each section the same formulas and numbers."""
    def sections(text: str) -> list[dict]:
        parts = []
        section = re.compile(r"^(#+) ((?:```\w*\n.*?```|.)*?)(?=^#+ |\Z)", re.DOTALL | re.MULTILINE)
        for level, part in section.findall(hide_words(text)):
            blocks = re.findall(r"```\w*\n.*?```", part, re.DOTALL)
            prose = re.sub(r"```\w*\n.*?```|\]\([^)]*\)", "", part, flags=re.DOTALL)
            parts.append(dict(
                level=level, blocks=blocks, pictures=[path for _, path in PICTURE.findall(part)],
                formulas=sorted(re.findall(r"\$[^$]+\$", prose)),
                numbers=sorted(re.findall(r"\d+(?:[.,]\d+)*", prose)),
            ))
        return parts

    def hide_words(text: str) -> str:  # those in commands and formulas are in the language of the page
        commands = re.compile(r"```bash\n.*?```", re.DOTALL)
        text = commands.sub(lambda block: re.sub(r" +# .*", "", block[0]), text)
        return re.sub(r"\\text\{[^}]*\}", r"\\text{}", text)

    ours, theirs = (sections((ROOT / f"{page}{language}.md").read_text()) for language in ("", ".zh-CN"))
    assert [part["level"] for part in theirs] == [part["level"] for part in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert other == mine
