"""Where a run's wall-clock went, from the events of its logs/progress.jsonl. Free of torch.

Goodput is the time of the steps that the run kept over the wall-clock since its first process had the folder. The rest of that time, by class: `redone`,
steps that a restart did again; `data`, waited for a batch (of a GPU, which computes meanwhile, only the trace knows it); `compile`, kernels made and judged,
and what a process's first step takes beyond its others; `validation`; `checkpoint`; `restore`, a checkpoint read; `paced`, waited to keep to a power budget;
`starting`, the rest from having the folder to the first step;
`stopped`, from a process's last word to the next one's first, with what a killed one did after its last report; `other`, what is left.
"""

from collections.abc import Mapping
from typing import Any

CLASSES = ("training", "redone", "data", "compile", "validation", "checkpoint", "restore", "paced", "starting", "stopped", "other")
TOLD = ("data", "compile", "validation", "checkpoint", "restore", "paced")  # which a run says by name
LARGEST = 1e100  # beyond it a number is damage


def sessions_of(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Events by process, up to the one that finished the run: what only looked at it later is no part of it."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        found.setdefault(event.get("process"), []).append(event)
        if event["event"] == "end" and event.get("why") == "finished":
            break
    return list(found.values())


def began_of(session: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Its first step's event; None if it never came to one."""
    return next((event for event in session if event["event"] == "steps" and number(event, "step") is not None), None)


def goodput_of(
    sessions: list[list[dict[str, Any]]], now: float | None, after: list[list[dict[str, Any]]] | None = None
) -> dict[str, Any] | None:
    """Seconds by class since the first process had the folder, until `now` (None: the last event), and the share that was kept.

    `after`: processes that followed, whose time is not looked at; what they did again was not kept.
    """
    if not sessions:
        return None
    seconds = dict.fromkeys(CLASSES, 0.0)
    for index, session in enumerate(sessions):
        later = [began["step"] for began in map(began_of, [*sessions[index + 1 :], *(after or ())]) if began]
        cut = min(later, default=float("inf"))  # what lies behind it was done again
        began = began_of(session)
        at = began["step"] if began else 0
        starting = (began or session[-1])["time_s"] - session[0]["time_s"]
        for event in session:
            spent = event.get("seconds")
            spent = spent if isinstance(spent, dict) else {}
            for what in TOLD:
                seconds[what] += number(spent, what) or 0.0
            if event is began:
                starting -= sum(number(spent, what) or 0.0 for what in spent)
            if event["event"] == "report" and (step := number(event, "step")) is not None:
                trained = number(spent, "training") or 0.0
                kept = min(1.0, max(0.0, (cut - at) / (step - at))) if step > at else 0.0
                seconds["training"] += trained * kept
                seconds["redone"] += trained * (1 - kept)
                at = step
        seconds["starting"] += max(0.0, starting)
        if began and session[-1].get("killed"):  # by its supervisor's word: what it did since its own last one is lost
            lived, ends = ([event for event in session if (event["event"] == "end") is last] for last in (False, True))
            told = [event["seconds"] for event in ends if isinstance(event.get("seconds"), dict)]
            said_s = sum(number(spent, what) or 0.0 for spent in told for what in TOLD)
            seconds["stopped"] += max(0.0, session[-1]["time_s"] - lived[-1]["time_s"] - said_s)
        if index:
            seconds["stopped"] += max(0.0, session[0]["time_s"] - sessions[index - 1][-1]["time_s"])
    end = sessions[-1][-1]["time_s"]
    wall_s = max(0.0, max(now or end, end) - sessions[0][0]["time_s"])
    if (told_s := sum(seconds.values())) > wall_s:  # a clock was set back meanwhile: shares are kept
        seconds = {what: spent * wall_s / told_s for what, spent in seconds.items()}
    seconds["other"] = max(0.0, wall_s - sum(seconds.values()))
    return {
        "wall_s": round(wall_s, 3),
        "share": min(1.0, seconds["training"] / wall_s) if wall_s else None,
        "seconds": {what: round(spent, 3) for what, spent in seconds.items()},
    }


def classes(events: list[dict[str, Any]], now: float | None = None) -> dict[str, float]:
    """Seconds by class (CLASSES) of the events of a logs/progress.jsonl; they add up to the wall-clock that they span. Nothing of no events."""
    found = goodput_of(sessions_of(events), now)
    return dict(found["seconds"]) if found else {}


def number(row: Mapping[str, Any], key: str) -> Any:
    """A number of a row; what is missing or something else, or not finite, or too large to be of a run, is None."""
    value = row.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST else None
