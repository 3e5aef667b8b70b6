"""Export trained networks to ONNX, and make of them a page on which they run in the reader's browser.

    python web/export.py                                    make the page, in web-build/, a folder for any web server
    python web/export.py --serve                            and show it, at http://127.0.0.1:8000
    python web/export.py --serve --checkpoint runs/mnist-1  with a network of your own

Needs `pip install onnx onnxscript onnxruntime`. The files of the page stand beside this one. Two networks run on it:
the bundled one, which samples in 20 steps, and the distilled one. A checkpoint of your own takes the place of the one
of its kind.

ONNX is a file format for networks: a graph of elementary operations, and the weights. PyTorch runs the network once on
symbolic tensors to record the graph. It is compared with the network itself before it is used.
"""

import functools
import http.server
import io
import json
import shlex
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, load_model  # noqa: E402
from cli import Parser, UsageError, number, run_script  # noqa: E402
from dataset import bundled_digits  # noqa: E402
from dit import Attention  # noqa: E402
from sampling import TrainedModel, grid, image_noise  # noqa: E402
from shortcut import ShortcutModel  # noqa: E402

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx.export needs it
except ImportError:
    onnx = None

WEB = Path(__file__).parent
MADE_BY = "web/export.py"  # in full.json, by which the folder of an earlier export is recognised
DIGITS_A_CLASS = 5  # real digits on the page
SIZE = 28           # pixels of an image on the page
TOLERANCE = 1e-2    # of what an exported network predicts: rounding to float16 moves x0_hat by a few thousandths,
                    # which nobody sees, and weights that are float16 already, as the distilled ones, by 1e-4


class OpenAttention(Attention):
    """Attention that computes its maps step by step and keeps them, where the fused one does not show them."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                          # each (B, heads, N, D/heads)
        self.kept.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))  # (B, heads, N, N)
        return self.proj((self.kept[-1] @ v).transpose(1, 2).reshape(B, N, D))


class OpenDiT(nn.Module):
    """A trained network as the page calls it: it also returns what each token attends to."""

    def __init__(self, trained: TrainedModel):
        super().__init__()
        self.model, self.distilled = trained.model, isinstance(trained, ShortcutModel)
        self.eval()
        for block in self.model.blocks:
            block.attn.__class__ = OpenAttention  # the same weights, another way to compute

    def forward(self, x: Tensor, t: Tensor, y: Tensor, d: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prediction (B, 1, S, S), and attention maps (B, depth, heads, N, N), where row i is what token i takes
        from each.

        x: (B, 1, S, S), t: (B,) timesteps, y: (B,) int32 labels, d: (B,) step sizes t - s, for distilled networks; all
        but y float32
        """
        kept = []
        for block in self.model.blocks:
            block.attn.kept = kept
        out = self.model(x, torch.stack([t, t - d], 1) if self.distilled else t, y)
        return out[:, : x.shape[1]], torch.stack(kept, 1)  # without the channels of a learned variance


def examples(trained: TrainedModel, batch: int) -> dict[str, Tensor]:
    """Inputs for `OpenDiT`, by name: noise, timesteps up to the last, labels, and steps that end at the clean image."""
    t = (torch.arange(1, batch + 1) / batch * (trained.diffusion.T - 1)).round()
    y = torch.arange(batch, dtype=torch.int32) % (trained.model.config.num_classes + 1)
    inputs = dict(x=image_noise(0, range(batch), trained.shape, "cpu")(), t=t, y=y)
    return inputs | (dict(d=t + 1) if isinstance(trained, ShortcutModel) else {})


