"""Words of power: sums that count nothing twice."""

import pytest

from gigatrain.errors import PowerError
from gigatrain.power.reading import FIELDS, Reading, Taken, total


def of(*place, scope, joules=1.0):
    return Reading(place, scope, joules, "measured", f"meter of {place[-1]}")


def test_things_beside_each_other_are_added():
    cpu, left, right = of("n1", "socket0", scope="cpu", joules=5), of("n1", "GPU-a", scope="gpu"), of("n1", "GPU-b", scope="gpu")
    assert total([cpu, left, right, of("n2", scope="node", joules=100)]) == 107


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (of("n1", "GPU-a", scope="gpu"), of("n1", scope="node")),
        (of("n1", "GPU-a", scope="memory"), of("n1", "GPU-a", scope="gpu")),
        (of("n1", "m0", "GPU-a", scope="gpu"), of("n1", "m0", scope="module")),
        (of("n1", "socket0", "core", scope="cpu"), of("n1", "socket0", scope="cpu")),
        (of("n1", "GPU-a", scope="gpu"), of("n1", "GPU-a", scope="gpu")),
        (of("n1", scope="node"), Reading((), "facility", 9.0, "measured", "site")),
    ],
)
def test_what_lies_within_another_is_refused_and_named_in_either_order(inner, outer):
    for pair in ([inner, outer], [outer, inner]):
        with pytest.raises(PowerError, match=f"{inner.scope} .*lies within {outer.scope}"):
            total(pair)


def test_a_record_survives_its_integers():
    numbers = list(range(1, len(FIELDS) + 1))
    assert Taken.of(numbers).ints() == numbers
    assert all(isinstance(number, int) for number in Taken().ints())
