"""Continuous batching: requests join and leave a fixed number of slots; prompts in pieces, all slots decoded at once.

Source: docs/architecture.md section 9. What is compiled, and the arrays it takes, is `infer.programs`; here is who
gets a slot, what is read, what is decoded. Nothing is compiled after each program has run once (`warmup` runs them);
only the vision tower has programs for each class of image sizes (`infer.media`).

Order: callers take turns, each first come, first served (`infer.line`). A step reads pieces of as many prompts as its
budget of tokens allows, or decodes; where both wait the two take turns, so a long prompt does not stop the others. How
long a prompt's pieces are depends on it alone, so that its numbers do too, whatever stands beside it. `tokens_per_call`
tokens are decoded for all slots before Python hears of them, the same ones as one at a time; a call is left early when
enough slots have ended for those who wait, and gives one token while prompts are being read.

Pages: a request gets all that it can ever need (prompt and max_new_tokens) when its prompt starts, and waits, as does
everybody behind it, until there are enough. So nothing ever has to be taken back, at the price of room for tokens that
an early stop leaves unused. A prompt that begins like an earlier one, of this or another request, shares its full
pages; one that is being read is waited for. A request that gives a seed or asks for log-probabilities
(`Sampling.reproducible`) shares only those that were made by reading prompts, since decoding rounds otherwise (visibly
so in bfloat16). Answers to one prompt that are submitted together (`submit_group`) share all of it: one of them reads,
the others begin at its last token.

Weights: `set_params` says what becomes of answers that are not complete, and every token carries the version that drew
it. `unfinished`, `take` and `resume` make values of such answers, which a checkpoint can hold, and answers of values.

B slots   P pages   s tokens a page   A alternatives listed   L MoE layers   k experts of a token
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.infer.cache import Cache, PagePool, media_digest
from kimi_jax.infer.checks import check_media, check_sampling, check_tokens
from kimi_jax.infer.line import NOBODY, Caller, Line
from kimi_jax.infer.media import VisionEncoder, encode_media
from kimi_jax.infer.pages import Pages, Place
from kimi_jax.infer.programs import PrefillChunk, Programs, Sizes, common_entropy, shapes
from kimi_jax.infer.request import Completion, Grammar, GrammarError, Matcher, Request, Sampling, TokenEvent, completion
from kimi_jax.infer.sequence import Answer, AnswerGroup
from kimi_jax.infer.unfinished import Unfinished, restore

CHUNKS = (32, 128, 512)  # lengths of a prompt's pieces; the last one also bounds how long a decoding step may wait
LOOK_AHEAD = 4  # times the slots: of those who wait, how many are looked at while others wait for a prompt to be read

Running = Literal["drain", "keep", "recompute"]


class Engine:
    """Runs requests on a model. Single thread: `submit`, `cancel` and `step` are called by one thread.

    params: the plain tree of `nn.kimi`, decoder and vision tower; version 0, until others of these `shapes` are set.
    slots: requests that decode together. page_size: tokens a page, a power of two. num_pages: of the cache; default:
    enough for `conversations` of the longest length, of which as many as there are slots run and the others may return:
    their pages are kept meanwhile; default: as many as slots. max_sequence_length: most tokens of prompt and answer.
    mesh: of `kimi_jax.sharding`, None for one device; slots and pages are sharded along its batch axes. Each of
    several hosts has this engine and calls it alike (`infer.lockstep`). chunks: lengths of a prompt's pieces.
    tokens_per_call: how many tokens of an answer are decoded before they are reported; 1 to stream them as they come.
    prefill_tokens: of prompts, read in one step; the longest piece unless given.
    Raises ValueError for sizes without sense.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        *,
        slots: int = 8,
        page_size: int = 64,
        num_pages: int | None = None,
        conversations: int | None = None,
        max_sequence_length: int = 4096,
        mesh: Mesh | None = None,
        chunks: Sequence[int] = CHUNKS,
        tokens_per_call: int = 1,
        prefill_tokens: int | None = None,
    ):
        if any(n < 1 or n & (n - 1) for n in (page_size, *chunks)) or list(chunks) != sorted(set(chunks)):
            raise ValueError(f"page_size={page_size} and the ascending chunks={chunks} must be powers of two")
        if slots < 1 or max_sequence_length < 2 or tokens_per_call < 1:
            raise ValueError(
                f"slots={slots} and tokens_per_call={tokens_per_call} must be at least 1, "
                f"max_sequence_length={max_sequence_length} at least 2"
            )
        self.config, self.mesh, self.shapes = config, mesh, shapes(params)
        self.page_size, self.max_sequence_length = page_size, max_sequence_length
        width = -(-max_sequence_length // page_size)
        num_pages = 1 + max(slots, conversations or 0) * width if num_pages is None else num_pages
        if mesh is not None:
            num_pages += -num_pages % sharding.batch_parts(mesh)
        longest = 1 << (max_sequence_length - 1).bit_length()
        self._chunks = [n for n in chunks if n <= longest] or [chunks[0]]
        budget = max(prefill_tokens or 0, self._chunks[-1])
        # a prompt has one piece of a shorter length, its last, and may have many of the longest
        rows = {n: budget // n if n == self._chunks[-1] else min(budget // n, slots) for n in self._chunks}
        self._pool = PagePool(num_pages)
        self._pages = Pages(self._pool, page_size)
        self._programs = Programs(config, mesh, Sizes(slots, num_pages, page_size, width, tokens_per_call, rows))
        self._encoder = VisionEncoder(config, {}, mesh)
        self._slots: list[Answer | None] = [None] * slots
        self._waiting = Line()
        self._prefilling: list[Answer] = []
        self._coming: tuple[dict[str, Any], int] | None = None
        self._numbers = itertools.count()
        self._seeds = np.random.default_rng(common_entropy(mesh))
        self._counts = dict.fromkeys(("prefill_tokens", "decode_tokens", "prefix_hit_tokens"), 0)
        self._decoded_last = False
        self.version = -1
        self.set_params(params, 0)

    # ------------------------------------------------------------------------------------------------ the public part

    def submit(self, request: Request, caller: Caller = NOBODY) -> int:
        """Put a request at the end of its caller's line; its number.

        Raises ValueError for tokens outside the vocabulary, a prompt that leaves no room for an answer or needs more
        pages than there are, media that do not fit the pads or the model, settings out of range.
        """
        return self._enter(request, caller).number

    def submit_group(self, request: Request, seeds: Sequence[int | None]) -> list[int]:
        """As many answers to one prompt as there are seeds, which take the place of the request's own; their numbers.

        The prompt is read once and its media are encoded once. Raises as `submit`.
        """
        if request.sampling.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1 for a group: a prompt is scored once, not many times")
        if not seeds:
            return []
        with_seed = [dataclasses.replace(request.sampling, seed=seed) for seed in seeds]
        first = self._enter(dataclasses.replace(request, sampling=with_seed[0]))
        if first.owners[-1] < 0:  # who begins at the last token embeds it as a token, which a media pad is not
            first.group = AnswerGroup(len(seeds))
        members = [first]
        for sampling in with_seed[1:]:
            member = dataclasses.replace(
                first, number=next(self._numbers), sampling=sampling, seed=self._seed(sampling),
                tokens=list(first.tokens), pages=[], events=[], scores=[], experts=[], matcher=_begin(first.grammar),
            )  # fmt: skip
            self._waiting.append(member)
            members.append(member)
        return [member.number for member in members]

    def resume(self, unfinished: Unfinished) -> int:
        """Go on with an answer that was taken out, at the end of the line; its number. What it has so far is read like
        a prompt; the next tokens are those that it would have got. Raises ValueError as `submit`, or for an answer that
        is no beginning of one."""
        answer = self._enter(unfinished.request)
        try:
            restore(answer, unfinished, self.config)
        except ValueError:
            self._waiting.remove(answer)
            raise
        answer.rewind(self.page_size)
        return answer.number

    def unfinished(self) -> dict[int, Unfinished]:
        """The answers that wait or run, as they are now, by their numbers. They go on."""
        answers = (s for s in (*self._slots, *self._waiting) if s is not None and not s.cancelled)
        return {s.number: Unfinished.of(s) for s in sorted(answers, key=lambda s: s.number)}

    def take(self) -> dict[int, Unfinished]:
        """The same, and the engine is idle; no events report it."""
        found = self.unfinished()
        self._evict()
        self._waiting.clear()
        self._pages.drop_groups()
        return found

    def _enter(self, request: Request, caller: Caller = NOBODY) -> Answer:
        sampling = request.sampling
        only_scored = sampling.score_from is not None and sampling.max_new_tokens == 0
        tokens = check_tokens(self.config, request.token_ids, self.max_sequence_length + only_scored)
        check_sampling(self.config, sampling, len(tokens))
        owners = check_media(self.config, tokens, request.media)
        limit = min(len(tokens) + sampling.max_new_tokens, self.max_sequence_length)
        if self._pages.count(limit) > self._pool.capacity:
            raise ValueError(
                f"{len(tokens)} tokens and up to {limit - len(tokens)} new ones need {self._pages.count(limit)} pages, "
                f"the cache has {self._pool.capacity}: shorten the prompt, lower max_new_tokens or raise num_pages"
            )
        digests = [media_digest(item) for item in request.media]
        answer = Answer(
            next(self._numbers), sampling, request.media, tokens.tolist(), len(tokens), limit, owners, digests,
            self._seed(sampling), caller, request.grammar, _begin(request.grammar),
        )  # fmt: skip
        if answer.matcher and owners[-1] >= 0:
            raise ValueError("a prompt that ends with an image cannot have a grammar")
        answer.rewind(self.page_size)
        self._waiting.append(answer)
        return answer

    def _seed(self, sampling: Sampling) -> int:
        """The seed it gives, or one that is drawn; below 2^32."""
        return int(self._seeds.integers(1 << 32)) if sampling.seed is None else sampling.seed % (1 << 32)

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, which reports it. Unknown and finished ones are ignored."""
        for answer in (*self._waiting, *self._slots):
            if answer is not None and answer.number == request_id:
                answer.cancelled = True

    def step(self, tokens: int | None = None) -> list[TokenEvent]:
        """Let in who can start, then read pieces of prompts or decode up to `tokens` tokens for every slot (at most,
        and unless given, `tokens_per_call`). What happened."""
        events = self._drop_cancelled()
        self._install()
        events += self._admit()
        events += self._turn(tokens or self._programs.sizes.tokens)
        self._install()  # now, should nobody call again
        return events

    def _turn(self, tokens: int) -> list[TokenEvent]:
        running = [s for s in self._slots if s is not None and not s.prefilling]
        if self._prefilling and (self._decoded_last or not running):
            self._decoded_last = False
            return self._read()
        self._decoded_last = True
        steps = 1 if self._prefilling else min(tokens, self._programs.sizes.tokens)
        return self._decode(running, steps) if running else []

    @property
    def idle(self) -> bool:
        """Nothing waits or runs."""
        return not self._waiting and not any(self._slots)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """All of them, to the end, in the order given. Raises ValueError as `submit`, RuntimeError if one fails.

        Events of requests that others submitted are dropped.
        """
        answers = [self._enter(request) for request in requests]
        for answer in answers:
            while not (answer.events and answer.events[-1].finish_reason):
                self.step()
        return [completion(answer.events, answer.prompt) for answer in answers]

    def stats(self) -> dict[str, int]:
        """waiting, running, free_pages (cached_pages are among them), and since the start: compilations,
        prefill_tokens, decode_tokens, prefix_hit_tokens."""
        return {
            "waiting": len(self._waiting), "running": sum(s is not None for s in self._slots),
            "free_pages": self._pool.free, "cached_pages": self._pool.cached,
            "compilations": self._programs.compilations, **self._counts,
        }  # fmt: skip

    def set_params(self, params: dict[str, Any], version: int | None = None, running: Running | None = None) -> None:
        """Go on with other weights of the same shapes, the vision tower's among them; forgets all known prefixes.

        version: the next one unless given. running: what becomes of answers that are not complete. "drain": they are
        first completed with the old weights, and nobody else begins. "keep": they go on over what the old weights left
        in the cache. "recompute": what they have so far is read again with the new weights, then they go on.
        Raises RuntimeError without `running` unless idle, ValueError if it is something else.
        """
        if running is None and not self.idle:
            raise RuntimeError("set_params needs an idle engine, or running=: the cache is of the old weights")
        if running not in (None, "drain", "keep", "recompute"):
            raise ValueError(f"running must be drain, keep or recompute, not {running!r}")
        self._coming = params, self.version + 1 if version is None else version
        if running == "recompute":
            self._evict()
        self._install(now=running == "keep")

    def _install(self, now: bool = False) -> None:
        """The weights that were set, once no answer runs; or now, beneath those that do."""
        if self._coming is None or (any(self._slots) and not now):
            return
        (params, version), self._coming = self._coming, None
        params = self._programs.place(params)
        self._programs.set_weights(params)  # it fails if they are none; then nothing has changed
        self._encoder.params = {name: params[name] for name in params.keys() & {"vision", "projector"}}
        self.version = version
        for answer in self._slots:
            if answer is not None:
                answer.stale = True
        self._pages.clear()

    def _evict(self) -> None:
        """Those who run go back to the head of the line, the first one first; what they have so far will be read."""
        for answer in sorted((s for s in self._slots if s is not None), key=lambda s: -s.number):
            self._leave(answer, keep=False)
            answer.group, answer.features = None, None
            answer.rewind(self.page_size)
            self._waiting.put_back(answer)

    def warmup(
        self, *, groups: bool = False, scores: bool = False, experts: bool = False, grammars: bool = False
    ) -> None:
        """Compile every program now; those that only groups, scores, routed experts or grammars need if there will be
        any. Raises RuntimeError unless idle.
        """
        if not self.idle:
            raise RuntimeError("warmup needs an idle engine")
        for record in {False, experts}:
            for size, scored in itertools.product(self._chunks, {False, scores}):
                self._programs.prefill([], size, scored, record)
            self._programs.decode([], 1, 1, record)
            if grammars:
                self._programs.decode([], 1, 1, record, {0: np.zeros(0, np.uint32)})
        if groups:
            self._programs.copy([])

    @property
    def _cache(self) -> Cache:
        return self._programs.cache

    @property
    def _weights(self) -> Any:
        return self._programs.weights

    @property
    def _program(self) -> Callable:
        return self._programs.step

    # ------------------------------------------------------------------------------------------------- joining, leaving

    def _drop_cancelled(self) -> list[TokenEvent]:
        gone = [s for s in (*self._waiting, *self._slots) if s is not None and s.cancelled]
        for answer in gone:
            if answer.slot < 0:
                self._waiting.remove(answer)
                self._pages.begun(answer)
        return [self._end(answer, "cancelled") for answer in gone]

    def _admit(self) -> list[TokenEvent]:
        """Slots and pages for those who wait, as far as there are both; their images are encoded together."""
        if self._coming is not None or not self._waiting or None not in self._slots:
            return []
        joined, copies = [], []
        coming = self._pages.being_prefilled(self._prefilling)
        for answer in list(itertools.islice(self._waiting, LOOK_AHEAD * len(self._slots))):
            if None not in self._slots:
                break
            if self._pages.worth_waiting(answer, coming):
                continue
            place = self._pages.give(answer)
            if place is None:
                if not any(self._slots):
                    self._pages.drop_groups()  # they must not hold what the first in line needs, who tries again
                break
            self._waiting.take(answer)
            self._join(answer, place)
            coming.update(self._pages.to_prefill(answer, answer.num_cached))
            copies += [place.copied] if place.copied else []
            joined.append(answer)
        if copies:
            self._programs.copy(copies)
        return self._encode_media(joined)

    def _join(self, answer: Answer, place: Place) -> None:
        answer.pages, answer.num_hits, answer.num_cached = place.pages, place.num_cached, place.num_cached
        self._counts["prefix_hit_tokens"] += place.num_cached
        answer.slot = self._slots.index(None)
        self._slots[answer.slot] = answer
        if answer.prefilling:
            self._prefilling.append(answer)
            if answer.group is not None:
                answer.group.prefiller = answer
        self._pages.begun(answer)

    def _encode_media(self, joined: Sequence[Answer]) -> list[TokenEvent]:
        """The features of what they still have to read. Those whose images fail end."""
        seeing = [s for s in joined if (s.owners[s.num_cached :] >= 0).any()]
        if not seeing:
            return []
        items = {d: item for s in seeing for d, item in zip(s.digests, s.media, strict=True)}
        features, failed = encode_media(self._encoder, items), []
        for answer in seeing:
            own = [features[digest] for digest in answer.digests]
            errors = [error for error in own if isinstance(error, Exception)]
            if errors:  # one bad request must not end the others
                failed.append(self._end(answer, "error", f"vision: {type(errors[0]).__name__}: {errors[0]}"))
            else:
                answer.features = np.concatenate([each for each in own if not isinstance(each, Exception)])
        return failed

    def _end(self, answer: Answer, reason: str, error: str | None = None) -> TokenEvent:
        self._leave(answer)
        return answer.report(None, None, (), reason, error, self.version)

    def _leave(self, answer: Answer, keep: bool = True) -> None:
        """Frees slot and pages. Full pages stay known, the answer's too: it is part of the next turn's prompt."""
        if answer.slot >= 0:
            self._slots[answer.slot] = None
            if keep:
                self._pages.insert(answer, answer.page_keys(answer.num_cached, self.page_size))
            self._pool.release(answer.pages)
            answer.slot = -1
        if answer.group is not None and answer.group.prefiller is answer:
            answer.group.prefiller = None
        if answer in self._prefilling:
            self._prefilling.remove(answer)

    # ------------------------------------------------------------------------------------------------- the two programs

    def _read(self) -> list[TokenEvent]:
        """The next pieces of prompts, all of one length; after the last one of a prompt its first new token."""
        size = self._piece(self._prefilling[0].goal - self._prefilling[0].num_cached)
        pieces: list[PrefillChunk] = []
        for answer in self._prefilling:
            start = answer.num_cached
            while start < answer.goal and len(pieces) < self._programs.sizes.rows[size]:
                if self._piece(answer.goal - start) != size:
                    break
                pieces.append(PrefillChunk(answer, start, min(size, answer.goal - start)))
                start += size
        scored = any(s.sampling.score_from is not None and start < s.prompt for s, start, _ in pieces)
        record = any(piece.sequence.sampling.routed_experts for piece in pieces)
        drawn = self._programs.prefill(pieces, size, scored, record)
        events = []
        for row, (answer, start, count) in enumerate(pieces):
            answer.num_cached = start + count
            self._counts["prefill_tokens"] += count
            if drawn.scores is not None:
                answer.add_scores(start + 1, drawn.scores[row, :count])
            if drawn.experts is not None:
                answer.add_experts(start, drawn.experts[row, :count])
            self._pages.insert(answer, answer.keys)
            if answer.prefilling:
                continue
            answer.features = None
            self._pages.hold(answer)
            if len(answer.tokens) >= answer.limit:
                events.append(self._end(answer, "length"))  # it was only scored
            elif answer.goal == len(answer.tokens):  # else the last one is decoded, which draws the next
                token, logprob, *top = (a[row] for a in drawn.sampled)
                events.append(self._advance(answer, int(token), float(logprob), *top))
        # who still reads goes behind those who had no room in this call
        rest = [s for s in self._prefilling if s.prefilling and s.slot >= 0]
        moved = {piece.sequence for piece in pieces}
        self._prefilling = [s for s in rest if s not in moved] + [s for s in rest if s in moved]
        return events

    def _piece(self, left: int) -> int:
        """The length of the next piece of a prompt that has so many tokens left."""
        return next((n for n in self._chunks if n >= left), self._chunks[-1])

    def _decode(self, running: list[Answer], steps: int) -> list[TokenEvent]:
        """The next tokens of every running sequence."""
        allowed, events = self._masks(running)
        running = [s for s in running if s.slot >= 0]
        if not running:
            return events
        ended = max(min(len(self._waiting), len(self._slots) // 8), 1) if self._waiting else len(running)
        record = any(s.sampling.routed_experts for s in running)
        decoded = self._programs.decode(running, steps, min(ended, len(running)), record, allowed)
        tokens, logprobs = decoded.sampled.tokens.tolist(), decoded.sampled.logprobs.tolist()
        top = decoded.sampled.top_tokens, decoded.sampled.top_logprobs
        for i in range(int(decoded.steps)):
            for answer in running:
                slot = answer.slot
                if slot >= 0:
                    if decoded.experts is not None:
                        answer.add_experts(answer.num_cached, decoded.experts[i, slot][None])
                    answer.num_cached += 1
                    self._counts["decode_tokens"] += 1
                    listed = (a[i, slot] for a in top)
                    events.append(self._advance(answer, tokens[i][slot], logprobs[i][slot], *listed))
        return events

    def _masks(self, running: Sequence[Answer]) -> tuple[dict[int, np.ndarray], list[TokenEvent]]:
        """By slot, what those who have a grammar may say next. Those who cannot follow it end."""
        allowed, failed = {}, []
        for answer in running:
            if answer.matcher is not None:
                try:
                    for token in answer.tokens[answer.prompt + answer.matched :]:
                        answer.matcher.accept(token)
                        answer.matched += 1
                    allowed[answer.slot] = answer.matcher.allowed()
                except GrammarError as error:
                    failed.append(self._end(answer, "error", f"grammar: {error}"))
        return allowed, failed

    def _advance(
        self, answer: Answer, token: int, logprob: float, listed: np.ndarray, values: np.ndarray
    ) -> TokenEvent:
        """A new token, and the end if it is one. listed, values: the alternatives, [A] each."""
        wanted = answer.sampling
        answer.tokens.append(token)
        reason = None
        if token in wanted.stop_ids:
            reason = "stop"
        elif len(answer.tokens) >= answer.limit:
            reason = "length"
        most = wanted.top_logprobs
        top = tuple(zip(listed[:most].tolist(), values[:most].tolist(), strict=True)) if most else ()
        if reason:
            self._leave(answer)
        return answer.report(token, logprob, top, reason, None, self.version)


def _begin(grammar: Grammar | None) -> Matcher | None:
    return None if grammar is None else grammar.start()
