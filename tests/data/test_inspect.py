"""`inspect` and `tokenizer`: the numbers are those of the batches, images come back from patches pixel for pixel."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from kimi_jax.config import DataConfig, SourceConfig, TrainConfig, preset
from kimi_jax.data.inspect import show, summarise
from kimi_jax.data.inspect_plot import draw, items_of
from kimi_jax.data.inspect_text import draw_text, lines_of, pieces_of
from kimi_jax.data.packing import unpack
from kimi_jax.data.tokenizer import load_tokenizer
from kimi_jax.data.vocabulary import _spread, tokenizer_for
from tests.data.sources.media import clip, png, write_jsonl
from tests.environment import REPO

# exact multiples of the merge window of 28 pixels: nothing is resized, nothing padded
SIZES = [(28, 56), (56, 56), (84, 56), (112, 28)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on two JSONL files: text with odd characters, and images of four sizes with a clip among them."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "run.mp4").write_bytes(clip())
    text = [
        {"text": f"Number {i} costs $5 to $7, größer {{as}} \\alpha, 山水 " + "word " * (i % 40)} for i in range(60)
    ]
    media: list = ["no json"]
    for i, (width, height) in enumerate(SIZES):
        (folder / f"{i}.png").write_bytes(png(width, height, seed=i))
        parts = [{"text": f"What is {i}?", "loss": 0}, {"image": f"{i}.png"}, {"text": f" Noise {i}."}]
        media += [{"id": f"{i}-{j}", "parts": parts} for j in range(12)]
    media += [{"id": "clip", "text": "See <video> rise.", "videos": ["run.mp4"]}] * 8
    sources = {
        "words": SourceConfig(kind="jsonl", path=str(write_jsonl(folder / "text.jsonl", text))),
        "media": SourceConfig(kind="jsonl", path=str(write_jsonl(folder / "media.jsonl", media)), vision=True),
    }
    data = DataConfig(
        sources=sources, tokenizer=str(folder / "tokenizer.json"), sequence_length=128, rows_per_pack=2, num_packs=2,
        vision_bins=((16, 4), (64, 1)), vision_ratio=((0.0, 0.05), (0.5, 0.09)), max_bad_fraction=0.5,
    )  # fmt: skip
    config = TrainConfig(steps=10, model=preset("demo"), data=data)
    tokenizer_for(config, data.tokenizer, 400)
    return config


@pytest.fixture(scope="module")
def looked(config):
    return summarise(config, 4)


def test_findings(config, looked):
    """Totals agree with the arrays of the batch and with the stream's own report."""
    found, first = looked
    assert found.batches == 4
    assert found.tokens == found.report["tokens"]
    assert found.tokens_by_batch[0] == (first.segment_ids > 0).sum()
    assert sum(found.documents.values()) == found.report["documents"]
    patches = sum(int(np.prod(g)) * n for g, n in found.items.items())
    filled = sum(f * p * v for f, (p, v) in zip(found.report["patch_fill"], config.data.vision_bins, strict=True))
    assert patches == round(filled * config.data.num_packs * 4)
    assert found.sizes == {"words": 60, "media": 1 + 12 * len(SIZES) + 8}
    assert found.least_grids >= 2


def test_images_come_back_pixel_for_pixel(looked):
    """Un-patchified from the packed bins, every noise image is one of the files."""
    _, first = looked
    known = {np.asarray(PIL.Image.open(io.BytesIO(png(w, h, seed=i)))).tobytes() for i, (w, h) in enumerate(SIZES)}
    items = [item for bins in first.vision for b in range(len(bins.segment_ids)) for item in items_of(bins, b)]
    stills = [item for item in items if item.grid != (4, 4, 6)]
    assert stills
    assert all(item.frames[0].tobytes() in known for item in stills)
    normalised = first.vision[0]._replace(patches=first.vision[0].patches / np.float32(127.5) - 1)
    for b in range(4):
        for item, same in zip(items_of(first.vision[0], b), items_of(normalised, b), strict=True):
            assert np.abs(item.frames.astype(int) - same.frames).max() <= 1  # rounding of the way back


def test_tables_say_it_all(config, looked):
    """In 80 columns nothing is cut off; the schedule, the bad line and its reason are there."""
    console = Console(file=io.StringIO(), width=80)
    show(config, looked[0], console)
    text = console.file.getvalue()
    for expected in (
        "token fill",
        "asked 0.0500",
        "asked 0.0900 from 50% of the run",
        "steps/epoch",
        "media.jsonl:1",
        "bad_json",
    ):
        assert expected in text
    assert "…" not in text


