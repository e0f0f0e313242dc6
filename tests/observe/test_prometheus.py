"""Metrics over a real socket, to who brings the token; and the dashboard that stands on them."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from commands import training
from test_watch import KILLED, made, window

from gigatrain import load
from gigatrain.errors import RunError
from gigatrain.observe import prometheus
from gigatrain.observe.reader import Reader

SECRET = "a-secret-of-enough-letters"
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf'({NAME})\{{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\}} (-?[0-9.e+-]+|NaN|[+-]Inf)')


@pytest.fixture
def run(tmp_path):
    return made(tmp_path / 'a "run"\\', KILLED, [window(20), window(50)])


def asked(port, path="/metrics", secret: str | None = SECRET):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if secret is not None:
        request.add_header("Authorization", f"Bearer {secret}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.headers.get("WWW-Authenticate"), refused.read().decode()


def test_the_text_is_exposition_format(run):
    text = prometheus.exposition(Reader(run, now=lambda: 1130.0).seen())
    assert text.endswith("\n")
    known, found = {}, []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            known[line.split()[2]] = "help"
        elif line.startswith("# TYPE "):
            assert known[line.split()[2]] == "help"
            known[line.split()[2]] = line.split()[3]
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert known[match[1]] == "gauge"
            assert match[2].startswith('run="a \\"run\\"\\\\"')
            found.append(line)
    assert all(name.startswith("gigatrain_") for name in known)
    assert len(found) == len(set(found))
    assert any(line.startswith("gigatrain_step{") and line.endswith(" 50.0") for line in found)
    assert not any(line.startswith("gigatrain_power_watts{") for line in found)  # unknown is no sample


def test_a_token_is_asked_for_over_a_real_socket(run):
    with prometheus.Server(run, ("127.0.0.1", 0), SECRET) as server:
        assert server.host == "127.0.0.1"
        code, content, text = asked(server.port)
        assert (code, content) == (200, prometheus.CONTENT)
        assert "gigatrain_loss{" in text
        for wrong in (None, "", SECRET[:-1], SECRET + "x", "é"):
            assert asked(server.port, secret=None if wrong is None else wrong.encode().decode("latin-1"))[:2] == (401, "Bearer")
        assert asked(server.port, "/../etc/passwd")[0] == 404
        with socket.create_connection(("127.0.0.1", server.port)) as rude:
            rude.sendall(b"GARBAGE\r\n\r\n")
            assert b"400" in rude.recv(4096)
        assert asked(server.port)[0] == 200


def test_tokens_come_from_a_file_the_environment_or_are_made(run, tmp_path, monkeypatch):
    monkeypatch.delenv("GIGATRAIN_TOKEN", raising=False)
    made_one, where = prometheus.token(run)
    assert len(made_one) > 30
    assert stat.S_IMODE(os.stat(where).st_mode) == 0o600
    assert prometheus.token(run) == (made_one, where)  # a restarted server keeps it
    monkeypatch.setenv("GIGATRAIN_TOKEN", SECRET)
    assert prometheus.token(run) == (SECRET, "GIGATRAIN_TOKEN")
    file = tmp_path / "token"
    file.write_text(f"{SECRET}2\n")
    assert prometheus.token(run, file)[0] == f"{SECRET}2"
    file.write_text("short")
    with pytest.raises(RunError, match="has 5 characters; it needs at least 16"):
        prometheus.token(run, file)
    with pytest.raises(RunError, match="cannot be read"):
        prometheus.token(run, tmp_path / "nowhere")


def test_a_token_appears_whole(run, monkeypatch):
    """Whoever sees the file, sees the token: it has its name only when it is written."""
    monkeypatch.delenv("GIGATRAIN_TOKEN", raising=False)
    path, seen, real = run / "logs" / "prometheus.token", [], os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *given: seen.append(path.exists()) or real(*given))
    prometheus.token(run)
    assert seen == [False]
    assert [found.name for found in path.parent.glob("prometheus*")] == [path.name]


def test_no_name_service_is_asked(run, monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("asked"))
    prometheus.Server(run, ("127.0.0.1", 0), SECRET).listener.server_close()


def test_addresses_and_ports_that_cannot_be_had(run):
    assert prometheus.address("9400") == ("127.0.0.1", 9400)
    assert prometheus.address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert prometheus.address("[::1]:80") == ("::1", 80)
    for wrong in ("", "x", "1:x", "70000"):
        with pytest.raises(RunError, match="is no port"):
            prometheus.address(wrong)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunError, match="cannot be served"):
            prometheus.Server(run, ("127.0.0.1", taken.getsockname()[1]), SECRET)


def test_the_command_serves_until_it_is_stopped(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "gigatrain", "watch", str(run), "--serve", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"GIGATRAIN_TOKEN": SECRET},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        assert SECRET not in line
        assert asked(port)[0] == 200
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_run_serves_its_own_metrics(tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    sets = ["train.steps=100000", "validation.every=0", "checkpoint.every=100000", f"report.prometheus={port}"]
    command = training(tiny, folder, *sets)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"GIGATRAIN_TOKEN": SECRET}
    )
    try:
        end, text = time.monotonic() + 120, ""
        while "gigatrain_step{" not in text:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
            try:
                text = asked(port)[2]
            except OSError:
                continue
        assert 'gigatrain_state{run="run",state="running"} 1.0' in text
    finally:
        process.terminate()
        said = process.communicate(timeout=60)
    assert process.returncode == 75, said  # asked to leave, and saved
    assert f"http://127.0.0.1:{port}/metrics, bearer token in GIGATRAIN_TOKEN" in said[0]
    assert SECRET not in "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_the_dashboard_stands_on_metrics_that_exist():
    board = json.loads((load.shipped("launch") / "grafana.json").read_text())
    assert board["schemaVersion"] >= 36
    assert {"title", "uid", "panels", "templating", "time", "refresh"} <= board.keys()
    known = {f"gigatrain_{name}" for name, _, _ in prometheus.METRICS}
    used, taken = set(), set()
    for panel in board["panels"]:
        assert {"id", "type", "title", "gridPos", "targets", "datasource", "fieldConfig"} <= panel.keys()
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            used |= (names := set(re.findall(r"gigatrain_\w+", target["expr"])))
            assert names
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count('{run=~"$run"}') == len(re.findall(r"gigatrain_\w+", target["expr"]))
    for variable in board["templating"]["list"]:
        used |= set(re.findall(r"gigatrain_\w+", json.dumps(variable)))
    assert used <= known
    assert known - used == set()  # whatever is served is drawn
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
