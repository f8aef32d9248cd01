"""python -m kimi_jax.chat --model=DIR: talk to a released checkpoint or one of our workdirs in the terminal.

Answers appear as they are written, in a terminal the reasoning too, dimmed. --image and --video (each may be given
several times) belong to the first message. What is piped in is one message a line:

  echo "What is this?" | python -m kimi_jax.chat --model=DIR --image=cat.png

Commands: /image FILE and /video FILE for the next message, /thinking (on or off), /reset (a new conversation), /help,
/exit. Ctrl-C ends an answer, at the prompt the program.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from absl import app, flags

from kimi_jax import cli
from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.data.reply import Delta, ReplyParser
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.generate import Chat, ReplyStream, chat_request, stream
from kimi_jax.infer.request import Sampling

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine
    from kimi_jax.infer.lockstep import Leader

HELP = "/image FILE   /video FILE   /thinking   /reset   /exit"
Output: TypeAlias = TextIO | io.TextIOBase
DIM, PLAIN = "\033[2m", "\033[0m"


class ChatSession:
    """What was said so far, and the engine that goes on with it."""

    def __init__(
        self, engine: Engine | Leader, tokenizer: Tokenizer, sampling: Sampling, thinking: bool = True, system: str = ""
    ):
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.thinking = thinking
        self.finish_reason = ""
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages: list[dict[str, Any]] = list(self._system)
        self._media: list[dict[str, Any]] = []

    def attach(self, kind: str, path: str) -> None:
        """An image ("image") or a "video" for the next message. Raises OSError for a file that cannot be read."""
        self._media.append({"type": kind, kind: Path(path).read_bytes()})

    def say(self, text: str) -> Generator[Delta, None, None]:
        """Asks and yields the answer as it comes; what was said counts once an answer has begun to come.

        A caller who stops early leaves the answer in the conversation as far as it got; `finish_reason` says afterwards
        why it ended. Raises ValueError, BadRecord for what cannot be answered; images are forgotten then.
        """
        parts, self._media = [*self._media, {"type": "text", "text": text}], []
        asked = [*self.messages, {"role": "user", "content": parts if len(parts) > 1 else text}]
        chat = Chat(asked, thinking=self.thinking)
        request = chat_request(chat, self._tokenizer, self._engine.config, self._sampling)
        shown = ReplyStream(self._tokenizer, request.sampling.stop_ids, ReplyParser(chat.reasons))
        begun, self.finish_reason = False, ""
        try:
            for delta in stream(self._engine, request, shown):
                begun = True
                yield delta
        finally:
            self.finish_reason = shown.finish_reason
            if begun or shown.finish_reason:
                self.messages = [*asked, shown.reply.message()]


def command(conversation: ChatSession, line: str) -> str:
    """Does what a line that begins with / says; returns what to tell the user."""
    name, _, argument = line.partition(" ")
    if name in ("/image", "/video") and argument.strip():
        try:
            conversation.attach(name[1:], argument.strip())
        except OSError as error:
            return f"{argument.strip()}: {error.strerror or error}"
        return f"{argument.strip()} goes with the next message"
    if name == "/thinking":
        conversation.thinking = not conversation.thinking
        return f"thinking is {'on' if conversation.thinking else 'off'}"
    if name == "/reset":
        conversation.reset()
        return "a new conversation"
    return HELP


def talk(conversation: ChatSession, lines: Iterator[str], out: Output, notes: Output, colours: bool = False) -> int:
    """Answers every line until /exit. Answers go to `out`, notes to `notes`. Returns how many could not be answered."""
    failed = 0
    for line in lines:
        text = line.strip()
        if text == "/exit":
            break
        if text.startswith("/"):
            print(command(conversation, text), file=notes, flush=True)
        elif text:
            try:
                _answer(conversation, text, out, notes, colours)
            except (ValueError, BadRecord) as error:
                failed += 1
                print(f"error: {error}", file=notes, flush=True)
    return failed


def _answer(conversation: ChatSession, text: str, out: Output, notes: Output, colours: bool) -> None:
    reasoning = False
    with _interrupts() as interrupted, contextlib.closing(conversation.say(text)) as deltas:
        for delta in deltas:
            if delta.reasoning and colours:
                out.write(delta.reasoning if reasoning else DIM + delta.reasoning)
                reasoning = True
            if delta.content or delta.call >= 0:
                begins = delta.call >= 0 and not delta.arguments
                shown = f"\n{delta.name or delta.id} " if begins else delta.content + delta.arguments
                out.write(f"{PLAIN}\n{shown}" if reasoning else shown)
                reasoning = False
            out.flush()
            if interrupted:
                break
    print(PLAIN if reasoning else "", file=out, flush=True)
    if conversation.finish_reason == "length":
        print("truncated: --max_new_tokens or --max_sequence_length", file=notes, flush=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, in place of an exception amid a step, which would cost the engine its cache."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Lines from the keyboard, with editing and history where readline is there."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", None, "A released directory or a workdir, with its tokenizer.")
    flags.DEFINE_multi_string("image", [], "An image for the first message.")
    flags.DEFINE_multi_string("video", [], "A video for the first message.")
    flags.DEFINE_bool("thinking", True, "Whether the model reasons before it answers.")
    flags.DEFINE_string("system", "", "What a system message says first.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "float16"], "Of weights and activations.")
    flags.DEFINE_enum("experts", "float", ["float", "int4"], "int4: packed experts stay packed in memory.")
    flags.DEFINE_bool("mesh", False, "Shard the weights over all devices; several hosts always do.")
    flags.DEFINE_integer("max_sequence_length", 4096, "Most tokens of the whole conversation.", 2)
    flags.DEFINE_integer("max_new_tokens", 2048, "Most tokens of an answer.", 1)
    flags.DEFINE_float("temperature", None, "0 is greedy; default: 1.0, 0.6 without thinking.", 0.0)
    flags.DEFINE_float("top_p", 0.95, "Mass of the most probable tokens that are drawn from.", 0.0, 1.0)
    flags.DEFINE_integer("seed", None, "The same one gives the same answers.")


def main(argv: list[str]) -> None:
    """Loads the model and talks; exits with status 1 and the reason if it cannot, or if a piped line had no answer."""
    f = flags.FLAGS
    if len(argv) > 1 or not f.model:
        sys.exit(f"error: {f'unexpected argument {argv[1]!r}' if argv[1:] else 'which model? Give --model=DIR'}")
    from kimi_jax import hosts
    from kimi_jax.infer import lockstep
    from kimi_jax.infer.engine import Engine
    from kimi_jax.model import load_alike

    lockstep.join()
    cli.enable_compilation_cache()
    temperature = f.temperature if f.temperature is not None else 1.0 if f.thinking else 0.6
    sampling = Sampling(temperature, f.top_p, f.seed, f.max_new_tokens)
    try:
        model = load_alike(f.model, f.dtype, f.experts, sharded=f.mesh)
        engine = Engine(model.config, model.params, slots=1, max_sequence_length=f.max_sequence_length, mesh=model.mesh)
        links = lockstep.meet()
        if not hosts.is_first():
            lockstep.obey(engine, links[0])
            return
        with contextlib.closing(lockstep.Leader(engine, links)) as leader:
            leader.watch(lockstep.leave)
            conversation = ChatSession(leader if links else engine, model.tokenizer, sampling, f.thinking, f.system)
            for kind, paths in (("image", f.image), ("video", f.video)):
                for path in paths:
                    conversation.attach(kind, path)
            typed = sys.stdin.isatty()
            if typed:
                print(HELP)
            lines = _typed() if typed else sys.stdin
            failed = talk(conversation, lines, sys.stdout, sys.stderr, sys.stdout.isatty())
    except hosts.HostMissing as error:
        lockstep.leave(str(error))
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failed and not typed else 0)


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = __doc__
    define_flags()
    app.run(main, flags_parser=cli.parse_plain)
