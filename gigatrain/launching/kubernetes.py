"""A job as a Kubernetes manifest: a JobSet, or a Kubeflow TrainJob with a runtime of its own, from the same `Job` as the sbatch script.

One pod a node, found by its index under a headless service; torchrun in each; recipe and site travel in a ConfigMap, run folders lie on the site's claim.
Any pod's failure, an eviction too, starts the set again from the newest checkpoint, at most `RESTARTS` times; an error that would come again ends it at once.
Sources: the API types of kubernetes-sigs/jobset (v1alpha2) and kubeflow/trainer (v1alpha1).
"""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gigatrain.errors import REQUEUE, RunError, SiteError
from gigatrain.launching import yamltext
from gigatrain.launching.job import Job

RESOURCES = {"jobset": "jobsets.jobset.x-k8s.io", "trainjob": "trainjobs.trainer.kubeflow.org"}
PORT = 29500  # of the rendezvous: each pod has an address of its own, so it is free
RESTARTS = 20  # then `gigatrain requeue` makes a new set, whose count begins at 0
FATAL = (2, 3, 4, 5, 6)  # exit codes of a wrong recipe, site, plan, corpus or checkpoint: the next time is the same
SAVED = REQUEUE  # exit code of a pod whose ranks saved because of a signal
_SETTINGS = "/etc/gigatrain"  # where a pod sees the ConfigMap
_LIMIT_BYTES = 1_000_000  # etcd takes 1 MiB an object
_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"  # the label that JobSet gives each pod
_AMD = ("mi",)  # what the accelerators are called whose resource is amd.com/gpu


def name(job: Job) -> str:
    """What the cluster calls the job: the run folder's name as a DNS label, and a mark of its whole path, so that equal names do not meet.

    At most 40 characters: a pod's name adds `-node-0-INDEX-xxxxx`, and host names end at 63.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(job.run).name.lower()).strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}".rstrip("-")
    return f"{slug[:33].rstrip('-')}-{hashlib.sha256(job.run.encode()).hexdigest()[:6]}"


def manifest(job: Job, settings: Mapping[str, str]) -> str:
    """The job as YAML; `settings` are the files `recipe.json` and `site.json`.

    Raises SiteError where the site does not say what a pod needs: its image, the claim of the run folders, what its accelerators are called.
    """
    documents = [_config(job, settings), *(_jobset(job) if job.form == "jobset" else _trainjob(job))]
    head = (
        f"{job.name} on {job.site.name}: {job.nodes} pod(s) of {job.ranks_per_node} rank(s), run folder {job.run}",
        f"Written by gigatrain launch from job.json beside it. To submit it by hand: {shlex.join(command(job))}",
    )
    return "".join(f"# {re.sub('[^ -~]', '?', line)}\n" for line in head) + yamltext.text(*documents)  # no name may end a comment


def command(job: Job, verb: Sequence[str] = ("apply", "-f")) -> list[str]:
    """kubectl on the job's manifest."""
    return ["kubectl", *_namespace(job), *verb, str(Path(job.run) / "launch" / "job.yaml")]


def in_pods(job: Job) -> Job:
    """The job as pods see it: relative paths begin on the claim, which every pod mounts, and Python is the image's."""
    return job.model_copy(update={"workdir": str(PurePosixPath(job.run).parent), "python": "python3"})


def files(job: Job, settings: Mapping[str, str]) -> dict[str, str]:
    """What RUN/launch holds for the cluster."""
    return {"job.yaml": manifest(job, settings)}


def submit(job: Job) -> list[str]:
    """`kubectl apply`, and the name of what it made; nothing where kubectl is missing or has no context (`unreachable` says which).

    Raises RunError with kubectl's own words where the cluster refuses.
    """
    if unreachable():
        return []
    kubectl(*command(job)[1:])
    return [name(job)]


