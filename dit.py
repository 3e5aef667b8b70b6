"""The network: a Diffusion Transformer (DiT) with adaLN-Zero conditioning (adaptive layer norm, initialized to zero).

Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, sections 3.1 and 3.2.

The network receives a noisy image x, the timestep t that says how noisy it is, and a label y. The image is cut into
square patches, and each patch becomes one token of a transformer. The timestep and the label become one vector c, which
conditions every layer. The classes are in the order in which an image passes through them:

    x     -> patches -> tokens -> [DiTBlock] x depth -> FinalLayer -> patches -> prediction
                                      ^                     ^
    t, y  -> embeddings -> c ---------+---------------------+

The parameters carry the names of the official code, so that its published weights load with `strict=True`.

Shapes: B batch, C channels (C_out: C, or 2C with learn_sigma), H W height and width, P patch size, N = (H/P)(W/P)
tokens, D width of a token. Timesteps t run from 0 to T - 1, and T is usually 1000; diffusion.py says what they mean.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Each size is (width, depth, heads). S to XL are Table 1 of the paper; N, U and T (nano, micro, tiny) are for digits.
SIZES = {
    "N": (128, 5, 4), "U": (160, 5, 5), "T": (256, 8, 4),
    "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16),
}
# {"DiT-S/2": {"hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2}, ...}
MODELS = {
    f"DiT-{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for name, (width, depth, heads) in SIZES.items()
    for patch in ((2, 4, 7, 8, 14) if name in ("N", "U", "T") else (2, 4, 8))
}


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT, for example `DiTConfig(**MODELS["DiT-S/2"], image_size=32, in_channels=4)`.

    image_size:  height and width in pixels; images are square, and this is a multiple of patch_size, P
    in_channels: C, the channels of an image
    hidden_size: D, the width of a token; a multiple of num_heads and of 4
    depth:       the number of blocks; num_heads: the attention heads of each
    mlp_ratio:   the width inside the MLP, divided by D
    num_classes: 0 for an unconditional model; the null class ("no label") gets the index num_classes
    learn_sigma: predict 2C channels; the second half sets the variance of a reverse step (variance.py)

    Raises ValueError, with the fix in its message, where the numbers do not fit together.
    """

    image_size: int = 28
    patch_size: int = 7
    in_channels: int = 1
    hidden_size: int = 128
    depth: int = 5
    num_heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int = 10
    learn_sigma: bool = False

    def __post_init__(self):
        for name in ("image_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}: use 0 for an unconditional model")
        if not 1 <= self.hidden_size * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}: it must leave the MLP at least one unit")
        if self.image_size % self.patch_size:
            divisors = [p for p in range(1, min(self.image_size, 4096) + 1) if self.image_size % p == 0]
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: "
                f"use a patch size among {divisors}, or another image size"
            )
        if self.hidden_size % self.num_heads:
            fitting = math.ceil(self.hidden_size / self.num_heads) * self.num_heads
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                f"use hidden_size {fitting}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4 (sine and cosine of row and column): "
                f"use {math.ceil(self.hidden_size / 4) * 4}"
            )


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, N, P*P*C), row by row. A patch lists its pixels row by row as well."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`, for square images: (B, N, P*P*C) -> (B, C, H, W)."""
    B, N, values = x.shape
    side, C = math.isqrt(N), values // patch**2
    x = x.view(B, side, side, patch, patch, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side * patch, side * patch)


