"""Rollouts by servers: the same tokens as here, whatever some of the servers do; replies are taken for hostile."""

import contextlib
import copy
import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import ConfigError, check
from kimi_jax.config_rl import RolloutConfig
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.rl.endpoint import Drawn, Endpoint, EndpointError, Malformed, read_drawn
from kimi_jax.rl.remote import EndpointsLost, RemoteSampler, RemoteWorker, rest_seconds
from kimi_jax.rl.rollout import RolloutSource
from kimi_jax.rl.run import run
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.serve.weights import WeightsFolder
from kimi_jax.train import checkpoint
from kimi_jax.untrusted import parse_object
from tests.nn.tiny import QUICK
from tests.rl.stub_server import LOGPROB, VOCABULARY, answer, reply, send, stubs
from tests.rl.tiny_run import TEXT, VISION, settings, write_tokenizer
from tests.serve.server import serving

KEY = "secret"
PROMPT = [5, 6, 7]
BODY = {"seed": 3, "prompt": PROMPT, "max_tokens": 4}
ROLLOUT = RolloutConfig(slots=8, endpoint_tries=3)


def request(seed, most=4, stop_ids=(1,)):
    return Request(np.array(PROMPT, np.int32), (), Sampling(seed=seed, max_new_tokens=most, stop_ids=stop_ids))


@contextlib.contextmanager
def sampler_over(servers, rollout=ROLLOUT, seconds=60.0, rest=lambda failures: 0.01):
    """A sampler whose weights are numbered 1, 2, ..."""
    numbers = iter(range(1, 1000))
    endpoints = [Endpoint(server.url, KEY, seconds, VOCABULARY) for server in servers]
    sampler = RemoteSampler(endpoints, rollout, lambda params: next(numbers), rest)
    try:
        yield sampler
    finally:
        sampler.close()


def draw(sampler, seeds):
    """{seed: (tokens, versions, finish)} of as many answers."""
    numbers = dict(zip(sampler.submit_group(request(None), seeds), seeds, strict=True))
    found = {}
    while not sampler.idle:
        events = sampler.step()
        if events:
            tokens = [event.token_id for event in events]
            versions = {event.version for event in events}
            found[numbers[events[0].request_id]] = (tokens, versions, events[-1].finish_reason)
    return found


def expected(seeds, version):
    return {seed: (answer(seed, PROMPT, 4), {version}, "length") for seed in seeds}


# --------------------------------------------------------------------------------------------------------- one reply


def read(value, stop_ids=(1,)):
    return read_drawn(value, PROMPT, 4, stop_ids, VOCABULARY)


def test_reply_gives_tokens_log_probabilities_and_versions():
    tokens = tuple(answer(3, PROMPT, 4))
    assert read(reply(BODY, 9)) == Drawn(tokens, (LOGPROB,) * 4, (9,) * 4, False)


@pytest.mark.parametrize(("name", "value"), [
    ("token_ids", [1, 2, 3]), ("token_ids", [5, 6, 7, VOCABULARY]), ("token_ids", [5, 6, 7, -1]),
    ("token_ids", [5, 6, 7, 8, 9]), ("token_ids", []), ("token_ids", None), ("token_ids", "abcd"),
    ("token_ids", [5, 6, 7, True]), ("token_ids", [5, 6, 7, 8.0]), ("token_ids", [5, 6, 7, 10**400]),
    ("token_ids", [5, 1, 7, 8]), ("token_ids", {"0": 5}), ("token_ids", [[5], 6, 7, 8]),
    ("weight_versions", [0, 0, 0]), ("weight_versions", [0, 0, 0, -1]), ("weight_versions", [0, 0, 0, "0"]),
    ("weight_versions", [0, 0, 0, 1 << 31]), ("weight_versions", None),
    ("logprobs", None), ("logprobs", []), ("logprobs", {}), ("logprobs", {"token_logprobs": [-1.0] * 3}),
    *(("logprobs", {"token_logprobs": [-1.0, -1.0, -1.0, bad]})
      for bad in (float("nan"), float("inf"), -float("inf"), 0.5, -1e30, 10**400, None, "0", True, [])),
    ("prompt_token_ids", [5, 6]), ("prompt_token_ids", None), ("prompt_token_ids", [5, 6, 8]),
    ("finish_reason", "error"), ("finish_reason", None), ("finish_reason", []), ("finish_reason", {}),
])  # fmt: skip
def test_reply_with_one_wrong_field_is_refused(name, value):
    wrong = reply(BODY, 0)
    wrong["choices"][0][name] = value
    with pytest.raises(Malformed):
        read(wrong)


