"""MuonClip written a second time, in NumPy and float64, one matrix at a time: what the golden-step tests compare with.

It shares no code with `kimi_jax.optim`; the only thing it reads is the declared group of a parameter.
"""

import numpy as np

from kimi_jax.nn.param import AdamW, Muon


def newton_schulz(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """The textbook iteration on X X^T, whatever the shape of the matrix."""
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


class MuonClip:
    """`step(grads, lr)` changes `params`, a flat dict name -> float64 array, in place."""

    def __init__(self, params: dict, groups: dict, config):
        self.params, self.groups, self.config = params, groups, config
        self.momentum = {name: np.zeros_like(p) for name, p in params.items()}
        self.second = {name: np.zeros_like(p) for name, p in params.items()}
        self.count = 0

    def step(self, grads: dict, lr: float) -> None:
        c = self.config
        self.count += 1
        norm = np.sqrt(sum(float(np.sum(g**2)) for g in grads.values()))
        shrink = c.grad_clip_norm / norm if c.grad_clip_norm and norm > c.grad_clip_norm else 1.0
        for name, group in self.groups.items():
            if isinstance(group, Muon):
                direction = self._muon(name, shrink * grads[name], group)
            elif isinstance(group, AdamW):
                direction = self._adam(name, shrink * grads[name])
            else:
                continue
            p = self.params[name]
            self.params[name] = p - lr * (direction + c.weight_decay * p)

    def _muon(self, name: str, grad: np.ndarray, group: Muon) -> np.ndarray:
        c = self.config
        self.momentum[name] = c.muon_momentum * self.momentum[name] + grad
        ahead = grad + c.muon_momentum * self.momentum[name] if c.muon_nesterov else self.momentum[name]
        out = np.zeros_like(ahead)
        for index in np.ndindex(*ahead.shape[: group.batch]):
            tensor = ahead[index]
            rows = int(np.prod(tensor.shape[: group.rows]))
            matrix = tensor.reshape(rows, -1)
            update = newton_schulz(matrix, c.newton_schulz_steps) * c.update_rms * np.sqrt(max(matrix.shape))
            out[index] = update.reshape(tensor.shape)
        return out

    def _adam(self, name: str, grad: np.ndarray) -> np.ndarray:
        c = self.config
        self.momentum[name] = c.adam_b1 * self.momentum[name] + (1 - c.adam_b1) * grad
        self.second[name] = c.adam_b2 * self.second[name] + (1 - c.adam_b2) * grad**2
        first = self.momentum[name] / (1 - c.adam_b1**self.count)
        second = self.second[name] / (1 - c.adam_b2**self.count)
        return first / (np.sqrt(second) + c.adam_eps)
