"""The machines of an estimate, in numbers alone: an accelerator and how it is joined to the others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Level:
    """One kind of link: `accelerators` are joined by it before the next level begins."""

    name: str  # scale_up | node | rail | spine
    accelerators: int
    gbyte_s: float  # one direction, per accelerator, as sold
    oversubscription: float = 1.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """`accelerators` alike. `devices` of one are ranks (an MI250X has two). Rates of the chip are hardware.CHIPS'; `chip` is its id there."""

    chip: str
    accelerators: int
    per_node: int
    levels: tuple[Level, ...]  # inner to outer; the last joins all
    memory_bytes: int | None = None  # of a rank
    cap_watts: float | None = None  # limit that is set, per accelerator; None: as sold
    clock_share: float = 1.0  # of the boost clock, where it is set
    site: str = ""
    assumed: tuple[str, ...] = ()  # what of this nobody said

    def level_of(self, ranks: int, stride: int) -> int:
        """Index of the innermost level whose `accelerators` hold a group of `ranks` that are `stride` apart."""
        span = ranks * stride
        for index, level in enumerate(self.levels):
            if span <= level.accelerators:
                return index
        return len(self.levels) - 1
