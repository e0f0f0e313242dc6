"""The machines: what a plan may count on, what a job is asked for with, and how sure each number is. Frozen, strict, free of torch.

One TOML file a site (launch/sites/). Every number is a `Figure`: a value, its basis and its source, or the word "unknown"; nothing is invented, and a
plan that needs an unknown number refuses by name.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from gigatrain.config import Count, Name, Section

Accelerator = Literal[  # planning/hardware.py says what each is
    "a100", "a100-40", "a100-64", "mi250x", "h100", "h100-64", "h100-pcie", "h100-nvl", "gh200", "gh200-144", "h200", "b200", "gb200", "b300", "gb300",
    "mi300x", "mi325x", "mi350x", "mi355x", "mi430x", "mi455x", "rubin",
]  # fmt: skip
# What NVIDIA's driver calls those whose name says all. Seen: the first two here, the others in public lists (neuralinternet/SN27#296); what is not here
# stays unknown.
DRIVER_NAMES: dict[str, Accelerator] = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA A100-SXM4-80GB": "a100",
}
Basis = Literal["measured", "declared", "assumed", "unknown"]
BASES = {
    "measured": "a meter or a benchmark on this system gave it",
    "declared": "the operator or the vendor says so, or is quoted as saying so",
    "assumed": "taken from alike systems or from memory; a plan that uses it says so",
    "unknown": "not public, or not found",
}


class Figure(Section):
    """One number and what it rests on: `{ value = 4, basis = "declared", source = "..." }` in TOML, or the word "unknown"."""

    value: float | None = None
    basis: Basis
    source: str = Field(
        default="", description="Where it was read, or for what is assumed why; of an unknown one, where it was looked for."
    )

    @model_validator(mode="after")
    def honest(self) -> Self:
        if (self.value is None) != (self.basis == "unknown"):
            raise ValueError('a figure is unknown exactly if it has no value; give both value and basis, or the word "unknown"')
        if self.value is not None and not self.source:
            raise ValueError(f'{self.value:g} has no source; say where it was read, or for basis = "assumed" why it is assumed')
        if self.value is not None and not 0 <= self.value < 1e18:
            raise ValueError(f"{self.value:g} is below 0 or not finite")
        return self

    @property
    def known(self) -> bool:
        return self.value is not None


UNKNOWN = Figure(basis="unknown")


def _named(value: Any) -> Any:
    return {"basis": "unknown"} if value == "unknown" else value


class _OrTheWord:
    """In the JSON Schema: the table, or the word "unknown"."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(core), {"const": "unknown"}]}


Known = Annotated[Figure, BeforeValidator(_named), _OrTheWord()]


class Node(Section):
    """One node, as the scheduler hands it out."""

    accelerators: Known = Field(default=UNKNOWN, description="Accelerators (packages) per node.")
    ranks: Count | None = Field(
        default=None,
        description="Processes per node, where that is not one per accelerator (an MI250X shows two devices; a CPU node none).",
    )
    cores: Known = Field(default=UNKNOWN, description="CPU cores per node.")
    memory_bytes: Known = Field(default=UNKNOWN, description="Host memory per node.")
    local_bytes: Known = Field(default=UNKNOWN, description="Node-local storage.")


class Network(Section):
    """Between nodes and within one; bandwidths are of one direction."""

    name: str = Field(default="unknown", description="For instance InfiniBand NDR200.")
    topology: str = Field(default="unknown", description="For instance dragonfly+, 240 nodes a group.")
    nic_gbit_s: Known = Field(default=UNKNOWN, description="Network per accelerator, Gbit/s.")
    scale_up_gbyte_s: Known = Field(default=UNKNOWN, description="NVLink or the like per accelerator, GB/s.")
    scale_up_accelerators: Known = Field(default=UNKNOWN, description="Accelerators that scale-up links join.")
    group_nodes: Known = Field(default=UNKNOWN, description="Nodes under one leaf switch, group or block.")


