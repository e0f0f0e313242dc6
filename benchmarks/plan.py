r"""How well the planner predicts: steps, memory, intervals and ranking of layouts, held against published measurements.

    python benchmarks/plan.py IN.jsonl                             predicts a file of measurements and scores that
    python benchmarks/plan.py IN.jsonl --predictions OUT.jsonl     scores what `gigatrain plan --predict IN.jsonl -o OUT.jsonl` wrote
    python benchmarks/plan.py measured                             ten of the sets that constants are fitted on; `further`: the other five
    python benchmarks/plan.py --leave-one-out                      refits the constants without each set in turn: data/folds.json; takes minutes
    python benchmarks/plan.py --write                              from data/folds.json: interval.json, results/plan_loso.csv, plan_further.csv, PLANNER.md

Errors are of seconds of a step, predicted over measured - 1; a row that tells no time counts for memory alone. Published TFLOP/s and MFU are never scored:
sources count FLOPs each in their own way. Data (benchmarks/data/), each row with the repository, path and commit that it was read from:

    measured.jsonl.gz     1,772 rows of 10 sets
    further.jsonl         68 rows of 5 sets more; like each of the ten, each is scored by constants that were fitted without it
    measured_power.csv    86 power logs of MLPerf, reduced to watts of a node and kWh of a run
"""

import argparse
import csv
import io
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import python_version
from statistics import median
from typing import Any

import plan_memory  # beside this file, as the next one
from plan_data import DATA, Pair, Row, further, gibibytes_of, measured, measured_power, read, seconds_of  # noqa: F401 - two for whoever imports this

from gigatrain.errors import GigatrainError
from gigatrain.planning import predict
from gigatrain.planning.estimate import estimate as estimates
from gigatrain.planning.estimate import interval, operations, rows
from gigatrain.planning.estimate.constants import PRIORS, VALUES

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "PLANNER.md"
FOLDS = DATA / "folds.json"
LAYOUTS = 4  # of a group, from which on its ranking is scored
ITERATIONS = 5  # of a fit; plan_fit.py's own default
SAMPLED = 12  # rows of a set that a test may afford


# ---- scores ----


@dataclass(frozen=True, slots=True)
class Score:
    """Of the rows of one group that tell a time and were predicted. Shares are of 1."""

    rows: int
    median: float
    mean: float
    p90: float
    bias: float  # mean of the signed errors
    covered: float  # share of rows within their interval
    width: float  # median of high over low


