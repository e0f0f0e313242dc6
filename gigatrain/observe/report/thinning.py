"""Curves of no more points than a picture has room for."""

from collections.abc import Sequence

POINTS = 600  # of a curve

Point = tuple[float, float | None]


def thinned(points: Sequence[Point], limit: int = POINTS) -> list[list[float | None]]:
    """At most about `limit` of the points: each stretch's lowest and highest in their order, the first and the last; a None parts a curve."""
    if len(points) <= limit:
        return [list(point) for point in points]
    return [list(points[at]) for at in extremes([y for _, y in points], limit)]


def extremes(heights: Sequence[float | None], limit: int) -> list[int]:
    """Which to keep, of so many heights: in each stretch the lowest, the highest, and one that has none."""
    buckets = max(1, limit // 2 - 1)
    kept = {0, len(heights) - 1}
    for number in range(buckets):
        stretch = range(number * len(heights) // buckets, (number + 1) * len(heights) // buckets)
        values = [(height, at) for at in stretch if (height := heights[at]) is not None]
        if values:
            kept |= {min(values)[1], max(values)[1]}
        if len(values) < len(stretch):
            kept.add(next(at for at in stretch if heights[at] is None))
    return sorted(kept)
