"""The reader of compiled programs: shapes, brackets, calls, and how often loops run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.plan import hlo

LOOP = """HloModule loop

%body.1 (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.1 = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one), metadata={op_name="jit(f)/while/body/add"
    source_line=3}
  %y.1 = f32[8,128]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%double, backend_config={"estimated_cycles":"350"}
  ROOT %t.1 = (s32[], f32[8,128]) tuple(%next, %y.1)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%condition.1 (p.2: (s32[], f32[8,128])) -> pred[] {
  %p.2 = (s32[], f32[8,128]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] constant(7)
  ROOT %go = pred[] fusion(%i.2, %limit), kind=kLoop, calls=%less
}

%double (p.3: f32[8,128]) -> f32[8,128] {
  %p.3 = f32[8,128] parameter(0)
  ROOT %d = f32[8,128] add(%p.3, %p.3)
}

ENTRY %main (x: f32[8,128], n: s32[]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %n = s32[] parameter(1)
  %two = s32[] constant(2)
  %start = s32[] copy(%two)
  %t = (s32[], f32[8,128]) tuple(%start, %x)
  %w = (s32[], f32[8,128]) while(%t), condition=%condition.1, body=%body.1
  ROOT %out = f32[8,128] get-tuple-element(%w), index=1
}
"""


def the_loop(text):
    program = hlo.parse(text)
    entry = program[program.entry]
    return program, entry, next(i for i in entry.instructions if i.opcode == "while")


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[2,3]{1,0:T(8,128)}", 24), ("(bf16[4]{0}, s32[])", 12), ("s4[8]{0}", 4), ("pred[]", 1), ("token[]", 0)],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.nbytes(shape) == size


def test_instructions_are_taken_apart():
    """Layouts with brackets, comments in tuples, attributes over two lines and nested calls do not confuse it."""
    program, entry, _ = the_loop(LOOP)
    body = program["body.1"]
    assert program.entry == "main" and len(body.instructions) == 7
    assert hlo.arrays(body.parameter(0).shape) == [("s32", ()), ("f32", (8, 128))]
    fusion = body.by_name["y.1"]
    assert (fusion.opcode, fusion.operands, fusion.called, fusion.cycles) == (
        "fusion", ("x.1",), {"calls": ["double"]}, 350)  # fmt: skip
    assert (
        body.by_name["next"].op_name == "jit(f)/while/body/add" and "source_line=3" in body.by_name["next"].attributes
    )
    assert body.root.operands == ("next", "y.1")


def test_trip_count_is_limit_minus_start_also_through_a_fused_comparison():
    assert hlo.trip_count(*the_loop(LOOP)) == 5
    assert hlo.trip_count(*the_loop(LOOP.replace("direction=LT", "direction=LE"))) == 6
    turned = LOOP.replace("compare(%a, %b), direction=LT", "compare(%b, %a), direction=GT")
    assert hlo.trip_count(*the_loop(turned)) == 5


def test_trip_count_that_the_compiler_states_is_believed():
    stated = LOOP.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"61"}}')
    assert hlo.trip_count(*the_loop(stated)) == 61


def test_trip_count_decided_at_run_time_is_unknown():
    assert hlo.trip_count(*the_loop(LOOP.replace("copy(%two)", "copy(%n)"))) is None
    assert hlo.trip_count(*the_loop(LOOP.replace("s32[] constant(7)", "s32[] negate(%i.2)"))) is None


def test_computations_of_the_sparse_core_end_with_the_name_of_their_thread():
    part = '%part (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8] parameter(0)\n}, execution_thread="sparsecore"\n\n'
    program = hlo.parse(part + "ENTRY %main (y: f32[8]) -> f32[8] {\n  ROOT %y = f32[8] parameter(0)\n}\n")
    assert program["part"].root.name == "x" and program["main"].root.name == "y"


def test_text_that_is_no_program_is_refused():
    with pytest.raises(hlo.HloError, match="no ENTRY"):
        hlo.parse("module @jit_f { }")
    with pytest.raises(hlo.HloError, match="does not hold"):
        hlo.parse(LOOP)["missing"]


def test_loops_of_real_programs_run_as_often_as_jax_says():
    """A scan of 11 that holds a scan of 3, compiled for this machine."""

    def f(x, w):
        def inner(x, _):
            return jnp.sin(x @ w), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0] + 1, None

        return jax.lax.scan(outer, x, None, length=11)[0]

    text = jax.jit(f).lower(np.ones((16, 16), np.float32), np.ones((16, 16), np.float32)).compile().as_text()
    program = hlo.parse(text)
    found = sorted(
        hlo.trip_count(program, c, i)
        for c in program.computations.values()
        for i in c.instructions
        if i.opcode == "while"
    )
    assert found == [3, 11]