def sincos(position: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines, each (M, dim/2), of M positions (M,) at frequencies that fall from 1 almost to 1/10000
    (arXiv 1706.03762, section 3.5). High frequencies separate adjacent positions, low ones distant positions.
    """
    exponent = torch.arange(dim // 2, dtype=position.dtype, device=position.device) / (dim // 2)
    frequency = torch.exp(-math.log(10000) * exponent)
    angle = position[:, None] * frequency
    return angle.sin(), angle.cos()


def position_table(side: int, dim: int) -> Tensor:
    """Fixed 2-D sin-cos positions (1, side*side, dim). The first half tells the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    columns, rows = sincos(column.flatten().double(), dim // 2), sincos(row.flatten().double(), dim // 2)
    return torch.cat([*columns, *rows], dim=1).float()[None]


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) -> tokens (B, N, D): a convolution of stride P, done as one matrix product of patches."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) -> (D, P*P*C)
        return F.linear(patchify(x, self.proj.kernel_size[0]), weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,), integer or fractional, in [0, T] -> (B, D). The frequencies suit a T of about 1000."""

    width = 256  # 128 sines and 128 cosines, as in the official code

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        sin, cos = sincos(t.float(), self.width)
        return self.mlp(torch.cat([cos, sin], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) in 0 ... num_classes -> (B, D). The last row of the table is the null class, "no label"."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)             # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)      # softmax(q k^T / sqrt(D/heads)) v, (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class GELU(nn.Module):
    """GELU (arXiv 1606.08415) in its tanh form, x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3).

    Since (1 + tanh u) / 2 is sigmoid(2u), both returns below are the same function. Compiled for a CPU, the sigmoid is
    three times as fast as the tanh, which saves one eighth of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():  # by torch.compile; an exported network keeps the usual form
            return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
        return F.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    """Two linear layers around a GELU, (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = GELU()
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift every token of x (B, N, D) by vectors (B, 1, D). Thanks to 1 + scale, zeros leave x as it is."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero: the condition c scales, shifts and gates both of its branches.

    x: tokens (B, N, D), c: condition (B, D) -> (B, N, D)

    The modulation starts at zero, so both gates are zero and the block is the identity. It can learn nevertheless,
    because the gradient of a gate contains the output of its branch as a factor, and that is not zero. The linear layer
    at the end starts at zero as well. So the first training step moves only that layer, the second also the modulations
    and the patch embedding, the third everything.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        # The norms have no weights of their own, since their scale and shift come from c.
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        # c is a sum of two embeddings. Without the SiLU, the effects of t and y on the modulation would only add up.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)  # (B, 1, D)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))  # (B, N, D)
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))   # (B, N, D)
        return x


class FinalLayer(nn.Module):
    """Tokens (B, N, D), condition (B, D) -> patches (B, N, P*P*C_out)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The Diffusion Transformer."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D, P, C = config.hidden_size, config.patch_size, config.in_channels
        self.x_embedder = PatchEmbed(P, C, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        # The positions are fixed. A learned table would converge to much the same on one small grid.
        self.register_buffer("pos_embed", position_table(config.image_size // P, D))
        self.blocks = nn.ModuleList(DiTBlock(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, P, 2 * C if config.learn_sigma else C)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # flat, because it acts as a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # With the official code's 0.02, labels would have almost no effect at first.
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.5)
        # The zeros come last, so that nothing above undoes them. Each block starts as the identity, the output as 0.
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
            nn.init.zeros_(layer.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """The vector c (B, D) that conditions every layer, for timesteps t (B,) and labels y (B,)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What the network predicts for noisy images x: (B, C, H, W), or (B, 2C, H, W) with learn_sigma.

        x: (B, C, H, W) float; t: (B,) timesteps in [0, T); y: (B,) int64 labels in 0 ... num_classes, where the last is
        the null class. Without y all labels are the null class. Raises ValueError for images of another shape.
        """
        config = self.config
        expected = (config.in_channels, config.image_size, config.image_size)
        if x.shape[1:] != expected:
            raise ValueError(
                f"this DiT takes images of shape {expected}, not {tuple(x.shape[1:])}: "
                "resize and crop them, or change its config"
            )
        if y is None:
            y = torch.full((len(x),), config.num_classes, device=x.device)
        x = self.x_embedder(x) + self.pos_embed          # (B, N, D)
        c = self.condition(t, y)                         # (B, D)
        for block in self.blocks:
            x = block(x, c)                              # (B, N, D)
        x = self.final_layer(x, c)                       # (B, N, P*P*C_out)
        return unpatchify(x, config.patch_size)          # (B, C_out, H, W)
