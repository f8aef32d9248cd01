"""The README of the experiment, from its results alone: no sentence can disagree with the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.swarm_robustness.simulate import (
    ASSIGNED,
    ATTEMPTS,
    CHILD_LIMIT,
    FAULTS,
    OBEYED,
    STRAGGLERS,
    TIME_BUDGET,
    WORK_BUDGET,
)

Row = dict[str, Any]
LOSS = 0.05  # item F1 that a swarm may lose before its quality counts as broken

HEAD = """# How the gain of a swarm scales, and where it breaks

**Question.** How does the gain of Agent Swarm scale with slots and items, and which faults of its subagents end it?
Source: Kimi K2.5 report (arXiv 2602.02276), section 6, which freezes the subagents and leaves their quality open.

    python -m experiments.swarm_robustness.run           # minutes on one core; writes the same results.jsonl again
    python -m experiments.swarm_robustness.run --report  # this page and the plots, from results.jsonl

**Setting.** Scripted agents in logical steps, no model and no clock (`simulate.py`), on tasks over the World Factbook
and Wikipedia leads (`kimi_jax/agents/families.py`): {n} tasks a family (seeds 0 to {last}), 12 items each unless said,
8 slots. Runs of one task share their luck between policies and levels, so everything is paired over tasks. The
orchestrator makes no mistakes of its own, waits for all subagents of a turn, assigns what visibly failed up to
{assigned} times and then does it itself. A subagent is stopped after {limit} steps, and gives up after {attempts}
refusals of one request; a run has {time} x T1 steps of time and {work} x T1 steps of work, enforced before each step.

| policy | what the orchestrator assigns |
| --- | --- |
| sequential | nothing: one agent does all; the measure of everything else, and untouched by faults of subagents |
| mixed | half of the items that could be assigned in a turn; it does the other half itself |
| parallel | all items that wait for no other |
| checked | the same, and spends one step on each result, which finds every wrong one |