class Storage(Section):
    """What runs and data lie on."""

    filesystem: str = Field(default="unknown", description="For instance Lustre.")
    bytes: Known = Field(default=UNKNOWN, description="Usable capacity.")
    read_gbyte_s: Known = Field(default=UNKNOWN, description="Of the whole file system.")
    write_gbyte_s: Known = Field(default=UNKNOWN, description="Of the whole file system.")


class Power(Section):
    """Watts at each boundary (device, node, IT, facility) and what they may be."""

    device_watts: Known = Field(default=UNKNOWN, description="Limit of one accelerator as it is run here.")
    node_watts: Known = Field(default=UNKNOWN, description="One node under training load.")
    it_watts: Known = Field(default=UNKNOWN, description="The whole system without cooling.")
    facility_watts: Known = Field(default=UNKNOWN, description="The whole site, cooling included.")
    cap_watts: Known = Field(default=UNKNOWN, description="What the site may draw at most.")
    pue: Known = Field(default=UNKNOWN, description="Facility over IT.")
    fabric_watts: Known = Field(default=UNKNOWN, description="Switches and optics, for each accelerator.")
    storage_watts: Known = Field(default=UNKNOWN, description="Storage, management and service nodes, for each accelerator.")
    ramp_watts_min: Known = Field(default=UNKNOWN, description="How fast the site's draw may change, watts per minute.")


class Grid(Section):
    """What a kWh costs and emits; location-based, yearly means."""

    carbon_g_kwh: Known = Field(default=UNKNOWN, description="g CO2e per kWh.")
    price_eur_mwh: Known = Field(default=UNKNOWN, description="Euro per MWh.")


class Scheduler(Section):
    """How a job is asked for."""

    kind: Literal["none", "slurm", "kubernetes", "ssh", "unknown"] = Field(
        default="none", description="none: what is typed here runs here."
    )
    source: str = Field(default="", description="Where this was read.")
    partition: str | None = Field(default=None, description="Slurm partition; several, by commas, are heterogeneous.")
    account: str | None = Field(default=None, description="What is billed; else --account or SBATCH_ACCOUNT.")
    qos: str | None = Field(default=None, description="--qos of sbatch.")
    constraint: str | None = Field(default=None, description="--constraint of sbatch.")
    gpus: Literal["gres", "gpus-per-node", "none"] = Field(
        default="gres", description="How accelerators are asked for; none: nodes come whole."
    )
    gpu_type: str | None = Field(
        default=None, description="The type in --gres=gpu:TYPE:N; of Kubernetes the resource, such as nvidia.com/gpu."
    )
    exclusive: bool = Field(default=True, description="A job has its nodes to itself.")
    cpus_per_task: bool = Field(
        default=False, description="Ask for node.cores shared over the tasks of a node; some sites bind to one core else."
    )
    bind: Literal["none", "cores", "closest"] = Field(
        default="none", description="CPU binding: none, --cpu-bind=cores, or to the GPU's NUMA node."
    )
    switches: Count | None = Field(default=None, description="--switches: at most so many leaf switches where a job fits under them.")
    segment: Count | None = Field(default=None, description="--segment: nodes of one scale-up domain that belong together (Slurm 24.05).")
    max_time_s: Known = Field(default=UNKNOWN, description="The partition's time limit.")
    max_nodes: Known = Field(default=UNKNOWN, description="Nodes that one job may have there; a plan for more says so.")
    lead_s: Count = Field(
        default=300, description="How long before the limit a job is told to save (--signal=B:USR1@); Slurm may be 60 s late."
    )
    requeue: bool = Field(default=True, description="Whether jobs may requeue themselves.")
    options: tuple[str, ...] = Field(default=(), description='Other options of sbatch, one each: "--hint=nomultithread".')
    modules: tuple[str, ...] = Field(default=(), description="Loaded in the job, in this order.")
    container: Literal["none", "apptainer", "pyxis"] = Field(default="none", description="What starts the ranks within `image`.")
    image: str | None = Field(default=None, description="The container's image; may name an environment variable.")
    namespace: str | None = Field(default=None, description="Of Kubernetes; else that of kubectl's context.")
    claim: str | None = Field(default=None, description="The PersistentVolumeClaim that holds paths.runs; every pod mounts it.")
    queue: str | None = Field(default=None, description="Kueue's LocalQueue, where the cluster has Kueue.")
    topology: str | None = Field(default=None, description="The node label of Kueue's topology under which a job's pods belong together.")


