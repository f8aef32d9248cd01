"""The work of `benchmarks.rollout`, and the side of the engine in another checkout, in an interpreter of its own.

Settings: folder (the checkout), slots, page_size, prompts, answers, cases (new tokens, image or not). What is
imported from kimi_jax is imported late, so that it comes from that folder; only names that every version of the engine
has are used.

N patches of an image
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from typing import Any

import numpy as np

from benchmarks.peer import Step, serve

TEXT, GRID = 24, (1, 8, 8)  # tokens of a prompt beside the image's; patches of the image


def demo_model(image: bool) -> Any:
    """The demo's model with random weights, in float32; without its vision tower if there are no images."""
    import jax

    from kimi_jax.config import preset
    from kimi_jax.model import Model
    from kimi_jax.nn.kimi import init_params
    from kimi_jax.nn.param import unbox

    config = dataclasses.replace(preset("demo"), dtype="float32", param_dtype="float32", remat=False)
    config = config if image else dataclasses.replace(config, vision=None)
    return Model(config, unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))))


def prompts_of(model: Any, prompts: int, image: bool, seed: int) -> list[tuple[np.ndarray, tuple]]:
    """Token ids and media of prompts that have no beginning in common."""
    from kimi_jax.data.example import MediaItem
    from kimi_jax.data.patches import num_features

    rng, found = np.random.default_rng(seed), []
    pad = model.config.media_placeholder_token_id
    words = [i for i in range(model.config.vocab_size) if i != pad]
    for _ in range(prompts):
        text, media = rng.choice(words, TEXT).astype(np.int32), ()
        if image:
            channels = 3 * model.config.vision.patch_size**2
            media = (MediaItem(rng.integers(0, 256, (int(np.prod(GRID)), channels)).astype(np.uint8), GRID),)
            pads = np.full(num_features(GRID), pad, np.int32)
            text = np.concatenate([text[:4], pads, text[4:]])
        found.append((text, media))
    return found


def length_of(image: bool, new: int) -> int:
    """Tokens of the longest sequence."""
    return TEXT + (int(np.prod(GRID)) // 4 if image else 0) + new


def rollouts(settings: dict[str, Any], new: int, image: bool) -> Step:
    """One round: `answers` samples of `new` tokens for each of new prompts, as the requests of a list."""
    from kimi_jax.infer.engine import Engine
    from kimi_jax.infer.request import Request, Sampling

    model, rounds = demo_model(image), iter(range(1 << 30))
    # an older checkout's engine is given the model as one
    given = (model,) if "model" in inspect.signature(Engine).parameters else (model.config, model.params)
    engine = Engine(
        *given, slots=settings["slots"], page_size=settings["page_size"], max_sequence_length=length_of(image, new)
    )
    engine.warmup()

    def step() -> None:
        requests = [
            Request(tokens, media, Sampling(1.0, seed=seed, max_new_tokens=new))
            for tokens, media in prompts_of(model, settings["prompts"], image, next(rounds))
            for seed in range(settings["answers"])
        ]
        assert all(len(done.token_ids) == new for done in engine.run(requests))

    return step


def main() -> None:
    """Serves one step for every case."""
    settings = json.loads(sys.argv[1])
    sys.path.insert(0, settings["folder"])
    steps = {f"{new} {image}": rollouts(settings, new, image) for new, image in settings["cases"]}
    import kimi_jax

    serve({"from": kimi_jax.__file__}, steps)


if __name__ == "__main__":
    main()
