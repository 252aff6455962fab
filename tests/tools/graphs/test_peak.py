"""tools/graphs/peak.py by hand, rule by rule; test_bench_compile compares it with what XLA:CPU allocates."""

import pytest

from parallel.graph.hlo import Graph
from tools.graphs.peak import find_peak

ARRAY = "f32[8,8]{1,0}"  # what all lines make that do not say otherwise: 256 bytes
DOT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
BATCHED = "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"


def peak(*lines, **options):
    """(what lives beside the input p0, in arrays; the names of what lives) at the peak of a graph whose
    result is `out`. Each line is `name = operation`; dot(...) is a plain product."""
    text = ["ENTRY %m () -> f32[8,8] {", f"  %p0 = {ARRAY} parameter(0)", "  %one = f32[] constant(1)"]
    for line in lines:
        name, operation = line.split(" = ", 1)
        if operation.startswith("dot("):
            operation = f"{operation}, {DOT}"
        text.append(f"  %{name} = {operation if operation[0] in 'f(' else f'{ARRAY} {operation}'}")
    text += [f"  ROOT %root = ({ARRAY}) tuple(%out)", "}"]
    found = find_peak(Graph("\n".join(text)), **options)
    return found.bytes / 256, {tensor.maker.name for tensor in found.tensors} - {"p0", "out"}


def test_elementwise_operations_are_fused_into_what_reads_them():
    assert peak("a = negate(%p0)", "b = add(%a, %p0)", "out = multiply(%b, %p0)") == (1, set())
    assert peak("a = negate(%p0)", "out = dot(%a, %p0)") == (2, {"a"})  # but not into a product
    assert peak("a = broadcast(%one), dimensions={}", "b = slice(%a)", "out = add(%b, %p0)") == (1, set())


@pytest.mark.parametrize(
    "operation, stored",
    [("negate(%x)", False), ("multiply(%x, %x)", False), ("exponential(%x)", True), ("add(%x, %y)", True)],
)
def test_what_is_read_twice_is_stored_if_it_is_expensive_or_has_two_operands(operation, stored):
    _, alive = peak(
        "x = dot(%p0, %p0)",
        "y = dot(%p0, %x)",
        f"a = {operation}",
        "c = add(%a, %p0)",
        "d = subtract(%a, %p0)",
        "out = dot(%c, %d)",
    )
    assert ("a" in alive) == stored and {"c", "d"} <= alive


def test_a_product_takes_transposed_what_is_stored():
    assert peak("t = transpose(%p0), dimensions={1,0}", "out = dot(%p0, %t)") == (1, set())
    fused = ("a = negate(%p0)", "t = transpose(%a), dimensions={1,0}", "out = dot(%p0, %t)")
    assert peak(*fused) == (2, {"t"})
    for order, count in (("0,2,1", 1), ("1,0,2", 2)):  # the dimension of the batch has to stay
        lines = (
            "r = f32[4,4,4]{2,1,0} reshape(%p0)",
            f"t = f32[4,4,4]{{2,1,0}} transpose(%r), dimensions={{{order}}}",
            f"b = f32[4,4,4]{{2,1,0}} dot(%r, %t), {BATCHED}",
            "out = reshape(%b)",
        )
        assert peak(*lines)[0] == count


def test_a_result_takes_the_memory_of_its_operand():
    assert peak("x = dot(%p0, %p0)", "out = negate(%x)") == (1, set())
    assert peak("x = dot(%p0, %p0)", "out = dot(%x, %p0)") == (2, {"x"})


def test_a_result_overwrites_the_input_that_it_updates():
    chain = ("x = dot(%p0, %p0)", "y = dot(%x, %x)", "z = dot(%y, %y)", "out = dot(%z, %z)")
    # x lives in the memory of the result, which is not written yet.
    assert peak(*chain) == (3, {"y", "z"})
    # y lives in the memory of the input, which was read for the last time.
    assert peak(*chain, overwritten={0: 0})[0] == 1


def test_a_barrier_keeps_what_is_computed_again_from_being_computed_early():
    lines = [
        "h = dot(%p0, %p0)",
        "g = dot(%h, %p0)",
        "u = dot(%g, %p0)",
        "v = dot(%g, %g)",
        "w = dot(%u, %v)",
        f"both = ({ARRAY}, {ARRAY}) tuple(%h, %w)",
        f"barrier = ({ARRAY}, {ARRAY}) opt-barrier(%both)",
        "again = get-tuple-element(%barrier), index=0",
        "grad = get-tuple-element(%barrier), index=1",
        "r = dot(%again, %again)",
        "s = dot(%again, %p0)",
        "t = dot(%r, %grad)",
        "out = dot(%t, %s)",
    ]
    assert peak(*lines) == (5, {"w", "r", "s", "t"})
    # Early, r and s live beside g and v (and u in the memory of the result).
    assert peak(*lines, keeps_barriers=False) == (5, {"g", "v", "r", "s"})
