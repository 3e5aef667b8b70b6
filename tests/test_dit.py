"""Claims about the network."""

import math

import pytest
import torch
import torch.nn.functional as F

import dit
from dit import MODELS, Attention, DiT, DiTBlock, DiTConfig, patchify, position_table, unpatchify

SMALL = dict(image_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def randomized(model: DiT) -> DiT:
    """No layer left at zero, so that a test sees all of them."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model


def inputs(config: DiTConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, config.in_channels, config.image_size, config.image_size, generator=g)
    t = torch.randint(0, 1000, (batch,), generator=g)
    return x, t, torch.randint(0, config.num_classes + 1, (batch,), generator=g)


def test_block_is_identity_at_init():
    block = DiT(DiTConfig(**SMALL)).blocks[1]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(block(x, c), x)


def test_layers_that_start_at_zero_wake_up_one_after_another():
    """First only the last layer has a gradient, then the modulations too, then everything."""
    model = DiT(DiTConfig(**SMALL))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    moving = []
    for _ in range(3):
        optimizer.zero_grad()
        out = model(*inputs(model.config))
        (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        moving.append({name for name, p in model.named_parameters() if p.grad.abs().max() > 0})
        optimizer.step()
    last = {"final_layer.linear.weight", "final_layer.linear.bias"}
    modulations = {name for name, _ in model.named_parameters() if "adaLN_modulation" in name}
    assert moving[0] == last
    assert moving[1] >= last | {name for name in modulations if "final" in name}
    assert not any("blocks.0.attn" in name or "blocks.0.mlp" in name for name in moving[1])
    assert moving[1] == last | modulations | {"x_embedder.proj.weight", "x_embedder.proj.bias"}
    assert moving[2] == {name for name, _ in model.named_parameters()}


def test_patchify_and_unpatchify_are_inverse():
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(unpatchify(patchify(x, 4), 4), x)


def test_patches_are_taken_row_by_row():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert patchify(x, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_patch_embedding_is_the_convolution():
    embed = dit.PatchEmbed(4, 3, 16)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(embed(x), embed.proj(x).flatten(2).transpose(1, 2))


def test_attention_equals_a_naive_loop():
    attention = Attention(12, num_heads=3)
    x = torch.randn(2, 5, 12)
    qkv = attention.qkv(x)
    merged = torch.zeros(2, 5, 12)
    for b in range(2):
        for head in range(3):
            q, k, v = (qkv[b, :, part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in range(3))
            for i in range(5):
                scores = torch.stack([q[i] @ k[j] for j in range(5)]) / math.sqrt(4)
                merged[b, i, head * 4 : head * 4 + 4] = sum(w * v[j] for j, w in enumerate(scores.softmax(0)))
    torch.testing.assert_close(attention(x), attention.proj(merged))


def test_positions_of_the_published_table():
    """Half the width for the column, half for the row; sines, then cosines; frequencies 10000^(-i / (D/4))."""
    table = position_table(3, 8)[0]
    column, row = 2, 1
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1, 10000**-0.5)]
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected))


def test_timesteps_may_be_fractions():
    embed = dit.TimestepEmbedder(8)
    halves = embed(torch.tensor([3.0, 3.5, 4.0]))
    torch.testing.assert_close(halves[0], embed(torch.tensor([3]))[0])
    assert not torch.allclose(halves[1], halves[0])
    assert not torch.allclose(halves[1], halves[2])


def test_no_labels_are_the_null_class():
    model = randomized(DiT(DiTConfig(**SMALL)))
    x, t, _ = inputs(model.config)
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 5)))


def test_an_unconditional_model_has_no_labels():
    model = randomized(DiT(DiTConfig(**{**SMALL, "num_classes": 0})))
    x, t, _ = inputs(model.config)
    assert model(x, t).shape == x.shape


def test_images_of_a_batch_do_not_meet():
    model = randomized(DiT(DiTConfig(**SMALL)))
    x, t, y = inputs(model.config)
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]))


def test_learn_sigma_doubles_the_channels():
    model = DiT(DiTConfig(**SMALL, learn_sigma=True))
    x, t, y = inputs(model.config)
    assert model(x, t, y).shape == (3, 6, 8, 8)


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (dict(image_size=9), "patch size among"),
        (dict(num_heads=5), "use hidden_size 35"),
        (dict(hidden_size=30, num_heads=3), "use 32"),
        (dict(depth=0), "1 or more"),
        (dict(num_classes=-1), "unconditional"),
        (dict(mlp_ratio=0.0), "at least one unit"),
    ],
)
def test_a_config_that_cannot_be_names_the_fix(change, fix):
    with pytest.raises(ValueError, match=fix):
        DiTConfig(**{**SMALL, **change})


def test_images_of_another_shape_are_refused():
    model = DiT(DiTConfig(**SMALL))
    for shape in ((1, 3, 8, 12), (1, 1, 8, 8), (1, 3, 16, 16)):
        with pytest.raises(ValueError, match="resize and crop"):
            model(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


# The state dict of the official code for one block; weights published for it load with strict=True.
OFFICIAL_NAMES = """
pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias
t_embedder.mlp.2.weight t_embedder.mlp.2.bias y_embedder.embedding_table.weight
blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias blocks.0.attn.proj.weight blocks.0.attn.proj.bias
blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
blocks.0.adaLN_modulation.1.weight blocks.0.adaLN_modulation.1.bias
final_layer.linear.weight final_layer.linear.bias
final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias
""".split()


def test_parameters_have_the_official_names():
    assert sorted(DiT(DiTConfig(**{**SMALL, "depth": 1})).state_dict()) == sorted(OFFICIAL_NAMES)


def test_dit_xl_2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = DiT(DiTConfig(**MODELS["DiT-XL/2"], image_size=32, in_channels=4, num_classes=1000, learn_sigma=True))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 675_129_632


def test_every_named_size_can_be_built():
    for shape in MODELS.values():
        with torch.device("meta"):
            DiT(DiTConfig(**shape, image_size=56))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_output_equals_that_of_diffusers(learn_sigma):
    """diffusers has its own DiT, into which the official weights are converted: the same weights, the same output."""
    from diffusers import DiTTransformer2DModel

    config = DiTConfig(**{**SMALL, "in_channels": 4}, learn_sigma=learn_sigma)
    ours = randomized(DiT(config)).eval()
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8 if learn_sigma else 4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()
    w = ours.state_dict()
    converted = {"pos_embed.proj.weight": w["x_embedder.proj.weight"], "pos_embed.proj.bias": w["x_embedder.proj.bias"]}
    for kind in ("weight", "bias"):
        converted[f"proj_out_1.{kind}"] = w[f"final_layer.adaLN_modulation.1.{kind}"]
        converted[f"proj_out_2.{kind}"] = w[f"final_layer.linear.{kind}"]
        for i in range(2):
            ours_block, block = f"blocks.{i}", f"transformer_blocks.{i}"
            for name, part in zip("qkv", w[f"{ours_block}.attn.qkv.{kind}"].chunk(3), strict=True):
                converted[f"{block}.attn1.to_{name}.{kind}"] = part
            converted[f"{block}.attn1.to_out.0.{kind}"] = w[f"{ours_block}.attn.proj.{kind}"]
            converted[f"{block}.ff.net.0.proj.{kind}"] = w[f"{ours_block}.mlp.fc1.{kind}"]
            converted[f"{block}.ff.net.2.{kind}"] = w[f"{ours_block}.mlp.fc2.{kind}"]
            converted[f"{block}.norm1.linear.{kind}"] = w[f"{ours_block}.adaLN_modulation.1.{kind}"]
            converted[f"{block}.norm1.emb.timestep_embedder.linear_1.{kind}"] = w[f"t_embedder.mlp.0.{kind}"]
            converted[f"{block}.norm1.emb.timestep_embedder.linear_2.{kind}"] = w[f"t_embedder.mlp.2.{kind}"]
    for i in range(2):
        name = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        converted[name] = w["y_embedder.embedding_table.weight"]
        # diffusers spaces the frequencies by 127, the official code by 128.
        theirs.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0
    missing, unexpected = theirs.load_state_dict(converted, strict=False)
    assert not unexpected and not missing

    x, t, y = inputs(config)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-4, atol=1e-4)


def test_a_network_can_memorize_one_batch():
    torch.manual_seed(0)
    config = DiTConfig(**SMALL)
    model, (x, t, y) = DiT(config), inputs(config, batch=8)
    target = torch.randn_like(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.mse_loss(model(x, t, y), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # it starts at 1


def test_a_block_takes_its_condition_per_image():
    block = DiTBlock(16, 2, 4.0)
    x = torch.randn(1, 4, 16).expand(2, -1, -1)
    out = block(x, torch.randn(2, 16))
    assert not torch.allclose(out[0], out[1])


def test_no_images_give_no_images():
    """A micro-batch may hold none of the images that a loss is about, and processes still exchange gradients."""
    model = DiT(DiTConfig(image_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=1))
    out = model(torch.zeros(0, 1, 8, 8), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert out.shape == (0, 1, 8, 8)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
