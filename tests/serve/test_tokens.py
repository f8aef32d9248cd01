"""Token ids through the server: in and out on both routes, histories that are token-exact, the weights' version.

What reinforcement learning needs of an endpoint: the ids that a prompt had, those that were drawn, their
log-probabilities, and the version of the weights that drew each. Random weights write bytes that are no text, so a
history of texts is never what the model saw: the control of the test of histories.
"""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import openai
import pytest

from kimi_jax.data.conversation import with_released_ids
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.generate import Chat, chat_request
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.serve.worker import EngineWorker
from tests.serve.server import PATIENCE, ScriptedEngine, client, load_checkpoint, serving
from tests.serve.test_app import HELLO, TOKENIZER, WEATHER, config, script, user

LENGTH = 1024
PROMPT = list(range(65, 75))
IDS = {"return_token_ids": True}
INSTANT = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model.config, model.params, slots=2, page_size=16, max_sequence_length=LENGTH, chunks=(32,))


@pytest.fixture(scope="module")
def direct(model, engine):
    """What the engine itself draws; then it forgets the prompt, which would else be cached."""
    stops = tuple(map(model.tokenizer.special_id, ("[EOS]", "<|im_end|>", "[EOT]")))
    sampling = Sampling(temperature=1.0, seed=3, max_new_tokens=12, logprobs=True, stop_ids=stops)
    (done,) = engine.run([Request(np.array(PROMPT, np.int32), (), sampling)])
    engine.set_params(model.params, version=0)
    return done


@pytest.fixture(scope="module")
def api(model, engine, direct):
    with serving(engine, model.tokenizer, model.config) as address, client(address) as api:
        yield api


def test_weights_change_beneath_the_answers_of_a_worker(model, engine):
    """The worker hands new weights to the engine's thread; what is wrong with them is raised where they come from.
    It comes before the tests whose server has this engine."""

    async def run() -> tuple[list[int], int]:
        worker = EngineWorker(engine, limit=4)
        worker.start()
        request = Request(np.arange(5, dtype=np.int32), (), Sampling(seed=0, max_new_tokens=100))
        versions = []
        async with worker.submit([request]) as answer:
            async for _, event in answer.events():
                versions.append(event.version)
                if len(versions) == 5:
                    await worker.set_params(model.params, 3, "keep")
                    with pytest.raises(KeyError):
                        await worker.set_params({}, 4, "keep")
        version = worker.version
        await worker.stop()
        return versions, version

    versions, version = asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert version == 3
    assert [key for key, _ in itertools.groupby(versions)] == [0, 3]
    assert len(versions) == 100


