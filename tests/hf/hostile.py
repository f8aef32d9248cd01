"""Damaged and hostile released directories for the tests, and the random ones of the fuzz tests."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from kimi_jax.hf import stream
from tests.hf import tiny

ODD = (
    None, True, -1, 0, 1, 2, 1 << 31, 10**9, 10**12, 10**30, 0.5, -1.0, 1e300, "", "x", "../x", [], [1], [[]], {},
    {"a": 1},
)  # fmt: skip
SCALARS = st.sampled_from(ODD).map(copy.deepcopy)  # they are changed in place


def released(folder: Path, model_type: str = "kimi_k25", **save: Any) -> Path:
    """A tiny released directory."""
    model = tiny.config(model_type)
    stream.save(folder, model, tiny.params(model), model_type, **save)
    return folder


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header (JSON or bytes) and data; length: that it claims for the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The path of everything inside nested objects and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, child in children for path in ((*prefix, key), *paths(child, (*prefix, key)))]


@st.composite
def mutations(draw: st.DrawFn, value: Any) -> Any:
    """The JSON value with one to three places replaced, removed or added to."""
    out = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(paths(out)))
        parent = out
        for key in parents:
            parent = parent[key]
        kind = draw(st.sampled_from(("replace", "remove", "add")))
        if kind == "remove" and len(parent) > 1:
            del parent[last]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=12))] = draw(SCALARS)
        else:
            parent[last] = draw(SCALARS)
    return out
