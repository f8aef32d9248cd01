"""The small parts: norms, linear maps, the gated MLP. Pure functions, then thin Linen modules with parameters.

Source: docs/released_model.md sections 2 and 3 (cast order of RMSNorm, fused bias, SwiGLU).

D width   F inner width   I, O widths of what goes into a matrix and of what comes out
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from kimi_jax.config import ModelConfig
from kimi_jax.kernels.fsdp import fsdp_matmul
from kimi_jax.nn.layout import Layout
from kimi_jax.nn.param import ADAPTERS, AdamW, Muon, declare


def precision(dtype: jnp.dtype | str) -> lax.Precision | None:
    """HIGHEST for float32: on TPU a float32 matmul is otherwise made of bfloat16 products."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Float[Array, "*b I"], kernel: Float[Array, "I O"], wide: bool) -> Float[Array, "*b O"]:
    """x @ kernel, cast to the dtype of x, in that dtype, or in float32 from there on if `wide`.

    The kernel's gradient is summed in float32 and has the kernel's dtype. It is written [I, O] at once: left to
    autodiff it is made [O, I] and transposed, which takes XLA:CPU three times as long behind an activation function.
    """
    kernel = kernel.astype(x.dtype)
    return jnp.matmul(x, kernel, precision=precision(x.dtype), preferred_element_type=jnp.float32 if wide else None)


def _project_fwd(x: Array, kernel: Array, wide: bool) -> tuple[Array, tuple[Array, Array]]:
    return project(x, kernel, wide), (x, kernel)


