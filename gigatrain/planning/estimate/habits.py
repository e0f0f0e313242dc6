"""What one thing costs, what a software stack does by habit, and what a simulated step came to: records between rates.py, stacks.py and step.py."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one item on the device's stream; `launch_s` is the host's time to launch it, which is the floor of an eager stream."""

    seconds: float
    launch_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Habits:
    """How a stack, of a version, runs a step. Shares are of 1."""

    stack: str
    overlaps: dict[str, float] = field(
        default_factory=dict
    )  # axis -> share of its transfers that run beside compute where there is enough of it
    slowdown: dict[str, float] = field(
        default_factory=dict
    )  # axis -> share of compute's rate that a transfer beside it takes (its SMs, its HBM)
    launch_s: float = 0.0  # of the host, per kernel
    graphed: bool = False
    looped: bool = False  # products of experts are launched one by one, on a few streams, and not as one kernel
    # Bytes of passes over memory, of operations.py's with `fused` taken off: what its kernels read twice or not at all.
    passes_share: float = 1.0
    fused: frozenset[str] = frozenset()  # names of operations.py's passes that one kernel does
    bucket_bytes: float = 0.0  # of gradients, zero 0 to 2
    attention: str = "fused"  # cuDNN, FlashAttention-3; flash1, flash2, flash4: those, on accelerators where they are slower or faster
    pace: float = 1.0  # of its kernels' seconds: a later release has faster ones
    synced_sends: bool = False  # the host waits for the device at each send between pipeline stages, and so never runs ahead of it
    checkpoint_s: float = 0.0  # of the host, for each layer whose activations are made again: generator states, a second autograd engine
    microbatch_s: float = 0.0  # of the host, beside its kernels: data, schedule, logging of losses
    step_s: float = 0.0  # constant of a step: host, logging, gradient norm's read


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step; keys as `Estimate.phases` and `Estimate.busy`."""

    step_s: float
    phases: dict[str, float]
    busy: dict[str, float]
    spans: tuple[tuple[int, str, str, float, float], ...] = ()  # pipeline rank, stream, name, begin, end; where they were asked for
