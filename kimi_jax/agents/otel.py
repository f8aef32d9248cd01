"""A run as OpenTelemetry spans: OTLP in JSON, which every collector takes (POST it to /v1/traces).

One `invoke_agent` span for each agent, below its parent's; in it one `chat` span for each step and one `execute_tool`
span for each tool call. Source: OpenTelemetry semantic conventions for generative AI (1.37; their status is
Development, so all names stand in this file). Texts of models and tools are left out unless they are asked for.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from kimi_jax.agents.events import Event

INTERNAL, CLIENT = 1, 3  # kinds of spans
OK, ERROR = 1, 2  # codes of a status
OPERATION = "gen_ai.operation.name"
AGENT_ID, AGENT_NAME, AGENT_TASK = "gen_ai.agent.id", "gen_ai.agent.name", "gen_ai.agent.description"
CONVERSATION = "gen_ai.conversation.id"
PROVIDER, MODEL = "gen_ai.provider.name", "gen_ai.request.model"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
FINISH = "gen_ai.response.finish_reasons"
TOOL_NAME, TOOL_ARGUMENTS, TOOL_RESULT = "gen_ai.tool.name", "gen_ai.tool.call.arguments", "gen_ai.tool.call.result"
OUTPUT = "gen_ai.output.messages"
ERROR_TYPE = "error.type"


def export(meta: dict[str, Any], events: Sequence[Event], *, texts: bool = False) -> dict[str, Any]:
    """The body of an OTLP/HTTP request, as a JSON-able dict. texts: with arguments, results and answers."""
    trace = _id(repr((meta.get("question"), meta.get("began"))), 32)
    began = float(meta.get("began") or 0.0)
    starts = {e.agent: e for e in events if e.kind == "start"}
    ends = {e.agent: e for e in events if e.kind == "end"}
    last = max((e.time for e in events), default=0.0)
    spans = []
    for agent, start in starts.items():
        end = ends.get(agent)
        attributes = {
            OPERATION: "invoke_agent",
            AGENT_ID: agent,
            AGENT_NAME: start.detail.get("agent", ""),
            CONVERSATION: trace,
            **({AGENT_TASK: start.detail.get("brief", "")} if texts else {}),
        }
        span = _span(trace, f"agent {agent}", start.parent and f"agent {start.parent}", INTERNAL)
        span["name"] = f"invoke_agent {attributes[AGENT_NAME]}"
        spans.append(
            _timed(span, began, start.time, end.time if end else last, attributes, end.status if end else "ok")
        )
    for event in events:
        if event.kind in ("step", "tool"):
            span = _span(
                trace, f"event {event.id}", f"agent {event.agent}", CLIENT if event.kind == "step" else INTERNAL
            )
            attributes = _step(meta, event, texts) if event.kind == "step" else _tool(event, texts)
            span["name"] = f"{attributes[OPERATION]} {attributes.get(MODEL) or attributes.get(TOOL_NAME)}"
            attributes |= {AGENT_ID: event.agent, CONVERSATION: trace}
            spans.append(_timed(span, began, event.time - event.duration, event.time, attributes, event.status))
    resource = {"attributes": [_attribute("service.name", "kimi_jax.swarm")]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "kimi_jax"}, "spans": spans}]}]}


def _step(meta: dict[str, Any], event: Event, texts: bool) -> dict[str, Any]:
    attributes = {
        OPERATION: "chat",
        PROVIDER: "kimi_jax",
        MODEL: str(meta.get("model", "")),
        INPUT_TOKENS: event.usage.prompt_tokens,
        OUTPUT_TOKENS: event.usage.completion_tokens,
        FINISH: [str(event.detail.get("finish", "stop"))],
    }
    return attributes | ({OUTPUT: str(event.detail.get("text", ""))} if texts else {})


def _tool(event: Event, texts: bool) -> dict[str, Any]:
    attributes = {OPERATION: "execute_tool", TOOL_NAME: str(event.detail.get("name", ""))}
    if texts:
        attributes |= {TOOL_ARGUMENTS: str(event.detail.get("arguments")), TOOL_RESULT: str(event.detail.get("result"))}
    return attributes


def _id(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:digits]


def _span(trace: str, name: str, parent: str | None, kind: int) -> dict[str, Any]:
    above = {"parentSpanId": _id(trace + parent, 16)} if parent else {}
    return {"traceId": trace, "spanId": _id(trace + name, 16), **above, "kind": kind}


def _timed(
    span: dict[str, Any], began: float, start: float, end: float, attributes: dict[str, Any], status: str
) -> dict[str, Any]:
    failed = status != "ok"
    pairs = {**attributes, **({ERROR_TYPE: status} if failed else {})}
    return {
        **span,
        "startTimeUnixNano": str(int((began + start) * 1e9)),
        "endTimeUnixNano": str(int((began + max(end, start)) * 1e9)),
        "attributes": [_attribute(name, value) for name, value in pairs.items()],
        "status": {"code": ERROR, "message": status} if failed else {"code": OK},
    }


def _attribute(name: str, value: str | int | list[str]) -> dict[str, Any]:
    if isinstance(value, int):
        return {"key": name, "value": {"intValue": str(value)}}
    if isinstance(value, list):
        return {"key": name, "value": {"arrayValue": {"values": [{"stringValue": text} for text in value]}}}
    return {"key": name, "value": {"stringValue": value}}