def to_onnx(trained: TrainedModel) -> bytes:
    """The network as an ONNX file for batches of any size, whose matrices are float16."""
    inputs = examples(trained, 3)
    batch = {name: {0: torch.export.Dim("batch")} for name in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that PyTorch gives to dimensions
        program = torch.onnx.export(
            OpenDiT(trained), kwargs=inputs, dynamic_shapes=batch, input_names=list(inputs),
            output_names=["out", "maps"], verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # the lines of Python that it comes from
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 2:
            half = onnx.numpy_helper.to_array(weight).astype(np.float16)
            cast = onnx.helper.make_node("Cast", [f"{weight.name}.half"], [weight.name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)  # done once, when the file is loaded
            weight.CopyFrom(onnx.numpy_helper.from_array(half, f"{weight.name}.half"))
    return model.SerializeToString()


def largest_error(trained: TrainedModel, file: bytes) -> float:
    """The largest difference between what an ONNX file and the network predict for some images."""
    inputs = examples(trained, 20)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    out, maps = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = OpenDiT(trained)(**inputs)
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip((out, maps), expected, strict=True))


def network_files(name: str, trained: TrainedModel) -> dict[str, bytes]:
    """The files of a network: NAME.json, what the page has to know of it, and NAME.onnx.

    Raises FloatingPointError where the ONNX file predicts something else than the network.
    """
    config, file = trained.model.config, to_onnx(trained)
    error = largest_error(trained, file)
    if not error < TOLERANCE:
        raise FloatingPointError(f"{name}.onnx differs by {error:.0e} from the network: try another version of onnx")
    about = dict(
        **trained.diffusion.config, guidance=trained.settings["guidance"], bytes=len(file), made_by=MADE_BY,
        interval=trained.settings["guidance_interval"], num_classes=config.num_classes,
        patch_size=config.patch_size, depth=config.depth, num_heads=config.num_heads,
    )
    print(f"{name}.onnx: {len(file) / 1e6:.1f} MB, at most {error:.0e} from what PyTorch predicts", flush=True)
    return {f"{name}.json": json.dumps(about).encode(), f"{name}.onnx": file}


def poster(full: TrainedModel) -> bytes:
    """A picture of x_t from noise to a digit, as a PNG file, for the eye while the networks load."""
    path, label = [], torch.tensor([min(3, full.model.config.num_classes)])
    full.sample(label, 1, callback=lambda t, x_t, x0_hat: path.append(x_t[0]))
    file = io.BytesIO()
    grid(torch.stack(path[1::2]), columns=10, gap=0).save(file, "PNG")
    return file.getvalue()


def page_files(networks: dict[str, TrainedModel]) -> dict[str, bytes]:
    """All files of the page by name: the networks, the files beside this one, and some real digits class by class."""
    files = {}
    for name, trained in networks.items():
        files |= network_files(name, trained)
    files |= {path.name: path.read_bytes() for path in WEB.iterdir() if path.suffix in (".html", ".css", ".js")}
    digits = bundled_digits()
    some = torch.cat([digits.pixels[digits.labels == label][:DIGITS_A_CLASS] for label in range(10)])
    return files | {"digits.bin": some.numpy().tobytes(), "poster.png": poster(networks["full"])}


def check_output(folder: Path) -> None:
    """Raises UsageError unless a folder is new, empty, or one that an earlier export made, see MADE_BY."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    with suppress(OSError, ValueError):
        about = json.loads((folder / "full.json").read_bytes())
        if isinstance(about, dict) and about.get("made_by") == MADE_BY:
            return
    raise UsageError(f"{folder} is not an earlier export: give a new or an empty folder as --output")


def save_page(folder: Path, networks: dict[str, TrainedModel]) -> None:
    """Write the page. Nothing is written before all networks are exported, and full.json is written first.

    networks: "full", which samples in 20 steps, first, and "fast", which is distilled

    Raises OSError, which names the file, where the disk is full or may not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in page_files(networks).items():
        checkpoint.write_whole(folder / name, lambda file, content=content: file.write(content))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each, and without letting the browser keep old ones."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def copyfile(self, source, outputfile) -> None:
        with suppress(ConnectionError):  # the reader has left
            super().copyfile(source, outputfile)

    def log_message(self, *_) -> None:
        pass


def open_server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of a folder for this machine only. Raises UsageError where the port cannot be used."""
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=folder))
    except OSError as error:
        raise UsageError(f"port {port} cannot be used ({error.strerror}): give another --port") from error


def main(argv: list[str] | None = None) -> None:
    """Raises UsageError, CheckpointError, DataError, FloatingPointError."""
    parser = Parser("export.py", "Make a page on which trained networks run in the browser.")
    parser.add_argument("--checkpoint", type=Path, help="your own network, a file or the folder of a run, in place of "
                        "the bundled one of its kind")
    parser.add_argument("--output", type=Path, default=Path("web-build"), help="the page's folder: a new or an empty "
                        "one, or that of an earlier export (default: web-build)")
    parser.add_argument("--serve", action="store_true", help="serve the page to this machine's browser")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="(default: 8000)")
    args = parser.parse_args(argv)
    if onnx is None:
        raise UsageError("the export needs three more packages: pip install onnx onnxscript onnxruntime")
    check_output(args.output)
    networks = {}
    for path in filter(None, (BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, args.checkpoint)):
        trained = load_model(path)
        if trained.shape != (1, SIZE, SIZE):
            raise UsageError(f"{path} is a network of shape {trained.shape}: the page takes only (1, {SIZE}, {SIZE})")
        networks["fast" if isinstance(trained, ShortcutModel) else "full"] = trained
    server = open_server(args.output, args.port) if args.serve else None
    save_page(args.output, networks)
    if server:
        print(f"the page is at http://127.0.0.1:{server.server_port} until Ctrl-C", flush=True)
        server.serve_forever()
    else:
        command = shlex.join(["python", "-m", "http.server", "--directory", str(args.output)])
        print(f"the page is in {args.output}. To open it, add --serve, or run {command} and open http://localhost:8000")


if __name__ == "__main__":
    run_script(main)
