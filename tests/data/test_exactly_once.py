"""P12: over any sequence of kills and resizes every sample of an epoch is consumed exactly once, in the order that an undisturbed run has."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatrain.data.corpus import Corpus
from gigatrain.data.loader import Batches

BATCH = 4
KEYS: dict[str, Any] = {"sequence": 16, "packing": "stream", "batch": BATCH, "seed": 5}
LIVES = st.lists(st.tuples(st.sampled_from((1, 2, 4)), st.integers(0, 6), st.integers(0, 3)), min_size=4, max_size=9)


def consumed(batches: Batches) -> list[tuple[int, int, int]]:
    """(source, epoch, sample) of this rank's share of the next step, which is read as well."""
    at = batches.position
    next(batches)
    return batches.mixture.many(range(at + batches.share.start, at + batches.share.stop))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives=LIVES)
def test_every_sample_once_over_kills_and_resizes(corpus: Corpus, lives: list[tuple[int, int, int]]) -> None:
    """A life has some ranks, does some steps, of which the last so many are lost with the kill that ends it; at least four lives, so three resumes.

    Nothing is read ahead here: that this changes nothing is tests/data/test_loader.py's."""
    first = Batches(corpus, **KEYS, prefetch=0)
    state, step, kept = first.state(), 0, []
    for ranks, steps, lost in lives:
        readers = [Batches(corpus, **KEYS, rank=rank, ranks=ranks, prefetch=0) for rank in range(ranks)]
        states, rows = [state], []
        for reader in readers:
            reader.load(state)
        for _ in range(steps):
            rows.append([place for reader in readers for place in consumed(reader)])
            assert len({str(reader.state()) for reader in readers}) == 1  # any rank's word of the position is every rank's
            states.append(readers[0].state())
        for reader in readers:
            reader.close()
        done = max(0, steps - lost)  # up to here there was a checkpoint
        state, step = states[done], step + done
        kept += rows[:done]
    whole = [first.mixture.many(range(number * BATCH, (number + 1) * BATCH)) for number in range(step)]
    assert kept == whole
    flat = [place for row in kept for place in row]
    assert len(set(flat)) == len(flat)
    assert len(str(state)) < 500  # O(1): no list of what was seen


def test_a_whole_epoch_over_a_kill_at_every_step(corpus: Corpus) -> None:
    """The run is killed after each step and goes on with another number of ranks: the epoch has every sample, once."""
    state = Batches(corpus, **KEYS, prefetch=0).state()
    seen: list[tuple[int, int, int]] = []
    samples = 0
    while not samples or len(seen) < samples // BATCH * BATCH:
        ranks = (1, 2, 4)[len(seen) % 3]
        readers = [Batches(corpus, **KEYS, rank=rank, ranks=ranks, prefetch=0) for rank in range(ranks)]
        samples = len(readers[0].samples[0])
        for reader in readers:
            reader.load(state)
            seen += consumed(reader)
        state = readers[0].state()
    assert {epoch for _, epoch, _ in seen} == {0}
    assert len({sample for _, _, sample in seen}) == len(seen) == samples // BATCH * BATCH
