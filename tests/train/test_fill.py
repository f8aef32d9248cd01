"""The watch over fill and vision ratio of the last log interval."""

from kimi_jax.config import DataConfig, SourceConfig
from kimi_jax.train.fill import FillWatch

DATA = DataConfig(sources={"t": SourceConfig(), "v": SourceConfig(vision=True)}, vision_ratio=((0.0, 0.1),))


def reports(intervals):
    """Reports of the whole run after each interval of 10 batches of 1,000 tokens: (fill, vision ratio) of each."""
    tokens = vision = 0.0
    for n, (fill, ratio) in enumerate(intervals, 1):
        tokens, vision = tokens + 10_000 * fill, vision + 10_000 * fill * ratio
        yield {"batches": 10 * n, "tokens": tokens, "vision_tokens": vision, "token_fill": tokens / (10_000 * n)}


def test_token_fill_of_the_last_interval_is_reported_and_its_fall_is_warned_of_once():
    watch, lines = FillWatch(), []
    seen = list(reports([(0.98, 0.1), (0.98, 0.1), (0.5, 0.1), (0.5, 0.1), (0.98, 0.1), (0.4, 0.1)]))
    for report in seen:
        watch(report, DATA, 1000, lines.append)
    assert "interval_token_fill" not in seen[0]
    assert abs(seen[2]["interval_token_fill"] - 0.5) < 1e-9  # rounding of float64 only
    assert [line.split(":")[1].strip() for line in lines] == ["step 30", "step 60"]
    assert all("token fill" in line for line in lines)


def test_vision_ratio_of_the_last_interval_falling_is_warned_of():
    watch, lines = FillWatch(), []
    for report in reports([(0.98, 0.1), (0.98, 0.05)]):
        watch(report, DATA, 1000, lines.append)
    assert len(lines) == 1 and "vision ratio" in lines[0] and "5.0%" in lines[0]