def test_ids_and_log_probabilities_of_the_endpoint_are_those_of_the_engine(api, direct):
    """JSON carries a float32 exactly."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3, "logprobs": 0}
    choice = api.completions.create(model="tiny", extra_body=IDS, **body).choices[0]
    assert choice.prompt_token_ids == PROMPT
    assert tuple(choice.token_ids) == direct.token_ids
    assert tuple(choice.logprobs.token_logprobs) == direct.logprobs
    assert choice.weight_versions == [0] * len(direct.token_ids)


def test_chat_gives_the_ids_of_the_prompt_once_and_of_every_choice(api, model):
    body = {"messages": HELLO, "n": 2, "seed": 1, "max_tokens": 6, "logprobs": True, "extra_body": IDS}
    whole = api.chat.completions.create(model="tiny", **body)
    wanted = chat_request(Chat(HELLO), model.tokenizer, model.config, Sampling()).token_ids.tolist()
    assert whole.prompt_token_ids == wanted
    for choice in whole.choices:
        assert len(choice.token_ids) == len(choice.weight_versions) == len(choice.logprobs.content)
        assert "prompt_token_ids" not in choice.model_extra
    pieces = list(api.chat.completions.create(model="tiny", stream=True, **body))
    assert [piece.model_extra.get("prompt_token_ids") for piece in pieces] == [wanted, *[None] * (len(pieces) - 1)]
    for choice in whole.choices:
        mine = [p.choices[0].model_extra for p in pieces if p.choices[0].index == choice.index]
        assert [i for extra in mine for i in extra.get("token_ids", ())] == choice.token_ids
        assert [v for extra in mine for v in extra.get("weight_versions", ())] == choice.weight_versions
    assert "prompt_token_ids" not in api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).model_extra


@pytest.mark.parametrize("thinking", [INSTANT, {}], ids=["instant", "thinking"])
def test_history_given_as_ids_is_what_the_model_saw(api, thinking):
    """Each prompt begins with the one before and all that was drawn, and finds it in the prefix cache; a tool's result
    among them. The same history as text is another one."""

    def ask(messages, seed):
        extra = IDS | thinking
        answer = api.chat.completions.create(
            model="tiny",
            messages=messages,
            tools=[WEATHER],
            seed=seed,
            max_tokens=16,
            temperature=1.5,
            extra_body=extra,
        )
        return answer, answer.prompt_token_ids, answer.choices[0].token_ids

    def continues(prompt, seen):
        return prompt[: len(seen)] == seen

    messages, text = user("What is the weather?"), user("What is the weather?")
    seen, exact, as_text = [], [], []
    for turn in range(4):
        answer, prompt, drawn = ask(messages, turn)
        exact.append(continues(prompt, seen))
        if turn:
            as_text.append(continues(ask(text, turn)[1], seen))
            assert answer.usage.prompt_tokens_details.cached_tokens >= (len(seen) - 16) // 16 * 16 - 16
        seen = prompt + drawn
        message = answer.choices[0].message.to_dict()
        new = user(f"And on day {turn}?")
        messages = [*messages, {**message, "token_ids": drawn}, *new]
        text = [*text, message, *new]
    assert exact == [True] * 4
    assert as_text == [False] * 3


def test_tool_results_behind_ids_keep_the_ids_that_the_model_wrote():
    """As text the call would be renumbered: functions.f:0."""
    call = {"id": "functions.f:7", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.f:7", "content": "x"},
    ]
    ids = TOKENIZER.encode("anything")
    sampled = chat_request(Chat(messages, sampled={0: ids}), TOKENIZER, config(), Sampling()).token_ids
    assert "## Return of functions.f:7\nx" in TOKENIZER.decode(sampled)
    assert "<think>anything<|im_end|>" in TOKENIZER.decode(sampled)
    assert with_released_ids(messages)[1]["tool_call_id"] == "functions.f:0"


@pytest.mark.parametrize("end", [[], ["<|im_end|>"], ["[EOS]"]])
def test_answer_in_the_history_ends_once_however_it_ended(end):
    ids = [*TOKENIZER.encode("no"), *map(TOKENIZER.special_id, end)]
    chat = Chat([{"role": "assistant"}, *HELLO], sampled={0: ids})
    text = TOKENIZER.decode(chat_request(chat, TOKENIZER, config(), Sampling()).token_ids)
    assert f"<think>no{'[EOS]' if end == ['[EOS]'] else ''}<|im_end|><|im_user|>" in text


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": "x", "token_ids": [1]}, "is for whole messages of the assistant"),
        ({"role": "assistant", "content": "x", "partial": True, "token_ids": [1]}, "is for whole messages"),
        ({"role": "assistant", "token_ids": "12"}, "must be a list of token ids"),
        ({"role": "assistant", "token_ids": [1.5]}, "must be a list of token ids"),
        ({"role": "assistant", "token_ids": [True]}, "must be a list of token ids"),
        ({"role": "assistant", "token_ids": [-1]}, "must be a list of token ids"),
        ({"role": "assistant", "token_ids": [1 << 31]}, "must be a list of token ids"),
        ({"role": "assistant", "token_ids": [511, 512]}, "the vocabulary has 0..511"),
        ({"role": "assistant", "token_ids": [1] * LENGTH}, f"at most {LENGTH}"),
        ({"role": "assistant", "token_ids": [TOKENIZER.media_pad_id]}, "holds the media pad"),
    ],
)
def test_ids_that_are_no_answer_are_a_400(api, message, reason):
    with pytest.raises(openai.BadRequestError, match=reason):
        api.chat.completions.create(model="tiny", messages=[message, *HELLO])


def test_every_answer_says_which_weights_there_are_and_every_token_which_drew_it():
    """New weights beneath a running answer: its later tokens have the new number, and so have later answers."""
    engine = ScriptedEngine(TOKENIZER, script, patient=True)
    with serving(engine, TOKENIZER, config()) as address, client(address) as api:
        create = api.chat.completions.with_raw_response.create
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "extra_body": IDS}
        engine.permits.release(3)
        stream = create(stream=True, **body)
        assert stream.headers["x-weight-version"] == "0"
        versions: list[int] = []
        for piece in stream.parse():
            versions += getattr(piece.choices[0], "weight_versions", None) or []
            if len(versions) == 3 and engine.version == 0:
                engine.version = 5
                engine.permits.release(10_000)
        assert versions == [0, 0, 0, 5, 5, 5]
        assert create(**body).headers["x-weight-version"] == "5"
        with pytest.raises(openai.BadRequestError) as error:
            create(model="tiny", messages=HELLO, temperature=-1)
        assert error.value.response.headers["x-weight-version"] == "5"
        assert api.models.with_raw_response.list().headers["x-weight-version"] == "5"
