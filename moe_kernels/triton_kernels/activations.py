"""Activations of the expert MLP and their derivatives as device functions, in fp32."""

import triton
import triton.language as tl

# What a gated activation applies to the first half of the pre-activation; the result scales the second half.
GATED = {"swiglu": "silu", "geglu": "gelu"}
ACTIVATIONS = ("relu", "gelu", "silu", "relu2", *GATED)


@triton.jit
def activate(z, NAME: tl.constexpr):
    positive = tl.where(z <= 0.0, 0.0, z)  # keeps a NaN
    if NAME == "relu":
        return positive
    elif NAME == "relu2":
        return positive * positive
    elif NAME == "silu":
        return z * tl.sigmoid(z)
    else:
        tl.static_assert(NAME == "gelu")
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activation_grad(z, NAME: tl.constexpr):
    if NAME == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif NAME == "relu2":
        return tl.where(z <= 0.0, 0.0, 2.0 * z)
    elif NAME == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(NAME == "gelu")
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
