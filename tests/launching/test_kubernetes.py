"""Manifests against the models that Kubeflow generates from the APIs themselves, and the pods' script through real bash and torchrun."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api import models

from gigatrain import load
from gigatrain.errors import CheckpointError, DataError, PlanError, RecipeError, RunError, SiteError
from gigatrain.launching import kubernetes, submit
from gigatrain.launching.job import Job
from gigatrain.site import Figure, Node, Scheduler, Site

CLUSTER = Scheduler(
    kind="kubernetes", image="registry.example/gigatrain:1", claim="runs", namespace="training", queue="gpus", topology="cloud/block"
)
SETTINGS = {"recipe.json": '{"name": "tiny"}', "site.json": "{}"}


def job(**changes):
    site = Site(
        name="pods",
        summary="A cluster of pods.",
        device="cuda",
        accelerator="h200",
        node=Node(accelerators=Figure(value=8, basis="declared", source="test")),
        scheduler=CLUSTER.model_copy(update=changes.pop("scheduler", {})),
        environment={"NCCL_DEBUG": "WARN"},
    )
    given = {
        "name": "tiny",
        "run": "/runs/My run_1",
        "recipe": "/runs/My run_1/launch/recipe.json",
        "workdir": "/runs",
        "python": "python3",
        "site": site.model_copy(update=changes.pop("site", {})),
        "nodes": 4,
        "ranks_per_node": 8,
    }
    return Job(**(given | changes))


MODELS = {
    "ConfigMap": None,  # its model is not in the package; its four keys are compared below
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


def read(text):
    """The documents by kind; each is what the API's own model makes of it, so that no key is unknown to it and no type is another."""
    found = {document["kind"]: document for document in yaml.safe_load_all(text)}
    for kind, document in found.items():
        if (model := MODELS[kind]) is not None:
            kept = model.from_dict(document).to_dict()
            assert kept == document, f"{kind} has keys that its API does not know"
    return found


def pod(found):
    spec = found["JobSet"]["spec"] if "JobSet" in found else found["TrainingRuntime"]["spec"]["template"]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]


def test_a_jobset_is_what_its_api_takes():
    found = read(kubernetes.manifest(job(exclude=("bad1", "bad2"), time_s=3600), SETTINGS))
    assert found["ConfigMap"]["data"] == SETTINGS
    assert {document["metadata"]["name"] for document in found.values()} == {kubernetes.name(job())}
    assert found["JobSet"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert found["JobSet"]["metadata"]["annotations"] == {"gigatrain/run": "/runs/My run_1"}
    spec = pod(found)
    assert (spec["completions"], spec["parallelism"], spec["completionMode"], spec["activeDeadlineSeconds"]) == (4, 4, "Indexed", 3600)
    inner = spec["template"]["spec"]
    assert inner["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    terms = inner["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms == [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["bad1", "bad2"]}]}]
    assert inner["initContainers"][0]["name"] == "doctor"
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in inner["volumes"]
    assert spec["template"]["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-preferred-topology": "cloud/block"}


