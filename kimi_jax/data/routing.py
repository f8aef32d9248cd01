"""Routed experts beside the tokens of a batch: to which experts a sampler sent every token, for the trainer to replay.

Source: rollout routing replay, R3 (arXiv 2510.11370); docs/rl.md section 3. The array lies beside `tokens`, not beside
`targets`: what stands at a position is where the token at that position went.

n tokens   B rows   S tokens a row   L MoE layers   k experts of a token
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kimi_jax.config import ModelConfig

FREE = -1  # in place of all k experts of a token in a layer: the router chooses


class RoutingShape(NamedTuple):
    """What a model's routed experts look like."""

    num_layers: int  # with experts
    experts_per_token: int
    num_experts: int  # a layer

    @classmethod
    def of(cls, model: ModelConfig) -> RoutingShape | None:
        """Of a model; None if it has no experts."""
        moe = model.moe
        return None if moe is None else cls(model.num_moe_layers, moe.num_experts_per_tok, moe.n_routed_experts)

    def check(self, experts: np.ndarray, wanted: tuple[int, ...], what: str) -> None:
        """Raises ValueError unless the experts are ints of the wanted shape, the last axis k, that the model has.

        In each layer a token has k different experts or k times `FREE`. what: whose experts they are, for the message.
        """
        if experts.shape != wanted or not np.issubdtype(experts.dtype, np.integer):
            raise ValueError(
                f"routed experts of {what} must be ints {wanted}, for {self.num_layers} MoE layers and "
                f"{self.experts_per_token} experts of a token, not {experts.dtype} {experts.shape}"
            )
        if experts.size and not (experts.min() >= FREE and experts.max() < self.num_experts):
            raise ValueError(
                f"routed experts of {what} are {experts.min()}..{experts.max()}; the model has "
                f"0..{self.num_experts - 1}, and {FREE} lets the router choose"
            )
        ordered = np.sort(experts, axis=-1)
        free, twice = ordered[..., 0] == FREE, (np.diff(ordered, axis=-1) == 0).any(axis=-1)
        if (twice & ~free).any() or (ordered[..., -1] != FREE)[free].any():
            raise ValueError(
                f"routed experts of {what}: in each layer a token has {self.experts_per_token} different experts, or "
                f"{FREE} in place of all of them"
            )
