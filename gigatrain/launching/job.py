"""What is submitted: everything that a script, a pod or a host needs, so that nothing is looked up once it waits in a queue.

`RUN/launch/` holds it: job.json, the recipe and the site as they were (recipe.json, site.json), the script, history.jsonl, and per attempt what the
doctor said of each node. Logs of ranks are in `RUN/logs/attempt-NNN/`.
"""

from typing import Annotated, Literal

from pydantic import Field

from gigatrain.config import Count, Section
from gigatrain.site import Site

Launcher = Literal["torchrun", "srun"]


class Job(Section):
    """One run as a job of a site. `run`, `recipe`, `workdir` and `python` are absolute paths as its nodes see them."""

    format: Literal[1] = 1
    name: str = Field(description="The recipe's name; the scheduler shows it.")
    run: str
    recipe: str = Field(description="The recipe with every override in it, as JSON.")
    workdir: str = Field(description="Where relative paths of the recipe begin.")
    python: str = Field(description="The interpreter that has gigatrain.")
    site: Site
    nodes: Count = Field(description="Nodes that train.")
    spares: Annotated[int, Field(ge=0)] = Field(default=0, description="Nodes asked for beside them, that take the place of bad ones.")
    ranks_per_node: Count
    launcher: Launcher = Field(
        default="torchrun", description="torchrun: one task a node, its agents start the ranks; srun: one task a rank."
    )
    time_s: Count | None = Field(default=None, description="The job's time limit; none: the partition's own.")
    account: str | None = None
    exclude: tuple[str, ...] = Field(default=(), description="Nodes that are known to be bad.")
    environment: dict[str, str] = Field(default={}, description="Beside the site's, of every rank.")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node
