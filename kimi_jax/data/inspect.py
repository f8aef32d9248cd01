"""python -m kimi_jax.data inspect --config=configs/x.py: what a run will see, before it costs anything.

Runs the real data stream of the config (same seed, so the very batches of the run) and prints token and patch counts,
fill rates, the vision share asked for and reached, distinct grids, how many steps an epoch of each source takes, and
bad records by reason. With --out it also draws the first packs of the first batch: rows as bars of segments with their
text, and the vision bins beside them with the images that lie in them. With --text_out it draws the text of the first
documents with the loss mask over it.
"""

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from kimi_jax import cli
from kimi_jax.config import ConfigError, TrainConfig
from kimi_jax.data import DataError
from kimi_jax.data.inspect_plot import draw, items_of
from kimi_jax.data.inspect_text import draw_text
from kimi_jax.data.mixture import ratio_at
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.tokenizer import load_tokenizer
from kimi_jax.packed_batch import PackedBatch

parse = cli.parse
MODALITIES = ("text only", "with images", "with video")


def define_flags() -> None:
    """The command's flags beside --config."""
    flags.DEFINE_integer("batches", 8, "Batches to look at.", lower_bound=1)
    flags.DEFINE_string("out", "", "Draws sample packs into this file (.png, .pdf, .svg).")
    flags.DEFINE_string("text_out", "", "Draws the loss mask over the text of documents into this file.")
    flags.DEFINE_integer("documents", 8, "Documents of the first batch that --text_out draws.", lower_bound=1)
    flags.DEFINE_integer("packs", 4, "Packs of the first batch that are drawn.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    config, f = cli.settings(), flags.FLAGS
    try:
        tokenizer = _tokenizer(config)
        findings, first = summarise(config, f.batches)
        show(config, findings, Console())
        if f.out:
            draw(config, first, tokenizer, f.packs, f.out)
            print(f"{f.out}: the first {min(f.packs, config.data.num_packs)} packs of the first batch")
        if f.text_out:
            count = draw_text(first, tokenizer, f.documents, f.text_out)
            print(f"{f.text_out}: the loss mask of the first {count} documents of the first batch")
    except (ConfigError, DataError, ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


@dataclass
class Findings:
    """What some batches of a stream hold. `report` is that of BatchStream."""

    report: dict[str, Any] = field(default_factory=dict)
    batches: int = 0
    tokens: int = 0
    learned: float = 0.0  # tokens with a loss weight
    longest: int = 0  # tokens of a document
    sizes: dict[str, int] = field(default_factory=dict)  # examples of a source
    drawn: dict[str, float] = field(default_factory=dict)  # from a source for a batch
    documents: Counter = field(default_factory=Counter)  # by modality
    items: Counter = field(default_factory=Counter)  # by grid
    least_grids: int = 0  # distinct grids of the batch that has fewest
    tokens_by_batch: list[int] = field(default_factory=list)


def summarise(config: TrainConfig, batches: int) -> tuple[Findings, PackedBatch]:
    """Reads the first batches of the run; (findings, first batch). Raises ConfigError, DataError."""
    data = dataclasses.replace(config.data, num_workers=0, prefetch=0)  # the same batches whatever the workers
    found = Findings()
    with BatchStream(data, config.model, config.steps) as stream:
        for i in range(batches):
            batch = next(stream)
            _count(found, batch)
            if i == 0:
                first, (found.sizes, before) = batch, _drawn(stream)
        found.report = stream.report()
        _, after = _drawn(stream)
        # the first batch also draws the examples that wait; from then on as many are drawn as are delivered
        found.drawn = {n: (after[n] - before[n]) / (batches - 1) if batches > 1 else float(after[n]) for n in after}
    return found, first


def _drawn(stream: BatchStream) -> tuple[dict[str, int], Counter]:
    """By source: its examples, and how many were drawn so far."""
    sizes: dict[str, int] = {}
    drawn: Counter[str] = Counter()
    for shard in stream.state()["shards"].values():
        for name, source in shard["sources"].items():
            sizes[name] = source["size"]
            drawn[name] += source["drawn"]
    return sizes, drawn


def _count(found: Findings, batch: PackedBatch) -> None:
    real = batch.segment_ids > 0
    starts = real & (batch.positions == 0)
    found.batches += 1
    found.tokens += int(real.sum())
    found.tokens_by_batch.append(int(real.sum()))
    found.learned += int((batch.loss_weights > 0).sum())
    found.longest = max(found.longest, int(batch.positions.max()) + 1)
    found.documents.update(batch.modality[starts].tolist())
    grids = Counter(item.grid for k in batch.vision for b in range(len(k.segment_ids)) for item in items_of(k, b))
    found.items.update(grids)
    found.least_grids = len(grids) if found.batches == 1 else min(found.least_grids, len(grids))


# -------------------------------------------------------------------------------------------------------------- tables


def show(config: TrainConfig, found: Findings, console: Console) -> None:
    """Prints the findings as tables."""
    console.print(_batch_table(config, found))
    if config.data.vision_bins and config.model.vision:
        console.print(_vision_table(config, found))
    console.print(_source_table(config, found))
    for name in found.report["masked"]:
        console.print(f"warning: source {name!r} has no loss in any example: nothing is learned from it", markup=False)
    for name, count in found.report["shortened"].items():
        console.print(f"source {name!r}: {count} conversations were longer than a row and lost turns", markup=False)
    bad = found.report["bad"]
    console.print("bad records: " + ("see below" if bad else "none"), highlight=False)
    for name, reasons in bad.items():
        console.print(f"  {name}: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()), markup=False)
        for example in found.report["bad_examples"].get(name, []):
            console.print(f"    {example}", markup=False, highlight=False, soft_wrap=True)


def _batch_table(config: TrainConfig, found: Findings) -> Table:
    d, report = config.data, found.report
    rows = d.num_packs * d.rows_per_pack
    table = _table(f"a batch (mean of {found.batches})", "", "")
    low, high = min(found.tokens_by_batch), max(found.tokens_by_batch)
    table.add_row("rows x tokens", f"{rows} x {d.sequence_length:,} = {rows * d.sequence_length:,}")
    table.add_row("packs", f"{d.num_packs} of {d.rows_per_pack} row(s)")
    table.add_row("real tokens", f"{found.tokens / found.batches:,.0f}   ({low:,} to {high:,})")
    table.add_row("token fill", f"{report['token_fill']:.2%}")
    table.add_row("tokens learned", f"{found.learned / found.batches:,.0f}   ({found.learned / found.tokens:.1%})")
    asked = ratio_at(d.vision_ratio, 0.0) if config.model.vision else 0.0
    table.add_row("vision share", f"{report['ratio']:.4f} of tokens, asked {asked:.4f}")
    for start, ratio in d.vision_ratio[1:] if config.model.vision else ():
        table.add_row("", f"asked {ratio:.4f} from {start:.0%} of the run")
    for modality, name in enumerate(MODALITIES):
        table.add_row(f"documents, {name}", f"{found.documents[modality] / found.batches:,.1f}")
    table.add_row("longest document", f"{found.longest:,} tokens")
    millions = config.steps * found.tokens / found.batches / 1e6
    table.add_row("the whole run", f"{config.steps:,} steps, {millions:,.1f} M tokens")
    return table


def _vision_table(config: TrainConfig, found: Findings) -> Table:
    d = config.data
    table = _table("vision", "", "")
    for (patches, bins), fill in zip(d.vision_bins, found.report["patch_fill"], strict=True):
        count = bins * d.num_packs
        table.add_row(f"bins of {patches:,} patches", f"{count} a batch ({bins} a pack), fill {fill:.1%}")
    images = sum(n for (t, _, _), n in found.items.items() if t == 1)
    frames = Counter(dict.fromkeys((2, 3, 4), 0))
    for (t, _, _), n in found.items.items():
        frames[t] += n
    table.add_row("items of one frame", f"{images / found.batches:,.1f} a batch")
    table.add_row("chunks of 2, 3, 4 frames", " / ".join(f"{frames[t] / found.batches:,.1f}" for t in (2, 3, 4)))
    table.add_row("distinct grids", f"{len(found.items)} in all, at least {found.least_grids} in every batch")
    if found.items:
        common = ", ".join(f"{_grid(g)} ({n})" for g, n in found.items.most_common(4))
        table.add_row("most frequent (t x h x w)", common)
        largest = max(found.items, key=lambda g: int(np.prod(g)))
        limit = d.vision_bins[-1][0]
        table.add_row("largest", f"{_grid(largest)}, {int(np.prod(largest))} of {limit} patches of the largest bin")
    return table


def _source_table(config: TrainConfig, found: Findings) -> Table:
    columns = ("name", "kind", "weight", "examples", "a batch", "steps/epoch", "epochs/run")
    table = _table("sources (*: with media)", *columns)
    for name, source in config.data.sources.items():
        size, a_batch = found.sizes[name], found.drawn[name]
        table.add_row(
            name,
            source.kind + ("*" if source.vision else ""),
            ", ".join([f"{source.weight:g}", *(f"{w:g} from {f:.0%}" for f, w in source.weight_schedule)]),
            f"{size:,}",
            f"{a_batch:,.1f}",
            f"{size / a_batch:,.0f}" if a_batch else "none drawn",
            f"{a_batch * config.steps / size:.2f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 or not any(columns) else "right", no_wrap=any(columns))
    return table


def _grid(grid: tuple[int, int, int]) -> str:
    return "x".join(map(str, grid))


def _tokenizer(config: TrainConfig) -> Any:
    path = config.data.tokenizer
    if not path or not os.path.exists(path):
        raise ConfigError(
            f"no tokenizer at {path!r} (data.tokenizer): `python -m kimi_jax.data tokenizer --config=...` makes it"
        )
    return load_tokenizer(path)