def _project_bwd(wide: bool, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    exact = precision(x.dtype)
    grad_x = jnp.einsum("...o,io->...i", grad, kernel.astype(x.dtype), precision=exact, preferred_element_type=x.dtype)
    # over several axes XLA:CPU may sum in parts, and would round each of them to bfloat16
    grad_kernel = jnp.einsum("...i,...o->io", x, grad, precision=exact, preferred_element_type=jnp.float32)
    return grad_x, grad_kernel.astype(kernel.dtype)


project.defvjp(_project_fwd, _project_bwd)


def rms_norm(x: Float[Array, "*b D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*b D"]:
    """x / rms(x) in float32, cast to the dtype of x, and only then times scale (docs/released_model.md section 3)."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return _times_scale(normed.astype(x.dtype), scale)


@jax.custom_vjp
def _times_scale(x: Float[Array, "*b D"], scale: Float[Array, " D"]) -> Float[Array, "*b D"]:
    """x * scale in the dtype of x; the scale's gradient is a float32 sum over all tokens, of all devices too."""
    return x * scale.astype(x.dtype)


def _times_scale_fwd(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _times_scale(x, scale), (x, scale)


def _times_scale_bwd(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, scale = residuals
    total = jnp.sum(grad.astype(jnp.float32) * x.astype(jnp.float32), axis=range(x.ndim - 1))
    return grad * scale.astype(x.dtype), total.astype(scale.dtype)


_times_scale.defvjp(_times_scale_fwd, _times_scale_bwd)


def layer_norm(
    x: Float[Array, "*b D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*b D"]:
    """Mean and variance norm with scale and bias, all in float32, cast to the dtype of x at the end."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale. parts: names of parts of the model, as in `nn.param.declare`."""

    eps: float
    param_dtype: str = "float32"
    parts: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Normalise the last axis; same shape and dtype."""
        init = declare(nn.initializers.ones, ("norm",), AdamW(), self.parts)
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        return rms_norm(x, scale, self.eps)


class LayerNorm(nn.Module):
    """`layer_norm` with its scale and bias. parts: names of parts of the model, as in `nn.param.declare`."""

    eps: float
    param_dtype: str = "float32"
    parts: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Normalise the last axis; same shape and dtype."""
        shape = x.shape[-1:]
        ones, zeros = (
            declare(init, ("norm",), AdamW(), self.parts) for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale = self.param("scale", ones, shape, self.param_dtype)
        bias = self.param("bias", zeros, shape, self.param_dtype)
        return layer_norm(x, scale, bias, self.eps)


class Linear(nn.Module):
    """x[..., *inputs] -> y[..., *outputs]: one matrix, seen as an array with several input and output axes.

    inputs, outputs: sizes; input_axes, output_axes: their logical names; layout: of x [B, S, *inputs] and the matrix
    over a mesh, None to leave that to the compiler; parts: names of parts of the model, as in `nn.param.declare`.
    The matrix is one Muon matrix. If the collection of adapters has a `kernel` {a [*inputs, r], b [r, *outputs]}, x a b
    is added before the bias.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_axes: tuple[str, ...]
    output_axes: tuple[str, ...]
    init_std: float
    dtype: str = "float32"
    param_dtype: str = "float32"
    use_bias: bool = False
    layout: Layout | None = None
    parts: tuple[str, ...] = ()

    def setup(self) -> None:
        """Create `kernel` [*inputs, *outputs] and, if asked for, `bias` [*outputs]."""
        normal = nn.initializers.normal(self.init_std)
        init = declare(normal, (*self.input_axes, *self.output_axes), Muon(rows=len(self.inputs)), self.parts)
        self.kernel = self.param("kernel", init, (*self.inputs, *self.outputs), self.param_dtype)
        if self.use_bias:
            init = declare(nn.initializers.zeros, self.output_axes, AdamW(), self.parts)
            self.bias = self.param("bias", init, self.outputs, self.param_dtype)

    def matrix(self) -> Float[Array, "..."]:
        """The whole matrix [*inputs, *outputs], in the dtype in which it is stored, adapters added in float32."""
        kernel = self.kernel
        if self.has_variable(ADAPTERS, "kernel"):
            adapter: Any = self.get_variable(ADAPTERS, "kernel")
            kernel = kernel + jnp.tensordot(adapter["a"], adapter["b"], axes=1, precision=lax.Precision.HIGHEST)
        return kernel

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product in `dtype`; with a bias the sum is rounded once, after the bias."""
        x, kernel = x.astype(self.dtype), self.kernel
        lead = x.shape[: x.ndim - len(self.inputs)]
        x = x.reshape(*lead, math.prod(self.inputs))
        if self.layout is not None and not self.use_bias:
            names = (*self.input_axes, *self.output_axes)
            y = fsdp_matmul(self.layout.matrix(names, kernel.shape, len(self.inputs)), x, kernel)
        else:
            y = project(x, kernel.reshape(x.shape[-1], math.prod(self.outputs)), self.use_bias)
        if self.has_variable(ADAPTERS, "kernel"):
            adapter: Any = self.get_variable(ADAPTERS, "kernel")
            a = adapter["a"].reshape(x.shape[-1], -1)
            b = adapter["b"].reshape(a.shape[1], -1)
            y = y + project(project(x, a, False), b, self.use_bias)
        y = y.reshape(*lead, *self.outputs)
        if self.use_bias:
            y = (y + self.bias.astype(jnp.float32)).astype(self.dtype)
        return y


def text_linear(
    config: ModelConfig, part: str, inputs: dict[str, int], outputs: dict[str, int], layout: Layout | None = None
) -> Linear:
    """A `Linear` of this part of the language model from {axis name: size}, without bias."""
    return Linear(
        tuple(inputs.values()), tuple(outputs.values()), tuple(inputs), tuple(outputs),
        config.initializer_range, config.dtype, config.param_dtype, layout=layout, parts=("language", part),
    )  # fmt: skip


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense MLP and the shared experts."""

    config: ModelConfig
    inner: int
    layout: Layout | None = None
    part: str = "mlp"

    def setup(self) -> None:
        """Three matrices."""
        linear = functools.partial(text_linear, self.config, self.part, layout=self.layout)
        width = {"embed": self.config.hidden_size}
        self.gate = linear(width, {"mlp": self.inner})
        self.up = linear(width, {"mlp": self.inner})
        self.down = linear({"mlp": self.inner}, width)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Same shape, in the activations' dtype."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