@pytest.mark.parametrize("choices", [None, [], {}, "x", [1], [None], [{}], [{}, {}], [[]]])
def test_reply_without_its_one_choice_is_refused(choices):
    with pytest.raises(Malformed):
        read({**reply(BODY, 0), "choices": choices})


def test_answer_that_ends_too_early_by_length_is_refused_and_says_what_may_be_wrong():
    """A server with a shorter longest sequence would otherwise be asked for the rest for ever."""
    short = reply({**BODY, "max_tokens": 2}, 0)
    with pytest.raises(Malformed, match="max_sequence_length"):
        read(short)


def test_any_damage_to_a_reply_is_refused_or_leaves_an_answer_within_the_bounds():
    """Bytes changed, removed, doubled and moved, and values of the JSON exchanged for others."""
    chance = random.Random(0)
    whole = reply(BODY, 0)
    values = [None, True, -1, 1e999, 10**30, "", [], {}, [[]] * 3, "\ud800", whole["choices"]]
    refused = 0
    for _ in range(3000):
        if chance.random() < 0.5:
            damaged = copy.deepcopy(whole)
            place = chance.choice([damaged, damaged["choices"][0], damaged["choices"][0]["logprobs"]])
            place[chance.choice(list(place))] = chance.choice(values)
            data = json.dumps(damaged).encode()
        else:
            data = bytearray(json.dumps(whole).encode())
            for _ in range(chance.randint(1, 4)):
                at, size = chance.randrange(len(data)), chance.randint(0, 8)
                data[at : at + size] = bytes(chance.choices(b'0123456789[]{},:"e-.\xff\x00', k=chance.randint(0, 8)))
        try:
            drawn = read(parse_object(bytes(data), "the reply", Malformed))
        except Malformed:
            refused += 1
            continue
        assert 1 <= len(drawn.token_ids) == len(drawn.logprobs) == len(drawn.versions) <= 4
        assert all(type(t) is int and 0 <= t < VOCABULARY for t in drawn.token_ids)
        assert np.isfinite(drawn.logprobs).all()
    assert 1000 < refused < 3000  # much of a reply is not looked at


# ------------------------------------------------------------------------------------------------------ the sampler


def test_answers_are_distributed_over_the_endpoints_and_carry_the_version_of_their_weights():
    with stubs(2) as servers, sampler_over(servers) as sampler:
        for version in (0, 5):
            sampler.set_params(None, version)
            assert draw(sampler, range(40)) == expected(range(40), version)
        assert [server.changes for server in servers] == [2, 2]
        assert min(server.drawn for server in servers) > 0 and sum(server.drawn for server in servers) == 80
        assert sampler.take_metrics() == {"endpoints": 2, "redrawn": 0}


def test_stop_token_of_the_server_that_nobody_asked_for_does_not_end_an_answer():
    def own_stop(server, connection, path, body):
        value = server.well(path, body)
        if path == "/v1/completions" and len(body["prompt"]) == len(PROMPT):
            value = reply({**body, "max_tokens": 2}, server.version)
            value["choices"][0]["finish_reason"] = "stop"
        return value

    with stubs(1) as servers, sampler_over(servers) as sampler:
        servers[0].misbehave = own_stop
        sampler.set_params(None, 0)
        assert draw(sampler, range(3)) == expected(range(3), 0)


