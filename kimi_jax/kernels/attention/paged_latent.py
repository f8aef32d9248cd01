"""Decoding's attention on TPU: one query a row over the row's pages of latents, in MLA's absorbed form.

Source: flash attention (Dao et al. 2022, Algorithm 1) over pages (Kwon et al. 2023, arXiv 2309.06180, section 4.3);
the absorbed form is explained in `kimi_jax.infer.forward`. Keys are the latents with their rotary part, values their
first R numbers, for all heads the same: a page is read once and meets the queries of all heads.

One step of the grid is one row. Its pages come from HBM to VMEM a block at a time, in two buffers: while one block is
computed the next one is on its way, across the border of two rows too, so that only the first block of all is waited
for. A row reads as many blocks as it has tokens, so the time follows the work and not the longest row.

B rows   H heads   C = R + rotary   R latent rank   P pages   s tokens a page   W pages in a row's table   K = BLOCK
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.attention.mla_flash import LANES

BLOCK = 512  # tokens that are looked at together; two blocks of K2.5's latents are 1.3 MB of VMEM
TILE = 16  # rows of bfloat16 that lie together
NEGATIVE = -1e30


def supports(rank: int, dtype: Any, page_size: int = TILE) -> bool:
    """Whether the kernel takes these: values that are whole vectors of bfloat16, pages of whole tiles."""
    return jnp.dtype(dtype) == jnp.bfloat16 and rank % LANES == 0 and page_size % TILE == 0


def attend(
    q: Float[Array, "B H C"],
    pages: Float[Array, "P s C"],
    table: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    rank: int,
    scale: float,
    interpret: Any = False,
) -> Float[Array, "B H R"]:
    """softmax(scale q . latents) times the latents' first `rank` numbers, over the first `lengths` tokens of each row.

    table: the row's pages in order; its other entries are numbers of pages too, of finite content. A row of no tokens
    gives what its first one would. Softmax in float32, result in q's dtype.
    """
    rows, heads, width = q.shape
    size = pages.shape[1]
    together = max(min(BLOCK // size, table.shape[1]), 1)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % together)))
    kernel = functools.partial(_kernel, rows, together, size, rank, scale)
    row = lambda b, *_: (b, 0, 0)  # noqa: E731
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows,),
            in_specs=[pl.BlockSpec((1, heads, width), row), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((1, heads, rank), row),
            scratch_shapes=[
                pltpu.VMEM((2, together * size, width), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, heads, rank), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="paged_latent_attention",
    )(jnp.maximum(lengths, 1).astype(jnp.int32), table.astype(jnp.int32), q, pages)


def _kernel(
    rows: int, together: int, size: int, rank: int, scale: float,
    lengths: Any, table: Any, q: Any, pages: Any, out: Any, buffers: Any, arrived: Any, turn: Any,
) -> None:  # fmt: skip
    """A row: lengths [B] and table [B, W] in SMEM, q [1, H, C] and out [1, H, R] in VMEM, pages [P, s, C] in HBM.

    buffers [2, K, C], arrived: a semaphore each, turn: the buffer that this row's first block is in.
    """
    row, block = pl.program_id(0), together * size
    blocks = lax.div(lengths[row] + (block - 1), block)

    def copies(of: Any, number: Any, buffer: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(
                pages.at[table[of, number * together + i]], buffers.at[buffer, pl.ds(i * size, size)],
                arrived.at[buffer],
            )
            for i in range(together)
        ]  # fmt: skip

    def start(of: Any, number: Any, buffer: Any) -> None:
        for copy in copies(of, number, buffer):
            copy.start()

    @pl.when(row == 0)
    def _() -> None:
        turn[0] = 0
        start(0, 0, 0)

    first = turn[0]

    def step(number: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        top, total, acc = carry
        here = lax.rem(first + number, 2)
        last = number + 1 == blocks

        @pl.when(jnp.logical_not(last))
        def _() -> None:
            start(row, number + 1, 1 - here)

        @pl.when(last & (row + 1 < rows))
        def _() -> None:
            start(row + 1, 0, 1 - here)

        for copy in copies(row, number, here):
            copy.wait()
        latents = buffers[here]
        scores = scale * lax.dot_general(q[0], latents, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        place = number * block + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(place < lengths[row], scores, NEGATIVE)
        now = jnp.maximum(top, scores.max(axis=1, keepdims=True))
        probs, shrink = jnp.exp(scores - now), jnp.exp(top - now)
        part = jnp.dot(probs.astype(latents.dtype), latents[:, :rank], preferred_element_type=jnp.float32)
        return now, total * shrink + probs.sum(axis=1, keepdims=True), acc * shrink + part

    heads = q.shape[1]
    nothing = jnp.full((heads, 1), NEGATIVE, jnp.float32), jnp.zeros((heads, 1), jnp.float32)
    _, total, acc = lax.fori_loop(0, blocks, step, (*nothing, jnp.zeros((heads, rank), jnp.float32)))
    out[0] = (acc / total).astype(out.dtype)
    turn[0] = lax.rem(first + blocks, 2)
