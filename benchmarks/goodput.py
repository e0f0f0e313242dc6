"""Goodput against what was published, and the closed form against the event simulation; seconds, on any machine.

    python benchmarks/goodput.py                 published figures, policies by size, sites' failure rates
    python benchmarks/goodput.py --simulate      a grid of cases through both, 20,000 stops each

Every anchor takes its inputs from its source as far as that gives them; what it does not is said in its note, with what another choice would give.
Two rows are arithmetic that the source did, told again by the simulation's `replay`. `by hand`: people restarted the run, at hours nobody published; what is
printed is what a restart by itself would have left, and is not scored.
"""

import argparse
import math
import statistics
from dataclasses import dataclass, replace

from gigatrain.planning.estimate.failures import DAY_S, PUBLISHED, Failures, counted
from gigatrain.planning.estimate.goodput import Case, expected
from gigatrain.planning.estimate.goodput_simulation import Fault, Saves, replay, simulate
from gigatrain.planning.estimate.recovery import WRITE_GBYTE_S, Restart, Saving, Spares

STATE = 14  # bytes a parameter: bf16 weights, fp32 master weights and two moments
BLOCKING = Saving(405e9 * STATE, 2000.0)
EXACT = Restart(allocation_s=0, start_s=0, rendezvous_s=0, first_s=0)  # `first_s` is then all of a restart, as published


@dataclass(frozen=True)
class Anchor:
    name: str
    published: float  # share; a bound where `at_least`
    source: str
    case: Case
    note: str = ""
    at_least: bool = False
    scored: bool = True


def detected(failures: Failures, seconds: float) -> Failures:
    """The same failures, of which every crash and hang is found after `seconds`, and none is silent or planned."""
    kinds = tuple(replace(kind, detect_s=seconds, corrupts=False) for kind in failures.kinds)
    return replace(failures, kinds=kinds, planned_per_day=0.0)


