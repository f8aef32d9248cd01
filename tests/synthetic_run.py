"""A made-up run folder for the tests of the report: the files that training and evaluation leave behind."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from kimi_jax.config import SourceConfig, TrainConfig, preset

LAYERS, EXPERTS = 4, 8


def write_run(folder: Path, steps: int = 600, seed: int = 0) -> Path:
    """Writes config.json, metrics.jsonl, eval.jsonl, results.json, samples.json and images; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(workdir=str(folder), steps=steps, model=preset("demo"))
    sources = {"wiki": SourceConfig(path="wiki"), "vqa": SourceConfig(path="vqa", vision=True)}
    data = dataclasses.replace(config.data, sequence_length=512, rows_per_pack=4, num_packs=2, sources=sources)
    config = dataclasses.replace(config, data=data)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    lines = [json.dumps(_row(step, steps, rng)) for step in range(1, steps + 1, max(1, steps // 200))]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 12, "lo']))
    evaluations = [json.dumps(_evaluation(step, steps)) for step in range(100, steps + 1, 100)]
    (folder / "eval.jsonl").write_text("\n".join(evaluations))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "samples").mkdir(exist_ok=True)
    samples = [_image_sample(folder, i, rng) for i in range(8)] + [_clip_sample(folder, i) for i in range(4)]
    samples += [{"task": "text knowledge", "question": "The capital of France is <which city>?", "gold": "Paris",
                 "answer": "Paris", "images": [], "correct": True}]  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def _row(step: int, steps: int, rng: np.random.Generator) -> dict:
    done = step / steps
    lr = 2e-3 * min(1.0, step / 50) * (1.0 if done < 0.65 else 0.5 + 0.5 * np.cos(np.pi * (done - 0.65) / 0.35))

    def loss(start: float, end: float) -> float:
        return end + (start - end) * np.exp(-6 * done) + rng.normal(0, 0.06)

    load = rng.dirichlet(np.full(EXPERTS, 2 + 60 * done), LAYERS - 1) * 4096
    logits = 8 + 70 * done**1.5 * np.linspace(0.3, 1.3, LAYERS) + rng.normal(0, 2, LAYERS)
    speed = {"tokens_per_s": 6100 + rng.normal(0, 240), "patches_per_s": 9800 + rng.normal(0, 500), "step_s": 0.55,
             "wait_s": 0.001, "mfu": 0.31 + rng.normal(0, 0.012)}  # fmt: skip
    return {
        "step": step, "loss": loss(7.2, 1.9), "loss_text": loss(7.4, 3.0), "loss_image": loss(7.0, 0.6),
        "loss_video": loss(7.1, 0.9) if step > 1 else None, "balance_loss": 1.0, "lr": lr, "tokens_seen": step * 4000,
        "grad_norm": float(np.exp(rng.normal(0.2 - done, 0.25))), "dropped": 0, "clipped_heads": int(done > 0.95),
        "max_logit": logits.tolist(), "expert_load": load.tolist(), **speed,
        "data": {"token_fill": 0.978 + rng.normal(0, 0.003), "vision_ratio": 0.30},
        "goodput_run": 0.9, "seconds": {"steps": 54.0 * step, "start": 3.0 * step, "away": 3.0 * step},
    }  # fmt: skip


def _evaluation(step: int, steps: int) -> dict:
    done = step / steps
    scores = [(0.2 + 0.5 * done), (0.5 + 0.1 * done), (0.1 + 0.8 * done), (0.5 + 0.38 * done), 0.24, (3.4 - 1.5 * done)]
    return {"step": step, "rows": [row | {"score": s} for row, s in zip(RESULTS, scores, strict=True)]}


def _image_sample(folder: Path, i: int, rng: np.random.Generator) -> dict:
    image = Image.new("RGB", (64 + 16 * (i % 3), 64), "white")
    corner = int(rng.integers(5, 25))
    ImageDraw.Draw(image).ellipse([corner, corner, corner + 28, corner + 28], fill=["red", "blue", "green"][i % 3])
    image.save(folder / "samples" / f"image_{i}.png")
    right = i % 4 != 3
    gold = ["red", "blue", "green"][i % 3]
    return {"task": "shapes and colours", "question": "What is the colour of the shape?", "gold": gold,
            "answer": gold if right else "teal", "control_answer": "gray", "images": [f"samples/image_{i}.png"],
            "correct": right}  # fmt: skip


def _clip_sample(folder: Path, i: int) -> dict:
    names = []
    for t in range(6):
        image = Image.new("RGB", (70, 56), "black")
        x = 6 + 8 * t if i % 2 else 50 - 8 * t
        ImageDraw.Draw(image).rectangle([x, 20, x + 12, 32], fill="yellow")
        names.append(f"samples/clip_{i}_{t}.png")
        image.save(folder / names[-1])
    gold = "right" if i % 2 else "left"
    return {"task": "video direction", "question": "Which way does the square move?", "gold": gold,
            "answer": "right", "control_answer": "left", "images": names, "correct": gold == "right"}  # fmt: skip


RESULTS = [
    {"task": "shapes and colours", "modality": "image", "metric": "exact match", "score": 0.712, "stderr": 0.014,
     "control": 0.341, "control_name": "blank image", "chance": 0.077, "n": 1000},
    {"task": "vision reasoning", "modality": "image", "metric": "accuracy", "score": 0.634, "stderr": 0.015,
     "control": 0.602, "control_name": "blank image", "chance": 0.5, "n": 1000},
    {"task": "digits (OCR)", "modality": "image", "metric": "exact match", "score": 0.873, "stderr": 0.017,
     "control": 0.104, "control_name": "blank image", "chance": 0.1, "n": 360},
    {"task": "video direction", "modality": "video", "metric": "accuracy", "score": 0.881, "stderr": 0.021,
     "control": 0.512, "control_name": "single_frame", "chance": 0.5, "n": 240, "column": "video", "majority": 0.504,
     "controls": {"single_frame": 0.512, "shuffled_frames": 0.533}},
    {"task": "text knowledge", "modality": "text", "metric": "accuracy", "score": 0.243, "stderr": 0.022,
     "control": 0.31, "control_name": "majority", "chance": 0.25, "n": 400},
    {"task": "wiki", "modality": "text", "metric": "bits_per_byte", "score": 1.871, "stderr": 0.012, "control": 3.2,
     "control_name": "unigram", "chance": None, "n": 512},
]  # fmt: skip
