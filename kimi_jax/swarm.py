"""python -m kimi_jax.swarm "question" --model=URL-or-DIR --corpus=DIR: an agent swarm answers a question.

  --model=http://127.0.0.1:8000/v1 --model_name=kimi   any OpenAI-compatible endpoint (KIMI_API_KEY or --api_key_file)
  --model=DIR                            a released directory or a workdir, in this process
  --corpus=DIR                           documents to search and read: text, web pages, lines of JSON
  --mcp=NAME=COMMAND or --mcp=NAME=URL   tools of an MCP server (may be given several times)
  --code=4                               agents may run Python, in so many sandboxes at a time
  --budget=critical_steps=40,tokens=1e6,cost=2.5,seconds=600,steps=200

The answer and its sources go to standard output, what the agents do to standard error, everything into one journal:

  python -m kimi_jax.swarm --resume=RUN.sqlite --model=...   goes on where a run was interrupted; pays nothing twice
  python -m kimi_jax.swarm --replay=RUN.sqlite               repeats a run without a model
  python -m kimi_jax.swarm view RUN.sqlite                   serves a page with the run (or --out=FILE writes it)

Exit status: 0 for an answer, 1 if there is none, 2 for settings that do not work, 130 after Ctrl-C.
"""

from __future__ import annotations

import http.server
import json
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import app, flags

from kimi_jax import cli

if TYPE_CHECKING:
    from kimi_jax.agents.model import AgentModel
    from kimi_jax.agents.swarm import Swarm, SwarmResult
    from kimi_jax.agents.tools import Tool

_MODEL = flags.DEFINE_string("model", "", "The URL of an endpoint (with /v1), or a directory.")
_NAME = flags.DEFINE_string("model_name", "", "What the endpoint calls the model; default: the first one it lists.")
_KEY_FILE = flags.DEFINE_string("api_key_file", "", "A file with the endpoint's key; else KIMI_API_KEY counts.")
_CORPUS = flags.DEFINE_string("corpus", "", "A folder of documents.")
_CODE = flags.DEFINE_integer("code", 0, "Sandboxed Python interpreters that agents may use at a time; 0: none.", 0)
_MCP = flags.DEFINE_multi_string("mcp", [], "NAME=COMMAND or NAME=URL of an MCP server.")
_PARALLEL = flags.DEFINE_integer("max_parallel", 16, "Subagents that run at a time.", 1)
_DEPTH = flags.DEFINE_integer("max_depth", 1, "2: subagents may have subagents, and so on; 0: no subagents.", 0)
_TIMEOUT = flags.DEFINE_float("child_timeout", 1800.0, "Seconds that a subagent may run; waiting does not count.", 0)
_BUDGET = flags.DEFINE_string("budget", "", "Limits: critical_steps=,steps=,tokens=,cost=,seconds=.")
_PRICES = flags.DEFINE_string("prices", "", "Dollars for a million tokens of prompts and of answers: 0.6,2.5.")
_TOKENS = flags.DEFINE_integer("max_tokens", 4096, "Tokens of one answer.", 1)
_OWN_STEPS = flags.DEFINE_integer("orchestrator_steps", 100, "Turns of the orchestrator.", 1)
_STEPS = flags.DEFINE_integer("subagent_steps", 100, "Turns of a subagent.", 1)
_CONTEXT = flags.DEFINE_enum(
    "context",
    "sharding",
    ["sharding", "hide_tool_results", "discard_all", "summary"],
    "What agents send of their history.",
)
_FULL = flags.DEFINE_integer("context_tokens", 100_000, "From how many tokens discard_all and summary act.", 1)
_THINKING = flags.DEFINE_bool("thinking", True, "A directory's model: reasoning before each answer.")
_LENGTH = flags.DEFINE_integer("max_sequence_length", 4096, "A directory's model: tokens of prompt and answer.", 2)
_JOURNAL = flags.DEFINE_string("journal", "", "The file that the run is written to; default: swarm-DATE-TIME.sqlite.")
_RESUME = flags.DEFINE_string("resume", "", "The journal of a run to go on with.")
_REPLAY = flags.DEFINE_string("replay", "", "The journal of a run to repeat without a model.")
_PORT = flags.DEFINE_integer("port", 0, "view: the port of the page; 0 takes a free one.", 0, 65535)
_OUT = flags.DEFINE_string("out", "", "view: write the page to this file instead.")
_OTLP = flags.DEFINE_string("otlp", "", "view: write OpenTelemetry spans (OTLP, JSON) to this file instead.")
_QUIET = flags.DEFINE_bool("quiet", False, "Do not show what the agents do.")


