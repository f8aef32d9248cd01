"""The README of the experiment, from its results alone: no sentence can disagree with the numbers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.swarm_robustness.simulate import (
    ASSIGNED,
    ATTEMPTS,
    CHILD_LIMIT,
    FAULTS,
    OBEYED,
    OBEYED_STEPS,
    STRAGGLERS,
    TIME_BUDGET,
    WORK_BUDGET,
)
from experiments.swarm_robustness.verdicts import LOSS, broken, find_break, quality, speed, useful

Row = dict[str, Any]
INDEPENDENT, CHAINS = ("wide", "longdoc", "download"), ("deep", "trap")
SEEN = ("garbage", "crash", "rate_limit", "straggler", "oversize")  # the orchestrator notices these by itself

HEAD = """# How the gain of a swarm scales, and where it breaks

**Question.** How does the gain of Agent Swarm scale with slots and items, and which faults of its subagents end it?
Source: Kimi K2.5 report (arXiv 2602.02276), section 6, which freezes the subagents and leaves their quality open.
"""

SETTING = """## Setting

    python -m experiments.swarm_robustness.run           # 3 minutes of one core; writes the same results.jsonl again
    python -m experiments.swarm_robustness.run --report  # this page and the plots, from results.jsonl

Small scale: scripted agents in logical steps, no model and no clock (`simulate.py`), on tasks over the World Factbook
and Wikipedia leads (`kimi_jax/agents/families.py`). {n} tasks a family (seeds 0 to {last}), 12 items and 8 slots unless
said. Runs of one task share their luck between policies and levels, so everything is paired over tasks. Eight settings
are also played on the real runtime under a clock that jumps, and agree in work, critical steps, makespan and time
(`tests/experiments/test_swarm_robustness.py::test_simulator_agrees_with_the_real_runtime`).

The orchestrator makes no mistakes of its own, waits for all subagents of a turn, assigns what visibly failed up to
{assigned} times and then does it itself. A subagent is stopped after {limit} steps unless said, gives nothing back
then, and gives up after {attempts} refusals of one request. A run has {time} x T1 steps of time and {work} x T1 steps
of work, enforced before each step; the answer is what is known when they are used up.

| policy | what the orchestrator assigns |
| --- | --- |
| sequential | nothing: one agent does all; what the others are compared with, and untouched by faults of subagents |
| half | half of the items that could be assigned in a turn; it does the other half itself, after these |
| parallel | all items that wait for no other |
| checked | the same, and spends one step on each result, which finds every wrong one |

