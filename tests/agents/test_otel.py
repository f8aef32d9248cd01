"""OpenTelemetry export: known names only, a tree of spans, times inside one another."""

import json

from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.agents import otel
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.journal import read_run
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.tools import from_function
from tests.agents.scripts import brief, orchestrator, run, say, turn

# semantic conventions for generative AI, 1.37: attribute -> type of its value in OTLP; all of them are in the package
# opentelemetry-semantic-conventions 0.66b2 too
KNOWN = {
    "gen_ai.operation.name": "stringValue", "gen_ai.provider.name": "stringValue",
    "gen_ai.request.model": "stringValue",
    "gen_ai.agent.id": "stringValue", "gen_ai.agent.name": "stringValue", "gen_ai.agent.description": "stringValue",
    "gen_ai.conversation.id": "stringValue", "gen_ai.usage.input_tokens": "intValue",
    "gen_ai.usage.output_tokens": "intValue", "gen_ai.response.finish_reasons": "arrayValue",
    "gen_ai.tool.name": "stringValue", "gen_ai.tool.call.arguments": "stringValue",
    "gen_ai.tool.call.result": "stringValue", "gen_ai.output.messages": "stringValue", "error.type": "stringValue",
}  # fmt: skip
OPERATIONS = {"invoke_agent", "chat", "execute_tool"}


def recorded(tmp_path):
    async def look() -> str:
        """Looks."""
        return "found"

    async def child(request):
        if brief(request) == "b":
            raise RuntimeError("boom")
        return say("", ("look", {})) if turn(request) == 0 else say("done")

    path = tmp_path / "run.sqlite"
    swarm = Swarm(orchestrator(["a", "b", "c"], child), [from_function(look)], SwarmConfig(), path)
    run(swarm)
    swarm.close()
    return read_run(path)


def test_otel_spans_have_known_names_and_hang_together(tmp_path):
    meta, events = recorded(tmp_path)
    (resource,) = json.loads(json.dumps(otel.export(meta, events, texts=True)))["resourceSpans"]
    spans = resource["scopeSpans"][0]["spans"]
    by_id = {span["spanId"]: span for span in spans}
    assert len(by_id) == len(spans) == 4 + sum(e.kind in ("step", "tool") for e in events)
    for span in spans:
        attributes = {a["key"]: a["value"] for a in span["attributes"]}
        assert {key: set(value) for key, value in attributes.items()} == {key: {KNOWN[key]} for key in attributes}
        operation = attributes["gen_ai.operation.name"]["stringValue"]
        assert operation in OPERATIONS and span["name"].startswith(operation + " ")
        assert len(span["traceId"]) == 32 and len(span["spanId"]) == 16
        assert int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])
        parent = by_id.get(span.get("parentSpanId"))
        if parent is None:
            assert span["name"] == "invoke_agent root" and "parentSpanId" not in span
        else:
            assert int(parent["startTimeUnixNano"]) <= int(span["startTimeUnixNano"])
            assert int(span["endTimeUnixNano"]) <= int(parent["endTimeUnixNano"])
    failed = [s for s in spans if s["status"]["code"] == otel.ERROR]
    assert [s["name"] for s in failed] == ["invoke_agent worker"]


def test_otel_leaves_texts_out_unless_asked(tmp_path):
    meta, events = recorded(tmp_path)
    assert "found" not in json.dumps(otel.export(meta, events))
    assert "found" in json.dumps(otel.export(meta, events, texts=True))


@given(st.dictionaries(st.text(max_size=9), st.none() | st.integers(0, 9) | st.text(max_size=9), max_size=3))
def test_otel_of_a_run_without_events_is_empty(meta):
    (resource,) = otel.export({**meta, "began": None}, [])["resourceSpans"]
    assert resource["scopeSpans"][0]["spans"] == []