def main(argv: list[str]) -> None:
    """Answers, or shows a run. Leaves by SystemExit with the status."""
    try:
        if argv[1:2] == ["view"]:
            sys.exit(view(argv[2:]))
        sys.exit(_answer(argv[1:]))
    except ModuleNotFoundError as error:
        print(f'error: {error}; a swarm needs the extra [agents]: pip install "kimi_jax[agents]"', file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _answer(words: list[str]) -> int:
    import anyio

    from kimi_jax.agents import live
    from kimi_jax.agents.journal import ReplayMiss

    view = live.LiveView(_settings().budget)
    running: list[Swarm] = []
    try:
        if _QUIET.value:
            result = anyio.run(_run, words, None, running)
        elif sys.stderr.isatty():
            from rich.live import Live

            with Live(view, console=live.console(), refresh_per_second=4, transient=True):
                result = anyio.run(_run, words, view.observe, running)
        else:
            result = anyio.run(_run, words, live.PlainView(_tell).observe, running)
    except KeyboardInterrupt:
        return _interrupted(running)
    except ReplayMiss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(result, running[0], view.summary() if sys.stderr.isatty() else "")
    return 0 if result.status == "ok" else 1


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _run(words: list[str], observe: Any, running: list[Swarm]) -> SwarmResult:
    """Makes the swarm of this command line and lets it answer. `running` gets it, for those who ask after Ctrl-C."""
    from kimi_jax.agents.swarm import Swarm, replay

    observers = (observe,) if observe else ()
    if _REPLAY.value:
        swarm, question = replay(_REPLAY.value, observers)
        running.append(swarm)
        return await swarm.run(question)
    path, mode = (_RESUME.value, "resume") if _RESUME.value else (_JOURNAL.value or _new_name(), "new")
    question = _question(words)
    async with _tools(path) as tools, _model() as model:
        swarm = Swarm(model, tools, _settings(), path, mode, observers)  # type: ignore[arg-type]
        running.append(swarm)
        try:
            return await swarm.run(question)
        finally:
            swarm.close()


def _question(words: list[str]) -> str:
    from kimi_jax.agents.journal import read_run

    if _RESUME.value and not words:
        return str(read_run(_RESUME.value)[0].get("question"))
    if len(words) != 1 or not words[0].strip():
        raise ValueError('give the question as one argument, in quotes: python -m kimi_jax.swarm "Which ...?"')
    return words[0]


def _new_name() -> str:
    return time.strftime("swarm-%Y%m%d-%H%M%S.sqlite")


def _settings() -> Any:
    from kimi_jax.agents.budget import parse_budget
    from kimi_jax.agents.config import SwarmConfig
    from kimi_jax.agents.context import ContextConfig, Policy
    from kimi_jax.agents.model import Prices

    prices = [float(part) for part in _PRICES.value.split(",")] if _PRICES.value else [0.0, 0.0]
    if len(prices) != 2:
        raise ValueError(f"--prices={_PRICES.value}: give two numbers, for prompts and for answers")
    return SwarmConfig(
        max_parallel=_PARALLEL.value,
        child_timeout=_TIMEOUT.value,
        max_depth=_DEPTH.value,
        orchestrator_steps=_OWN_STEPS.value,
        subagent_steps=_STEPS.value,
        max_tokens=_TOKENS.value,
        budget=parse_budget(_BUDGET.value),
        prices=Prices(*prices),
        context=ContextConfig(cast(Policy, _CONTEXT.value), _FULL.value),
    )


@asynccontextmanager
async def _tools(journal: str) -> AsyncIterator[list[Tool]]:
    """The tools of this command line. What MCP servers write to their standard error goes beside the journal."""
    from kimi_jax.agents.corpus import Corpus
    from kimi_jax.agents.mcp_tools import McpServer

    tools = Corpus(_CORPUS.value).tools() if _CORPUS.value else []
    async with AsyncExitStack() as stack:
        for given in _MCP.value:
            name, _, target = given.partition("=")
            if not name or not target:
                raise ValueError(f"--mcp={given}: give NAME=COMMAND or NAME=URL")
            log = stack.enter_context(Path(f"{journal}.mcp.log").open("a"))  # noqa: SIM115 (closed by the stack)
            url = target.startswith(("http://", "https://"))
            server = McpServer(name, target if url else shlex.split(target), log=log)
            tools += (await stack.enter_async_context(server)).tools
        if _CODE.value:
            from kimi_jax.agents.code_tool import code_tool
            from kimi_jax.sandbox.pool import Pool

            tools.append(code_tool(await stack.enter_async_context(Pool(_CODE.value))))
        yield tools


@asynccontextmanager
async def _model() -> AsyncIterator[AgentModel]:
    """The model of this command line."""
    if not _MODEL.value:
        raise ValueError("which model? Give --model=URL of an OpenAI-compatible endpoint, or --model=DIR")
    if _MODEL.value.startswith(("http://", "https://")):
        from kimi_jax.agents.model import EndpointModel

        key = Path(_KEY_FILE.value).read_text().strip() if _KEY_FILE.value else os.environ.get("KIMI_API_KEY", "none")
        model = EndpointModel(_MODEL.value, _NAME.value, key)
        try:
            if not model.name:
                await model.take_first_name()
            yield model
        finally:
            await model.aclose()
    else:
        from kimi_jax.agents.local_model import LocalModel
        from kimi_jax.infer.engine import Engine
        from kimi_jax.model import load

        cli.enable_compilation_cache()
        loaded = load(_MODEL.value, "bfloat16")
        tokenizer = loaded.tokenizer
        engine = Engine(loaded.config, loaded.params, slots=_PARALLEL.value + 1, max_sequence_length=_LENGTH.value)
        name = _NAME.value or os.path.basename(os.path.normpath(_MODEL.value))
        temperature = 1.0 if _THINKING.value else 0.6
        async with LocalModel(engine, tokenizer, name, thinking=_THINKING.value, temperature=temperature) as local:
            yield local


# ------------------------------------------------------------------------------------------------------------- output


def _print(result: SwarmResult, swarm: Swarm, summary: str) -> None:
    print(result.answer)
    if result.sources:
        print("\nSources:")
        for source in result.sources:
            print(f"  [{source}]")
    agents = len(result.outcomes) - 1
    spent = f"{result.steps} steps ({result.critical_steps} critical), {result.usage.tokens:,} tokens"
    cost = f", ${result.usage.cost:.4f}" if result.usage.cost else ""
    print(f"\n{result.status}: {agents} subagents, {spent}{cost}", file=sys.stderr)
    if not _REPLAY.value:
        print(f"python -m kimi_jax.swarm view {swarm.journal.path}", file=sys.stderr)


def _interrupted(running: list[Swarm]) -> int:
    print("interrupted", file=sys.stderr)
    for swarm in running:
        groups: dict[str, list[str]] = {}
        for agent, status in swarm.outcomes.items():
            kind = {"aborted": "aborted", "not_started": "not started"}.get(status, "finished")
            groups.setdefault(kind, []).append(agent)
        for kind in ("finished", "aborted", "not started"):
            print(f"  {kind}: {', '.join(groups.get(kind, ())) or 'none'}", file=sys.stderr)
        if not _REPLAY.value:
            print(f"go on with: python -m kimi_jax.swarm --resume={swarm.journal.path} --model=...", file=sys.stderr)
    return 130


# ---------------------------------------------------------------------------------------------------------------- view


def view(words: list[str]) -> int:
    """Writes or serves the page of a journal; a page that is loaded again shows what has happened since."""
    if len(words) != 1:
        raise ValueError("view needs one journal: python -m kimi_jax.swarm view RUN.sqlite")
    from kimi_jax.agents import otel, trace
    from kimi_jax.agents.journal import read_run

    def page() -> str:
        return trace.page(*read_run(words[0]))

    if _OTLP.value:
        Path(_OTLP.value).write_text(json.dumps(otel.export(*read_run(words[0]))), encoding="utf-8")
        return 0
    if _OUT.value:
        Path(_OUT.value).write_text(page(), encoding="utf-8")
        return 0
    page()  # so that a file that is none is an error here
    server = http.server.ThreadingHTTPServer(("127.0.0.1", _PORT.value), _handler(page))
    print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
    return 0


def _handler(page: Any) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds that a client may be silent

        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if self.path.split("?")[0] != "/" or host not in ("127.0.0.1", "localhost"):
                self.send_error(404)  # another host name: a page of somewhere else that points here
                return
            body = page().encode("utf-8")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    return Handler


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = __doc__
    app.run(main, flags_parser=cli.parse_plain)