def unreachable() -> str:
    """Why nothing can be sent to a cluster from here; empty where it can."""
    if shutil.which("kubectl") is None:
        return "kubectl is not installed here"
    ended = subprocess.run(["kubectl", "config", "current-context"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return "kubectl has no current context (kubectl config use-context NAME)" if ended.returncode or not ended.stdout.strip() else ""


def kubectl(*arguments: str) -> str:
    """Standard output of kubectl; RunError with its own words."""
    try:
        ended = subprocess.run(
            ["kubectl", "--request-timeout=30s", *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError as failure:
        raise RunError(f"kubectl cannot be started: {failure.strerror}") from None
    if ended.returncode:
        raise RunError(f"kubectl {shlex.join(arguments)} failed: {ended.stderr.strip()[:1500]}")
    return ended.stdout


def found(job: Job) -> dict[str, Any] | None:
    """The cluster's object of this run; None where there is none. RunError where another run's has its name."""
    resource = RESOURCES[job.form]
    said = kubectl(*_namespace(job), "get", f"{resource}/{name(job)}", "--ignore-not-found", "-o", "json")
    if not said.strip():
        return None
    whole = json.loads(said)
    if (owner := whole["metadata"].get("annotations", {}).get("gigatrain/run")) != job.run:
        raise RunError(f"{resource}/{name(job)} is of run {owner!r}, not of {job.run}; it is left alone")
    return whole


def state(whole: Mapping[str, Any]) -> tuple[str, str]:
    """`(state, reason)` of a JobSet or TrainJob in our words, from its conditions."""
    true = {one["type"]: one for one in whole.get("status", {}).get("conditions", []) if one.get("status") == "True"}
    for kind, word in (("Failed", "failed"), ("Completed", "finished"), ("Complete", "finished"), ("Suspended", "queued")):
        if kind in true:
            return word, str(true[kind].get("message") or true[kind].get("reason") or "")
    return "running", ""


def delete(job: Job, *, wait: bool = False, now: bool = False) -> bool:
    """Its pods get SIGTERM, save and have `scheduler.lead_s` to leave; with `now` they are killed. False where there is nothing to delete."""
    if found(job) is None:
        return False
    at_once = ["--now"] if now else []
    kubectl(*_namespace(job), "delete", f"--wait={str(wait).lower()}", *at_once, f"{RESOURCES[job.form]}/{name(job)}")
    return True


def _namespace(job: Job) -> list[str]:
    return ["--namespace", job.site.scheduler.namespace] if job.site.scheduler.namespace else []


def _config(job: Job, settings: Mapping[str, str]) -> dict[str, Any]:
    size = sum(len(text.encode()) for text in settings.values())
    if size > _LIMIT_BYTES:
        raise SiteError(f"recipe and site are {size:,} bytes as JSON, and a ConfigMap holds {_LIMIT_BYTES:,}; shorten the recipe")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job), "data": dict(settings)}


def _metadata(job: Job, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    namespace = job.site.scheduler.namespace
    return {
        "name": name(job),
        **({"namespace": namespace} if namespace else {}),
        "labels": {"app.kubernetes.io/managed-by": "gigatrain", **(labels or {})},
        "annotations": {"gigatrain/run": job.run},  # whose it is: nothing else is ever cancelled by `gigatrain cancel`
    }


def _jobset(job: Job) -> list[dict[str, Any]]:
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(job, _queue(job)), "spec": _set(job)}]


def _trainjob(job: Job) -> list[dict[str, Any]]:
    """A runtime of the job's own, so that the cluster's `torch-distributed` need not have our init container, volumes and restarts."""
    version = "trainer.kubeflow.org/v1alpha1"
    return [
        {
            "apiVersion": version,
            "kind": "TrainingRuntime",
            "metadata": _metadata(job, {"trainer.kubeflow.org/framework": "torch"}),
            "spec": {
                "mlPolicy": {"numNodes": job.nodes, "torch": {}},
                "template": {"spec": _set(job)},
            },
        },
        {
            "apiVersion": version,
            "kind": "TrainJob",
            "metadata": _metadata(job, _queue(job)),
            "spec": {
                "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name(job)},
                "trainer": {"numNodes": job.nodes, "numProcPerNode": job.ranks_per_node},
            },
        },
    ]


def _queue(job: Job) -> dict[str, str]:
    queue = job.site.scheduler.queue
    return {"kueue.x-k8s.io/queue-name": queue} if queue else {}


def _set(job: Job) -> dict[str, Any]:
    """JobSet's spec: one replicated job with as many indexed pods as the run has nodes."""
    scheduler = job.site.scheduler
    if job.spares:
        raise SiteError(
            f"{job.spares} spare node(s) were asked for, and on Kubernetes a failed pod is placed anew by the scheduler; leave --spares out"
        )
    if job.launcher != "torchrun":
        raise SiteError(f"launcher {job.launcher!r} is Slurm's; a pod starts its ranks by torchrun")
    if scheduler.modules:
        raise SiteError(f"scheduler.modules {', '.join(scheduler.modules)}: a pod has no modules; its image holds everything")
    return {
        # DNS names begin before pods are ready, since they become ready by finding each other.
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": RESTARTS,
            # The pods' own failure policy fails the job at an error that comes again, and only then. That an eviction is counted like any other failure
            # is the price: a JobSet is told only that the policy failed the job, not by which rule.
            "rules": [{"name": "fatal", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [
            {
                "name": "node",
                "replicas": 1,
                "template": {
                    "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                    "spec": {
                        "completionMode": "Indexed",
                        "completions": job.nodes,
                        "parallelism": job.nodes,
                        "backoffLimit": 0,  # a pod that fails alone would leave the others in a collective: all start again, together
                        **({"activeDeadlineSeconds": job.time_s} if job.time_s else {}),
                        "podFailurePolicy": {
                            # Of the doctor's container too: no containerName.
                            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(FATAL)}}]
                        },
                        "template": {**_annotations(job), "spec": _pod(job)},
                    },
                },
            }
        ],
    }