def nearest(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed (nearest rank)."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def score(pairs: Iterable[Pair]) -> Score | None:
    timed = [(pair, error) for pair in pairs if (error := pair.error) is not None]
    if not timed:
        return None
    sizes = sorted(abs(error) for _, error in timed)
    return Score(
        rows=len(timed),
        median=median(sizes),
        mean=sum(sizes) / len(sizes),
        p90=nearest(sizes, 0.9),
        bias=sum(error for _, error in timed) / len(timed),
        covered=sum(pair.covered for pair, _ in timed) / len(timed),
        width=median(pair.answer["high_s"] / pair.answer["low_s"] for pair, _ in timed),
    )


def kinds(row: Row) -> list[str]:
    """What groups of the table a row is in."""
    found = [f"set {row.get('set', '?')}", "MoE" if row.get("moe_experts") else "dense"]
    try:
        return [*found, f"on {interval.family(rows.parse(row).cluster.chip)}"]
    except (rows.Refused, GigatrainError):
        return found


def scores(pairs: Sequence[Pair]) -> dict[str, Score]:
    """By set, family of accelerators and kind of model, and over all; `sets alike` takes so many of each set as the smallest ones have."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        for kind in kinds(pair.row):
            groups[kind].append(pair)
    ordered = sorted(groups, key=lambda name: (not name.startswith("set "), not name.startswith("on "), name))
    found = {name: scored for name in ordered if (scored := score(groups[name]))}
    alike = [pair for name in ordered if name.startswith("set ") for pair in sampled([p for p in groups[name] if p.error is not None], 40)]
    for name, some in (("at most 40 of a set", alike), ("all rows", pairs)):
        if scored := score(some):
            found[name] = scored
    return found


def sampled(found: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many, evenly taken."""
    return found[:: max(1, math.ceil(len(found) / most))] if found else found


@dataclass(frozen=True, slots=True)
class Ranking:
    """Of groups of layouts: same model, accelerators, sequence, batch, precision and stack."""

    groups: int
    layouts: int
    tau: float  # mean of Kendall's tau-b
    regret: float  # median over groups: the layout that is predicted fastest, over the fastest
    regret_p90: float
    regret_of_five: float  # P90 over groups: the best of the five predicted fastest


_SAME = (
    "set",
    "model",
    "gpu",
    "n_gpus",
    "seq_len",
    "global_batch",
    "precision",
    "framework",
    "framework_version",
    "act_ckpt",
    "attention_impl",
)


def ranking(pairs: Iterable[Pair]) -> Ranking | None:
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        found, predicted = seconds_of(pair.row), pair.answer["step_time_s"]
        if found is not None and predicted is not None:
            groups[tuple(str(pair.row.get(name)) for name in _SAME)].append((predicted, found))
    kept = [group for group in groups.values() if len(group) >= LAYOUTS]
    if not kept:
        return None
    regrets, of_five = [], []
    for group in kept:
        best = min(found for _, found in group)
        order = [found for _, found in sorted(group)]
        regrets.append(order[0] / best - 1)
        of_five.append(min(order[:5]) / best - 1)
    regrets.sort()
    return Ranking(
        groups=len(kept),
        layouts=sum(map(len, kept)),
        tau=sum(map(tau, kept)) / len(kept),
        regret=median(regrets),
        regret_p90=nearest(regrets, 0.9),
        regret_of_five=nearest(sorted(of_five), 0.9),
    )


def tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau-b of two orders (M. G. Kendall, Biometrika 1945); 0 where one of them is all ties."""
    agree = ties_first = ties_second = 0
    count = len(pairs) * (len(pairs) - 1) // 2
    for i, (a, b) in enumerate(pairs):
        for c, d in pairs[:i]:
            ties_first += a == c
            ties_second += b == d
            agree += (a > c) * (b > d) + (a < c) * (b < d) - (a > c) * (b < d) - (a < c) * (b > d)
    below = math.sqrt((count - ties_first) * (count - ties_second))
    return agree / below if below else 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """`false_fits`: rows that ran out of memory and were said to fit; `false_full`: rows that ran and were said not to."""

    rows: int
    median: float
    p90: float
    bias: float
    oom: int
    false_fits: int
    ran: int
    false_full: int


def memory(pairs: Iterable[Pair]) -> Memory | None:
    told = [pair for pair in pairs if pair.answer["refused"] is None]
    errors = [error for pair in told if (error := pair.memory_error) is not None]
    judged = [pair for pair in told if pair.answer["fits"] is not None]
    oom = [pair for pair in judged if str(pair.row.get("status")).lower() == "oom"]
    ran = [pair for pair in judged if str(pair.row.get("status", "ok")).lower() == "ok"]
    if not errors and not oom:
        return None
    sizes = sorted(map(abs, errors)) or [math.nan]
    return Memory(
        rows=len(errors),
        median=median(sizes),
        p90=nearest(sizes, 0.9),
        bias=sum(errors) / len(errors) if errors else math.nan,
        oom=len(oom),
        false_fits=sum(pair.answer["fits"] for pair in oom),
        ran=len(ran),
        false_full=sum(not pair.answer["fits"] for pair in ran),
    )


# ---- leaving a set out ----


@dataclass(slots=True)
class Known:
    """A row that was understood and whose operations are made: neither depends on a constant."""

    row: Row
    case: rows.Case
    works: Any

    def answer(self, constants: Mapping[str, float], learnt: Mapping[str, Any]) -> dict[str, Any]:
        """As predict.predict, with an interval of other residuals; without memory, which no time depends on."""
        step_s = estimates.timed(self.works, self.case.workload, self.case.cluster, constants).step_s
        beyond = interval.beyond(self.case.workload, self.case.cluster, learnt["domain"])
        wide = math.exp(interval.width(interval.group(self.case.workload, self.case.cluster), len(beyond), learnt))
        return dict.fromkeys(predict.NUMBERS) | {"step_time_s": step_s, "low_s": step_s / wide, "high_s": step_s * wide, "refused": None}


def understood(found: Iterable[Row]) -> list[Known]:
    """Rows that tell a time and can be expressed, with their operations."""
    kept = []
    for row in found:
        if seconds_of(row) is None:
            continue
        try:
            case = rows.parse(row)
            kept.append(Known(row, case, operations.works(case.workload)))
        except (rows.Refused, GigatrainError):
            continue
    return kept


def folds() -> dict[str, dict[str, float]]:
    """By set: the constants that were fitted without it."""
    return json.loads(FOLDS.read_text(encoding="utf-8"))["folds"]


def refit(say: Callable[[str], None]) -> None:
    """Fits the constants without each set in turn, and keeps them in data/folds.json."""
    import plan_fit  # needs numpy

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (*measured(), *further())), encoding="utf-8")
        found, _ = plan_fit.read([path])
    made: dict[str, dict[str, float]] = {}
    for name in sorted({row.set for row in found}):
        fitted = plan_fit.fit(plan_fit.thinned([row for row in found if row.set != name]), ITERATIONS)
        made[name] = {key: float(f"{value:.5g}") for key, value in sorted(fitted.items()) if value != PRIORS[key]}
        say(plan_fit.line(name, plan_fit.score([row for row in found if row.set == name], fitted)))
    FOLDS.write_text(json.dumps({"of": provenance(), "folds": made}, indent=0) + "\n", encoding="utf-8")


def residuals(known: Sequence[Known], by_set: Mapping[str, Mapping[str, float]]) -> list[interval.Residual]:
    """Each row's log error by the constants that were fitted without its set."""
    found = []
    for one in known:
        step_s = estimates.timed(one.works, one.case.workload, one.case.cluster, dict(PRIORS) | dict(by_set[one.case.set])).step_s
        found.append(
            interval.Residual(
                one.case.set, interval.group(one.case.workload, one.case.cluster), math.log((seconds_of(one.row) or 0.0) / step_s)
            )
        )
    return found


def left_out(known: Sequence[Known], by_set: Mapping[str, Mapping[str, float]], say: Callable[[str], None] = lambda _: None) -> list[Pair]:
    """Every row answered by what was learnt without its set: constants, widths of intervals and domain."""
    errors = residuals(known, by_set)
    pairs: list[Pair] = []
    for name in sorted({one.case.set for one in known}):
        others = [one for one in known if one.case.set != name]
        learnt = {
            "widths": interval.learn(error for error in errors if error.source != name),
            "domain": interval.domain((one.case.workload, one.case.cluster) for one in others),
        }
        constants = dict(PRIORS) | dict(by_set[name])
        pairs += [Pair(one.row, one.answer(constants, learnt)) for one in known if one.case.set == name]
        say(name)
    return pairs


def learn_intervals(known: Sequence[Known], by_set: Mapping[str, Mapping[str, float]]) -> None:
    """Writes the product's interval.json from all sets' residuals."""
    widths = interval.learn(residuals(known, by_set))
    learnt = {
        "of": provenance(),
        "widths": {key: float(f"{value:.4g}") for key, value in widths.items()},
        "memory": plan_memory.learnt(plan_memory.peaks([*measured(), *further()])),
        "domain": interval.domain((one.case.workload, one.case.cluster) for one in known),
    }
    interval.LEARNT.write_text(json.dumps(learnt, indent=1) + "\n", encoding="utf-8")


def provenance() -> dict[str, str]:
    asked = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": asked.stdout.strip(), "python": python_version()}


# ---- tables ----

COLUMNS = ("rows", "median", "mean", "p90", "bias", "covered", "width")


def as_csv(found: Mapping[str, Score], of: Mapping[str, str]) -> str:
    out = io.StringIO()
    written = csv.writer(out, lineterminator="\n")
    written.writerow(["group", *COLUMNS, *of])
    for name, one in found.items():
        written.writerow([name, one.rows, *(f"{getattr(one, column):.4f}" for column in COLUMNS[1:]), *of.values()])
    return out.getvalue()


def as_table(found: Iterable[Mapping[str, str]]) -> str:
    """The rows of a results file as Markdown."""
    lines = ["| rows of | n | median | mean | P90 | bias | within interval | high / low |", "|---|---|---|---|---|---|---|---|"]
    for row in found:
        shares = [f"{float(row[column]):.1%}" for column in ("median", "mean", "p90")]
        lines.append(
            f"| {row['group']} | {row['rows']} | {' | '.join(shares)} | {float(row['bias']):+.1%} | {float(row['covered']):.0%} | {float(row['width']):.2f} |"
        )
    return "\n".join(lines)


def stored(name: str) -> list[dict[str, str]]:
    """A results file, by rows."""
    with (RESULTS / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def sentences(pairs: Sequence[Pair]) -> str:
    """Intervals, ranking, memory and refusals in words."""
    said = []
    by_set: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.error is not None:
            by_set[str(pair.row.get("set"))].append(pair)
    if by_set:
        held = sum(sum(pair.covered for pair in found) / len(found) for found in by_set.values()) / len(by_set)
        said.append(f"Each of {len(by_set)} sets counting alike, intervals hold {held:.0%} of rows.")
    if found := ranking(pairs):
        said.append(
            f"Ranking of {found.layouts} layouts in {found.groups} groups: tau {found.tau:.2f}; the one predicted fastest is {found.regret:.1%} "
            f"(median) and {found.regret_p90:.1%} (P90) slower than the fastest; the best of five {found.regret_of_five:.1%} (P90)."
        )
    if kept := memory(pairs):
        if kept.rows:
            said.append(f"Memory of {kept.rows} rows: median error {kept.median:.1%}, P90 {kept.p90:.1%}, bias {kept.bias:+.1%}.")
        said.append(
            f"Of {kept.oom} rows that ran out of memory, {kept.false_fits} are said to fit; of {kept.ran} that ran, {kept.false_full} are said not to."
        )
    refused = [pair for pair in pairs if pair.answer["refused"] is not None]
    said.append(f"Refused: {len(refused)} of {len(pairs)} rows.")
    return "\n".join(said)


def marked(page: str, name: str, text: str) -> str:
    """`page` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: written by benchmarks/plan.py --write -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def between(page: str, name: str) -> str:
    return page.split(f"<!-- {name}: written by benchmarks/plan.py --write -->\n")[1].split(f"\n<!-- {name}: end -->", maxsplit=1)[0]


def write(say: Callable[[str], None]) -> None:
    """Intervals, results and the page, from the stored folds."""
    known, by_set, of = understood([*measured(), *further()]), folds(), provenance()
    learn_intervals(known, by_set)
    interval._learnt.cache_clear()
    ten = {row["set"] for row in measured()}
    pairs = left_out(known, by_set, say)
    loso, others = ([pair for pair in pairs if (pair.row["set"] in ten) == inside] for inside in (True, False))
    (RESULTS / "plan_loso.csv").write_text(as_csv(scores(loso) | checked(loso), of), encoding="utf-8")
    (RESULTS / "plan_further.csv").write_text(as_csv(scores(others), of), encoding="utf-8")
    held = [Pair(row, predict.predict(row)) for row in measured() if row.get("peak_mem")]
    page = PAGE.read_text(encoding="utf-8")
    page = marked(page, "left out", as_table(row for row in stored("plan_loso.csv") if row["group"] != CHECKED))
    page = marked(
        page,
        "left out, in words",
        sentences(loso) + "\n" + next(line for line in sentences(held).splitlines() if line.startswith("Memory")),
    )
    page = marked(page, "memory, in words", plan_memory.sentence(plan_memory.peaks([*measured(), *further()])))
    page = marked(page, "further", as_table(stored("plan_further.csv")))
    kept = [Pair(row, predict.predict(row)) for row in further()]
    of_memory = [line for line in sentences(kept).splitlines() if line.startswith(("Memory", "Of "))]
    page = marked(page, "further, in words", "\n".join([sentences(others), *of_memory]))
    PAGE.write_text(page, encoding="utf-8")


CHECKED = f"checked by CI: {SAMPLED} of a set"


def few(found: Iterable[Row]) -> list[Row]:
    """The rows of every set that a test may afford."""
    by_set: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        if seconds_of(row) is not None:
            by_set[row["set"]].append(row)
    return [row for name in sorted(by_set) for row in sampled(by_set[name], SAMPLED)]


def checked(pairs: Sequence[Pair]) -> dict[str, Score]:
    """The score of those rows: a test answers them again, so that a model that got worse fails."""
    kept = {row["id"] for row in few(pair.row for pair in pairs)}
    found = score(pair for pair in pairs if pair.row["id"] in kept)
    return {CHECKED: found} if found else {}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", help="measurements, one JSON object a line; or `measured` or `further`")
    parser.add_argument("--predictions", type=Path, help="answers to them, of gigatrain plan --predict")
    parser.add_argument("--leave-one-out", action="store_true", help="refit the constants without each set in turn")
    parser.add_argument("--write", action="store_true", help="intervals, results and PLANNER.md, from the stored folds")
    parser.add_argument("--json", action="store_true", help="scores as JSON")
    asked = parser.parse_args(words)
    if not (asked.rows or asked.leave_one_out or asked.write):
        parser.error(
            "nothing is asked: a file of measurements, `measured` or `further` is scored; --write makes the tables of PLANNER.md again"
        )

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if asked.leave_one_out:
        refit(say)
    if asked.write:
        write(say)
    if not asked.rows:
        return 0
    found = {"measured": measured, "further": further}[asked.rows]() if asked.rows in ("measured", "further") else read(Path(asked.rows))
    if asked.predictions:
        answers = {answer["id"]: answer for answer in read(asked.predictions)}
        lacking = [row["id"] for row in found if row.get("id") not in answers]
        if lacking:
            say(f"{asked.predictions} answers {len(lacking)} of {len(found)} rows not, {lacking[0]!r} the first")
            return 4
        pairs = [Pair(row, answers[row["id"]]) for row in found]
    else:
        pairs = [Pair(row, predict.predict(row, constants=VALUES)) for row in found]
    by_group = scores(pairs)
    if asked.json:
        print(json.dumps({name: {column: getattr(one, column) for column in COLUMNS} for name, one in by_group.items()}, indent=1))
    else:
        print(as_table(csv.DictReader(io.StringIO(as_csv(by_group, {})))))
        print(sentences(pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
