"""What the kernels of linear attention do to rows of a tile: feature maps, their gradients, and rounding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def phi(x, FEATURE: tl.constexpr):
    """The feature map of rows in float32."""
    if FEATURE == "softmax":
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
    elif FEATURE == "elu":
        y = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def phi_backward(grad, x, y, FEATURE: tl.constexpr):
    """The gradient of x from that of y = phi(x)."""
    if FEATURE == "softmax":
        d = y * (grad - tl.sum(y * grad, 1)[:, None])
    elif FEATURE == "elu":
        d = grad * tl.minimum(y, 1.0)
    else:
        d = tl.where(x > 0, grad, 0.0)
    return d


@triton.jit
def cast(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in a type, rounded; the interpreter cuts bfloat16 off instead, so there it is rounded in float32 first."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def operand(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x as products take it; the interpreter multiplies the bit patterns of bfloat16 operands, silently."""
    x = cast(x, TYPE, INTERPRETED)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x
