"""The side of transformers in `benchmarks.rollout`: `generate` on the same weights. Needs torch too.

Settings: folder (a checkpoint in the released layout), prompts, answers, length (tokens of a prompt), new (numbers of
tokens), slots (rows of a call), threads. A step draws `answers` samples for each of new random prompts, `slots` rows a
call with its key-value cache on; prompts are of one length, so that none of them is padded.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM

from benchmarks.peer import Step, serve


def main() -> None:
    """Serves a step for every number of new tokens and every way of transformers to run experts."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    rng = np.random.default_rng(0)
    steps: dict[str, Step] = {}
    for experts in ("eager", "grouped_mm"):
        model = DeepseekV3ForCausalLM.from_pretrained(
            settings["folder"], dtype=torch.float32, experts_implementation=experts
        ).eval()

        def rollouts(new: int, model: DeepseekV3ForCausalLM = model) -> None:
            shape = settings["prompts"], settings["length"]
            rows = torch.tensor(rng.integers(0, model.config.vocab_size, shape))
            per_call = max(settings["slots"] // settings["answers"], 1)
            for part in rows.split(per_call):
                out = model.generate(
                    part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0, max_new_tokens=new,
                    min_new_tokens=new, num_return_sequences=settings["answers"], pad_token_id=0, use_cache=True,
                )  # fmt: skip
                assert out.shape == (len(part) * settings["answers"], settings["length"] + new)

        for new in settings["new"]:
            steps[f"{new} {experts}"] = lambda new=new, rollouts=rollouts: rollouts(new)
    serve({"experts": ["eager", "grouped_mm"]}, steps)


if __name__ == "__main__":
    main()
