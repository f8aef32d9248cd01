"""Task families: deterministic, verifiable, over real text, with the oracle that the dial promises."""

import hashlib
import re

import pytest

from kimi_jax.agents import critical, families
from kimi_jax.agents.evals import Table
from kimi_jax.agents.families import FAMILIES, Knobs, facts, make, neighbour

SEEDS = range(5)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_a_function_of_its_seed(family):
    assert make(family, 3) == make(family, 3)
    # another seed is another task; of few chains of a length two seeds may draw the same
    assert len({make(family, seed).gold for seed in SEEDS}) >= len(SEEDS) - 1
    assert make(family, 3) != make(family, 3, Knobs(items=7))


def test_family_does_not_change_between_versions():
    """Results of experiments are of these tasks; a change of a generator has to be seen."""
    text = repr([(make(f, 0).question, make(f, 0).gold, [i.steps for i in make(f, 0).items]) for f in FAMILIES])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4c9a4c6099aa0aa5"


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_table_verifies_itself_and_nothing_else(family):
    for seed in SEEDS:
        task = make(family, seed)
        assert task.verify(task.gold).success == 1
        assert task.verify(None).item_f1 == task.verify("no table").item_f1 == 0
        shifted = tuple(row[:-1] + ("none",) for row in task.gold.rows)
        found = task.verify(Table(task.gold.columns, shifted))
        assert found.success == 0 and found.row_f1 == 0 and 0 < found.item_f1 < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_does_not_say_how_to_divide_the_work(family):
    for seed in SEEDS:
        question = make(family, seed).question.lower()
        assert not re.search(r"parallel|agent|concurren|simultan|at once|delegate|divide|split", question)


def test_dial_goes_from_a_chain_to_independent_items():
    means = []
    for phi in (0.0, 0.25, 0.5, 0.75, 1.0):
        tasks = [make("mixed", seed, Knobs(items=10, phi=phi)) for seed in range(20)]
        means.append(sum(task.work / task.span for task in tasks) / len(tasks))
    assert means == sorted(means), "T1 / T∞ rises with phi"
    assert means[0] == 1.0 and means[-1] > 3


def test_oracle_of_each_family():
    for seed in SEEDS:
        knobs = Knobs(items=9)
        for family in ("deep", "trap"):
            task = make(family, seed, knobs)
            assert task.work == task.span == task.makespan(9), "a chain"
        for family in ("wide", "longdoc", "download"):
            task = make(family, seed, knobs)
            steps = [item.steps for item in task.items]
            assert task.work == sum(steps) + 1 and task.span == max(steps) + 1
            assert task.makespan(9) == task.span and task.makespan(1) == task.work
            assert max(task.span, sum(steps) / 3) <= task.makespan(3) <= sum(steps) / 3 + task.span
        assert len(make("deep", seed, knobs).gold.rows) == 1 and len(make("trap", seed, knobs).gold.rows) == 9


@pytest.mark.parametrize("family", ["deep", "trap", "mixed"])
def test_links_are_what_the_factbook_says(family):
    """Each country follows from the ones that its line names, by the borders in the text of the corpus itself."""
    for seed in SEEDS:
        task = make(family, seed, Knobs(items=8, fan_in=3))
        texts = {document.name: document.text for document in task.documents}
        countries = [item.row[0] for item in task.items]
        assert len(set(countries)) == 8
        for i, item in enumerate(task.items):
            assert all(j < i for j in item.after)
            if item.after:
                lines = {int(n) - 1 for n in re.findall(r"line (\d+)", item.brief)}
                assert lines == set(item.after)
                source = max((countries[j] for j in lines), key=lambda c: float(facts()[c].cells["Area (sq km)"]))
                found = [r for r in range(4) if item.brief.startswith(families.RELATIONS[r].format("")[:50].rstrip())]
                assert countries[i] in [neighbour(source, r) for r in found]
            geography = texts[item.documents[0]]
            area = float(item.row[1])
            shown = re.search(r"Area, total: ([\d,.]+)( million)?", geography)
            assert float(shown[1].replace(",", "")) * (1e6 if shown[2] else 1) == pytest.approx(area)


def test_documents_of_every_item_are_in_the_corpus(tmp_path):
    for family in FAMILIES:
        task = make(family, 1)
        names = [document.name for document in task.documents]
        assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w/.-]+", name) for name in names)
        assert {name for item in task.items for name in item.documents} <= set(names)
        families.write_corpus(task, tmp_path / family)
        for document in task.documents:
            assert (tmp_path / family / document.name).read_text(encoding="utf-8") == document.text
    wanted = {d.name: d.text for d in make("download", 1).documents}
    for name, digest, size in make("download", 1).gold.rows:
        data = wanted[name].encode()
        assert hashlib.sha256(data).hexdigest()[:16] == digest and len(data) == int(size)


def test_long_documents_hide_the_fact_on_the_page_that_the_steps_say():
    task = make("longdoc", 0, Knobs(items=6, pages=9, effort=0))
    texts = {document.name: document.text for document in task.documents}
    for item in task.items:
        text = texts[item.documents[0]]
        assert len(text) == 9 * families.PAGE
        page = text.index(f"{item.row[1]}: Geography") // families.PAGE
        assert item.steps == 1 + page + 1


def test_effort_has_a_heavy_tail():
    steps = [item.steps for seed in range(100) for item in make("download", seed).items]
    assert min(steps) == 2 and max(steps) == 2 + 7, "most cost nothing more, some the most"
    assert steps.count(2) > len(steps) / 2 and steps.count(9) > 10
    assert {item.steps for item in make("download", 0, Knobs(effort=0)).items} == {2}


def test_relations_of_one_country_by_hand():
    """Norway borders Finland (709 km), Sweden (1,666 km) and Russia (191 km)."""
    assert [neighbour("Norway", r) for r in range(4)] == ["Sweden", "Russia", "Finland", "Sweden"]
    assert neighbour("Iceland", 0) is None
    assert facts()["Norway"].cells["Highest point (m)"] == "2469"


def test_knobs_and_families_out_of_range_are_refused():
    for bad in ({"items": 0}, {"items": 61}, {"phi": 1.5}, {"fan_in": 0}, {"effort": -1}, {"reliability": -0.1}):
        with pytest.raises(ValueError, match="no task can be made"):
            Knobs(**bad)
    with pytest.raises(ValueError, match="there is no family"):
        make("narrow", 0)
    with pytest.raises(ValueError, match="fewer items"):
        make("trap", 0, Knobs(items=60))
    assert critical.span(make("wide", 0, Knobs(items=60)).graph) < 20