@pytest.mark.parametrize("name", ["packs.png", "packs.svg"])
def test_figure_is_drawn(config, looked, tmp_path, name):
    """Text with dollars, backslashes and braces is no formula; the figure has ink of every modality's colour."""
    draw(config, looked[1], load_tokenizer(config.data.tokenizer), 9, str(tmp_path / name))
    if name.endswith(".png"):
        pixels = np.asarray(PIL.Image.open(tmp_path / name).convert("RGB"))
        assert pixels.shape[1] > 1500
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_text_only_run(config, looked, tmp_path):
    """Without vision there are no bins, and nothing asks for them."""
    data = dataclasses.replace(config.data, sources={"words": config.data.sources["words"]})
    text = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, vision=None))
    found, first = summarise(text, 1)
    show(text, found, Console(file=io.StringIO()))
    draw(text, first, load_tokenizer(data.tokenizer), 1, str(tmp_path / "text.png"))
    assert found.documents[0] == found.report["documents"]


def test_spread_covers_every_index_once():
    for count in (0, 1, 63, 64, 65, 1000):
        assert sorted(_spread(count)) == list(range(count))
    assert max(list(_spread(1000))[:64]) > 900


def test_same_texts_give_the_same_tokenizer(config, tmp_path):
    first = tokenizer_for(config, str(tmp_path / "a.json"), 400)
    tokenizer_for(config, str(tmp_path / "b.json"), 400)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert first.decode(first.encode("größer 山水")) == "größer 山水"


def test_the_commands(config, tmp_path):
    """The two real commands one after the other, on a config file; a second training of the tokenizer does nothing."""
    sources = {n: (s.kind, s.path, s.vision) for n, s in config.data.sources.items()}
    (tmp_path / "run.py").write_text(
        "from kimi_jax import config as c\n"
        "def get_config():\n"
        f"    sources = {{n: c.SourceConfig(kind=k, path=p, vision=v) for n, (k, p, v) in {sources!r}.items()}}\n"
        "    return c.thaw(c.TrainConfig(model=c.preset('demo'), data=c.DataConfig(\n"
        f"        sources=sources, tokenizer={str(tmp_path / 'new' / 't.json')!r}, sequence_length=128, num_packs=2,\n"
        "        vision_bins=((64, 1),), vision_ratio=((0.0, 0.05),), max_bad_fraction=0.5)))\n"
    )

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        command_line = [sys.executable, "-m", "kimi_jax.data", command, f"--config={tmp_path / 'run.py'}", *arguments]
        return subprocess.run(command_line, cwd=REPO, capture_output=True, text=True, timeout=600)

    before = run("inspect")
    assert before.returncode == 1
    assert "python -m kimi_jax.data tokenizer" in before.stderr
    assert "trained, 300 tokens" in run("tokenizer", "--vocab_size=300").stdout
    again = run("tokenizer", "--vocab_size=500")
    assert "there already, 300 tokens; 500 were asked for" in again.stdout
    done = run("inspect", "--batches=1", f"--out={tmp_path / 'p.png'}", "--config.data.num_packs=1")
    assert done.returncode == 0, done.stderr
    assert "1 x 128" in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "did you mean 'num_packs'" in run("inspect", "--config.data.num_group=1").stderr


def test_text_is_drawn_with_its_mask(config, looked, tmp_path):
    """Pieces are the document's text with the weights of the batch; nothing is lost when lines are broken."""
    _, first = looked
    tokenizer = load_tokenizer(config.data.tokenizer)
    for document in unpack(first):
        pieces = list(pieces_of(document, tokenizer))
        spelled = "".join(p.text.replace("⏎\n", "\n") for p in pieces if "media tokens]" not in p.text)
        assert spelled == tokenizer.decode(document.tokens[document.tokens != tokenizer.media_pad_id])
        learned = "".join(p.text for p in pieces if p.weight)
        weights = np.concatenate([[0.0], document.loss_weights[:-1]])
        assert learned.replace("⏎\n", "\n") == tokenizer.decode(document.tokens[weights > 0])
        lines = lines_of(pieces, 30)
        assert all(sum(len(p.text) for p in line) <= 30 for line in lines)
        assert "".join(p.text for line in lines for p in line) == "".join(p.text for p in pieces).replace("\n", "")
    assert draw_text(first, tokenizer, 5, str(tmp_path / "mask.png")) == 5
    colours = np.asarray(PIL.Image.open(tmp_path / "mask.png").convert("RGB")).reshape(-1, 3).astype(int)
    orange = (colours[:, 0] > 230) & (colours[:, 2] < 160) & (colours[:, 1] > 150)
    assert 0.001 < orange.mean() < 0.5  # the ground of what is learned
