"""python -m kimi_jax.serve --model=DIR: an OpenAI-compatible server for a released checkpoint or one of our workdirs.

  POST /v1/chat/completions   streaming, tools, images and videos as data URIs, logprobs, ids, stop, seed, usage,
                              response_format (JSON by a schema), tool_choice (required, or a function)
  POST /v1/completions        text or token ids
  GET  /v1/models, /v1/models/{id}, /health, /metrics (Prometheus)
  POST /v1/weights            with --weights_from=WORKDIR: go on with the weights of another checkpoint of that run

Any OpenAI client works: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). Reasoning comes as
`reasoning_content`; extra_body={"thinking": {"type": "disabled"}} switches it off. Without sampling settings in a call:
temperature 1.0 (0.6 without thinking), top_p 0.95, as the release recommends. Ctrl-C ends it after the running answers.
With --api_key, --api_key_file or KIMI_API_KEY in the environment, every route but /health needs it (Authorization:
Bearer KEY). Before others can reach it put a proxy in front, which speaks TLS and limits the rate of each client.

Started on several hosts (kimi_jax.hosts says how they find each other), they serve one model, whose weights and
cache lie over all their devices; host 0 has the port. A host that is lost ends all of them with status 75.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import sys
import threading

import jax
from absl import app, flags

from kimi_jax import cli, hosts
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer import lockstep
from kimi_jax.infer.engine import Engine
from kimi_jax.model import load_alike
from kimi_jax.serve.weights import WeightsFolder
from kimi_jax.serve.worker import EngineWorker

# a client that thinks, or a tool that runs, leaves its slot to others for a while and returns
CONVERSATIONS_A_SLOT = 4

_MODEL = flags.DEFINE_string("model", None, "A released directory or a workdir, with its tokenizer.")
_NAME = flags.DEFINE_string("name", "", "What clients call the model; default: the last part of --model.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.", 0, 65535)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "float16"], "Of weights and activations.")
_EXPERTS = flags.DEFINE_enum("experts", "float", ["float", "int4"], "int4: packed experts stay packed in memory.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Answers that are written at the same time.", 1)
_WAITING = flags.DEFINE_integer("max_waiting", 64, "Answers that may wait for a slot; more get a 429.", 0)
_LENGTH = flags.DEFINE_integer("max_sequence_length", 4096, "Most tokens of prompt and answer together.", 2)
_CONVERSATIONS = flags.DEFINE_integer(
    "conversations", None, "Of the longest length, in the cache: those that run and may go on. Default: 4 x slots.", 1
)
_GRAMMARS = flags.DEFINE_bool("warm_grammars", False, "Compile for schemas now, not at the first call that has one.")
_MESH = flags.DEFINE_bool("mesh", False, "Shard weights and cache over all devices; several hosts always do.")
_REMOTE = flags.DEFINE_bool("allow_remote_media", False, "Fetch http and https URLs on the public internet.")
_NETWORKS = flags.DEFINE_list("allow_media_networks", [], "Other networks that may be fetched from: 10.1.0.0/16,...")
_FOLDER = flags.DEFINE_string("allow_media_folder", "", "Open images below this folder by path.")
_KEY = flags.DEFINE_string("api_key", "", "What clients must send; seen in the list of processes, unlike the next two.")
_KEY_FILE = flags.DEFINE_string(
    "api_key_file", "", "A file that holds it; else KIMI_API_KEY of the environment counts."
)
_WEIGHTS = flags.DEFINE_string(
    "weights_from", "", "A workdir whose checkpoints POST /v1/weights may name by their step; needs a key."
)
_BODY = flags.DEFINE_integer("max_body_mb", 64, "Most MiB of a request.", 1)
_MEMORY = flags.DEFINE_integer("max_memory_mb", 2048, "MiB of host memory for bodies and media of all requests.", 1)
_GRACE = flags.DEFINE_integer("grace_seconds", 30, "How long running answers may take after Ctrl-C.", 0)


def main(argv: list[str]) -> None:
    """Loads, compiles, serves; exits with status 1 and the reason if it cannot."""
    if len(argv) > 1 or not _MODEL.value:
        sys.exit(f"error: {f'unexpected argument {argv[1]!r}' if argv[1:] else 'which model? Give --model=DIR'}")
    try:
        import uvicorn

        import kimi_jax.serve.app as http
        from kimi_jax.serve.guard import read_api_key, uvicorn_settings
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error}; the server needs the extra [serve]: pip install "kimi_jax[serve]"')
    lockstep.join()
    cli.enable_compilation_cache()
    try:
        networks = tuple(map(ipaddress.ip_network, _NETWORKS.value))
        key = read_api_key(_KEY.value, _KEY_FILE.value, os.environ.get("KIMI_API_KEY", ""))
        if _WEIGHTS.value and not key:
            raise ValueError("--weights_from lets calls change the weights, so the server needs a key: --api_key_file")
        if _WEIGHTS.value and jax.process_count() > 1:
            raise ValueError("--weights_from is for a server on one host: weights of many are set on each of them")
        engine, tokenizer = _load(_MODEL.value)
        links = lockstep.meet()
    except hosts.HostMissing as error:
        lockstep.leave(str(error))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not hosts.is_first():
        lockstep.obey(engine, links[0])
        return
    leader = lockstep.Leader(engine, links)
    worker = EngineWorker(leader if links else engine, limit=_SLOTS.value + _WAITING.value)
    leader.watch(lambda why: _lost(worker, why))
    server = http.Server(
        _NAME.value or os.path.basename(os.path.normpath(_MODEL.value)),
        tokenizer,
        engine.config,
        worker,
        _LENGTH.value,
        media_folder=_FOLDER.value,
        remote=_REMOTE.value,
        allowed_networks=networks,
        api_key=key,
        max_body=_BODY.value << 20,
        max_memory=_MEMORY.value << 20,
        weights=WeightsFolder(_WEIGHTS.value, engine) if _WEIGHTS.value else None,
    )
    # uvicorn raises it again when it has shut down; the other hosts are to be told that this is the end
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with contextlib.closing(leader):
        uvicorn.run(
            server.app(), host=_HOST.value, port=_PORT.value, timeout_graceful_shutdown=_GRACE.value,
            **uvicorn_settings(),
        )  # fmt: skip


def _lost(worker: EngineWorker, why: str) -> None:
    """A host is lost: calls get a 503 for a while, so that whoever balances load sees it, then the process ends."""
    worker.fail(why)
    threading.Timer(_GRACE.value, lockstep.leave, [why]).start()


def _load(path: str) -> tuple[Engine, Tokenizer]:
    """The model in an engine whose programs are compiled. Raises ValueError and OSError for what cannot be served."""
    model = load_alike(path, _DTYPE.value, _EXPERTS.value, sharded=_MESH.value)
    if hosts.is_first():
        print(f"{path} is loaded; compiling", file=sys.stderr)
    conversations = _CONVERSATIONS.value or CONVERSATIONS_A_SLOT * _SLOTS.value
    engine = Engine(
        model.config, model.params, slots=_SLOTS.value, conversations=conversations, max_sequence_length=_LENGTH.value,
        mesh=model.mesh,
    )  # fmt: skip
    engine.warmup(grammars=_GRAMMARS.value)
    return engine, model.tokenizer


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = __doc__
    app.run(main, flags_parser=cli.parse_plain)
