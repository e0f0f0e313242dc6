"""bench kernels, power, faults: what a run is made of, measured."""

import argparse

from gigatrain.cli import given
from gigatrain.cli.command import Command


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1000000000")
    return number


def _bench_kernels_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--op", action="append", default=[], help="only this operation; may be repeated (default: all)")
    made.add_argument("--peers", metavar="A,B", help="only these beside ours (default: all that are installed)")
    act = made.add_mutually_exclusive_group()
    act.add_argument("--check", action="store_true", help="errors over every case, no timings")
    act.add_argument("--tune", action="store_true", help="find the fastest configurations on this GPU and write its table")
    act.add_argument(
        "--compile", action="store_true", help="compile every kernel for GPUs that are not here: registers, spills, shared memory"
    )
    act.add_argument("--plots", metavar="DIR", help="a PNG per operation from the CSV; measures nothing and needs no GPU")
    made.add_argument(
        "--csv", metavar="PATH", help="rows are added here (default: benchmarks/results/kernels.csv in a checkout, else ./kernels.csv)"
    )
    made.add_argument("--out", metavar="PATH", help="with --tune: the table (default: that of this GPU in gigatrain/kernels/tables)")
    made.add_argument("--quick", action="store_true", help="the first size of each operation, fewer rounds, nothing that compiles")
    made.add_argument("--fresh", action="store_true", help="measure again what the CSV has from this commit, device and versions")
    made.add_argument("--json", action="store_true", help="the rows as JSON, for programs")


def _bench_kernels(options: argparse.Namespace) -> None:
    from gigatrain.bench import kernels

    kernels.run(
        options.op,
        peers=options.peers,
        check=options.check,
        tune=options.tune,
        compiled=options.compile,
        path=options.csv,
        plots=options.plots,
        out=options.out,
        quick=options.quick,
        fresh=options.fresh,
        as_json=options.json,
    )


_KERNELS = Command(
    "kernels",
    "every kernel beside its peers",
    """\
Every fused kernel of ours beside plain torch, torch.compile and the peers that are installed (pip install 'gigatrain[bench]'): right first, then fast.
Forward, backward and both; cold inputs, graphs and host, rounds in turn; the floor at this device's own measured ceilings. Losers are shown.

  gigatrain bench kernels                                     all, in less than nine minutes on an H200; run again, it goes on where it was
  gigatrain bench kernels --op rms_norm --peers torch,liger
  gigatrain bench kernels --quick                             a few minutes on a CPU: what has no GPU to run on is named
  gigatrain bench kernels --check                             errors of every version over every case
  gigatrain bench kernels --plots pictures                    from the CSV, anywhere""",
    _bench_kernels,
    _bench_kernels_arguments,
)


def _bench_power_arguments(made: argparse.ArgumentParser) -> None:
    given.add_recipe(made)
    made.add_argument("--site", metavar="SITE", help="where it runs (default: this machine; `gigatrain sites`)")
    made.add_argument("--megawatts", metavar="M", type=_positive, help="find the fastest site under M MW (default: the site's limit)")
    made.add_argument(
        "--sweep", metavar="A,B", help="of microbatch, precision, kernels, mesh, cap; A+B together (default: all but cap, one by one)"
    )
    made.add_argument("--allow-power-caps", action="store_true", help="limits of accelerators may be set; they are put back, whatever dies")
    long = made.add_mutually_exclusive_group()
    long.add_argument("--steps", metavar="N", type=given.ranks, help="of every run (default: as many as its steady window needs)")
    long.add_argument(
        "--seconds", metavar="S", type=_positive, help="of the steady window (default: 10, or 100 updates of the slowest meter)"
    )
    made.add_argument("--rounds", metavar="R", type=given.ranks, help="every variant trains once in each (default: 3; with --quick 1)")
    made.add_argument(
        "--csv", metavar="PATH", help="rows are added here (default: benchmarks/results/power-variants.csv in a checkout, else here)"
    )
    made.add_argument("--plots", metavar="DIR", help="write DIR/power.png")
    made.add_argument(
        "--quick",
        action="store_true",
        help="one round and a shorter settling: a look, without a spread of joules, or a word on whether losses are the baseline's",
    )
    made.add_argument("--json", action="store_true", help="the rows as JSON, for programs")


def _bench_power(options: argparse.Namespace) -> None:
    from gigatrain.bench import power

    power.run(
        options.recipe,
        site=options.site,
        sets=options.set,
        megawatts=options.megawatts,
        words=options.sweep,
        allow_caps=options.allow_power_caps,
        steps=options.steps,
        seconds=options.seconds,
        rounds=options.rounds,
        path=options.csv,
        plots=options.plots,
        quick=options.quick,
        as_json=options.json,
        measure=given.measured,
    )


