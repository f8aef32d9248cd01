"""python -m kimi_jax.serve --model=DIR: an OpenAI-compatible server for a released checkpoint or one of our workdirs.

  POST /v1/chat/completions   streaming, tools, pictures and videos as data URIs, logprobs, stop, seed, n, usage
  POST /v1/completions        text or token ids
  GET  /v1/models, /health, /metrics (Prometheus)

Any OpenAI client works: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Reasoning comes as
`reasoning_content`; extra_body={"thinking": {"type": "disabled"}} switches it off. Without sampling settings in a call:
temperature 1.0 (0.6 without thinking), top_p 0.95, as the release recommends. Ctrl-C ends it after the running answers.
There is no authentication: put a proxy in front before others can reach it.
"""

from __future__ import annotations

import os
import sys

from absl import app, flags

from kimi_jax import cli
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.engine import Engine
from kimi_jax.model import load
from kimi_jax.serve.addresses import opener
from kimi_jax.serve.worker import EngineWorker
from kimi_jax.sharding import serving_mesh

_MODEL = flags.DEFINE_string("model", None, "A released directory or a workdir, with its tokenizer.")
_NAME = flags.DEFINE_string("name", "", "What clients call the model; default: the last part of --model.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.", 0, 65535)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "float16"], "Of weights and activations.")
_EXPERTS = flags.DEFINE_enum("experts", "float", ["float", "int4"], "int4: packed experts stay packed in memory.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Answers that are written at the same time.", 1)
_WAITING = flags.DEFINE_integer("max_waiting", 64, "Answers that may wait for a slot; more get a 429.", 0)
_LENGTH = flags.DEFINE_integer("max_sequence_length", 4096, "Most tokens of prompt and answer together.", 2)
_PAGES = flags.DEFINE_integer("num_pages", None, "Pages of 64 tokens in the cache; default: enough for all slots.", 2)
_MESH = flags.DEFINE_bool("mesh", False, "Cut weights and cache over all devices.")
_REMOTE = flags.DEFINE_bool("allow_remote_media", False, "Fetch http and https addresses of pictures.")
_FOLDER = flags.DEFINE_string("allow_media_folder", "", "Open pictures below this folder by path.")
_GRACE = flags.DEFINE_integer("grace_seconds", 30, "How long running answers may take after Ctrl-C.", 0)


def main(argv: list[str]) -> None:
    """Loads, compiles, serves; exits with status 1 and the reason if it cannot."""
    if len(argv) > 1 or not _MODEL.value:
        sys.exit(f"error: {f'unexpected argument {argv[1]!r}' if argv[1:] else 'which model? Give --model=DIR'}")
    try:
        import uvicorn

        import kimi_jax.serve.app as http
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error}; the server needs the extra [serve]: pip install "kimi_jax[serve]"')
    cli.enable_compilation_cache()
    try:
        engine, tokenizer = _load(_MODEL.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    server = http.Server(
        _NAME.value or os.path.basename(os.path.normpath(_MODEL.value)),
        tokenizer,
        engine.config,
        EngineWorker(engine, limit=_SLOTS.value + _WAITING.value),
        _LENGTH.value,
        opener(_REMOTE.value, _FOLDER.value),
    )
    uvicorn.run(server.app(), host=_HOST.value, port=_PORT.value, timeout_graceful_shutdown=_GRACE.value)


def _load(path: str) -> tuple[Engine, Tokenizer]:
    """The model in an engine whose programs are compiled. Raises ValueError and OSError for what cannot be served."""
    mesh = serving_mesh() if _MESH.value else None
    model = load(path, _DTYPE.value, _EXPERTS.value, mesh)
    tokenizer = model.tokenizer  # before anything is compiled: it may be missing
    print(f"{path} is loaded; compiling", file=sys.stderr)
    engine = Engine(
        model, slots=_SLOTS.value, num_pages=_PAGES.value, max_sequence_length=_LENGTH.value, mesh=mesh
    )  # fmt: skip
    engine.warmup()
    return engine, tokenizer


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = __doc__
    app.run(main, flags_parser=cli.parse_plain)