def test_an_error_that_comes_again_ends_the_set_and_every_other_restart_is_counted():
    found = read(kubernetes.manifest(job(), SETTINGS))
    assert pod(found)["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3, 4, 5, 6]}}]
    policy = found["JobSet"]["spec"]["failurePolicy"]
    assert policy["rules"] == [{"name": "fatal", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] == 20
    assert {kind.exit_code for kind in (RecipeError, SiteError, PlanError, DataError, CheckpointError)} == set(kubernetes.FATAL)


KUBECTL = """#!/bin/bash
echo "$*" >>FOLDER/asked
case "$*" in
    *current-context*) echo here ;;
    *" get "*) [ ! -f FOLDER/whole ] || cat FOLDER/whole ;;
    *" delete "*) rm FOLDER/whole ;;
esac
"""


def test_resume_looks_for_the_set_that_is_there(tiny, tmp_path, monkeypatch):
    """One that lives is not joined by another; one that has ended is deleted, since applying it again would start nothing."""
    where = tmp_path / "bin"
    where.mkdir()
    (where / "kubectl").write_text(KUBECTL.replace("FOLDER", str(where)))
    (where / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{where}:{os.environ['PATH']}")
    (tmp_path / "pods.toml").write_text(
        'name = "pods"\nsummary = "s"\ndevice = "cpu"\n[node]\nranks = 2\n[scheduler]\nkind = "kubernetes"\nimage = "registry/gigatrain:1"\nclaim = "runs"\n'
    )
    run = tmp_path / "run"
    request = submit.Request(str(tiny), str(tmp_path / "pods.toml"), nodes=2, folder=str(run))
    submit.launch(submit.prepare(request))
    again = dataclasses.replace(request, resume=True)
    whole = {"metadata": {"annotations": {"gigatrain/run": str(run)}}, "status": {}}
    (where / "whole").write_text(json.dumps(whole))
    with pytest.raises(RunError, match="of this run is running; wait for it, or end it with: gigatrain cancel"):
        submit.prepare(again)
    (where / "whole").write_text(json.dumps(whole | {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}))
    submit.launch(submit.prepare(again))
    verbs = [
        next(word for word in line.split() if word in ("get", "delete", "apply", "config"))
        for line in (where / "asked").read_text().splitlines()
    ]
    assert [verb for verb in verbs if verb in ("delete", "apply")] == ["apply", "delete", "apply"]


def test_a_trainjob_brings_its_own_runtime():
    found = read(kubernetes.manifest(job(form="trainjob"), SETTINGS))
    assert set(found) == {"ConfigMap", "TrainingRuntime", "TrainJob"}
    assert found["TrainJob"]["spec"]["trainer"] == {"numNodes": 4, "numProcPerNode": 8}
    assert found["TrainJob"]["spec"]["runtimeRef"]["name"] == found["TrainingRuntime"]["metadata"]["name"]
    assert found["TrainingRuntime"]["spec"]["template"]["spec"] == read(kubernetes.manifest(job(), SETTINGS))["JobSet"]["spec"]


def test_the_check_would_see_a_wrong_key():
    text = kubernetes.manifest(job(), SETTINGS).replace("backoffLimit", "backofLimit")
    with pytest.raises(AssertionError, match="keys that its API does not know"):
        read(text)


@pytest.mark.parametrize(
    ("accelerator", "kind", "resource"),
    [("mi300x", None, "amd.com/gpu"), ("b200", None, "nvidia.com/gpu"), (None, "vendor.eu/npu", "vendor.eu/npu")],
)
def test_accelerators_have_their_vendors_name(accelerator, kind, resource):
    found = read(kubernetes.manifest(job(site={"accelerator": accelerator}, scheduler={"gpu_type": kind}), SETTINGS))
    assert pod(found)["template"]["spec"]["containers"][0]["resources"] == {"limits": {resource: 8}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheduler": {"image": None}}, "names no image"),
        ({"scheduler": {"image": "$IMAGE"}}, "no image reference"),
        ({"scheduler": {"claim": None}}, "names no PersistentVolumeClaim"),
        ({"site": {"accelerator": None}}, "what its accelerators are"),
        ({"spares": 2}, "leave --spares out"),
        ({"launcher": "srun"}, "is Slurm's"),
        ({"scheduler": {"modules": ("cuda",)}}, "a pod has no modules"),
        ({"scheduler": {"constraint": "fast"}}, "LABEL=VALUE"),
    ],
)
def test_what_a_pod_needs_is_asked_for_by_name(changes, said):
    with pytest.raises(SiteError, match=said):
        kubernetes.manifest(job(**changes), SETTINGS)


def test_a_recipe_that_no_configmap_holds_is_refused():
    with pytest.raises(SiteError, match="a ConfigMap holds 1,000,000"):
        kubernetes.manifest(job(), {"recipe.json": "x" * 1_000_001})


@pytest.mark.parametrize("run", ["/runs/A", "/runs/9.5", "/runs/" + "long-" * 30, "/runs/ünïcode", "/runs/---"])
def test_names_are_dns_labels_that_do_not_meet(run):
    found = kubernetes.name(job(run=run))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)
    assert len(found) <= 40
    assert found != kubernetes.name(job(run=run + "/again"))


HOSTILE = "a $(touch HARM) `touch HARM`\n'\"; touch HARM #${HOME} $(HOSTNAME) \\"


def test_hostile_values_stay_values(tmp_path):
    """What Kubernetes would hand to bash is parsed by bash: the run folder arrives as one word, and nothing in it is run or put in."""
    target = job(run=f"/runs/{HOSTILE}", environment={"X": HOSTILE}, name=HOSTILE)
    found = pod(read(kubernetes.manifest(target, SETTINGS)))["template"]["spec"]["containers"][0]
    script = found["command"][2]
    assert "$(touch" not in script.replace("$$(touch", "")
    assert next(entry["value"] for entry in found["env"] if entry["name"] == "X") == HOSTILE.replace("$(", "$$(")
    seen = script.replace("$$(", "$(").replace("mkdir -p", 'printf %s "$run" > seen; exit; mkdir -p')
    subprocess.run(["bash", "-c", seen], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"], "GIGATRAIN_ATTEMPT": "0"})
    assert (tmp_path / "seen").read_text() == f"/runs/{HOSTILE}"
    assert not (tmp_path / "HARM").exists()
    subprocess.run(["bash", "-n", "-c", script.replace("$$(", "$(")], check=True)


def _pods(target, settings, folder):
    """Both pods of a job as bash processes: their settings in a folder, and the first pod's DNS name is this machine."""
    (folder / "settings").mkdir(exist_ok=True)
    for file, text in settings.items():
        (folder / "settings" / file).write_text(text)
    script = pod(read(kubernetes.manifest(target, settings)))["template"]["spec"]["containers"][0]["command"][2].replace("$$(", "$(")
    host = f"{kubernetes.name(target)}-node-0-0.{kubernetes.name(target)}"
    assert host in script
    script = script.replace(host, "127.0.0.1").replace("/etc/gigatrain", str(folder / "settings"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script.replace("--master-port 29500", f"--master-port {free.getsockname()[1]}")
    environment = os.environ | {"GIGATRAIN_ATTEMPT": "0", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(["bash", "-c", script], env=environment | {"JOB_COMPLETION_INDEX": str(index)}, cwd=folder)
        for index in range(target.nodes)
    ]


@pytest.mark.long
def test_two_pods_save_at_sigterm_fail_and_then_finish(tiny, tmp_path):
    """An eviction: SIGTERM saves, the first pod says that the run is not done, and the next attempt of the set goes on from there to the end."""
    recipe = load.recipe(tiny, ["train.steps=150", "report.every=1", "checkpoint.every=140"])
    settings = {"recipe.json": recipe.model_dump_json(by_alias=True), "site.json": load.site("laptop").model_dump_json()}
    target = job(run=str(tmp_path / "run"), nodes=2, ranks_per_node=1, python=sys.executable, site={"device": "cpu"})
    pods = _pods(target, settings, tmp_path)
    end = time.monotonic() + 120
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < end
        assert all(one.poll() is None for one in pods)
        time.sleep(0.1)
    for one in pods:
        one.send_signal(signal.SIGTERM)
    assert [one.wait(90) for one in pods] == [kubernetes.SAVED] * 2
    saved = max(int(path.parent.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").glob("step-*/COMMITTED"))
    assert 0 < saved < 150
    again = _pods(target, settings, tmp_path)
    assert [one.wait(180) for one in again] == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["resumes"]) == (150, [saved])


def test_launch_writes_the_manifest_and_says_how_to_submit_it(tiny, tmp_path):
    """Through the command, where kubectl has no context: nothing is sent in silence, and nothing is said to be submitted."""
    (tmp_path / "pods.toml").write_text(
        'name = "pods"\nsummary = "s"\ndevice = "cpu"\n[node]\nranks = 2\n[scheduler]\nkind = "kubernetes"\nimage = "registry/gigatrain:1"\nclaim = "runs"\n'
    )
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "none")}

    def launch(*arguments):
        command = [sys.executable, "-m", "gigatrain", "launch", str(tiny), "--site", "pods.toml", "--nodes", "2", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    said = launch("--run", "runs/a", "--as", "trainjob")
    assert said.startswith("nothing was submitted: kubectl ")
    assert f"kubectl apply -f {tmp_path}/runs/a/launch/job.yaml" in said
    found = read((tmp_path / "runs" / "a" / "launch" / "job.yaml").read_text())
    assert set(found) == {"ConfigMap", "TrainingRuntime", "TrainJob"}
    assert json.loads(found["ConfigMap"]["data"]["recipe.json"])["name"] == "tiny"
    assert found["ConfigMap"]["data"]["recipe.json"] == (tmp_path / "runs" / "a" / "launch" / "recipe.json").read_text()
    inner = pod(found)["template"]["spec"]["containers"][0]
    assert (inner["workingDir"], inner["volumeMounts"][0]["mountPath"]) == (str(tmp_path / "runs"), str(tmp_path / "runs"))
    assert set(read(launch("--run", "runs/b", "--dry-run"))) == {"ConfigMap", "JobSet"}
    assert not (tmp_path / "runs" / "b").exists()


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ([], ("running", "")),
        ([{"type": "Suspended", "status": "True", "reason": "SuspendedJobs"}], ("queued", "SuspendedJobs")),
        ([{"type": "Suspended", "status": "False"}, {"type": "Completed", "status": "True", "message": "all"}], ("finished", "all")),
        ([{"type": "Complete", "status": "True"}], ("finished", "")),
        ([{"type": "Failed", "status": "True", "message": "max number of restarts"}], ("failed", "max number of restarts")),
    ],
)  # fmt: skip
def test_conditions_in_our_words(conditions, state):
    assert kubernetes.state({"status": {"conditions": conditions}}) == state
