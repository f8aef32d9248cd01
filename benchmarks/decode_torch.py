"""The side of transformers in `benchmarks.decode`: greedy decoding with its own key-value cache. Needs torch too.

Settings: folder (a checkpoint in the released layout, and ids.npy: int32 [1, n], whose logits go to logits.npy), prompt
and new (tokens), batch (sizes), threads. For each size and each way that transformers has to run experts one step
reads new random prompts, and one decodes `new` tokens after them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM

from benchmarks.peer import Step, serve


def steps_of(model: Any, vocabulary: int, batch: int, prompt: int, new: int) -> tuple[Step, Step]:
    """Prefill, and decoding of what came last out of it."""
    rng = np.random.default_rng(0)
    last: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill() -> None:
        prompts = torch.tensor(rng.integers(0, vocabulary, (batch, prompt)))
        last["out"] = model(prompts, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode() -> None:
        out = last["out"]
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    return prefill, decode


def main() -> None:
    """Says where the logits are."""
    settings = json.loads(sys.argv[1])
    folder = settings["folder"]
    torch.set_num_threads(settings["threads"])
    steps: dict[str, Step] = {}
    for experts in ("eager", "grouped_mm"):
        model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts)
        model.eval()
        for batch in settings["batch"]:
            pair = steps_of(model, model.config.vocab_size, batch, settings["prompt"], settings["new"])
            steps |= {f"{name} {batch} {experts}": step for name, step in zip(("prefill", "decode"), pair, strict=True)}
    with torch.inference_mode():
        np.save(f"{folder}/logits.npy", model(torch.tensor(np.load(f"{folder}/ids.npy").astype(np.int64))).logits)
    serve({"logits": f"{folder}/logits.npy", "experts": ["eager", "grouped_mm"]}, steps)


if __name__ == "__main__":
    main()
