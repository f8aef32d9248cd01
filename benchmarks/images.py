"""Images to `pixel_values` here, in transformers and in torchvision: images a second and ratios, from one run.

Run:    python -m benchmarks.images          (needs torch, torchvision, transformers with Kimi K2.5, scikit-learn)
Goal:   at least twice transformers' processor where no resize is needed.

A photograph of scikit-learn as a decoded PIL image, cut or enlarged to each size; every side returns float32 patches
[N, 3, 14, 14] (Qwen2-VL's [N, 1176]: two frames of 14x14).
  transformers    its own Kimi K2.5 image processor (torchvision inside, tensors out)
  qwen2-vl pil    transformers' Qwen2-VL processor with the PIL backend, at native resolution: the style of the
                  processor that came with the released weights. It has no padding, so it rounds sizes to 28 instead
  torchvision     the same steps written with torchvision.transforms.v2.functional, nothing around them
The sides take turns, so that a busy machine slows all. `difference` is the largest between our pixels and theirs:
theirs resize with torch, ours with PIL, bit for bit as the release does (tests/data/test_image.py).
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
from absl import app, flags
from sklearn.datasets import load_sample_image

from kimi_jax.data.image import plan_image, process_image

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # The registry's torchvision has its compiled operators for CUDA builds of torch only. No processor calls them, but
    # its import asks for these two by name
    _OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision.transforms.v2 import functional as tv
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 21, "Runs of each side.", lower_bound=3)
flags.DEFINE_integer("threads", 1, "Threads of torch; ours has one. More help only where nothing else runs.")

SIZES = {
    "448x448, whole grid": (448, 448),
    "640x427, padded": (640, 427),
    "1344x1008, whole grid": (1344, 1008),
    "1920x1080, padded": (1920, 1080),
    "2560x1920, resized": (2560, 1920),
}


def torchvision_patches(image: PIL.Image.Image) -> torch.Tensor:
    """[N, 3, 14, 14]: convert, resize and pad by our plan, normalise, cut."""
    plan = plan_image(*image.size)
    pixels = tv.pil_to_tensor(image)
    if image.size != (plan.width, plan.height):
        pixels = tv.resize(pixels, [plan.height, plan.width], tv.InterpolationMode.BICUBIC, antialias=True)
    pixels = tv.pad(pixels, [0, 0, plan.w * 14 - plan.width, plan.h * 14 - plan.height])
    pixels = tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), [0.5] * 3, [0.5] * 3)
    cut = pixels.reshape(3, plan.h, 14, plan.w, 14).permute(1, 3, 0, 2, 4)
    return cut.reshape(-1, 3, 14, 14)


def sides() -> dict[str, Callable[[PIL.Image.Image], np.ndarray | torch.Tensor]]:
    """What is timed, by name; ours first."""
    kimi, qwen = Kimi_K25ImageProcessor(), Qwen2VLImageProcessorPil(max_pixels=16384 * 196)
    return {
        "kimi_jax": lambda image: process_image(image)[0],
        "transformers": lambda image: kimi(image, return_tensors="pt")["pixel_values"],
        "qwen2-vl pil": lambda image: qwen(image, return_tensors="np")["pixel_values"],
        "torchvision": torchvision_patches,
    }


def seconds(fn: Callable[[PIL.Image.Image], object], image: PIL.Image.Image) -> float:
    """Time of one image."""
    start = time.perf_counter()
    fn(image)
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Prints one table."""
    del argv
    torch.set_num_threads(FLAGS.threads)
    photo = PIL.Image.fromarray(load_sample_image("china.jpg"))
    ways = sides()
    print(f"{'image':22} {'side':13} {'images/s':>9} {'ours / theirs':>14} {'difference':>11}")
    for name, size in SIZES.items():
        fits = all(a <= b for a, b in zip(size, photo.size, strict=True))
        image = photo.crop((0, 0, *size)) if fits else photo.resize(size, PIL.Image.Resampling.BICUBIC)
        ours = process_image(image)[0]
        for fn in ways.values():
            fn(image)
        rounds = [[seconds(fn, image) for fn in ways.values()] for _ in range(FLAGS.repeats)]
        for i, (side, fn) in enumerate(ways.items()):
            rate = 1 / statistics.median(r[i] for r in rounds)
            ratio = statistics.median(r[i] / r[0] for r in rounds)
            theirs = np.asarray(fn(image))
            gap = f"{np.abs(theirs - ours).max():.1e}" if theirs.shape == ours.shape else ""
            print(f"{name:22} {side:13} {rate:9.1f} {ratio:14.2f} {gap:>11}")


if __name__ == "__main__":
    app.run(main)
