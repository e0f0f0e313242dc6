"""`gigatrain launch` as a user calls it on a machine of the cluster, and sites that are run by it."""

import json
import subprocess
import sys
from pathlib import Path

SITE = """
name = "loopback"
summary = "A real Slurm on this machine."
device = "cpu"
[node]
ranks = {ranks}
[scheduler]
kind = "slurm"
partition = "debug"
gpus = "none"
lead_s = {lead_s}
requeue = {requeue}
[paths]
runs = "{runs}"
local = "$GIGATRAIN_TEST_SCRATCH"
[environment]
{environment}
"""


class Launches:
    """`gigatrain launch` as a user calls it on a machine of the cluster."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def site(self, *, ranks=1, lead_s=30, requeue=True, **environment) -> Path:
        lines = "\n".join(f'{name} = "{value}"' for name, value in environment.items())
        text = SITE.format(ranks=ranks, lead_s=lead_s, requeue=str(requeue).lower(), runs=self.folder / "runs", environment=lines)
        path = self.folder / "loopback.toml"
        path.write_text(text)
        return path

    def command(self, *arguments, code=0) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "gigatrain", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.cluster.env(),
            timeout=120,
            check=False,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stdout if code == 0 else ended.stderr

    def __call__(self, *arguments) -> tuple[str, Path]:
        """Launch; the job's number and the run folder."""
        said = json.loads(self.command("launch", *arguments, "--json"))
        return said["jobs"][0], Path(said["run"])
