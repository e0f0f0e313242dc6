"""The ranks of one command on this machine: started, watched, and started again where one dies or hangs. Free of torch.

A rank that dies is known at once, by its descriptor; one that hangs, by the board that all write (board.py, lookout.py, stuck.py). Then the others, which can
only wait for it, are ended too, and all start again from the newest whole checkpoint: forked from a process that has imported everything (standby.py), at a
new address, under a prefix that no start before had (parallel/meeting.py). What would only fail again is not tried: launching/restart.py judges.
"""

import contextlib
import datetime
import json
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gigatrain.config import Recovery
from gigatrain.errors import REQUEUE
from gigatrain.launching import agent, job, restart
from gigatrain.recovery import board, cause, meeting, stuck, tied
from gigatrain.recovery.lookout import Lookout, Overdue
from gigatrain.recovery.ranks import PASSED_ON, READY_S, Rank, Standby, started

START = "GIGATRAIN_START"  # how this start of them begins, whatever the command said
LOOK_S = 0.1
LEAVE_S = 30.0  # what the others get to leave too, once one that was asked to has saved
GRACE_S = 0.5  # what the others get to leave their words, once one was killed: they see its connections close
WORDS_S = 5.0  # once one has failed by itself, or because of one that has yet to say why
STACKS_S = 1.0  # what ranks of a run that hangs get to leave their stacks
MODULES = ("gigatrain.loop", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.pipelining")


@dataclass(frozen=True)
class Orders:
    """What a supervisor is to start. `fits` says with which arguments more the same run is planned on so many ranks; None: it cannot be."""

    run: Path
    arguments: Sequence[str]  # of `gigatrain`
    ranks: int
    start: str  # new, resume, auto or continue
    recovery: Recovery
    every: int = 10  # steps of a report's window
    modules: Sequence[str] = MODULES
    fits: Callable[[int], Sequence[str] | None] = lambda ranks: ()


@dataclass
class _Attempt:
    """One start of the ranks, as it is seen."""

    number: int
    before: int  # the newest committed step
    began_s: float
    lookout: Lookout
    ranks: list[Rank] = field(default_factory=list)


class Supervisor:
    """`run` starts the ranks and waits for their end, through any number of restarts."""

    def __init__(self, orders: Orders, why: Callable[[float], str | None] = lambda since: None) -> None:
        """`why`: what the ranks themselves left of their failure since then, in words."""
        self.orders, self._why = orders, why
        self.told: str | None = None  # the first signal that was passed on
        self._attempt: _Attempt | None = None
        self._board = board.Board(orders.ranks)
        recovery = orders.recovery
        self._pace = stuck.Pace(times=recovery.hang_times, floor_s=recovery.hang_floor_s, slow_s=recovery.hang_slow_s, every=orders.every)
        self._standby: Standby | None = None
        self._pending: dict[str, Any] | None = None  # a restart that is not yet told of
        self._stalled, self._furthest = 0, 0
        self._began_s = time.time()
        self._places = list(range(orders.ranks))  # that ranks can be started on, and those that failed them
        self._lost: dict[int, int] = {}
        self._more: Sequence[str] = ()
        self._environment = self._shared()

    def run(self) -> int:
        """0, or the exit code of what went wrong; 93 after `recovery.restarts` restarts without a step gained."""
        tied.adopt()
        hangs_up = signal.getsignal(signal.SIGHUP) == signal.SIG_DFL  # a terminal that is closed; nohup has it ignored
        before = {number: signal.signal(number, self._pass_on) for number in (*PASSED_ON, *((signal.SIGHUP,) if hangs_up else ()))}
        try:
            self._standby = self._stand_by()
            number = 0
            while True:
                count = self._size()
                lookout = Lookout(self._board, self._pace, hangs=bool(self.orders.recovery.hang_times))
                attempt = self._attempt = _Attempt(number, restart.committed(self.orders.run), time.time(), lookout)
                if not self._start(attempt, count):
                    return REQUEUE
                ended = self._watch(attempt)
                if ended is None:
                    return 0
                code = self._after(attempt, ended)
                if code is not None:
                    return code
                number += 1
        finally:
            self._end(self._attempt.ranks if self._attempt else ())
            if self._standby is not None:
                self._standby.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            self._board.close()
            tied.adopt(orphans=False)

    # ---- Starting -----------------------------------------------------------------------------------------------------

    def _shared(self) -> dict[str, str]:
        """The environment that all ranks of all attempts share."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.orders.ranks))
        found = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"} | os.environ
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
            found.pop(name, None)
        meeting.unset(found)
        return found | {
            board.SPAWNED: secrets.token_hex(8),
            "MASTER_ADDR": "127.0.0.1",
            meeting.TOKEN: meeting.token(self.orders.run) or meeting.new_token(),
            board.BOARD: str(self._board.descriptor),
        }

    def _stand_by(self) -> Standby | None:
        """None: of one rank that is never restarted, and where there is no fork to speak of."""
        if sys.platform != "linux" or not self.orders.recovery.standby:
            return None
        with contextlib.suppress(OSError):
            return Standby(self.orders.modules, self._environment, (self._board.descriptor,))
        return None

    def _start(self, attempt: _Attempt, count: int) -> bool:
        """False: a signal came before."""
        self._board.clear()
        if attempt.number:
            self._set_aside(attempt.number - 1)
        forks, end = False, time.monotonic() + READY_S
        while self._standby is not None and self._standby.alive and not forks and self.told is None and time.monotonic() < end:
            forks = self._standby.ready(LOOK_S)
        if self.told is not None:  # there is nobody yet who could lose anything
            return False
        with meeting.listening("127.0.0.1") as listener:
            environment = self._environment | {
                "MASTER_PORT": str(listener.getsockname()[1]),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                meeting.ROUND: str(attempt.number),
                START: self._how(attempt.number),
            }
            if len(self._places) < self.orders.ranks:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices())
            arguments = [*self.orders.arguments, *self._more]
            for rank in range(count):
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GIGATRAIN_PLACE": str(self._places[rank])}
                serves = listener if rank == 0 else None
                made = None
                if forks and self._standby is not None:
                    made = self._standby.fork(rank, arguments, own, serves, meeting.LISTEN)
                    forks = made is not None
                if made is None:
                    kept = [self._board.descriptor]
                    if serves is not None:
                        own[meeting.LISTEN] = str(serves.fileno())
                        kept.append(serves.fileno())
                    made = started(rank, arguments, own, kept)
                attempt.ranks.append(made)
        if self._standby is not None and not forks:
            self._standby.close()  # it failed: ranks of this attempt are interpreters of their own, and the next has another
            self._standby = self._stand_by()
        if self.told is not None:  # while some were not there to be told
            for rank in attempt.ranks:
                rank.send(signal.Signals[self.told])
        return True

    def _how(self, number: int) -> str:
        """A later start goes on where the first one has taken the folder; until then it begins as the command said."""
        start = self.orders.start
        if number == 0 or start in ("resume", "continue"):
            return start
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((self.orders.run / "run.json").read_text(encoding="utf-8"))
            if datetime.datetime.fromisoformat(record["created"]).timestamp() >= self._began_s - 1:
                return "continue"
        return start

    def _devices(self) -> list[str]:
        """The accelerators of the places that are left."""
        said = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one] or [str(n) for n in range(self.orders.ranks)]
        return [said[place] for place in self._places if place < len(said)]

    def _set_aside(self, number: int) -> None:
        """What the last attempt's ranks left of failures and hangs is kept, and is not this one's."""
        errors = self.orders.run / "logs" / f"attempt-{_job_attempt():03d}" / "errors"
        with contextlib.suppress(OSError):
            errors.rename(errors.with_name(f"errors.start-{number:03d}"))

    # ---- Watching -----------------------------------------------------------------------------------------------------

    def _watch(self, attempt: _Attempt) -> cause.Ended | None:
        """Until all have ended well (None), or one has not, or hangs; then the others are ended too."""
        poll = select.poll()
        for rank in attempt.ranks:
            if rank.descriptor >= 0:
                poll.register(rank.descriptor, select.POLLIN)
        blind = any(rank.descriptor < 0 for rank in attempt.ranks)
        while True:
            watched = {rank.descriptor for rank in attempt.ranks if rank.code is None}
            poll.poll(20 if blind else LOOK_S * 1000)
            for rank in attempt.ranks:
                descriptor = rank.descriptor
                if rank.code is None and rank.poll() is not None and descriptor in watched and descriptor >= 0:
                    poll.unregister(descriptor)
            if all(rank.code == 0 for rank in attempt.ranks):
                self._tell(attempt)
                return None
            if any(rank.code == REQUEUE for rank in attempt.ranks):
                return self._left(attempt)
            if failed := [rank for rank in attempt.ranks if rank.code]:
                return self._died(attempt, min(failed, key=lambda rank: rank.ended_s))
            if (now := time.monotonic()) - attempt.lookout.looked_s >= LOOK_S:
                overdue = attempt.lookout.look(attempt.ranks, now)
                if attempt.lookout.resumed is not None:
                    self._tell(attempt)
                if overdue is not None:
                    return self._hung(attempt, overdue)

    def _hung(self, attempt: _Attempt, overdue: Overdue) -> cause.Ended:
        """All leave their stacks, as far as they can, and are ended."""
        alive = [rank for rank in attempt.ranks if rank.code is None]
        blamed, why, views = attempt.lookout.culprit(alive)
        for rank in alive:
            self._board.ask(rank.rank)
        if blamed is not None and blamed.silent_s > stuck.SILENT_S:
            next(rank for rank in alive if rank.rank == blamed.rank).send(signal.SIGUSR2)
        time.sleep(STACKS_S)
        self._end(attempt.ranks)
        self._reap()
        view = blamed or min(views, key=lambda view: view.rank)
        usual = f"{self._pace.times:g} x the p99 step of {self._pace.p99_s:.2f} s" if self._pace.p99_s else "before a usual step is known"
        what = f"{why} (in {view.phase}, for {overdue.seconds:.1f} s on {os.uname().nodename}; limit {overdue.limit_s:.1f} s: {usual})"
        return cause.Ended(view.rank, -signal.SIGKILL, view.step, hung=what, ranks=len(attempt.ranks), began_s=attempt.began_s)

    def _left(self, attempt: _Attempt) -> cause.Ended:
        """One was asked to leave and is saved; so are the others, or they end because it has left."""
        end = time.monotonic() + LEAVE_S
        while time.monotonic() < end and any(rank.poll() is None for rank in attempt.ranks):
            time.sleep(0.02)
        self._end(attempt.ranks)
        first = next(rank for rank in attempt.ranks if rank.code == REQUEUE)
        return cause.Ended(first.rank, REQUEUE, self._board.row(first.rank).step, ranks=len(attempt.ranks), began_s=attempt.began_s)

    def _died(self, attempt: _Attempt, first: Rank) -> cause.Ended:
        """The others get a moment for their words, which may say who was first."""
        step = self._board.row(first.rank).step
        end = time.monotonic() + (GRACE_S if (first.code or 0) < 0 else WORDS_S)
        failure = None
        while time.monotonic() < end and any(rank.poll() is None for rank in attempt.ranks):
            failure = restart.failure(self.orders.run, _job_attempt(), since=attempt.began_s)
            if failure is not None and not failure.get("secondary"):
                end = min(end, time.monotonic() + GRACE_S)
            time.sleep(0.02)
        self._end(attempt.ranks)
        self._reap()
        failure = restart.failure(self.orders.run, _job_attempt(), since=attempt.began_s)
        killed = [rank for rank in attempt.ranks if rank.code and rank.code < 0 and rank.ended_s <= end - GRACE_S + 1e-3]
        if failure is not None and failure.get("secondary") and (first.code or 0) > 0 and killed:
            first = min(killed, key=lambda rank: rank.ended_s)  # it was a moment later to be seen
        final = any(self._board.row(rank.rank).final for rank in attempt.ranks)
        return cause.Ended(
            first.rank, first.code or 0, step, ranks=len(attempt.ranks), began_s=attempt.began_s, failure=failure, final=final
        )

    def _end(self, ranks: Sequence[Rank]) -> None:
        for rank in ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.kill()

    def _reap(self) -> None:
        """What dead ranks left behind became ours: it is not left as a zombie."""
        known = {rank.pid for rank in self._attempt.ranks} if self._attempt else set()
        standby = self._standby.pid if self._standby is not None else 0
        for pid in agent.children(os.getpid()):
            if pid not in known and pid != standby:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self.told = self.told or signal.Signals(number).name
        for rank in self._attempt.ranks if self._attempt else ():
            rank.send(number)

    # ---- Deciding -----------------------------------------------------------------------------------------------------

    def _after(self, attempt: _Attempt, ended: cause.Ended) -> int | None:
        """Judge an attempt that ended: the exit code, or None to start another."""
        if ended.code == REQUEUE:
            return REQUEUE
        limit = self.orders.recovery.restarts
        died_s = time.monotonic()
        verdict, step = cause.judged(self.orders.run, ended, before=attempt.before, stalled=self._stalled, restarts=limit, told=self.told)
        gained = step > max(attempt.before, 0)
        self._close_session(ended.words())
        if not limit or verdict.word != "again":
            self._last_words(attempt, ended, verdict, limit)
            if verdict.word == "stop" and limit:
                return verdict.code or ended.exit_code
            return self._code(attempt, ended)
        further = attempt.number > 0 and cause.further(attempt.lookout.resumed, self._furthest, attempt.before)
        self._stalled = 0 if gained or further else self._stalled + 1
        self._furthest = max(self._furthest, attempt.lookout.resumed or 0)
        self._blame(ended, gained)
        self._pending = {
            "words": ended.words(),
            "died_s": died_s,
            "rank": ended.rank,
            "code": ended.code,
            "hung": ended.hung or None,
            "step": ended.step,
            "committed": step,
            "stalled": self._stalled,
        }
        self._record("ended", attempt=attempt.number, **{name: value for name, value in self._pending.items() if name != "died_s"})
        end = time.monotonic() + cause.pause_s(ended, self._stalled)
        while time.monotonic() < end and self.told is None:
            time.sleep(LOOK_S)
        if self.told is not None:
            print(f"gigatrain: {ended.words()}; {self.told} came, so it is not started again; --resume goes on", file=sys.stderr)
            return self._code(attempt, ended)
        return None

    def _code(self, attempt: _Attempt, ended: cause.Ended) -> int:
        """Of a rank that says why, before that of one that was killed."""
        said = [rank.code for rank in attempt.ranks if rank.code and rank.code > 0]
        return ended.exit_code if ended.hung or not said else said[0]

    def _last_words(self, attempt: _Attempt, ended: cause.Ended, verdict: restart.Verdict, limit: int) -> None:
        if ended.hung or ended.code < 0:
            print(
                f"gigatrain: {ended.words()}; the others are stopped, and --resume goes on from the newest checkpoint",
                file=sys.stderr,
            )
        if said := self._why(attempt.began_s):
            print(f"gigatrain: {said}", file=sys.stderr)
        if verdict.word == "stop" and limit and (not said or verdict.code == restart.NO_PROGRESS):  # else it would say the same again
            print(f"gigatrain: not started again: {verdict.why.splitlines()[0]}", file=sys.stderr)

    def _tell(self, attempt: _Attempt) -> None:
        """Once it trains again: one line of what happened, and of what it cost."""
        said, self._pending = self._pending, None
        if said is None:
            return
        seconds = time.monotonic() - said.pop("died_s")
        without = f"; {self._stalled} of {self.orders.recovery.restarts} without a step gained" if self._stalled else ""
        where = f"from step {attempt.lookout.resumed}" if attempt.lookout.resumed is not None else "and finished"
        count = f" on {len(attempt.ranks)} of {self.orders.ranks} ranks" if len(attempt.ranks) < self.orders.ranks else ""
        print(
            f"gigatrain: {said['words']}; restarted {where}{count} in {seconds:.1f} s (attempt {attempt.number + 1}{without})",
            file=sys.stderr,
            flush=True,
        )
        facts = {"attempt": attempt.number, "step": attempt.lookout.resumed, "ranks": len(attempt.ranks), "seconds": round(seconds, 3)}
        self._record("restarted", **facts, stalled=self._stalled)

    def _record(self, event: str, **facts: Any) -> None:
        """Into RUN/logs/restarts.jsonl, and of a job into its history too."""
        row = {"time_s": round(time.time(), 3), "event": event} | {name: value for name, value in facts.items() if value is not None}
        with contextlib.suppress(OSError):
            with (self.orders.run / "logs" / "restarts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if (self.orders.run / "launch" / "job.json").is_file():
                job.record(self.orders.run, f"rank {event}", **facts)

    def _close_session(self, why: str) -> None:
        """Of the process that `gigatrain watch` counts, which could not say itself why it ended."""
        path = self.orders.run / "logs" / "progress.jsonl"
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                rows = [json.loads(line) for line in file.read().splitlines()[-2:] if line.endswith(b"}")]
            last = rows[-1]
            attempt_s = self._attempt.began_s if self._attempt else self._began_s
            if last["time_s"] < attempt_s or (last["event"] == "end" and last.get("why") == "finished"):
                return  # none of these ranks came to a word: the time is of no process; and what follows a finished run's end is no part of it
            row = {name: last[name] for name in ("attempt", "ranks", "process")}
            line = json.dumps({"time_s": round(time.time(), 3), "event": "end"} | row | {"why": why, "killed": True}) + "\n"
            with path.open("ab") as file:
                file.write(line.encode())

    # ---- With fewer ---------------------------------------------------------------------------------------------------

    def _blame(self, ended: cause.Ended, gained: bool) -> None:
        """Strikes of the place whose rank ended the attempt: the second in a row without a step gained, or the first of one that was lost before, and the
        run goes on without it."""
        if self.orders.recovery.shrink is None:
            return
        place = self._places[ended.rank]
        strikes = 0 if gained else self._lost.get(place, 0) + 1
        self._lost = {known: count for known, count in self._lost.items() if count >= 2} | {place: strikes}

    def _size(self) -> int:
        """How many ranks start, and on which places: all, but for those that are lost, if the run can be planned on fewer."""
        least = self.orders.recovery.shrink
        self._places, self._more = list(range(self.orders.ranks)), ()
        if least is None or not (lost := [place for place, strikes in self._lost.items() if strikes >= 2]):
            return self.orders.ranks
        left = [place for place in self._places if place not in lost]
        for count in range(len(left), least - 1, -1):
            more = self.orders.fits(count) if count else None
            if more is not None:
                self._places, self._more = left[:count], more
                self._lost = dict.fromkeys(lost, 1)  # at the next restart each gets another chance, and is out with its first strike
                return count
        return self.orders.ranks


def _job_attempt() -> int:
    said = os.environ.get("GIGATRAIN_ATTEMPT", "0")
    return int(said) if said.isdecimal() else 0


def supervise(orders: Orders, why: Callable[[float], str | None]) -> int:
    """Start the ranks and wait, through restarts; the command's exit code."""
    return Supervisor(orders, why).run()