def anchors() -> list[Anchor]:
    """Published goodputs, with their inputs."""
    llama, hsdp, rsc = PUBLISHED["llama3"], PUBLISHED["hsdp-98k"], PUBLISHED["rsc-1"]
    many = Spares(0, 0.0)  # a repair takes no time: there is always another node
    behemoth = Saving(2e12 * STATE, 2000.0)
    free = Saving(1.0, 1e6, far_interval_s=3600.0)  # RSC's model: writes stall nothing
    restart = replace(EXACT, first_s=300.0, growth=0.0)
    warm = replace(EXACT, first_s=600.0, growth=0.0)
    bloom = counted("1 to 2 GPUs a week on 384 A100", 1.5 * 117.5 / 7, 384, 117.5, llama.kinds)
    return [
        Anchor(
            "Llama 3 405B, 16,384 H100, 54 days", 0.90, "arXiv 2407.21783",
            Case(16_384, 8, 10.0, llama, BLOCKING, replace(EXACT, first_s=200.0), days=54),
            "419 and 47 interruptions; restart 200 s (arXiv 2602.00277, figure 2); saves at 2 TB/s; faults found as by inspection", at_least=True,
        ),
        Anchor(
            "the same, faults found by 10-minute timeouts", 0.90, "arXiv 2407.21783",
            Case(16_384, 8, 10.0, replace(detected(llama, 600.0), planned_per_day=47 / 54), BLOCKING, replace(EXACT, first_s=200.0), days=54),
            "ByteRobust's table 3: what is not inspected is found after about 10 minutes", at_least=True,
        ),
        Anchor(
            "98K GPUs, synchronous", 0.44, "arXiv 2602.00277",
            Case(98_304, 8, 20.0, detected(hsdp, 60.0), behemoth, warm, many),
            "a failure every 18 min, 60 s until a collective times out, warm restart 10 min; how it saved is "
            "not published: 2 T parameters at 2 TB/s, blocking, are assumed (written beside training it would be 52)",
        ),
        Anchor(
            "98K GPUs, fault-tolerant HSDP, 12 replicas", 0.80, "arXiv 2602.00277",
            Case(98_304, 8, 20.0, detected(replace(hsdp, kinds=tuple(replace(one, everywhere=False) for one in hsdp.kinds)), 60.0), behemoth,
                 replace(warm, stall_s=180.0), many, 12, True),
            "all stall 3 min, the replica is back after 10",
        ),
        Anchor(
            "RSC-1, 2,048 to 4,096 A100, hourly saves", 0.90, "arXiv 2410.21680",
            Case(3072, 8, 10.0, detected(rsc, 0.0), free, restart, many), "6.50 failures per 1,000 node-days, restart 5 min", at_least=True,
        ),
        Anchor(
            "RSC-1, 16,000 A100, saves every 5 min", 0.93, "arXiv 2410.21680",
            Case(16_000, 8, 10.0, detected(rsc, 0.0), replace(free, far_interval_s=300.0), restart, many), "restart 5 min; the source's own model",
        ),
        Anchor(
            "RSC-2's rate, 100,000 GPUs, saves and restart of 2 min", 0.90, "arXiv 2410.21680",
            Case(100_000, 8, 10.0, detected(PUBLISHED["rsc-2"], 0.0), replace(free, far_interval_s=120.0), replace(restart, first_s=120.0), many),
            "the source's own model, «about 2 minutes»",
        ),
        Anchor(
            "ByteRobust, 9,600 GPUs, three months", 0.97, "arXiv 2509.16293",
            Case(9600, 8, 10.0, llama, replace(BLOCKING, near=True, synchronous=False, write_gbyte_s=WRITE_GBYTE_S * 9600), Restart(standby=True), days=90),
            "Llama 3's rate and 405B (theirs are not published), saves in memory, warm standby",
        ),
        Anchor(
            "BLOOM, 384 A100", 100.45 / 110.5, "1,082,990 GPU-hours; 346 B tokens after the first week at 105.2 s for 4.19 M (metaseq and bigscience logs)",
            Case(384, 8, 105.2, replace(bloom, planned_per_day=0.0), Saving(2.3e12, 57.5, far_interval_s=10_520.0), Restart(), Spares(4), days=117),
            "by hand; saves every 100 steps, 40 s", scored=False,
        ),
        Anchor(
            "OPT-175B, 992 A100", 33 / 56, "33 ideal days took 56 (metaseq chronicles)",
            Case(992, 8, 30.0, PUBLISHED["opt"], Saving(175e9 * STATE, 120.0, far_interval_s=7500.0), Restart(), Spares(12), days=56),
            "by hand; saves every 250 steps; 12 spare nodes", scored=False,
        ),
    ]  # fmt: skip


def told() -> list[tuple[str, float, float]]:
    """The source's own arithmetic of 98K GPUs, by replay: faults 18 minutes apart, nothing saved anew and nothing lost."""
    times = [18.0 * 60 * (index + 1) for index in range(1000)]
    saves = Saves(far_s=1.0, far_stall_s=0.0)
    whole = replay([Fault(at, 0.0, 600.0, lands=0) for at in times], times[-1], saves)
    part = replay([Fault(at, 0.0, 180.0, lands=0, rebuild_s=420.0, replica=0) for at in times], times[-1], saves, replicas=12)
    return [("98K synchronous, (18 - 10) / 18", 0.44, whole.share), ("98K fault-tolerant, (7 x 11/12 + 8) / 18", 0.80, part.share)]