def closes(server, connection, path, body):
    connection.close()


def hangs(server, connection, path, body):
    server.stopping.wait()


def drips(server, connection, path, body):
    """A byte now and then: every read is in time, and the reply never ends."""
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not server.stopping.wait(0.02):
            connection.sendall(b" ")


def garbage(server, connection, path, body):
    connection.sendall(b"\x00\xff garbage \r\n\r\n" * 10)


def no_json(server, connection, path, body):
    send(connection, b"<html>it works</html>")


def deep(server, connection, path, body):
    send(connection, b"[" * 50_000)


def huge(server, connection, path, body):
    with contextlib.suppress(OSError):
        send(connection, b" " * (64 << 20))


def endless_headers(server, connection, path, body):
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for i in range(10_000):
            connection.sendall(b"X-%d: aaaaaaaaaaaaaaaaaaaaaaaa\r\n" % i)


def endless_chunks(server, connection, path, body):
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not server.stopping.is_set():
            connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")


def compressed(server, connection, path, body):
    send(connection, b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")


def error_503(server, connection, path, body):
    send(connection, b'{"error": {"message": "the engine has failed"}}', "503 Service Unavailable")


def error_500(server, connection, path, body):
    send(connection, b'{"error": {"message": "this request failed"}}', "500 Internal Server Error")


def moves(server, connection, path, body):
    send(connection, b"", "302 Found", headers="Location: http://169.254.169.254/\r\n")


def keeps_old_weights(server, connection, path, body):
    return server.well(path, body) if path != "/v1/weights" else {"object": "weights", "step": 1, "version": 0}


def other_weights(server, connection, path, body):
    value = server.well(path, body)
    return reply(body, 77) if path == "/v1/completions" else value


MISBEHAVIOUR = [
    (closes, "unreachable"), (hangs, "timeout"), (drips, "timeout"), (garbage, "malformed"), (no_json, "malformed"),
    (deep, "malformed"), (huge, "oversized"), (endless_headers, "malformed"), (endless_chunks, "oversized"),
    (compressed, "malformed"), (error_503, "refused"), (error_500, "request_failed"), (moves, "refused"),
    (keeps_old_weights, "stale"), (other_weights, "stale"),
]  # fmt: skip


@pytest.mark.parametrize(("misbehave", "reason"), MISBEHAVIOUR)
def test_endpoint_that_misbehaves_is_counted_and_its_answers_are_drawn_by_the_other(misbehave, reason):
    """And it is taken in again once it behaves: then it is alone, and draws."""
    seconds = 0.5 if reason == "timeout" else 60.0
    with stubs(2) as servers, sampler_over(servers, seconds=seconds) as sampler:
        sampler.set_params(None, 0)
        assert draw(sampler, range(8)) == expected(range(8), 0)
        good, bad = servers
        bad.misbehave = misbehave
        sampler.set_params(None, 1)
        counts = {}
        for _ in range(100):  # until the bad one was asked
            assert draw(sampler, range(24)) == expected(range(24), 1)
            counts |= {name: count for name, count in sampler.take_metrics().items() if count}
            if f"endpoint_{reason}" in counts:
                break
        assert f"endpoint_{reason}" in counts, counts
        bad.misbehave, good.misbehave = None, closes
        sampler.set_params(None, 2)
        assert draw(sampler, range(8)) == expected(range(8), 2)


@pytest.mark.parametrize("misbehave", [closes, garbage, no_json, keeps_old_weights, other_weights, error_503])
def test_all_endpoints_dead_ends_after_bounded_tries_with_an_error_that_names_them(misbehave):
    rests = []
    with stubs(2) as servers, sampler_over(servers, rest=lambda n: rests.append(n) or 0.0) as sampler:
        for server in servers:
            server.misbehave = misbehave
        sampler.set_params(None, 0)
        with pytest.raises(EndpointsLost) as lost:
            draw(sampler, range(8))
    assert all(server.url in str(lost.value) for server in servers)
    assert rests.count(1) == 2 and max(rests) >= ROLLOUT.endpoint_tries


def test_rests_grow_and_are_bounded():
    assert [rest_seconds(n) for n in (1, 2, 3, 6, 7, 10**6)] == [1, 2, 4, 30, 30, 30]


def test_server_that_was_started_again_gets_the_weights_again():
    with stubs(1) as (server,), sampler_over([server]) as sampler:
        sampler.set_params(None, 3)
        draw(sampler, range(4))
        server.version = 0  # what it was started with
        assert draw(sampler, range(4)) == expected(range(4), 3)
        assert server.changes == 2 and server.version == 1


@pytest.mark.parametrize(("eta", "kept"), [(0, False), (1, True)])
def test_tokens_that_are_older_than_the_bound_are_dropped_and_counted(eta, kept):
    """A server that goes on with the weights before, which it once was given."""

    def behind(server, connection, path, body):
        value = server.well(path, body)
        return reply(body, 1) if path == "/v1/completions" and server.drawn == 1 else value

    rollout = dataclasses.replace(ROLLOUT, max_staleness=eta)
    with stubs(1) as (server,), sampler_over([server], rollout) as sampler:
        sampler.set_params(None, 0)
        draw(sampler, [1])
        server.drawn, server.misbehave = 0, behind
        sampler.set_params(None, 1)
        (found,) = draw(sampler, [1]).values()
        assert found[1] == {0 if kept else 1}
        assert sampler.take_metrics().get("endpoint_stale", 0) == (not kept)


def test_answer_that_no_server_can_draw_is_given_up_and_the_others_are_not():
    def poisoned(server, connection, path, body):
        return error_500(server, connection, path, body) if body.get("seed") == 2 else server.well(path, body)

    with stubs(2) as servers, sampler_over(servers) as sampler:
        for server in servers:
            server.misbehave = poisoned
        sampler.set_params(None, 0)
        found = draw(sampler, range(6))
        assert found.pop(2)[2] == "error"
        assert found == expected([0, 1, 3, 4, 5], 0)


def test_server_without_room_is_asked_for_less_and_stays():
    """429 while others of its answers run is no failure."""

    def crowded(server, connection, path, body):
        if path == "/v1/completions" and server.drawn == 0 and body["seed"]:
            send(connection, b'{"error": {"message": "try again later"}}', "429 Too Many Requests")
            return None
        return server.well(path, body)

    with stubs(1) as (server,), sampler_over([server]) as sampler:
        server.misbehave = crowded
        sampler.set_params(None, 0)
        assert draw(sampler, range(8)) == expected(range(8), 0)


# ------------------------------------------------------------------------------------------------------------ the run


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("KIMI_API_KEY", KEY)


@pytest.mark.parametrize(("changes", "message"), [
    ({"endpoints": ("10.0.0.1:8000",)}, "10.0.0.1:8000"), ({"endpoints": ("ftp://a",)}, "ftp://a"),
    ({"endpoints": ("http://a/v1",)}, "without a path"), ({"endpoints": ("http://u:p@a",)}, "without a path"),
    ({"endpoints": ("http://a:99999",)}, "99999"), ({"endpoints": ("http://a", "http://a")}, "twice"),
    ({"endpoints": ("http://a",), "replay_experts": True}, "replay_experts"),
])  # fmt: skip
def test_settings_of_endpoints_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(settings(tmp_path, tmp_path, **changes))


def test_missing_key_and_tasks_with_images_are_refused(tmp_path, monkeypatch, key):
    write_tokenizer(tmp_path)
    config = settings(tmp_path, tmp_path, kind="count", model=VISION, endpoints=("http://127.0.0.1:9",))
    source = RolloutSource(config, [0], None, RemoteWorker(config, config.rl.rollout, 1.0))
    with pytest.raises(ConfigError, match="has images"):
        source._begin()
    monkeypatch.delenv("KIMI_API_KEY")
    with pytest.raises(ConfigError, match="KIMI_API_KEY"):
        RemoteWorker(config, config.rl.rollout, 1.0)


@pytest.mark.parametrize("changes", [{}, {"max_staleness": 2, "tokens_per_iteration": 2, "max_draws": 2.0}])
def test_rollouts_of_two_servers_are_those_of_this_process(tmp_path, key, changes):
    """Two real servers and engines, weights that change: the same tokens, log-probabilities to rounding."""
    write_tokenizer(tmp_path)
    config = settings(tmp_path, tmp_path / "run", **changes)
    params = jax.jit(lambda: unbox(init_params(TEXT, jax.random.key(0))), compiler_options=QUICK)()
    later = [jax.tree.map(lambda x, f=1 + 0.02 * i: x * f, params) for i in range(3)]

    def batches(config, worker):
        source, found = RolloutSource(config, [0], None, worker), []
        for step, each in enumerate(later):
            source.update(each, step)
            found.append(next(source))
        return found, source.report()

    here, _ = batches(config, RolloutWorker(config, config.rl.rollout, 1.0))
    with contextlib.ExitStack() as stack:
        urls = []
        for _ in range(2):
            engine = Engine(TEXT, params, slots=4, page_size=16, max_sequence_length=32)
            worker = RolloutWorker(config, config.rl.rollout, 1.0)
            folder = WeightsFolder(str(tmp_path / "run" / "weights"), engine)
            server = serving(engine, worker.tokenizer, TEXT, api_key=KEY, weights=folder)
            urls.append(stack.enter_context(server))
        rollout = dataclasses.replace(config.rl.rollout, endpoints=tuple(urls))
        remote = dataclasses.replace(config, rl=dataclasses.replace(config.rl, rollout=rollout))
        worker = stack.enter_context(contextlib.closing(RemoteWorker(remote, rollout, 1.0)))
        there, report = batches(remote, worker)
    assert report["endpoints"] == 2 and report["redrawn"] == 0
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.columns["advantage"], other.columns["advantage"])
        # prompts and pages are read in other pieces: rounding of float32
        np.testing.assert_allclose(one.columns["logp_sampler"], other.columns["logp_sampler"], atol=1e-5)


