"""QK-clip: the part of MuonClip that keeps attention logits bounded.

Source: Kimi K2, arXiv:2507.20534, Algorithm 1 (docs/paper_notes.md section 2.4). After the update, a head of a layer
whose largest logit of this step's forward pass exceeded tau gets its query and key weights scaled so that those logits
would have been tau. Other heads stay.

Shape letters: L layers (dense ones first), H heads.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kimi_jax.nn.decoder import map_attention
from kimi_jax.nn.mla import clip_attention


def scale_factors(max_logits: Float[Array, "L H"], tau: float) -> Float[Array, "L H"]:
    """gamma = min(1, tau / max logit) of every head, float32; 1 for a head that saw no pair (-inf)."""
    over = max_logits > tau
    # The inner choice keeps the division away from zero and -inf.
    return jnp.where(over, tau / jnp.where(over, max_logits, 1.0), 1.0).astype(jnp.float32)


def apply(
    params: PyTree, max_logits: Float[Array, "L H"], tau: float
) -> tuple[PyTree, dict[str, Float[Array, ""] | Int[Array, ""]]]:
    """Parameters with the offending heads scaled down, and `{"clipped_heads": int32, "min_gamma": float32}`.

    `max_logits` are those of the whole global batch, softmax scale included (`Aux.max_logits`); `tau` 0 is off.
    In MLA a head's non-rotary query and key weights take sqrt(gamma) each and its rotary query weights gamma; the
    rotary key is shared by the heads and stays. Raises ValueError for a negative tau, KeyError if an attention layer
    is not where the decoder puts it.
    """
    if tau < 0:
        raise ValueError(f"optimizer.qk_clip_tau must be positive, or 0 for off, not {tau}")
    if tau == 0:
        return params, {"clipped_heads": jnp.int32(0), "min_gamma": jnp.float32(1.0)}
    gamma = scale_factors(max_logits, tau)
    stats = {"clipped_heads": jnp.sum(gamma < 1.0, dtype=jnp.int32), "min_gamma": jnp.min(gamma)}
    return map_attention(params, clip_attention, gamma), stats
