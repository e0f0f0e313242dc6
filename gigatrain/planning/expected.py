"""What a plan expects of its run: the record that plan.json keeps, that `gigatrain plan` shows, and that a run is held against. `expect.py` fills it."""

from pydantic import Field

from gigatrain.config import Section


class Range(Section):
    """A middle and the ends of its 90 % interval."""

    low: float
    mid: float
    high: float


class Expected(Section):
    """Of the whole run on its site; None where a number cannot be had, and `unknown` says why: `{"step_s": "a cpu is in no table"}`."""

    step_s: Range | None = None
    reference_s: float | None = None  # before the first step, of as many rows as the run reads: a reference's log-probabilities
    tokens_per_s: Range | None = None
    tokens_per_s_per_rank: Range | None = None
    mfu: float | None = None  # model FLOPs over the accelerators' dense rate of bf16
    phases: dict[str, float] = Field(
        default={}
    )  # seconds of a step, adding up to it: gemm, attention, memory, optimizer, launch, bubble, exposed tensor, shard, ...
    busy: dict[str, float] = Field(default={})  # device-seconds of a rank: gemm, attention, memory, optimizer, communication, idle
    memory_bytes: Range | None = None  # peak of the fullest rank
    watts: dict[str, Range] = Field(default={})  # mean while it trains, of the whole run: device, node, it, facility
    peak_watts: dict[str, float] = Field(default={})  # by the same boundaries
    ramp_watts: float | None = None  # a step's compute to communication, of the whole run at IT
    tokens_per_s_mw: Range | None = None  # at the facility, goodput taken off
    goodput: Range | None = None
    lost: dict[str, float] = Field(default={})  # shares of the wall-clock: checkpoint, redone, restart, detection, wait, ...
    checkpoint_every: int | None = None  # steps, what would be best
    failure_hours: float | None = None  # accelerator-hours between two interruptions, as its site counts them
    failure_source: str = ""
    near_every: int | None = None  # steps, in node memory; None: the recipe has no such tier
    days: Range | None = None  # wall-clock, losses included
    mwh: Range | None = None  # at the facility
    eur: Range | None = None
    tco2: Range | None = None
    limits: str = ""  # what a step waits for most
    outside: tuple[str, ...] = ()  # in what the case is outside of what was calibrated
    assumed: tuple[str, ...] = ()
    unknown: dict[str, str] = Field(default={})
