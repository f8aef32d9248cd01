"""Agent Swarm: an orchestrator and its subagents, run concurrently, within a budget, with one record of what happened.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6; docs/swarm.md says how to use it. Names are loaded on first use,
because running a swarm needs the extra [agents] and reading its record does not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_jax.agents.budget import Budget
    from kimi_jax.agents.config import SwarmConfig
    from kimi_jax.agents.corpus import Corpus
    from kimi_jax.agents.mcp_tools import McpServer
    from kimi_jax.agents.model import EndpointModel, ScriptedModel
    from kimi_jax.agents.swarm import Swarm, SwarmResult
    from kimi_jax.agents.tools import from_function

_NAMES = {
    "Budget": "budget",
    "Corpus": "corpus",
    "EndpointModel": "model",
    "McpServer": "mcp_tools",
    "ScriptedModel": "model",
    "Swarm": "swarm",
    "SwarmConfig": "config",
    "SwarmResult": "swarm",
    "from_function": "tools",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"kimi_jax.agents.{_NAMES[name]}"), name)
    raise AttributeError(f"kimi_jax.agents has no {name!r}; it has: {', '.join(sorted(__all__))}")