_POWER = Command(
    "power",
    "what a joule buys: tokens/s/MW of a recipe's variants",
    """\
Train a recipe's variants in alternating rounds, and say what a joule buys: tokens/s per MW at device, node, IT and facility, loss and memory beside it.
Every variant is a `gigatrain train` of its own. Losses are judged by the baseline's own spread; losers and what the plan refuses are shown.

  gigatrain bench power my.toml                               microbatch, precision, kernels, mesh, one by one; limits and clocks as found
  gigatrain bench power my.toml --megawatts 200               and the fastest site under 200 MW: more, slower GPUs or fewer, faster ones
  sudo -E gigatrain bench power my.toml --allow-power-caps --sweep cap,microbatch+cap
  gigatrain bench power my.toml --sweep kernels --plots pictures --csv power.csv
  gigatrain bench power my.toml --quick --sweep microbatch --set power.node=redfish

A window is at least 10 s and 100 updates of the slowest meter; of less there is no figure. POWER.md says what is counted.""",
    _bench_power,
    _bench_power_arguments,
)


def _bench_faults_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--hours", metavar="H", type=_positive, help="go on drawing rows for so long (default: each fault once on each engine)"
    )
    made.add_argument("--seed", metavar="N", type=given.count, help="of all that is drawn (default: a new one, which is printed)")
    made.add_argument("--only", metavar="A,B", help="only these faults")
    made.add_argument(
        "--engines", metavar="A,B", help="on these (default: native-1,native-2,zero2-2; also native-4, ddp-2, zero1-2, zero3-2)"
    )
    made.add_argument(
        "--kills", metavar="K", type=given.ranks, default=1, help="kills of a kill, segv or abort row, one after the other (default: 1)"
    )
    made.add_argument("--row", metavar="SEED", type=given.count, help="one row again, of the --only fault on the --engines engine")
    made.add_argument(
        "--goodput", action="store_true", help="instead: kill a rank at exponential times, and hold goodput against the simulator"
    )
    made.add_argument(
        "--mtbf", metavar="S", type=_positive, default=30.0, help="of --goodput: seconds between two kills on average (default: 30)"
    )
    made.add_argument("--minutes", metavar="M", type=_positive, default=30.0, help="of --goodput: how long (default: 30)")
    made.add_argument("--csv", metavar="PATH", help="a line for each injection is added here")
    made.add_argument("--markdown", metavar="PATH", help="write the table for a page")
    made.add_argument(
        "--work", metavar="DIR", help="where the runs are (default: a temporary folder, which stays if a row broke its promise)"
    )
    made.add_argument("--json", action="store_true", help="the rows as JSON")


def _bench_faults(options: argparse.Namespace) -> None:
    from gigatrain.bench import faults

    if options.goodput:
        faults.goodput(
            minutes=options.minutes,
            mtbf_s=options.mtbf,
            seed=options.seed,
            engines=options.engines,
            work=options.work,
            as_json=options.json,
        )
        return
    faults.run(
        hours=options.hours,
        seed=options.seed,
        only=options.only,
        engines=options.engines,
        kills=options.kills,
        one=options.row,
        path=options.csv,
        page=options.markdown,
        work=options.work,
        as_json=options.json,
    )


_FAULTS = Command(
    "faults",
    "faults done to real runs, and which promises were kept",
    """\
Do faults to real runs of a tiny recipe, each from a process outside: kills at every moment, hangs, full and failing disks, damaged checkpoints, wrong recipes.
A row is kept only if the run ends bitwise as one that nothing was done to (weights, optimizer, generators, metrics, samples), or refuses by name
what it must refuse. Everything comes from the seed and nothing is tried twice. RELIABILITY.md has the promises. Leaves with 9 if one was broken.

  gigatrain bench faults                                      each fault once on each engine, about half an hour on two cores
  gigatrain bench faults --hours 1 --csv faults.csv --markdown faults.md
  gigatrain bench faults --only kill --kills 5 --engines native-2,native-4,zero2-2 --hours 1
  gigatrain bench faults --only bitflip --engines native-2 --row 70012    one row again
  sudo -E gigatrain bench faults --only enospc,erofs,stall,oom            what needs mounts and control groups
  gigatrain bench faults --goodput --mtbf 30 --minutes 30     goodput under a failure every 30 s, measured and simulated

Rows that cannot be made here (no root, no DeepSpeed) are shown as such, with the reason.""",
    _bench_faults,
    _bench_faults_arguments,
)


BENCH = Command("bench", "measure", "Measure what a run is made of, beside its peers.", within=(_KERNELS, _POWER, _FAULTS))
