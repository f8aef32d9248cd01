"""What the agent runtime costs: `python -m benchmarks.swarm [--openai_agents=PYTHON] [--langgraph=PYTHON]`.

1,000 agents of three turns, 32 at a time, with a model that answers at once: what is left is overhead. Then the same
with 50 ms a call and 100 at a time: how near the wall time comes to the ideal. Every contestant has a process of its
own, and they take turns; the table has the median of the repeats. Peers run in interpreters that have them installed
(`pip install openai-agents`, `pip install langgraph`); without one given, that row is left out.

Goals: at most 1 ms of CPU and 20 kB an agent with journal, checks, budgets and trace on; at least 6 times less CPU than
the better peer in the same run; wall at most 1.3 times the ideal at 50 ms a call.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

_AGENTS = flags.DEFINE_integer("agents", 1000, "Agents of a run.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each contestant.", 1)
_OPENAI = flags.DEFINE_string("openai_agents", "", "An interpreter with openai-agents.")
_LANGGRAPH = flags.DEFINE_string("langgraph", "", "An interpreter with langgraph.")
SCRIPT = Path(__file__).with_name("swarm_contestants.py")


def run(python: str, name: str, agents: int, slots: int, delay: float) -> dict[str, float]:
    """One measurement. Raises RuntimeError with the contestant's last words."""
    with tempfile.TemporaryDirectory() as folder:
        line = [python, str(SCRIPT), name, str(agents), str(slots), str(delay), folder]
        done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended: ...{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(pythons: dict[str, str], agents: int, slots: int, delay: float, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each contestant, whose runs alternate."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(repeats):
        for name, python in pythons.items():
            runs[name].append(run(python, name, agents, slots, delay))
    medians = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]} for name, found in runs.items()
    }
    print(f"\n{agents} agents x 3 turns, {slots} at a time, {1000 * delay:g} ms a call, median of {repeats}")
    print(f"{'':15}{'wall s':>9}{'CPU ms/agent':>14}{'kB/agent':>10}")
    for name, found in medians.items():
        print(f"{name:15}{found['wall']:9.2f}{found['cpu_ms']:14.3f}{found['kb']:10.1f}")
    return medians


def main(argv: list[str]) -> None:
    """Prints both tables and the ratios."""
    pythons = {"kimi_jax": sys.executable, "bare": sys.executable}
    pythons |= {n: p for n, p in (("openai_agents", _OPENAI.value), ("langgraph", _LANGGRAPH.value)) if p}
    found = table(pythons, _AGENTS.value, 32, 0.0, _REPEATS.value)
    peers = [found[name]["cpu_ms"] for name in pythons if name not in ("kimi_jax", "bare")]
    if peers:
        print(f"CPU of the better peer over ours: {min(peers) / found['kimi_jax']['cpu_ms']:.1f}")
    ideal = _AGENTS.value * 3 * 0.05 / 100
    found = table({name: pythons[name] for name in ("kimi_jax", "bare")}, _AGENTS.value, 100, 0.05, _REPEATS.value)
    print(f"wall over the ideal of {ideal:.2f} s: {found['kimi_jax']['wall'] / ideal:.2f}")


if __name__ == "__main__":
    app.run(main)
