"""Count: what one forward of a transformer computes and moves, part by part, from its configuration alone.

Matrix products are counted exactly: a multiplication and an addition are two operations, biases are left out. What
lies between them (norms, modulation, rotary positions, activations, residuals) is counted in bytes, as passes over the
tokens: each operation of the stock code reads and writes whole tensors, in the dtypes that it has there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import UsageError
from dit_accel.estimate.architectures import FLUX, HUNYUAN, SD3, WAN, Published

PICTURE_TOKENS = 257  # CLIP's, which Wan 2.1 from a picture attends to
_TIME = 256  # channels of a noise level's sinusoid
# Passes over `[tokens, channels]` in the model's dtype of everything in a block that is no product and no attention:
# each read and each write of such a tensor is one, of a float32 tensor two. Torch's own RMSNorm is one kernel (2
# passes); diffusers' own goes through float32 (17), as do rotary positions (28; Wan's 18).
_WAN_PASSES = 125  # three norms in float32 46, three RMSNorms 6, rotary 36, residuals 37; beside the activation
_FLUX_DOUBLE, _FLUX_SINGLE = 96, 89
_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE = 126, 125
_SD3_PASSES = 74


@dataclass(frozen=True)
class Product:
    """Matrix products `[rows, inner] x [inner, outer]`."""

    part: str
    rows: int
    inner: int
    outer: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.times * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class Work:
    """One forward."""

    products: tuple[Product, ...]
    cross_flops: int  # attention to the prompt, and to a picture
    batch: int  # rows of one forward
    heads: int
    head_dim: int
    tokens: int  # of image or video, in each row
    text: int  # tokens of the prompt that stand beside them in self-attention, in each row
    masked: bool  # whether dense attention is given a mask
    layers: int  # with self-attention
    pass_tokens: int  # token-channels that the passes run over, in all layers: passes x tokens x channels

    @property
    def joint(self) -> int:
        """Tokens of self-attention in each row."""
        return self.tokens + self.text

    @property
    def attention_flops(self) -> int:
        """Of dense self-attention in one layer."""
        return 4 * self.batch * self.heads * self.head_dim * self.joint**2

    @property
    def product_flops(self) -> int:
        return sum(product.flops for product in self.products)

    def by_part(self) -> dict[str, int]:
        """Floating-point operations of a dense forward, by part."""
        told: dict[str, int] = {"self-attention": self.attention_flops * self.layers}
        for product in self.products:
            told[product.part] = told.get(product.part, 0) + product.flops
        if self.cross_flops:
            told["cross-attention"] = told.get("cross-attention", 0) + self.cross_flops
        return told


def count_forward(
    model: Published, grid: tuple[int, int, int], *, batch: int = 1, layers: Mapping[str, int] | None = None
) -> Work:
    """Count a dense forward.

    Args:
        grid: frames, rows and columns, in tokens.
        batch: rows of the forward.
        layers: other numbers of blocks than the model's, by the config's names for them.

    Raises:
        UsageError: a transformer with parts that are not counted.
    """
    config = {**model.config, **(layers or {})}
    if config.get("dual_attention_layers"):
        raise UsageError(
            f"this {model.transformer} has blocks with two attentions (dual_attention_layers), which are not counted; "
            "Stable Diffusion 3 medium and 3.5 large are"
        )
    tokens = grid[0] * grid[1] * grid[2]
    return _FAMILIES[model.transformer](model, config, tokens, batch)


def _wan(model: Published, config: Mapping[str, Any], n: int, batch: int) -> Work:
    d, ffn, depth = model.width, config["ffn_dim"], config["num_layers"]
    text, pixels = batch * model.text, _volume(model.patch)
    rows = batch * n
    cross = [Product("cross-attention", rows, d, d, 2 * depth), Product("cross-attention", text, d, d, 2 * depth)]
    seen = model.text
    if config.get("added_kv_proj_dim"):
        cross.append(Product("cross-attention", batch * PICTURE_TOKENS, config["added_kv_proj_dim"], d, 2 * depth))
        seen += PICTURE_TOKENS
    products = [
        Product("projections", rows, d, d, 4 * depth),
        *cross,
        Product("feed-forward", rows, d, ffn, depth),
        Product("feed-forward", rows, ffn, d, depth),
        Product("embeddings", rows, config["in_channels"] * pixels, d),
        Product("embeddings", rows, d, config["out_channels"] * pixels),
        Product("embeddings", text, config["text_dim"], d),
        Product("embeddings", text, d, d),
        *_time_embedding(batch, d),
        Product("embeddings", batch, d, 6 * d),
    ]
    if config.get("image_dim"):
        picture = config["image_dim"]
        products += [
            Product("embeddings", batch * PICTURE_TOKENS, picture, picture),
            Product("embeddings", batch * PICTURE_TOKENS, picture, d),
        ]
    passed = depth * rows * (_WAN_PASSES * d + 2 * ffn)
    return _work(model, config, products, n, batch, text=0, passed=passed, cross=4 * rows * seen * d * depth)


def _flux(model: Published, config: Mapping[str, Any], n: int, batch: int) -> Work:
    d, text = model.width, model.text
    double, single = config["num_layers"], config["num_single_layers"]
    embedders = 3 if config.get("guidance_embeds") else 2
    products = [
        *_double_blocks(d, batch, n, text, double),
        *_single_blocks(d, batch, n + text, single),
        Product("embeddings", batch * n, config["in_channels"], d),
        Product("embeddings", batch * n, d, config.get("out_channels") or config["in_channels"]),
        Product("embeddings", batch * text, config["joint_attention_dim"], d),
        Product("embeddings", batch, _TIME, d, embedders - 1),
        Product("embeddings", batch, config["pooled_projection_dim"], d),
        Product("embeddings", batch, d, d, embedders),
        Product("embeddings", batch, d, 2 * d),
    ]
    passed = batch * (n + text) * d * (_FLUX_DOUBLE * double + _FLUX_SINGLE * single)
    return _work(model, config, products, n, batch, text=text, passed=passed)


def _hunyuan(model: Published, config: Mapping[str, Any], n: int, batch: int) -> Work:
    d, text, pixels = model.width, model.text, _volume(model.patch)
    double, single, refiner = config["num_layers"], config["num_single_layers"], config["num_refiner_layers"]
    embedders = 3 if config.get("guidance_embeds") else 2
    rows = batch * text
    products = [
        *_double_blocks(d, batch, n, text, double),
        *_single_blocks(d, batch, n + text, single),
        Product("text refiner", rows, config["text_embed_dim"], d),
        Product("text refiner", rows, d, d, 4 * refiner),
        Product("text refiner", rows, d, 4 * d, refiner),
        Product("text refiner", rows, 4 * d, d, refiner),
        Product("text refiner", batch, d, 2 * d, refiner),
        *_time_embedding(batch, d),
        Product("embeddings", batch, config["text_embed_dim"], d),
        Product("embeddings", batch, d, d),
        Product("embeddings", batch * n, config["in_channels"] * pixels, d),
        Product("embeddings", batch * n, d, config["out_channels"] * pixels),
        Product("embeddings", batch, _TIME, d, embedders - 1),
        Product("embeddings", batch, config["pooled_projection_dim"], d),
        Product("embeddings", batch, d, d, embedders),
        Product("embeddings", batch, d, 2 * d),
    ]
    passed = batch * (n + text) * d * (_HUNYUAN_DOUBLE * double + _HUNYUAN_SINGLE * single)
    cross = 4 * batch * text * text * d * refiner  # the refiner's, to itself
    return _work(model, config, products, n, batch, text=text, passed=passed, cross=cross)


def _sd3(model: Published, config: Mapping[str, Any], n: int, batch: int) -> Work:
    d, text, depth = model.width, model.text, config["num_layers"]
    pixels = _volume(model.patch)
    # of the last block's text only its queries, keys and values are used
    products = [
        *_double_blocks(d, batch, n, text, depth),
        Product("text stream", batch * text, d, d, -1),
        Product("text stream", batch * text, d, 4 * d, -1),
        Product("text stream", batch * text, 4 * d, d, -1),
        Product("modulation", batch, d, 4 * d, -1),
        Product("embeddings", batch * n, config["in_channels"] * pixels, d),
        Product("embeddings", batch * n, d, config["out_channels"] * pixels),
        Product("embeddings", batch * text, config["joint_attention_dim"], d),
        *_time_embedding(batch, d),
        Product("embeddings", batch, config["pooled_projection_dim"], d),
        Product("embeddings", batch, d, d),
        Product("embeddings", batch, d, 2 * d),
    ]
    passed = depth * batch * (n + text) * d * _SD3_PASSES
    return _work(model, config, products, n, batch, text=text, passed=passed)


def _double_blocks(d: int, batch: int, n: int, text: int, depth: int) -> Iterable[Product]:
    """Blocks with weights of their own for each of the two streams."""
    yield Product("projections", batch * n, d, d, 4 * depth)
    yield Product("feed-forward", batch * n, d, 4 * d, depth)
    yield Product("feed-forward", batch * n, 4 * d, d, depth)
    yield Product("text stream", batch * text, d, d, 4 * depth)
    yield Product("text stream", batch * text, d, 4 * d, depth)
    yield Product("text stream", batch * text, 4 * d, d, depth)
    yield Product("modulation", batch, d, 6 * d, 2 * depth)


def _single_blocks(d: int, batch: int, joint: int, depth: int) -> Iterable[Product]:
    """Blocks in which text and image share all weights; the feed-forward's end and the projection out are one."""
    yield Product("projections", batch * joint, d, d, 3 * depth)
    yield Product("feed-forward", batch * joint, d, 4 * d, depth)
    yield Product("feed-forward", batch * joint, 5 * d, d, depth)
    yield Product("modulation", batch, d, 3 * d, depth)


def _time_embedding(batch: int, d: int) -> tuple[Product, Product]:
    return Product("embeddings", batch, _TIME, d), Product("embeddings", batch, d, d)


def _work(
    model: Published,
    config: Mapping[str, Any],
    products: Iterable[Product],
    n: int,
    batch: int,
    *,
    text: int,
    passed: int,
    cross: int = 0,
) -> Work:
    return Work(
        products=tuple(products),
        cross_flops=cross,
        batch=batch,
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        tokens=n,
        text=text,
        masked=model.valid is not None,
        layers=config["num_layers"] + config.get("num_single_layers", 0),
        pass_tokens=passed,
    )


def _volume(patch: tuple[int, int, int]) -> int:
    return patch[0] * patch[1] * patch[2]


_FAMILIES = {WAN: _wan, FLUX: _flux, HUNYUAN: _hunyuan, SD3: _sd3}
