"""The quorum of the replicas: who lives, who is let in, and what it does not do. Real sockets, on loopback."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from gigatrain.errors import RunError
from gigatrain.parallel import lighthouse, quorum
from gigatrain.parallel.quorum import OwnSeat, Quorum

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def served():
    with Quorum("127.0.0.1", 0, KEY, lease_s=1.0) as found:
        yield found


def sit(served, replica, boot="b", **more):
    return OwnSeat(served.address, KEY, replica, boot, lease_s=1.0, **{"patience_s": 10.0} | more)


def meet(*asking):
    """What each of `(seat, said)` hears once all are there: the first to ask may be alone the first time."""
    heard = {}

    def ask(number, seat, said):
        while len(heard.setdefault(number, seat.meet(said))) < len(asking):
            del heard[number]

    threads = [threading.Thread(target=ask, args=(number, *one), daemon=True) for number, one in enumerate(asking)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(heard) == list(range(len(asking)))
    return [heard[number] for number in range(len(asking))]


def test_all_hear_what_all_said_by_their_numbers(served):
    one, two = sit(served, 1), sit(served, 0)
    for turn in range(3):
        first, second = meet((one, {"at": turn}), (two, {"at": -turn}))
        assert first == second == [{"replica": 0, "boot": "b", "said": {"at": -turn}}, {"replica": 1, "boot": "b", "said": {"at": turn}}]


def test_one_that_leaves_is_out_at_once_and_one_that_starts_holds_nobody_up(served):
    one, two = sit(served, 0), sit(served, 1)
    meet((one, {}), (two, {}))
    two.close()
    begin = time.monotonic()
    assert [member["replica"] for member in one.meet({})] == [0]
    assert time.monotonic() - begin < 0.9  # the lease is not waited for
    late = sit(served, 1, "anew")  # has not asked yet
    assert [member["replica"] for member in one.meet({})] == [0]
    assert [member["boot"] for member in meet((one, {}), (late, {}))[0]] == ["b", "anew"]


def test_a_process_that_stands_still_is_out_after_its_lease_and_is_told(served, tmp_path):
    (tmp_path / "token").write_bytes(KEY)
    text = (
        "import sys; from gigatrain.parallel.quorum import OwnSeat\n"
        f"seat = OwnSeat({served.address!r}, {KEY!r}, 1, 'still', lease_s=1.0)\n"
        "print('here', flush=True)\nwhile True: seat.meet({})"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"here\n"
            one = sit(served, 0)
            while len(one.meet({})) < 2:
                pass
            other.send_signal(19)  # SIGSTOP
            begin = time.monotonic()
            while len(one.meet({})) == 2:
                pass
            assert time.monotonic() - begin < 10
        finally:
            other.kill()


def test_one_that_lives_and_never_asks_again_is_left_out():
    with Quorum("127.0.0.1", 0, KEY, lease_s=1.0, wait_s=0.5) as served:
        one, two = sit(served, 0), sit(served, 1)
        meet((one, {}), (two, {}))
        assert [member["replica"] for member in one.meet({})] == [0]  # two still sends its signs of life


def test_a_quorum_that_was_killed_and_started_again_is_found(served):
    one, two = sit(served, 0), sit(served, 1)
    meet((one, {}), (two, {}))
    served.close()
    with Quorum("127.0.0.1", served.port, KEY, lease_s=1.0):
        end = time.monotonic() + 20
        while len(meet((one, {}), (two, {}))[0]) < 2:
            assert time.monotonic() < end


def test_a_quorum_that_stays_away_is_an_error_that_says_where(served):
    one = sit(served, 3, patience_s=0.5)
    served.close()
    with pytest.raises(RunError, match=rf"replica 3 has no quorum at {served.address}") as found:
        one.meet({})
    assert found.value.transient


def test_another_token_is_refused_on_either_side(served):
    with pytest.raises(RunError, match="refuses replica 0: the token is not this run's"):
        OwnSeat(served.address, b"x" * 32, 0, "b")
    with socket.create_server(("127.0.0.1", 0)) as fake:  # one that says it is the quorum

        def answer():
            link, _ = fake.accept()
            with link:
                link.sendall(b' {"nonce": "00"}\n')
                link.recv(4096)
                link.sendall(b' {"sign": "' + b"0" * 64 + b'"}\n')
                link.recv(4096)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RunError, match="does not know the run's token"):
            OwnSeat(f"127.0.0.1:{fake.getsockname()[1]}", KEY, 0, "b", patience_s=2)


@pytest.mark.parametrize(
    "sent",
    [b"\x80\x04cos\nsystem\n", b"0" * 70_000, b' {"said": {}}\n', b' {"replica": 0, "boot": "b", "nonce": "0", "sign": 1}\n', b" []\n"],
)
def test_what_has_not_proved_itself_is_not_heard(served, sent):
    one = sit(served, 0)
    one.meet({})
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        link.sendall(sent)
        link.settimeout(10)
        while link.recv(4096):  # its nonce, perhaps a refusal, then the end
            pass
    assert [member["replica"] for member in one.meet({})] == [0]


def test_a_line_that_is_sent_again_ends_its_connection(served):
    one, two = sit(served, 0), sit(served, 1)
    meet((one, {}), (two, {}))
    text = json.dumps({"said": {"at": 9}})
    line = two._line
    assert line is not None
    line.link.sendall(f"{quorum.sign(line.key, 'replica', '0', text)} {text}\n".encode())  # signed, but for an earlier turn
    assert [member["replica"] for member in one.meet({})] == [0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_no_quorum_listens_on_all_interfaces_unless_it_is_accepted(host, tmp_path):
    with pytest.raises(RunError, match="interface"):
        Quorum(host, 0, KEY)
    if host == "0.0.0.0":
        quorum.write_token(tmp_path / "token")
        command = [sys.executable, "-m", "gigatrain.parallel.quorum", "0.0.0.0:0", str(tmp_path / "token")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == RunError.exit_code
        assert "every interface" in ended.stderr
        assert "Traceback" not in ended.stderr
        Quorum(host, 0, KEY, accepted=True).close()


@pytest.mark.parametrize(
    ("serve", "arguments", "said"),
    [
        (quorum.main, [], "'nothing' is not what this command reads; write python -m gigatrain.parallel.quorum HOST:PORT"),
        (quorum.main, ["127.0.0.1:0", "token", "soon"], "LEASE_S is 'soon'; write seconds above 0"),
        (quorum.main, ["127.0.0.1:0", "token", "nan"], "LEASE_S is 'nan'"),
        (quorum.main, ["127.0.0.1:0", "token", "5", "opn"], "write python -m"),
        (lighthouse.main, ["127.0.0.1:0", "5"], "is not what this command reads; write python -m gigatrain.parallel.lighthouse"),
        (lighthouse.main, ["127.0.0.1:0", "5", "-1"], "WAIT_S is '-1'"),
    ],
)
def test_the_commands_that_serve_refuse_what_they_cannot_read(serve, arguments, said):
    with pytest.raises(RunError, match=re.escape(said)):
        serve(arguments)


def test_a_token_is_its_owners_alone(tmp_path):
    quorum.write_token(tmp_path / "token")
    assert len(quorum.token(tmp_path / "token")) == 64
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(RunError, match="may be read by others"):
        quorum.token(tmp_path / "token")
    (tmp_path / "short").write_text("abc")
    (tmp_path / "short").chmod(0o600)
    with pytest.raises(RunError, match="holds 3 bytes"):
        quorum.token(tmp_path / "short")
    os.symlink(tmp_path / "short", tmp_path / "link")
    with pytest.raises(RunError, match="cannot be read"):
        quorum.token(tmp_path / "link")