class Paths(Section):
    """Where things lie, by environment variables: \"$SCRATCH/runs\"; resolved when a job is submitted, an unset variable is an error."""

    runs: str = Field(default="runs", description="Where run folders are made.")
    cache: str | None = Field(default=None, description="Corpora and compiled kernels.")
    local: str | None = Field(default=None, description="Node-local scratch, resolved on the node.")


class Site(Section):
    """The machines: what a plan may count on."""

    name: Name = Field(description="What --site calls it.")
    summary: str = Field(description="One line for a reader.")
    kind: Literal["local", "generic", "gigafactory", "aifactory", "national", "cloud"] = Field(
        default="local", description="local: one machine, which has no fabric, storage or cooling of its own."
    )
    country: Annotated[str, Field(pattern=r"^([A-Z]{2})?$")] = Field(default="", description="Two letters, as FR.")
    status: str = Field(default="", description="operational, announced, ..., with its date.")
    source: str = Field(default="", description="Where the system is described.")
    notes: str = Field(default="", description="What whoever runs there should know.")
    device: Literal["cpu", "cuda"] = Field(description="What torch calls it; ROCm's devices are `cuda` too.")
    memory_bytes: Count | None = Field(
        default=None,
        description="Memory that one rank may fill; left out: the accelerator's by its data sheet, else the plan shows its need and checks nothing.",
    )
    accelerator: Accelerator | None = Field(
        default=None, description="What the GPUs are; unknown: kernels are chosen that work on all of them."
    )
    accelerators: Known = Field(default=UNKNOWN, description="How many there are.")
    h100e: Known = Field(default=UNKNOWN, description="The same in H100-equivalents: dense bf16 rate over 989 TFLOP/s.")
    nodes: Known = Field(default=UNKNOWN, description="How many nodes there are.")
    node: Node = Node()
    network: Network = Network()
    storage: Storage = Storage()
    power: Power = Power()
    grid: Grid = Grid()
    failure_hours: Known = Field(
        default=UNKNOWN,
        description="Accelerator-hours between two unplanned interruptions of a run, as counted here; else published ones are taken.",
    )
    scheduler: Scheduler = Scheduler()
    paths: Paths = Paths()
    environment: dict[str, str] = Field(default={}, description="Of every rank: NCCL, RCCL, libfabric.")

    @model_validator(mode="after")
    def consistent(self) -> Self:
        nodes, each, total = self.nodes.value, self.node.accelerators.value, self.accelerators.value
        if nodes and each and total and nodes * each > total:
            raise ValueError(f"{nodes:,.0f} nodes of {each:,.0f} accelerators are {nodes * each:,.0f}, and accelerators says {total:,.0f}")
        if self.accelerator == "mi250x" and self.scheduler.bind == "closest":
            raise ValueError(
                'scheduler.bind "closest" takes device n to sit beside NUMA domain n, which on an MI250X node it does not; set bind = "none"'
            )
        return self

    @property
    def ranks_per_node(self) -> int | None:
        """Processes of a node: `node.ranks`, else one per accelerator, else unknown."""
        count = self.node.accelerators.value
        return self.node.ranks or (int(count) if count else None)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """`(dotted path, figure)` of every number with a basis, the unknown ones too, in the order of the file."""
        yield from _figures(self)


def _figures(section: BaseModel, before: str = "") -> Iterator[tuple[str, Figure]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Figure):
            yield before + name, value
        elif isinstance(value, Section):
            yield from _figures(value, f"{before}{name}.")