**Gain** is the time of the sequential run over the time of the swarm on the same task, with slots, as a geometric mean;
**work** the steps of all agents over those of the sequential run: tokens, where every step costs the same. Brackets are
95 % intervals over tasks (`experiments/statistics.py`), each for itself: of so many cells one in twenty misses.
"""


def render(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    faults = [r for r in rows if r["sweep"] == "fault"]
    scale = [r for r in rows if r["sweep"] == "scale"]
    n = rows[0]["n"]
    head = HEAD.format(n=n, last=n - 1, assigned=ASSIGNED, limit=CHILD_LIMIT, attempts=ATTEMPTS, time=TIME_BUDGET,
                       work=WORK_BUDGET)  # fmt: skip
    parts = [head, _scaling(scale), _breaking(faults), _checks(faults), _tables(faults), LIMITS]
    return "\n".join(part.strip() + "\n" for part in parts)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _gain(row: Row) -> str:
    return f"{row['gain']:.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}]"


def _change(row: Row) -> str:
    return f"{row['f1_change']:+.3f} [{row['f1_low']:+.3f}, {row['f1_high']:+.3f}]"


# ------------------------------------------------------------------------------------------------------------ scaling


def _scaling(scale: Sequence[Row]) -> str:
    families = list(dict.fromkeys(r["family"] for r in scale))
    policies = list(dict.fromkeys(r["policy"] for r in scale))

    def find(family: str, policy: str, items: int, slots: int) -> Row:
        keys = (family, policy, items, slots)
        return next(r for r in scale if (r["family"], r["policy"], r["items"], r["slots"]) == keys)

    lines = []
    for family in families:
        row = find(family, "parallel", 12, 8)
        others = [f"{find(family, policy, 12, 8)['gain']:.2f}" for policy in policies if policy != "parallel"]
        lines.append([family, f"{row['oracle_parallelism']:.2f}", _gain(row), f"{row['work_ratio']:.2f}", *others])
    slots = sorted({r["slots"] for r in scale})
    by_slots = [[family, *(f"{find(family, 'parallel', 12, s)['gain']:.2f}" for s in slots)] for family in families]
    items = sorted({r["items"] for r in scale if r["items"] != 12})
    by_items = [[family, *(f"{find(family, 'parallel', i, 8)['gain']:.2f}" for i in items)] for family in families]
    ordered = sorted(families, key=lambda f: find(f, "parallel", 12, 8)["oracle_parallelism"])
    gains = [find(f, "parallel", 12, 8)["gain"] for f in ordered]
    follows = all(a <= b + 0.05 for a, b in itertools.pairwise(gains))
    slowed = [f for f in families if find(f, "parallel", 12, 8)["gain_high"] < 1]
    verdict = (
        f"Without faults the gain {'rises' if follows else 'does not rise'} with the task's own T1 / T∞ from family to"
        f" family. {'On ' + ' and '.join(slowed) + ', chains, delegation costs time.' if slowed else ''}"
    )
    return "\n\n".join(
        [
            "## How the gain scales",
            verdict,
            _table(["family", "oracle T1 / T∞", "gain, parallel", "work", "gain, mixed", "gain, checked"], lines),
            "Gain of `parallel` by slots (12 items):",
            _table(["family", *(f"p = {s}" for s in slots)], by_slots),
            "and by items (8 slots):",
            _table(["family", *(f"{i} items" for i in items)], by_items),
            "![Gain by slots and by items](scale.png)",
        ]
    )


# ------------------------------------------------------------------------------------------------------------ breaking


def _line(rows: Sequence[Row], family: str, policy: str, fault: str) -> list[Row]:
    found = [r for r in rows if (r["family"], r["policy"], r["fault"]) == (family, policy, fault)]
    return sorted(found, key=lambda r: r["level"])


def _first(line: Sequence[Row], broken: Any) -> str:
    return next((f"{r['level']:g}" for r in line if broken(r)), "-")


def _breaking(rows: Sequence[Row]) -> str:
    families = list(dict.fromkeys(r["family"] for r in rows))
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    lines = []
    for fault, (what, levels) in FAULTS.items():
        for policy in policies:
            cells = []
            for family in families:
                line = _line(rows, family, policy, fault)
                slow = _first(line, lambda r: r["gain_high"] < 1)
                bad = _first(line, lambda r: r["f1_high"] < -LOSS)
                cells.append(f"{slow} / {bad}")
            title = f"**{fault}**: {what}; {', '.join(f'{x:g}' for x in levels)}" if policy == policies[0] else ""
            lines.append([title, policy, *cells])
    wide = {policy: {f: _line(rows, "wide", policy, f) for f in FAULTS} for policy in policies}
    slow = [f for f, line in wide["parallel"].items() if line[-1]["gain_high"] < 1]
    bad = [f for f, line in wide["parallel"].items() if line[-1]["f1_high"] < -LOSS]
    saved = [f for f in bad if wide["checked"][f][-1]["f1_high"] >= -LOSS]
    smallest = max(r["f1_smallest"] for r in rows)
    verdict = (
        f"On `wide` tasks, faults at their worst level that end the gain of `parallel`: {', '.join(slow) or 'none'};"
        f" that cost quality: {', '.join(bad) or 'none'}; of these a check of each result repairs:"
        f" {', '.join(saved) or 'none'}."
    )
    return "\n\n".join(
        [
            "## Where it breaks",
            verdict,
            "The first level at which the swarm is slower than one agent (the whole interval of the gain is below 1) /"
            f" at which it loses more than {LOSS} of item F1 (the whole interval of the change is below -{LOSS});"
            " - is never.",
            _table(["fault and levels", "policy", *families], lines),
            "![Gain and item F1 by fault and level, tasks of the family wide](faults.png)",
            f"The smallest change of item F1 that a cell shows with probability 0.8 is at most {smallest:.3f}.",
        ]
    )


def _checks(rows: Sequence[Row]) -> str:
    monotone = []
    for family in dict.fromkeys(r["family"] for r in rows):
        for policy in dict.fromkeys(r["policy"] for r in rows):
            line = [r["item_f1"] for r in _line(rows, family, policy, "wrong")]
            monotone.append(all(b <= a + 0.005 for a, b in itertools.pairwise(line)))
    visible = [r for r in rows if r["fault"] in ("garbage", "crash") and r["level"] == 1]
    time, work = max(r["time_used"] for r in rows), max(r["work_used"] for r in rows)
    return "\n\n".join(
        [
            "## What holds in every cell",
            _table(
                ["claim", "found"],
                [
                    ["item F1 falls with the share of wrong subagents", f"{sum(monotone)} of {len(monotone)} lines"],
                    [
                        "when all subagents visibly fail, the answer is that of one agent",
                        f"lowest item F1 of {len(visible)} cells: {min(r['item_f1'] for r in visible):.3f}",
                    ],
                    ["a run ends within its time", f"at most {time:.2f} x T1, budget {TIME_BUDGET} x T1"],
                    ["a run ends within its work", f"at most {work:.2f} x T1, budget {WORK_BUDGET} x T1"],
                    ["never more subagents than slots", f"at most {max(r['peak'] for r in rows):g} of 8"],
                ],
            ),
        ]
    )


def _tables(rows: Sequence[Row]) -> str:
    parts = ["## All levels, tasks `wide`", "Gain / change of item F1 / work."]
    for fault, (what, levels) in FAULTS.items():
        lines = []
        for policy in dict.fromkeys(r["policy"] for r in rows):
            line = _line(rows, "wide", policy, fault)
            lines.append([policy, *(f"{_gain(r)} / {_change(r)} / {r['work_ratio']:.2f}" for r in line)])
        parts += [f"### {fault}: {what}", _table(["policy", *(f"{x:g}" for x in levels)], lines)]
    parts.append("The other families are in results.jsonl, one JSON line a cell.")
    return "\n\n".join(parts)


LIMITS = f"""## What this does not say

Scripted agents do what their script says: the levels are levels of a fault, not of a model. A step is a unit of time
for every agent, and of tokens only if steps cost the same. The orchestrator never errs: `sequential` is the best that
one agent can do; a real one loses quality with the length of its context, which a swarm avoids and which is not
modelled. Stragglers are {STRAGGLERS:.0%} of subagents. An orchestrator that obeys an injected order starts {OBEYED}
useless subagents; that it cannot start more than its budget allows is the runtime's doing, not the script's. A subagent
that is stopped at its limit gives nothing back; a runtime that returns partial results loses less.
"""