Families: `wide`, `longdoc`, `download` have independent items, `deep` and `trap` are chains, and in `mixed` about half
of the items need earlier ones. **Gain** is the time of the sequential run over the time of the swarm on the same task,
with slots, as a geometric mean; **work** the steps of all agents over those of the sequential run: tokens, where every
step costs the same. Brackets are 95 % intervals over tasks (`experiments/statistics.py`), each for itself: of many
cells one in twenty misses. A level counts as a gain if the interval of the gain lies above 1 and that of the change of
item F1 above -{loss}; as no gain if the first lies below 1 ("time") or the second below -{loss} ("quality"); else as
open. A run that is stopped early with a poor answer is fast, so a gain in time says nothing where quality is lost.
"""


def render(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    n = rows[0]["n"]
    setting = SETTING.format(n=n, last=n - 1, assigned=ASSIGNED, limit=CHILD_LIMIT, attempts=ATTEMPTS,
                             time=TIME_BUDGET, work=WORK_BUDGET, loss=LOSS)  # fmt: skip
    faults = _select(rows, sweep="fault")
    parts = [HEAD, _answer(rows), setting, _claims(rows), _scaling(_select(rows, sweep="scale")), _breaking(faults),
             _limits(_select(rows, sweep="limit")), _tables(faults), LIMITS]  # fmt: skip
    return "\n".join(part.strip() + "\n" for part in parts)


def _select(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def _cell(rows: Sequence[Row], family: str, policy: str = "parallel", items: int = 12, slots: int = 8) -> Row:
    """The line of a run without faults."""
    (row,) = _select(rows, sweep="scale", family=family, policy=policy, items=items, slots=slots)
    return row


def _line(rows: Sequence[Row], family: str, policy: str, fault: str) -> list[Row]:
    """The lines of one fault, ascending levels."""
    found = _select(rows, sweep="fault", family=family, policy=policy, fault=fault)
    return sorted(found, key=lambda r: r["level"])


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _gain(row: Row) -> str:
    return f"{row['gain']:.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}]"


def _change(row: Row) -> str:
    return f"{row['f1_change']:+.3f} [{row['f1_low']:+.3f}, {row['f1_high']:+.3f}]"


# ------------------------------------------------------------------------------------------------- answer and claims


def _answer(rows: Sequence[Row]) -> str:
    wide, trap, checked = _cell(rows, "wide"), _cell(rows, "trap"), _cell(rows, "wide", "checked")
    large = _cell(rows, "wide", items=48, slots=32)
    breaks = {fault: find_break(_line(rows, "wide", "parallel", fault)) for fault in FAULTS}
    ends = {why: [f"{_plain(f)} ({b.ends:g})" for f, b in breaks.items() if b.ends is not None and why in b.why]
            for why in ("quality", "time")}  # fmt: skip
    loops = {r["child_limit"]: r for r in _select(rows, sweep="limit", fault="loop", level=0.3)}
    best = max((r for r in loops.values() if useful(r)), key=lambda r: r["gain"], default=loops[CHILD_LIMIT])
    never = [_plain(fault) for fault, found in breaks.items() if found.ends is None]
    lines = [
        [_plain(fault), what, str(breaks[fault]), str(find_break(_line(rows, "wide", "checked", fault)))]
        for fault, (what, _) in FAULTS.items()
    ]
    return "\n\n".join(
        [
            f"**Answer.** Without faults, 8 slots do 12 independent items (`wide`) {_gain(wide)} times as fast as one"
            f" agent, for {wide['work_ratio']:.2f} times its steps; an ideal scheduler of the items would reach"
            f" {wide['ideal_gain']:.2f}. 32 slots do 48 items {_gain(large)} times as fast. A chain that looks wide"
            f" (`trap`) takes longer: {_gain(trap)}.",
            "Faults of subagents end this gain (in brackets the first of the levels tried at which it is gone) by"
            f" quality: {', '.join(ends['quality']) or 'none'}; by time: {', '.join(ends['time']) or 'none'}; not shown"
            f" to end it: {', '.join(never) or 'none'}. Unseen errors need a check of each result, which at one step a"
            f" result lowers the gain without faults to {_gain(checked)}. Where 0.3 of the subagents never end, a limit"
            f" of {best['child_limit']} steps gives {_gain(best)}, and one of {CHILD_LIMIT} steps"
            f" {_gain(loops[CHILD_LIMIT])}.",
            _table(["fault", "its level", "`parallel` is a gain", "`checked` is a gain"], lines),
        ]
    )


def _plain(fault: str) -> str:
    return fault.replace("_", " ")


def _claims(rows: Sequence[Row]) -> str:
    faults = _select(rows, sweep="fault")
    independent = [_cell(rows, family) for family in INDEPENDENT]
    chains = [_cell(rows, family) for family in CHAINS]
    wrong = [_line(rows, family, "checked", "wrong")[-1] for family in ("wide", "trap", "mixed")]
    wide_seen = [row for row in faults if row["family"] == "wide" and row["fault"] in SEEN]
    all_fail = [row for row in faults if row["fault"] in ("garbage", "crash") and row["level"] == 1]
    loops = [row for row in faults if row["fault"] == "loop" and row["level"] == 1]
    falling = []
    for family, policy in itertools.product(("wide", "trap", "mixed"), ("half", "parallel", "checked")):
        scores = [row["item_f1"] for row in _line(rows, family, policy, "wrong")]
        falling.append(all(b <= a + 0.005 for a, b in itertools.pairwise(scores)))
    time, work = max(r["time_used"] for r in rows), max(r["work_used"] for r in rows)
    over = sum(row["peak"] > row["slots"] for row in rows)
    lowest = min(r["gain_low"] for r in independent)
    lines = [
        ("On independent items a swarm is faster than one agent", [speed(r) == "faster" for r in independent],
         f"lowest end of an interval {lowest:.2f}"),
        ("On chains it is slower", [speed(r) == "slower" for r in chains],
         f"highest end of an interval {max(r['gain_high'] for r in chains):.2f}"),
        ("Item F1 falls with the share of wrong subagents, or stays", falling, "lines of one family and policy"),
        ("A check of each result keeps the quality when every subagent is wrong", [quality(r) == "kept" for r in wrong],
         f"lowest item F1 {min(r['item_f1'] for r in wrong):.3f}"),
        (f"Failures that are seen ({_names(SEEN)}) never cost quality on `wide`",
         [quality(r) == "kept" for r in wide_seen], f"lowest item F1 {min(r['item_f1'] for r in wide_seen):.3f}"),
        ("When all subagents fail visibly, the answer is as good as that of one agent",
         [quality(r) == "kept" for r in all_fail], f"lowest item F1 {min(r['item_f1'] for r in all_fail):.3f}"),
        ("The same when none of them ever ends", [quality(r) == "kept" for r in loops],
         f"item F1 {min(r['item_f1'] for r in loops):.3f} to {max(r['item_f1'] for r in loops):.3f}: the work of the"
         " run is used up before the orchestrator is left to do it itself"),
        ("A run ends within its time and its work", [time <= TIME_BUDGET, work <= WORK_BUDGET],
         f"at most {time:.2f} x T1 of {TIME_BUDGET}, {work:.2f} x T1 of {WORK_BUDGET}"),
        ("Never more subagents than slots", [not over], f"{len(rows)} cells"),
    ]  # fmt: skip
    cells = [[text, _verdict(held), f"{sum(held)} of {len(held)}; {found}"] for text, held, found in lines]
    return "\n\n".join(
        [
            "## Claims",
            "Whole intervals are compared, as above; a claim about several cells is confirmed if it holds in all of"
            " them and contradicted if it holds in none.",
            _table(["claim", "verdict", "found"], cells),
            _smallest(rows),
        ]
    )


def _verdict(held: Sequence[bool]) -> str:
    return "**confirmed at this scale**" if all(held) else "**holds in part**" if any(held) else "**contradicted**"


def _smallest(rows: Sequence[Row]) -> str:
    changes = [row["f1_smallest"] for row in rows if row["f1_smallest"]]
    gains = [row["gain_smallest"] for row in rows]
    return (
        "The smallest effects that a cell would show with probability 0.8: a factor of the gain of"
        f" {statistics.median(gains):.3f} in the median cell and {max(gains):.3f} in the widest; a change of item F1 of"
        f" {statistics.median(changes):.3f} and {max(changes):.3f}, among the {len(changes)} of {len(rows)} cells in"
        " which it differs between tasks."
    )


# ------------------------------------------------------------------------------------------------------------ scaling


def _scaling(scale: Sequence[Row]) -> str:
    families = sorted(dict.fromkeys(r["family"] for r in scale), key=lambda f: -_cell(scale, f)["oracle_parallelism"])
    lines = []
    for family in families:
        row = _cell(scale, family)
        others = [f"{_cell(scale, family, policy)['gain']:.2f}" for policy in ("half", "checked")]
        lines.append([family, f"{row['oracle_parallelism']:.2f}", f"{row['ideal_gain']:.2f}", _gain(row),
                      f"{row['work_ratio']:.2f}", *others])  # fmt: skip
    slots = sorted({r["slots"] for r in scale})
    by_slots = [[family, *(_gain(_cell(scale, family, slots=s)) for s in slots)] for family in families]
    sizes = sorted({(r["items"], r["slots"]) for r in scale if r["slots"] in (8, 32)}, key=lambda s: (s[1], s[0]))
    by_items = [[family, *(_some_gain(scale, family, items, s) for items, s in sizes)] for family in families]
    gains = [_cell(scale, family)["gain"] for family in families]
    follows = all(a >= b - 0.05 for a, b in itertools.pairwise(gains))
    items_at_32 = [items for items, s in sizes if s == 32]
    by_slot = [_increasing([_cell(scale, f, slots=s)["gain"] for s in slots if s <= 16]) for f in INDEPENDENT]
    by_item = [_increasing([_cell(scale, f, items=n, slots=32)["gain"] for n in items_at_32]) for f in INDEPENDENT]
    return "\n\n".join(
        [
            "## How the gain scales",
            f"The gain {_rises(follows)} with the task's own parallelism T1 / T∞ from family to family. On independent"
            f" items it {_rises(all(by_slot))} with slots up to the number of items, and {_rises(all(by_item))} with"
            " items at 32 slots. The ideal gain is that of list scheduling of the hidden graph by an oracle.",
            _table(["family", "oracle T1 / T∞", "ideal gain", "gain, parallel", "work", "gain, half", "gain, checked"],
                   lines),
            "Gain of `parallel` by slots p (12 items):",
            _table(["family", *(f"p = {s}" for s in slots)], by_slots),
            "and by items at 8 and at 32 slots (the Factbook has no chains of more than 12 for every seed):",
            _table(["family", *(f"{items} items, p = {s}" for items, s in sizes)], by_items),
            "![Gain by slots and by items](scale.png)",
        ]
    )  # fmt: skip


def _rises(so: bool) -> str:
    return "rises" if so else "does not always rise"


def _increasing(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _some_gain(scale: Sequence[Row], family: str, items: int, slots: int) -> str:
    found = _select(scale, family=family, policy="parallel", items=items, slots=slots)
    return f"{found[0]['gain']:.2f}" if found else "-"


# ----------------------------------------------------------------------------------------------------------- breaking


def _breaking(rows: Sequence[Row]) -> str:
    families = list(dict.fromkeys(r["family"] for r in rows))
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    lines = []
    for fault, (what, levels) in FAULTS.items():
        for policy in policies:
            cells = [str(find_break(_line(rows, family, policy, fault))) for family in families]
            title = f"**{_plain(fault)}**: {what}; {', '.join(f'{x:g}' for x in levels)}"
            lines.append([title if policy == policies[0] else "", policy, *cells])
    return "\n\n".join(
        [
            "## Where it breaks",
            "The last level up to which the swarm is a gain, and the first one at which it is shown to be none; the"
            " gain ends between the two.",
            _table(["fault and levels", "policy", *families], lines),
            "![Gain and change of item F1 by fault and level, tasks of the family wide](faults.png)",
        ]
    )


def _limits(rows: Sequence[Row]) -> str:
    limits = sorted({row["child_limit"] for row in rows})
    lines = []
    for fault, level in dict.fromkeys((row["fault"], row["level"]) for row in rows):
        found = sorted(_select(rows, fault=fault, level=level), key=lambda r: r["child_limit"])
        lines.append([f"{_plain(fault)} {level:g}" if level else "none", *map(_outcome, found)])
    chosen = []
    for level in sorted({row["level"] for row in rows if row["fault"] == "loop"} - {0}):
        gains = [row for row in _select(rows, fault="loop", level=level) if useful(row)]
        best = max(gains, key=lambda r: r["gain"], default=None)
        chosen.append(f"{best['child_limit']} steps at {level:g}" if best else f"none at {level:g}")
    return "\n\n".join(
        [
            "## What a limit of steps does about loops",
            "`parallel` on `wide`, by the number of steps after which a subagent is stopped: gain / item F1 / work. A"
            " limit below what an honest subagent needs throws its work away; a high one pays for every loop. The"
            f" limit with the largest gain, by the share of subagents that loop: {', '.join(chosen)}.",
            _table(["fault", *(f"{limit} steps" for limit in limits)], lines),
        ]
    )


def _outcome(row: Row) -> str:
    mark = f" ({broken(row)})" if broken(row) else ""
    return f"{_gain(row)} / {row['item_f1']:.2f} / {row['work_ratio']:.2f}{mark}"


def _tables(rows: Sequence[Row]) -> str:
    parts = ["## All levels, tasks `wide`", "Gain / change of item F1 / work."]
    for fault, (what, levels) in FAULTS.items():
        lines = []
        for policy in dict.fromkeys(r["policy"] for r in rows):
            line = _line(rows, "wide", policy, fault)
            lines.append([policy, *(f"{_gain(r)} / {_change(r)} / {r['work_ratio']:.2f}" for r in line)])
        parts += [f"### {_plain(fault)}: {what}", _table(["policy", *(f"{x:g}" for x in levels)], lines)]
    parts.append("The other families are in results.jsonl, one JSON line a cell.")
    return "\n\n".join(parts)


LIMITS = f"""## What this does not say

Scripted agents do what their script says: the levels are levels of a fault, not of a model. A step is a unit of time
for every agent, and of tokens only if steps cost the same. The orchestrator never errs: `sequential` is the best that
one agent can do; a real one loses quality with the length of its context, which a swarm avoids and which is not
modelled. Stragglers are {STRAGGLERS:.0%} of subagents. An orchestrator that obeys an injected order starts {OBEYED}
useless subagents of {OBEYED_STEPS} steps; that it cannot start more than its budget allows is the runtime's doing, not
the script's. A subagent that is stopped gives nothing back; the runtime returns partial results, and loses less. A
check finds every wrong result for one step, which no real check does. Where quality ends the gain depends on what one
is willing to lose, {LOSS} of item F1 here.
"""