def _annotations(job: Job) -> dict[str, Any]:
    topology = job.site.scheduler.topology
    return {"metadata": {"annotations": {"kueue.x-k8s.io/podset-preferred-topology": topology}}} if topology else {}


def _pod(job: Job) -> dict[str, Any]:
    scheduler, claim = job.site.scheduler, _claim(job)
    mount = str(PurePosixPath(job.run).parent)
    container = {
        "image": _image(job),
        "workingDir": _literal(job.workdir),
        "env": _environment(job),
        "volumeMounts": [
            {"name": "runs", "mountPath": mount},
            {"name": "settings", "mountPath": _SETTINGS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
        # No CPUs are asked for: a node gives its pods fewer than it has, and a request of all would wait for ever.
        **_accelerators(job),
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": scheduler.lead_s,  # SIGTERM, a checkpoint, then SIGKILL
        **({"priorityClassName": scheduler.qos} if scheduler.qos else {}),
        **({"nodeSelector": _selector(scheduler.constraint)} if scheduler.constraint else {}),
        **_affinity(job.exclude),
        **(
            {"initContainers": [{"name": "doctor", **container, "command": ["bash", "-c", _literal(_doctor(job))]}]}
            if job.preflight
            else {}
        ),
        "containers": [
            {
                "name": "node",
                **container,
                "command": ["bash", "-c", _literal(_script(job))],
                "ports": [{"containerPort": PORT, "protocol": "TCP"}],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "settings", "configMap": {"name": name(job)}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # a container's own /dev/shm has 64 MB
        ],
    }


def _image(job: Job) -> str:
    image = job.site.scheduler.image
    if not image:
        raise SiteError(f"site {job.site.name} names no image, and a pod needs one that has gigatrain; set scheduler.image in its file")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", image):
        raise SiteError(
            f"site {job.site.name}: scheduler.image {image!r} is no image reference such as registry/name:tag; no variables here"
        )
    return image


def _claim(job: Job) -> str:
    claim = job.site.scheduler.claim
    if not claim:
        raise SiteError(
            f"site {job.site.name} names no PersistentVolumeClaim for its run folders ({PurePosixPath(job.run).parent}); set scheduler.claim in its file"
        )
    return claim


def _accelerators(job: Job) -> dict[str, Any]:
    """The limit that hands a pod its devices: one a rank."""
    site = job.site
    if site.device == "cpu":
        return {}
    resource = site.scheduler.gpu_type if "/" in (site.scheduler.gpu_type or "") else None
    if resource is None and site.accelerator is None:
        raise SiteError(
            f"site {site.name} does not say what its accelerators are, so what a pod asks for is unknown; set accelerator, or "
            'scheduler.gpu_type = "nvidia.com/gpu", in its file'
        )
    return {
        "resources": {
            "limits": {resource or ("amd.com/gpu" if str(site.accelerator).startswith(_AMD) else "nvidia.com/gpu"): job.ranks_per_node}
        }
    }


def _environment(job: Job) -> list[dict[str, Any]]:
    given = {
        "OMP_NUM_THREADS": "1",
        **job.site.environment,
        **job.environment,
    }
    return [
        *({"name": key, "value": _literal(value)} for key, value in given.items()),
        {"name": "GIGATRAIN_ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{_ATTEMPT}']"}}},
        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ]


def _literal(text: str) -> str:
    """Kubernetes puts variables in for `$(NAME)` in commands and values; doubled, the dollar is a dollar."""
    return text.replace("$(", "$$(")


def _selector(constraint: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in constraint.split(",")]
    if not all(key and equals for key, equals, _ in pairs):
        raise SiteError(f"scheduler.constraint {constraint!r} is no node selector of Kubernetes; write LABEL=VALUE, several by commas")
    return {key: value for key, _, value in pairs}


def _affinity(exclude: Sequence[str]) -> dict[str, Any]:
    if not exclude:
        return {}
    away = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(exclude)}
    required = {"nodeSelectorTerms": [{"matchExpressions": [away]}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}


def _doctor(job: Job) -> str:
    """Each pod looks at its own node first: a sick one fails the pod, and the set starts again elsewhere or is refused once more."""
    doctor = shlex.join([job.python, "-m", "gigatrain", "doctor", "--site", f"{_SETTINGS}/site.json", "--run", job.run])
    return f"""\
set -euo pipefail
exec {doctor}
"""


def _script(job: Job) -> str:
    """torchrun without restarts of its own: gloo hangs where ranks come back within a job, and a JobSet starts all pods again anyway."""
    run = shlex.quote(job.run)
    train = shlex.join(["train", f"{_SETTINGS}/recipe.json", "--site", f"{_SETTINGS}/site.json", "--run", job.run, "--continue"])
    return f"""\
set -euo pipefail
run={run}
printf -v attempt 'attempt-%03d' "$GIGATRAIN_ATTEMPT"
mkdir -p "$run/logs/$attempt"
status=0
{shlex.quote(job.python)} -m gigatrain.launching.agent \\
  --nnodes {job.nodes} --nproc-per-node {job.ranks_per_node} --node-rank "$JOB_COMPLETION_INDEX" \\
  --master-addr {name(job)}-node-0-0.{name(job)} --master-port {PORT} --max-restarts 0 --shutdown-timeout 20 \\
  -m -- gigatrain {train} &
torchrun=$!
# The pod's SIGTERM reaches this shell; the agent passes it on, and the ranks save and leave.
told=
trap 'told=1; kill -TERM "$torchrun"' TERM
while wait "$torchrun" || status=$?; kill -0 "$torchrun" 2>/dev/null; do status=0; done
# Ranks that saved after a signal leave with {SAVED}; and a pod is only done if the run is.
# The first pod knows; the others may end before its last words.
if [ "$status" = 0 ] && [ ! -f "$run/summary.json" ] && {{ [ "$JOB_COMPLETION_INDEX" = 0 ] || [ -n "$told" ]; }}; then status={SAVED}; fi
exit "$status"
"""