def test_weights_alone_are_a_checkpoint_and_no_number_comes_twice(tmp_path):
    write_tokenizer(tmp_path)
    config = settings(tmp_path, tmp_path)
    params = jax.jit(lambda: unbox(init_params(TEXT, jax.random.key(0))), compiler_options=QUICK)()
    assert [checkpoint.save_weights(str(tmp_path / "w"), params, config) for _ in range(4)] == [1, 2, 3, 4]
    steps = sorted(folder.name for folder in (tmp_path / "w" / "checkpoints").iterdir())
    assert steps == ["3", "4"] and (tmp_path / "w" / "checkpoints" / "4" / "checksums.json").exists()
    found = checkpoint.load(str(tmp_path / "w"), 3)[1]
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_run_whose_endpoints_all_die_ends_with_an_error_and_its_checkpoint_and_goes_on_when_they_live(
    tmp_path, key, monkeypatch
):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    write_tokenizer(tmp_path)
    with stubs(1) as (server,):

        def dies(server, connection, path, body):
            if body.get("step") == 3:  # the weights of the third iteration
                server.misbehave = closes
                return connection.close()
            return server.well(path, body)

        server.misbehave = dies
        config = settings(tmp_path, tmp_path / "run", endpoints=(server.url,), endpoint_tries=1)
        config = dataclasses.replace(config, steps=3)
        with pytest.raises(EndpointsLost, match=server.url):
            run(config)
        assert checkpoint.load_settings(str(tmp_path / "run")).steps == 3
        assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
        server.misbehave = None
        assert run(config) == 0
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]


def test_every_error_of_an_endpoint_has_a_reason_of_its_own():
    kinds = EndpointError.__subclasses__()
    assert len({kind.reason for kind in kinds}) == len(kinds)
