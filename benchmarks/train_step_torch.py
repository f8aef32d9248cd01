"""The side of transformers in `benchmarks.train_step`: forward, backward and torch's fused AdamW. Needs both.

Settings: folder (a checkpoint in the released layout, and ids.npy: int32 [rows, tokens]), dtype, threads.
One step for each way that transformers has to run experts. In bfloat16 "autocast" keeps weights and moments in float32
as we do, "bf16" has everything in bfloat16.
"""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM

from benchmarks.peer import Step, serve


def make(folder: str, tokens: torch.Tensor, experts: str, weights: torch.dtype, autocast: bool) -> Step:
    """A step that returns its loss."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=weights, experts_implementation=experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            out = model(tokens, labels=tokens).loss
        out.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.item()

    return step


def main() -> None:
    """Says each step's first loss."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    tokens = torch.tensor(np.load(f"{settings['folder']}/ids.npy").astype(np.int64))
    ways = {"": (torch.float32, False)}
    if settings["dtype"] == "bfloat16":
        ways = {" autocast": (torch.float32, True), " bf16": (torch.bfloat16, False)}
    steps = {
        f"torch {experts}{name}": make(settings["folder"], tokens, experts, *way)
        for experts in ("eager", "grouped_mm")
        for name, way in ways.items()
    }
    serve({"losses": {name: step() for name, step in steps.items()}}, steps)


if __name__ == "__main__":
    main()