def grid() -> dict[str, Case]:
    """Cases over sizes, tiers, tolerance, pools and rates, that the closed form and the simulation must agree on."""
    llama = PUBLISHED["llama3"]

    def case(
        accelerators: int,
        failures: Failures = llama,
        *,
        restart: Restart | None = None,
        spares: Spares | None = None,
        replicas: int = 1,
        tolerance: bool = False,
        tiers: Saving = BLOCKING,
    ) -> Case:
        saving = replace(tiers, write_gbyte_s=WRITE_GBYTE_S * accelerators)
        return Case(accelerators, 8, 10.0, failures, saving, restart or Restart(), spares or Spares(), replicas, tolerance)

    beside = replace(BLOCKING, synchronous=False)
    memory = replace(beside, near=True)
    quick = Restart(growth=0.0, rendezvous_growth=0.3, standby=True)
    return {
        "1,024": case(1024),
        "16,384": case(16_384),
        "16,384, hourly": case(16_384, tiers=replace(BLOCKING, far_interval_s=3600.0)),
        "16,384, in memory": case(16_384, tiers=memory),
        "16,384, 8 spares": case(16_384, spares=Spares(8)),
        "16,384, no spare": case(16_384, spares=Spares(0, 7200.0)),
        "16,384, shrinks": case(16_384, replicas=32, spares=Spares(4, shrink=True)),
        "16,384, lemons": case(16_384, replace(llama, lemon_factor=30.0, strikes=3)),
        "16,384, racks": case(
            16_384, replace(PUBLISHED["rsc-1"], correlated_share=0.1, correlated_nodes=4), spares=Spares(30), tiers=memory
        ),
        "4,096, maintenance": case(4096, replace(llama, planned_per_day=4.0, planned_s=3600.0)),
        "32,768, corruption": case(32_768, PUBLISHED["hsdp-32k"]),
        "100,000": case(100_000),
        "100,000, beside training": case(100_000, tiers=beside),
        "98,304, HSDP": case(98_304, PUBLISHED["hsdp-98k"], replicas=12, tolerance=True),
        "98,304, HSDP, 20 spares": case(98_304, replicas=48, tolerance=True, spares=Spares(20)),
        "98,304, half lost": case(98_304, PUBLISHED["hsdp-98k"]),
        "288,000, in memory": case(288_000, restart=quick, tiers=memory),
    }


def policies() -> list[tuple[str, list[float]]]:
    """What reliability.md's table has by a simulation of its own, at Llama 3's rate: interval and restart fixed, nothing else lost."""
    failures = detected(PUBLISHED["llama3"], 0.0)
    rows = []
    for name, interval, restart, stall in (
        ("A", 1800, 900, 30),
        ("B", 300, 300, 1),
        ("C", 60, 90, 0.2),
        ("D", 30, 45, 0.1),
        ("E", 15, 20, 0.1),
    ):
        found = []
        for accelerators in (16_384, 100_000, 131_072, 288_000):
            saving = Saving(stall * 1e9, 1.0, read_gbyte_s=1e9, far_interval_s=float(interval))
            case = Case(accelerators, 8, 1.0, failures, saving, replace(EXACT, first_s=float(restart), growth=0.0), Spares(0, 0.0))
            found.append(expected(case).share)
        rows.append((f"{name}: saves every {interval} s, {restart} s until the next step", found))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="the grid through both")
    parser.add_argument("--stops", type=int, default=20_000)
    options = parser.parse_args()
    print(f"{'published':<58} {'figure':>7} {'ours':>6} {'points':>7}  90 %")
    for one in anchors():
        found = expected(one.case)
        off = 100 * (found.share - one.published)
        word = "" if one.scored else "  not scored: by hand"
        print(
            f"{one.name:<58} {'>' if one.at_least else ' '}{100 * one.published:6.1f} {100 * found.share:6.1f} {off:+7.1f}  "
            f"{100 * found.low:.1f} to {100 * found.high:.1f}{word}\n    {one.source}: {one.note}"
        )
    for name, published, share in told():
        print(f"{name:<58}  {100 * published:6.1f} {100 * share:6.1f} {100 * (share - published):+7.1f}  told again")
    print(f"\n{'policy, per cent at':<58} {'16,384':>8} {'100,000':>8} {'131,072':>8} {'288,000':>8}")
    for name, found in policies():
        print(f"{name:<58} " + " ".join(f"{100 * share:8.1f}" for share in found))
    print(f"\n{'interruptions':<58} {'per 1,000 node-days':>20} {'MTBF at 16,384, h':>18}")
    logs = []
    for failures in PUBLISHED.values():
        each = failures.per_accelerator_s * 8 * DAY_S * 1000
        logs.append(math.log(each))
        print(f"{failures.source:<75} {each:4.2f} {1 / failures.per_s(16_384) / 3600:17.2f}")
    print(f"deviation of their logarithm {statistics.stdev(logs):.2f}")
    if options.simulate:
        print(f"\n{'closed form against simulation':<32} {'closed':>8} {'counted':>8} {'points':>7}")
        for name, case in grid().items():
            found = expected(case)
            share = simulate(case, found, 1, options.stops).share
            print(f"{name:<32} {100 * found.share:8.2f} {100 * share:8.2f} {100 * (found.share - share):+7.2f}")


if __name__ == "__main__":
    main()
