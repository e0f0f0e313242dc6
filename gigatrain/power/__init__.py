"""Watts: what is drawn (meters), what was got for it (the account), and what is done about it (limits, pace, schedule). Free of torch.

    reading.py    the words: scope, provenance, sample; sums over nested scopes are refused
    nvml.py amd.py host.py node.py    meters: each gives `Source`s
    redfish.py    what node.py asks a BMC, and which of its chassis is the node
    track.py      one source over time: counters' differences, resets and gaps, the integral of watts beside it
    parts.py      what there is of a node, what is added to what and what lies within what
    meter.py      one reader per node: samples sources in a thread, counts joules, marks gaps; `Taken` is what it saw since it was last asked
    boundary.py   from those sums to joules at four boundaries (POWER.md), pure
    spans.py account.py    from a run's folder to tokens/s/MW over its whole wall-clock; live.py what it draws now
    control.py    from what is drawn to what is done (pure); line.py what is believed of a run; cost.py what it costs; pace.py waits
    guard.py      sets limits, restore.py puts them back, whatever dies
    schedule.py   megawatts, prices and carbon by time of day

RUN/energy.jsonl, by rank 0, is never cut: energy of steps that a restart did again was drawn all the same. One object a window:

    {"time_s": 1790000012.3,        when it was written, seconds since 1970
     "event": "begin" | "steps" | "window" | "end",     a process has the run; comes to its first step; a report; leaves
     "attempt": 0, "process": "3f2a...",       as in logs/progress.jsonl
     "step": 20, "tokens": 40960,              done by now, of the run
     "taken": {"nodes": 2, "ms": 24012, ...},  reading.FIELDS: integers, summed over the nodes since the last row
     "bins": [[179000001, 2, 5310000, 9020000], ...],   ten-second bins of wall-clock that all nodes have closed: number (time // 10), nodes, device mJ, node mJ
     "phases": {"training": 5310.2, "checkpoint": 12.0, ...},   joules of rank 0's node by what its loop did meanwhile
     "orders": {"period_s": 0.5, "cap_share": null, "why": "..."}}     what the governor ordered for the next window, if there is one

The first row of a process also has "meters": {what: how}, e.g. {"device": "8 x NVML energy counter (H100)", "node": "estimated: ..."}.
"""
