"""The page: what collect.py found, as one HTML file that needs nothing beside it and runs no script.

Curves are SVG that is stretched to its place, and their words are HTML over it: text keeps its size on a telephone, on a wide screen and on paper. Every
curve has a table of its numbers behind it, no two differ by colour alone, and colours come in a light and a dark set (PALETTE), whose contrast tests hold.
Every text that a file gave goes through `_e`, and the page's own policy forbids scripts and the network even if one did not.
"""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gigatrain.observe import logs, watch
from gigatrain.observe.report.collect import DRIFT, finite, letters, names
from gigatrain.power.reading import BOUNDARIES

Value = Mapping[str, Any]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TONES = 6  # colours of curves
DASHES = 5  # their patterns: 30 runs before two look alike
WORDS = {"device": "accelerators", "node": "nodes", "it": "IT", "facility": "facility"}
LAYERS = {"device": "accelerators", "node": "rest of nodes", "it": "fabric, storage", "facility": "cooling, losses"}
CLASSES = {
    "training": "steps that were kept",
    "redone": "steps that a restart did again",
    "validation": "evaluation",
    "checkpoint": "saving",
    "starting": "from a process's begin to its first step",
    "stopped": "nobody had the run",
    "other": "what nothing else explains",
}
PALETTE = {
    "light": {
        "bg": "#f6f6f3", "card": "#ffffff", "ink": "#1a1d21", "muted": "#596069", "rule": "#e2e3df", "edge": "#858c94",
        "t0": "#0f5c9c", "t1": "#9a4d00", "t2": "#0b7261", "t3": "#84408f", "t4": "#4d5660", "t5": "#a3263e",
        "warn": "#7d4300", "warnbg": "#fcefd9",
    },
    "dark": {
        "bg": "#111316", "card": "#191c20", "ink": "#eceef0", "muted": "#a6aeb8", "rule": "#2d3238", "edge": "#7b848e",
        "t0": "#7db7ef", "t1": "#e6a35c", "t2": "#5cc4b0", "t3": "#d09ada", "t4": "#b3bcc6", "t5": "#f08c9c",
        "warn": "#f4c584", "warnbg": "#33260e",
    },
}  # fmt: skip
_HIDDEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")  # what turns or hides the words around it
_CSS = """\
:root{color-scheme:light dark;%(light)s}
@media (prefers-color-scheme:dark){:root{%(dark)s}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%%;text-size-adjust:100%%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 28px}
header{padding-top:40px}
footer{padding-top:8px;padding-bottom:40px;color:var(--muted);font-size:13px}
h1{font-size:32px;line-height:1.15;letter-spacing:-.02em;margin:0 0 6px;font-weight:650}
h2{font-size:24px;line-height:1.2;letter-spacing:-.015em;margin:52px 0 4px;font-weight:650}
h3{font-size:15px;line-height:1.35;margin:0 0 2px;font-weight:650}
p{margin:0 0 8px}
a{color:var(--t0)}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--t0);outline-offset:3px;border-radius:3px}
.quiet{color:var(--muted)}
.small{font-size:13px}
.state{display:inline-block;font-size:13px;font-weight:600;border:1.5px solid currentColor;border-radius:99px;padding:1px 11px;margin-right:8px}
.good{color:var(--t2)}.bad{color:var(--t5)}.warn{color:var(--warn)}
.short{margin:18px 0 0;padding:0 0 0 18px;max-width:80ch}
.short li{margin:3px 0}
.tiles{display:grid;grid-template-columns:repeat(5,minmax(0,1fr));gap:1px;margin:26px 0 20px;background:var(--rule);border:1px solid var(--rule);
border-radius:12px;overflow:hidden}
.tile{background:var(--card);padding:16px 18px 14px;min-width:0}
.tile.hero{grid-column:span 2}
.tile dt{font-size:13px;color:var(--muted)}
.tile dd{margin:0}
.tile .v{font-size:25px;line-height:1.3;font-weight:620;letter-spacing:-.015em}
.tile.hero .v{font-size:42px;line-height:1.12;letter-spacing:-.03em;color:var(--t2)}
.tile .v.un,.tile.hero .v.un{font-size:20px;line-height:1.6;font-weight:500;letter-spacing:0;color:var(--muted)}
.tile .n{font-size:12.5px;line-height:1.4;color:var(--muted)}
.unit{font-size:.58em;font-weight:500;letter-spacing:0;color:var(--muted);margin-left:.28em}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:20px;margin-bottom:20px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:20px 22px 16px;margin:0;min-width:0}
.wide{grid-column:1/-1}
.card>p,.card figcaption p{color:var(--muted);font-size:13px;margin:0 0 12px;max-width:90ch}
.card figcaption p+p{margin-top:-8px}
.chart{position:relative;height:220px;margin:16px 104px 42px 52px}
.chart.bare{margin-right:14px}
.chart svg{position:absolute;inset:0;width:100%%;height:100%%;overflow:visible;display:block}
.chart span{position:absolute;font-size:12px;line-height:1.2;white-space:nowrap;color:var(--muted)}
.ty{right:100%%;transform:translateY(-50%%);padding-right:8px}
.tx{top:100%%;transform:translateX(-50%%);padding-top:7px}
.xl{top:100%%;right:0;padding-top:24px}
.yl{bottom:100%%;left:-44px;padding-bottom:8px}
.chart .lb{left:100%%;transform:translateY(-50%%);padding-left:9px;font-weight:600;line-height:1.15;white-space:normal;width:108px}
.mk{top:-7px;bottom:0;width:0;border-left:1px dashed var(--edge)}
.mk i{position:absolute;top:-13px;left:-6px;font-style:normal}
.gap{top:0;bottom:0;background:repeating-linear-gradient(135deg,transparent 0 5px,var(--rule) 5px 7px);min-width:1px;
print-color-adjust:exact;-webkit-print-color-adjust:exact;overflow:hidden;display:flex;align-items:center;justify-content:center}
.pc{top:0;transform:translate(4px,-2px);font-weight:600}
path,line,rect{vector-effect:non-scaling-stroke}
.gl{stroke:var(--rule);stroke-width:1;fill:none}.zl{stroke:var(--edge);stroke-width:1;fill:none}
.cv{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dt{fill:none;stroke-width:8;stroke-linecap:round}
.ar{stroke:var(--card);stroke-width:1.5;fill-opacity:.82}
.pl{fill:none;stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 5}
%(tones)s
.d1{stroke-dasharray:8 5}.d2{stroke-dasharray:2 5}.d3{stroke-dasharray:10 4 2 4}.d4{stroke-dasharray:16 5}
table{border-collapse:collapse;width:100%%;font-size:14px}
caption{text-align:left;color:var(--muted);font-size:13px;padding-bottom:6px}
th{text-align:left;font-weight:600}
thead th{font-size:12.5px;font-weight:500;color:var(--muted);vertical-align:bottom;border-bottom:1px solid var(--edge)}
td,th{padding:7px 14px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child>td,tr:last-child>th[scope=row]{border-bottom:0}
td:last-child,th:last-child{padding-right:0}
.r{text-align:right;white-space:nowrap}
td.un{color:var(--muted);white-space:normal}
td .n{display:block;font-size:12.5px;color:var(--muted);white-space:normal}
.scroll{overflow-x:auto}
.scroll table{min-width:640px}
.bars td{white-space:nowrap}
.bars th{font-weight:500;white-space:nowrap;width:1%%}
.bars th small{display:block;color:var(--muted);font-weight:400;font-size:12.5px;white-space:normal;min-width:11em}
.bars .b{width:99%%;min-width:70px;vertical-align:middle}
.bars svg{display:block;width:100%%;height:14px}
.mark{display:inline-block;background:var(--warnbg);color:var(--warn);font-weight:600;border-radius:4px;padding:0 7px}
.kv{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 18px;margin:0;font-size:14px}
.kv dt{color:var(--muted)}
.kv dd{margin:0}
details{margin-top:4px;font-size:13px;color:var(--muted)}
summary{cursor:pointer;width:max-content;max-width:100%%}
details table{font-size:13px;margin-top:8px;color:var(--ink)}
pre{white-space:pre-wrap;font:13px/1.45 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace;margin:6px 0 0}
.alarm{border-left:4px solid var(--t5);background:var(--card);padding:14px 18px;margin:20px 0 0;border-radius:0 10px 10px 0}
.key{display:inline-block;width:34px;height:10px;vertical-align:middle;margin-right:6px}
nav ul{list-style:none;margin:14px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px}
.section{scroll-margin-top:12px}
@media (max-width:1000px){.tiles{grid-template-columns:repeat(3,minmax(0,1fr))}.tile.hero{grid-column:1/-1}.tile:last-child:nth-child(3n){grid-column:span 2}}
@media (max-width:820px){.grid{grid-template-columns:minmax(0,1fr)}}
@media (max-width:560px){main,header,footer{padding-left:14px;padding-right:14px}header{padding-top:24px}h1{font-size:26px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tile{padding:12px 13px 11px}.tile .v{font-size:21px}.tile.hero .v{font-size:34px}
.tile:last-child:nth-child(3n){grid-column:auto}
.card{padding:16px 14px 12px}.chart{height:190px;margin-left:44px;margin-right:84px}.chart .lb{width:86px}.chart.bare{margin-right:10px}.chart span{font-size:11.5px}
.bars th small{min-width:0}.bars td,.bars th{padding-right:9px}.bars th{white-space:normal}.bars .b{min-width:48px}.kv{grid-template-columns:minmax(0,1fr)}.kv dd{margin-bottom:6px}}
@media print{:root{color-scheme:light;%(light)s}@page{size:A4;margin:14mm 12mm}body{background:#fff;font-size:10.5pt}
main,header,footer{max-width:none;padding-left:0;padding-right:0}header{padding-top:0}details{display:none}
.card,.tiles,.alarm,tr,li{break-inside:avoid}h2,h3,figcaption,thead{break-after:avoid}.run+.run{break-before:page}
.tiles{grid-template-columns:repeat(5,minmax(0,1fr))}.tile.hero{grid-column:span 2}.tile{padding:8px 10px}.tile .v{font-size:15pt}.tile.hero .v{font-size:24pt}
.grid{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px;margin-bottom:10px}.card{padding:12px}.chart{height:150px;margin-left:44px;margin-right:92px}
.scroll{overflow:visible}.scroll table{min-width:0}table{font-size:9.5pt}svg,.mark,.gap{print-color-adjust:exact;-webkit-print-color-adjust:exact}nav{display:none}}
"""


def page(values: Sequence[Value]) -> str:
    """The whole file, of one run or of several side by side."""
    if not values:
        raise ValueError("a page is of a run")
    several, called = len(values) > 1, names(values)
    title = f"{len(values)} runs side by side" if several else f"{values[0]['run']['name']}"
    parts = []
    if several:
        parts.append(f"<header><h1>{_e(title)}</h1><p class=quiet>{_e(', '.join(called[:12]))}</p>{_index(called)}</header><main>")
        parts.append(_comparison(values, called))
    else:
        parts.append(f"<header>{_head(values[0], 'h1', title)}</header><main>")
    for at, value in enumerate(values):
        head = f"<div class=section id=run-{at}>{_head(value, 'h2', called[at])}</div>" if several else ""
        parts.append(
            f"<section class=run aria-label={_q(called[at] if several else title)}>{head}{_body(value, 'h3' if several else 'h2')}</section>"
        )
    made = f"Made by gigatrain report at {values[0]['collected']} from the run's own files. Unknown is said to be unknown. Curves are thinned to each stretch's lowest and highest."
    style = _CSS % {
        "light": _variables("light"),
        "dark": _variables("dark"),
        "tones": "".join(
            f".c{at}{{stroke:var(--t{at})}}.f{at}{{fill:var(--t{at})}}.chart .x{at}{{color:var(--t{at})}}" for at in range(TONES)
        ),
    }
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{_e(title)} | gigatrain report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n</main>\n<footer><p>{_e(made)}</p></footer>\n</body>\n</html>\n"
    )


def _variables(mode: str) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in PALETTE[mode].items())


def _e(text: Any, most: int = 600) -> str:
    """A text as HTML: escaped, without control characters, and not longer than anybody reads."""
    shown = _HIDDEN.sub("", logs.printable(str(text))).encode("utf-8", "replace").decode("utf-8")
    return html.escape(shown if len(shown) <= most else shown[: most - 1] + "…", quote=True)


def _q(text: Any) -> str:
    """An attribute's value with its quotes."""
    return f'"{_e(text)}"'


# Numbers as people read them.


def number(value: float, digits: int = 4) -> str:
    """1,234,567 and 0.0123; millions and above by a letter."""
    size = abs(value)
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{_digits(value / limit, digits)} {letter}"
    return _digits(value, digits)


def _digits(value: float, digits: int) -> str:
    size = abs(value)
    if size and size < 1e-4:
        power = math.floor(math.log10(size))
        return f"{value / 10**power:.{digits - 3}f} × 10^{power}"
    if size >= 10 ** (digits - 1) or value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, digits - 1 - (math.floor(math.log10(size)) if size else 0))}f}"


def scaled(value: float, unit: str, digits: int = 3) -> tuple[str, str]:
    """A number and its unit, larger or smaller by thousands: (`1.23`, `kW`)."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return _digits(value / factor, digits), letter + unit
    return _digits(value, digits), unit


def _energy(joules: float) -> tuple[str, str]:
    return scaled(joules / 3600, "Wh")


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**27 else f"{count / 2**20:,.1f} MiB"


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else watch.span(seconds)


def _per_cent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _provenance(shares: Any) -> str:
    """71 % measured, 29 % estimated; whole per cents, and never 0 for what is there."""
    if not isinstance(shares, Mapping) or not shares:
        return "provenance unknown"
    known = {kind: share for kind, said in shares.items() if (share := finite(said))}
    return (
        ", ".join(f"{'< 1' if share < 0.005 else f'{share * 100:.0f}'} % {kind}" for kind, share in known.items()) or "provenance unknown"
    )


# The parts of the page.


def _index(called: Sequence[str]) -> str:
    return (
        f"<nav aria-label=Runs><ul>{''.join(f'<li><a href=#run-{at}>{_e(name, 80)}</a></li>' for at, name in enumerate(called))}</ul></nav>"
    )


def _head(value: Value, tag: str, title: str) -> str:
    run = value["run"]
    tone = {"finished": "good", "running": "good", "silent": "bad", "ended": "warn"}.get(run["state"], "quiet")
    state = f"ended: {run['why']}" if run["state"] == "ended" and run["why"] else run["state"]
    count = f"{run['ranks']:,} rank{'s' * (run['ranks'] != 1)}" if run["ranks"] else ""
    where = ", ".join(
        text for text in (f"on {run['site']}" if run["site"] else "", count, f"begun {run['began']}" if run["began"] else "") if text
    )
    what = f"<p>{_e(run['summary'])}</p>" if run["summary"] else ""
    alarm = (
        f"<div class=alarm role=note><strong class=bad>Why it failed</strong><pre>{_e(run['failure'], 4000)}</pre></div>"
        if run["failure"]
        else ""
    )
    short = "".join(f"<li>{text}</li>" for text in _short(value))
    return f"<{tag}>{_e(title, 200)}</{tag}>{what}<p class=quiet><span class='state {tone}'>{_e(state, 200)}</span>{_e(where)}</p>{alarm}<ul class=short>{short}</ul>"


def _short(value: Value) -> list[str]:
    """What to know before anything else, as HTML."""
    said, run, goodput, energy = [], value["run"], value["goodput"], value["energy"]
    if run["step"] is not None and run["steps"]:
        said.append(f"{run['step']:,} of {run['steps']:,} steps ({_per_cent(run['step'] / run['steps'])}).")
    if "share" in goodput:
        lost = {name: spent for name, spent in goodput["seconds"].items() if name != "training"}
        most = max(lost, key=lambda name: lost[name])
        share = f"{_per_cent(goodput['share'])} of {_span(goodput['wall_s'])} of wall-clock went into steps that were kept"
        said.append(
            share
            + (f"; most of the rest was {most}, {_span(lost[most])} ({_per_cent(lost[most] / goodput['wall_s'])})." if lost[most] else ".")
        )
    if value["restarts"]:
        count = len(value["restarts"])
        redone = goodput.get("seconds", {}).get("redone")
        again = f"; {_span(redone)} of steps were done again" if redone else ""
        said.append(f"{count} restart{'s' * (count > 1)}{again}. The last: {_e(value['restarts'][-1]['why'], 200)}.")
    for name, what in (("capped_share", "the power limit"), ("thermal_share", "heat")):
        if (share := finite(energy.get(name))) is not None and share >= 0.01:
            said.append(f"Clocks were held down by {what} {_per_cent(share)} of the time.")
    for row in value["plan"]["rows"]:
        if row["drifted"]:
            said.append(
                f"<span class=mark>drift {row['drift'] * 100:+.0f} %</span> {_e(row['what'])}: {_amount(row['actual']['value'], row['unit'])}, planned {_amount(row['planned']['value'], row['unit'])}."
            )
    if value["refused_steps"]:
        said.append(f"{value['refused_steps']:,} updates were refused: they were not finite.")
    said += [f"Missing: {_e(text)}." for text in value["missing"]]
    return said


def _tile(name: str, figure: Value, shown: Callable[[float], tuple[str, str]], note: str = "", hero: bool = False) -> str:
    kind = "tile hero" if hero else "tile"
    if figure["value"] is None:
        return f"<div class='{kind}'><dt>{_e(name)}</dt><dd class='v un'>unknown</dd><dd class=n>{_e(figure['unknown'], 160)}</dd></div>"
    text, unit = shown(figure["value"])
    after = f"<span class=unit>{_e(unit)}</span>" if unit else ""
    note = note or figure.get("note", "")
    return f"<div class='{kind}'><dt>{_e(name)}</dt><dd class=v>{_e(text)}{after}</dd><dd class=n>{_e(note, 240)}</dd></div>"


def _tiles(value: Value) -> str:
    """The headline: what the run came to, in ten figures."""
    head = value["headline"]
    speed = head["tokens_per_s_mw"]
    notes = []
    if speed["value"] is not None:
        low, high = speed.get("low"), speed.get("high")
        notes.append(f"at the {WORDS.get(speed.get('boundary'), 'unknown boundary')} boundary")
        notes.append(f"between {number(low)} and {number(high)}" if low is not None and high is not None else "bounds unknown")
        notes.append(_provenance(speed.get("provenance")))
        notes += [speed["why"]] if speed.get("why") else []
    spent = head["mwh"]
    boundary = WORDS.get(spent.get("boundary"), "")
    shares = _provenance(spent.get("provenance"))
    loss = (
        f"validation {head['val_loss']['value']:.4f}"
        if head["val_loss"]["value"] is not None
        else f"validation unknown: {head['val_loss']['unknown']}"
    )
    wall = f"of {_span(head['wall_s']['value'])} wall-clock" if head["wall_s"]["value"] is not None else ""
    tiles = [
        _tile("Tokens/s per MW", speed, lambda it: (number(it), ""), "; ".join(notes), hero=True),
        _tile("Loss", head["loss"], lambda it: (f"{it:.4f}", ""), loss),
        _tile("Tokens, retained", head["tokens"], lambda it: (number(it), "")),
        _tile("Tokens/s", head["tokens_per_s"], lambda it: (number(it), "")),
        _tile("MFU", head["mfu"], lambda it: (f"{it * 100:.1f}", "%")),
        _tile("Goodput", head["goodput"], lambda it: (f"{it * 100:.1f}", "%"), wall),
        _tile("Energy", spent, lambda it: _energy(it * 3.6e9), f"{boundary}; {shares}"),
        _tile("Cost", head["eur"], lambda it: (number(it), "€"), f"energy of the {boundary}; {shares}"),
        _tile("Carbon", head["kg_co2e"], lambda it: (number(it), "kg CO2e"), f"energy of the {boundary}; {shares}"),
    ]
    return f"<dl class=tiles>{''.join(tiles)}</dl>"


def _body(value: Value, tag: str) -> str:
    restarts = [(one["step"], "restart") for one in value["restarts"] if one["step"] is not None]
    again = [
        (one["time_s"] - value["run"]["began_s"], "restart")
        for one in value["restarts"]
        if one["time_s"] is not None and value["run"]["began_s"] is not None
    ]
    marks = " ↻ marks a restart." if value["restarts"] else ""
    mfu = value["mfu_per_token_per_s"]
    flops = (
        f" MFU {_per_cent(value['headline']['mfu']['value'])} of dense bf16 in the mean."
        if mfu
        else f" MFU unknown: {value['headline']['mfu'].get('unknown', '')}."
    )
    cards = [
        _lines(
            tag, "Loss", f"Mean of each window, and of each validation (dots).{marks}",
            [_curve("training", value["curves"]["loss"], 0, 0), _curve("validation", value["curves"]["val_loss"], 1, 1, dots=True)],
            "step", shown=lambda it: f"{it:.4g}", marks=restarts, empty="no window with a loss yet",
        ),
        _lines(
            tag, "Speed", f"Tokens a second while it trained.{flops}{marks}", [_curve("tokens/s", value["curves"]["tokens_per_s"], 0, 0)],
            "step", zero=True, marks=restarts, empty="no window with a speed yet",
        ),
        _stack(tag, value, again, marks),
        _efficiency(tag, value, again, marks),
        _table_of_energy(tag, value),
        _waterfall(tag, value),
        _phases(tag, value),
        _step_times(tag, value),
        _restarts(tag, value),
        _plan(tag, value),
        _memory(tag, value),
        _joules(tag, value),
        _sources(tag, value),
        _pairs(tag, "Recipe", "Main settings, as the plan has them.", value["settings"], "plan.json is not there"),
        _identity(tag, value),
    ]  # fmt: skip
    return f"{_tiles(value)}<div class=grid>{''.join(cards)}</div>"


def _card(tag: str, title: str, text: str, inside: str, wide: bool = False) -> str:
    note = f"<p>{text}</p>" if text else ""
    return f"<section class='card{' wide' if wide else ''}' aria-label={_q(title)}><{tag}{_small(tag)}>{_e(title)}</{tag}>{note}{inside}</section>"


def _small(tag: str) -> str:
    """The size of a card's heading is the same, whatever its level."""
    return ' style="font-size:15px;line-height:1.35;letter-spacing:0;margin:0 0 2px"' if tag == "h2" else ""


def _lacking(tag: str, title: str, why: str) -> str:
    return _card(tag, title, f"unknown: {_e(why)}", "")


# Curves.


def _curve(
    name: str, points: Sequence[Sequence[float | None]], tone: int, dash: int, *, dots: bool = False, label: str | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "points": points,
        "tone": tone % TONES,
        "dash": dash % DASHES,
        "dots": dots,
        "label": name if label is None else label,
    }


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that hold both between the first and the last."""
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), low + (abs(low) * 0.05 or 0.5)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [at * step for at in range(first, max(last, first + 1) + 1)]


def _path(points: Sequence[Sequence[float | None]], place: Callable[[float, float], tuple[float, float]]) -> str:
    """Of a curve; a point without a height parts it, and one that stands alone is a dot."""
    found, pen = [], False
    for at, (x, y) in enumerate(points):
        if x is None or y is None:
            pen = False
            continue
        left, top = place(x, y)
        found.append(f"{'L' if pen else 'M'}{left:.5g} {top:.5g}")
        if not pen and (at + 1 == len(points) or points[at + 1][1] is None):
            found.append("h.01")
        pen = True
    return "".join(found)


def _apart(heights: Sequence[float], least: float = 9.0) -> list[float]:
    """Places of labels, in per cent from above, moved as little as keeps them from covering each other."""
    order = sorted(range(len(heights)), key=lambda at: heights[at])
    placed = list(heights)
    for before, after in zip(order, order[1:], strict=False):
        placed[after] = max(placed[after], placed[before] + least)
    over = placed[order[-1]] - 100 if order else 0.0
    if over > 0:
        limit = 100.0
        for at in reversed(order):
            placed[at] = min(placed[at], limit)
            limit = placed[at] - least
    return placed


def _frame(
    label: str,
    x: tuple[float, float],
    heights: Sequence[float],
    inside: str,
    *,
    x_label: str,
    y_label: str = "",
    x_shown: Callable[[float], str],
    y_shown: Callable[[float], str],
    labels: Sequence[tuple[float, str, int | None]] = (),
    marks: Sequence[tuple[float, str]] = (),
    gaps: Sequence[tuple[float, float]] = (),
) -> str:
    """Axes, their words and marks about what is drawn in 1,000 by 1,000; `labels`: per cent from above, text, tone."""
    low, high = heights[0], heights[-1]
    grid = "".join(
        f"<path class={'zl' if at == 0 else 'gl'} d='M0 {1000 - 1000 * (tick - low) / (high - low):.5g}h1000'/>"
        for at, tick in enumerate(heights)
    )
    words = [f"<span class=ty style='top:{100 - 100 * (tick - low) / (high - low):.4g}%'>{_e(y_shown(tick))}</span>" for tick in heights]
    begin, end = x
    wide = end - begin or 1.0
    words += [
        f"<span class=tx style='left:{100 * (tick - begin) / wide:.4g}%'>{_e(x_shown(tick))}</span>"
        for tick in ticks(begin, end, 4)
        if begin - 1e-9 * wide <= tick <= end + 1e-9 * wide
    ]
    words.append(f"<span class=xl>{_e(x_label)}</span>")
    words += [f"<span class=yl>{_e(y_label)}</span>"] if y_label else []
    for left, right in gaps:
        share = 100 * (right - left) / wide
        said = "no reading" if share > 16 else ""
        words.append(f"<span class=gap style='left:{100 * (left - begin) / wide:.4g}%;width:{share:.4g}%'>{said}</span>")
    words += [f"<span class=mk style='left:{100 * (at - begin) / wide:.4g}%'><i>↻</i></span>" for at, _ in marks[:40] if begin <= at <= end]
    for top, (_, text, tone) in zip(_apart([top for top, _, _ in labels]), labels, strict=True):
        words.append(f"<span class='lb{'' if tone is None else f' x{tone}'}' style='top:{top:.4g}%'>{_e(text, 60)}</span>")
    svg = f'<svg role="img" aria-label={_q(label)} viewBox="0 0 1000 1000" preserveAspectRatio="none" focusable="false"><title>{_e(label)}</title>{grid}{inside}</svg>'
    return f"<div class='chart{'' if labels else ' bare'}'>{svg}<div aria-hidden=true>{''.join(words)}</div></div>"


def _lines(
    tag: str,
    title: str,
    text: str,
    curves: Sequence[dict[str, Any]],
    x_label: str,
    *,
    zero: bool = False,
    shown: Callable[[float], str] = number,
    x_shown: Callable[[float], str] = number,
    marks: Sequence[tuple[float, str]] = (),
    planned: tuple[float, str] | None = None,
    gaps: Sequence[tuple[float, float]] = (),
    empty: str = "nothing to draw",
    wide: bool = False,
) -> str:
    """A card with curves over steps or time, each with its name and last number at its end."""
    curves = [curve for curve in curves if any(y is not None for _, y in curve["points"])]
    if not curves:
        return _lacking(tag, title, empty)
    xs = [x for curve in curves for x, _ in curve["points"] if x is not None]
    ys = [y for curve in curves for _, y in curve["points"] if y is not None] + ([planned[0]] if planned else [])
    heights = ticks(min(0.0, *ys) if zero else min(ys), max(ys))
    begin, end, low, high = min(xs), max(xs), heights[0], heights[-1]
    begin = 0.0 if begin > 0 and begin < 0.2 * end else begin
    wide_x, wide_y = end - begin or 1.0, high - low

    def place(x: float, y: float) -> tuple[float, float]:
        return 1000 * (x - begin) / wide_x, 1000 - 1000 * (y - low) / wide_y

    drawn, labels = [], []
    for curve in curves:
        drawn.append(
            f"<path class='cv c{curve['tone']} d{curve['dash']}' d='{_path(curve['points'], place)}'><title>{_e(curve['name'])}</title></path>"
        )
        if curve["dots"] and len(curve["points"]) <= 60:
            dots = "".join(
                f"M{left:.5g} {top:.5g}h.01" for x, y in curve["points"] if x is not None and y is not None for left, top in (place(x, y),)
            )
            drawn.append(f"<path class='dt c{curve['tone']}' d='{dots}'/>")
        last = next(y for _, y in reversed(curve["points"]) if y is not None)
        labels.append((100 - 100 * (last - low) / wide_y, f"{curve['label']} {shown(last)}", curve["tone"]))
    if planned:
        drawn.append(f"<path class=pl d='M0 {1000 - 1000 * (planned[0] - low) / wide_y:.5g}h1000'/>")
        labels.append((100 - 100 * (planned[0] - low) / wide_y, planned[1], None))
    said = "; ".join(_spoken(curve, shown) for curve in curves)
    picture = _frame(
        f"{title} over {x_label}. {said}", (begin, end), heights, "".join(drawn), x_label=x_label, x_shown=x_shown, y_shown=shown, labels=labels, marks=marks, gaps=gaps
    )  # fmt: skip
    return _figure(tag, title, text, picture, _numbers(title, curves, x_label, x_shown, shown), wide)


def _spoken(curve: Mapping[str, Any], shown: Callable[[float], str]) -> str:
    ys = [y for _, y in curve["points"] if y is not None]
    return f"{curve['name']}: from {shown(ys[0])} to {shown(ys[-1])}, lowest {shown(min(ys))}, highest {shown(max(ys))}"


def _figure(tag: str, title: str, text: str, picture: str, behind: str, wide: bool = False) -> str:
    return f"<figure class='card{' wide' if wide else ''}'><figcaption><{tag}{_small(tag)}>{_e(title)}</{tag}><p>{_e(text)}</p></figcaption>{picture}{behind}</figure>"


def _numbers(
    title: str, curves: Sequence[Mapping[str, Any]], x_label: str, x_shown: Callable[[float], str], shown: Callable[[float], str]
) -> str:
    """A dozen points of each curve as a table: what the picture says, in words."""
    rows = []
    for curve in curves:
        points = [(x, y) for x, y in curve["points"] if x is not None and y is not None]
        some = points if len(points) <= 12 else [points[round(at * (len(points) - 1) / 11)] for at in range(12)]
        rows += [
            f"<tr><th scope=row>{_e(curve['name'], 80)}</th><td class=r>{_e(x_shown(x))}</td><td class=r>{_e(shown(y))}</td></tr>"
            for x, y in some
        ]
    head = f"<thead><tr><th scope=col>curve</th><th scope=col class=r>{_e(x_label)}</th><th scope=col class=r>{_e(title)}</th></tr></thead>"
    return f"<details><summary>Numbers of this picture</summary><table>{head}<tbody>{''.join(rows)}</tbody></table></details>"


def _clock(longest: float) -> tuple[float, str]:
    """Seconds of one unit, and its name, for an axis so long."""
    return next(
        ((size, name) for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")) if longest >= 3 * size), (1.0, "seconds")
    )


def _gaps(times: Sequence[float | None]) -> list[tuple[float, float]]:
    found = []
    for at, time_s in enumerate(times[1:-1], 1):
        before, after = times[at - 1], times[at + 1]
        if time_s is None and before is not None and after is not None:
            found.append((before, after))
    return found


def _stack(tag: str, value: Value, marks: Sequence[tuple[float, str]], restarts: str) -> str:
    """Watts of the boundaries upon each other; what no meter read is a gap."""
    title, watts = "Draw", value["watts"]
    there = [name for name in BOUNDARIES if any(one is not None for one in watts["watts"][name])]
    times = watts["t_s"]
    if not there:
        return _lacking(tag, title, value["headline"]["mwh"].get("unknown") or "no window has watts")
    scale, unit = _clock(max(one for one in times if one is not None))
    outer, end = there[-1], max(one for one in times if one is not None)
    begin = 0.0
    planned = watts["planned"].get(outer)
    heights = ticks(0.0, max([one for one in watts["watts"][outer] if one is not None] + ([planned] if planned else [])))
    high = heights[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return 1000 * (x - begin) / ((end - begin) or 1.0), 1000 - 1000 * y / high

    drawn, labels, inner = [], [], None
    for layer, name in enumerate(there):
        parts, top, bottom = [], [], []
        for at, time_s in enumerate([*times, None]):
            upper = watts["watts"][name][at] if time_s is not None else None
            if time_s is None or upper is None:
                if len(top) > 1:
                    parts.append("M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in (*top, *reversed(bottom))) + "Z")
                top, bottom = [], []
                continue
            lower = (watts["watts"][inner][at] or 0.0) if inner else 0.0
            top.append(place(time_s, max(upper, lower)))
            bottom.append(place(time_s, lower))
        said = LAYERS[name] if inner or name == "device" else f"{WORDS[name]}, all"
        last = max((at for at, one in enumerate(watts["watts"][name]) if one is not None), default=0)
        upper, lower = watts["watts"][name][last], (watts["watts"][inner][last] or 0.0) if inner else 0.0
        drawn.append(f"<path class='ar f{layer}' d='{''.join(parts)}'><title>{_e(said)}</title></path>")
        labels.append((100 - 100 * (upper + lower) / 2 / high, f"{said} {' '.join(scaled(max(0.0, upper - lower), 'W'))}", layer))
        inner = name
    if planned:
        drawn.append(f"<path class=pl d='M0 {1000 - 1000 * planned / high:.5g}h1000'/>")
        labels.append((100 - 100 * planned / high, f"plan {' '.join(scaled(planned, 'W'))}", None))
    curves = [
        {"name": f"{WORDS[name]}, all within", "points": [[time_s, one] for time_s, one in zip(times, watts["watts"][name], strict=True)]}
        for name in there
    ]
    show = lambda it: " ".join(scaled(it, "W"))  # noqa: E731
    said = "; ".join(_spoken(curve, show) for curve in curves)
    gaps = _gaps(times)
    picture = _frame(
        f"Watts over time, stacked by boundary. {said}. {len(gaps)} gaps", (begin, end), heights, "".join(drawn), x_label=unit, x_shown=lambda it: number(it / scale),
        y_shown=show, labels=labels, marks=marks, gaps=gaps,
    ) if scale == 1 else _scaled_frame(f"Watts over time, stacked by boundary. {said}. {len(gaps)} gaps", (begin, end), heights, "".join(drawn), scale, unit, show, labels, marks, gaps)  # fmt: skip
    lacking = [f"{WORDS[name]} unknown: {_said(value, name)}" for name in BOUNDARIES if name not in there]
    text = f"Watts of {WORDS[outer]}, by what they are of. Hatched: no reading.{restarts}" + "".join(f" {one}." for one in lacking)
    return _figure(tag, title, text, picture, _numbers("watts", curves, unit, lambda it: number(it / scale), show))


def _scaled_frame(
    label: str, x: tuple[float, float], heights: Sequence[float], inside: str, scale: float, unit: str, shown: Callable[[float], str],
    labels: Sequence[tuple[float, str, int | None]], marks: Sequence[tuple[float, str]], gaps: Sequence[tuple[float, float]],
) -> str:  # fmt: skip
    """`_frame` with its time in minutes, hours or days, so that the axis has round numbers of them."""
    return _frame(
        label, (x[0] / scale, x[1] / scale), heights, inside, x_label=unit, x_shown=number, y_shown=shown, labels=labels,
        marks=[(at / scale, what) for at, what in marks], gaps=[(left / scale, right / scale) for left, right in gaps],
    )  # fmt: skip


def _said(value: Value, boundary: str) -> str:
    said = value["energy"].get("unknown")
    return str(said.get(boundary) or "no reason given") if isinstance(said, Mapping) else "no reason given"


def _efficiency(tag: str, value: Value, marks: Sequence[tuple[float, str]], restarts: str) -> str:
    """Tokens/s per MW over time at the headline's boundary, and what it would be at the plan's watts."""
    title, watts, speed = "Tokens/s per MW", value["watts"], value["headline"]["tokens_per_s_mw"]
    boundary = speed.get("boundary")
    if boundary is None:
        return _lacking(tag, title, speed.get("unknown") or "no boundary is known")
    times = [one for one in watts["t_s"] if one is not None]
    scale, unit = _clock(max(times)) if times else (1.0, "seconds")
    points = [
        [None if time_s is None else time_s / scale, one]
        for time_s, one in zip(watts["t_s"], watts["tokens_per_s_mw"][boundary], strict=True)
    ]
    planned = watts["planned_tokens_per_s_mw"].get(boundary)
    text = f"At the {WORDS[boundary]} boundary, while it trained. " + (
        "Dashed: the measured speed at the plan's watts."
        if planned
        else f"Plan: {value['plan']['watts'][boundary].get('unknown', 'not planned')}."
    )
    return _lines(
        tag, title, text + restarts, [_curve("tokens/s/MW", points, 2, 0, label="")], unit, zero=True, marks=[(at / scale, what) for at, what in marks],
        planned=(planned, f"at planned watts {number(planned)}") if planned else None,
        gaps=[(left / scale, right / scale) for left, right in _gaps(watts["t_s"])], empty="no window has both tokens and watts",
    )  # fmt: skip


# Tables and bars.


def _bars(rows: Sequence[tuple[str, str, float, float, int, str, str]], head: tuple[str, str, str], label: str) -> str:
    """Rows of (name, note, where its bar begins, how long it is, tone, number, share): bars are shares of 1."""
    lines = []
    for name, note, begin, length, tone, amount, share in rows:
        small = f"<small>{_e(note)}</small>" if note else ""
        bar = f"<rect class=f{tone} x='{1000 * begin:.5g}' y='0' width='{max(1000 * length, 2 if length > 0 else 0):.5g}' height='10'/>"
        svg = f'<svg role="img" aria-label={_q(f"{name}: {share}")} viewBox="0 0 1000 10" preserveAspectRatio="none" focusable="false"><title>{_e(name)}: {_e(share)}</title>{bar}</svg>'
        lines.append(
            f"<tr><th scope=row>{_e(name)}{small}</th><td class=b>{svg}</td><td class=r>{_e(amount)}</td><td class=r>{_e(share)}</td></tr>"
        )
    cells = f"<th scope=col>{_e(head[0])}</th><th scope=col><span class=quiet>{_e(label)}</span></th><th scope=col class=r>{_e(head[1])}</th><th scope=col class=r>{_e(head[2])}</th>"
    return f"<table class=bars><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _waterfall(tag: str, value: Value) -> str:
    """From all of wall-clock down to what was kept, class by class."""
    found = value["goodput"]
    if "seconds" not in found:
        return _lacking(tag, "Goodput", found["unknown"])
    wall = found["wall_s"] or 1.0
    rows = [("wall-clock", "", 0.0, 1.0, 4, _span(found["wall_s"]), _per_cent(1.0))]
    left = 1.0
    for name in sorted((name for name in watch.CLASSES if name != "training"), key=lambda name: -found["seconds"][name]):
        share = found["seconds"][name] / wall
        left -= share
        rows.append((f"− {name}", CLASSES[name], max(0.0, left), share, 1, _span(found["seconds"][name]), _per_cent(share)))
    rows.append(("= training", CLASSES["training"], 0.0, found["share"], 2, _span(found["seconds"]["training"]), _per_cent(found["share"])))
    return _card(
        tag,
        "Goodput",
        "Every second of wall-clock since the first process had the run, in one class; they add up to it.",
        _bars(rows, ("class", "time", "share"), "of wall-clock"),
    )


def _phases(tag: str, value: Value) -> str:
    found = value["phases"]
    if "shares" not in found:
        return _lacking(tag, "Phases", found["unknown"])
    exposed = found["exposed_communication"]
    said = f"{_per_cent(exposed['value'])} {exposed['note']}" if exposed["value"] is not None else f"unknown: {exposed['unknown']}"
    text = f"Where rank 0's time went, by its trace. Exposed communication: {_e(said)}; a reduction that the backward hides, or waits for within itself, is not in it."
    rows = [
        (name, "", 0.0, share, 3 if name == "reduce" else 0, _span(found["seconds"][name]), _per_cent(share))
        for name, share in found["shares"].items()
    ]
    return _card(tag, "Phases", text, _bars(rows, ("phase", "time", "share"), "of its time"))


def _step_times(tag: str, value: Value) -> str:
    """A histogram, its percentiles as lines, and each rank's as a table."""
    found = value["step_s"]
    if "p50" not in found:
        return _lacking(tag, "Step times", found["unknown"])
    histogram = found["histogram"]
    low, high, counts = histogram["low"], histogram["high"], histogram["counts"]
    heights = ticks(0, max(counts))
    width = 1000 / len(counts)
    inside = "".join(
        f"<rect class=f0 x='{at * width + 0.8:.5g}' y='{1000 - 1000 * count / heights[-1]:.5g}' width='{width - 1.6:.5g}' height='{1000 * count / heights[-1]:.5g}'/>"
        for at, count in enumerate(counts)
        if count
    )
    inside += "".join(f"<path class=pl d='M{1000 * (found[name] - low) / (high - low):.5g} 0v1000'/>" for name in ("p50", "p90", "p99"))
    said = ", ".join(f"{name} {_seconds(found[name])}" for name in ("p50", "p90", "p99"))
    unit, scale = ("ms", 1e3) if high < 2 else ("s", 1.0)
    picture = _frame(
        f"Histogram of {found['steps']:,} step times: {said}, longest {_seconds(found['longest'])}", (low * scale, high * scale), heights, inside, x_label=unit,
        y_label="steps", x_shown=number, y_shown=number,
    )  # fmt: skip
    places = _spread([100 * (found[name] - low) / (high - low) for name in ("p50", "p90", "p99")])
    words = "".join(
        f"<span class=pc style='left:{left:.4g}%'>{name}</span>" for name, left in zip(("p50", "p90", "p99"), places, strict=True)
    )
    picture = picture.replace("</div></div>", f"{words}</div></div>")
    longer = f"; {histogram['longer']:,} longer than shown" if histogram["longer"] else ""
    rows = [
        f"<tr><th scope=row>rank {one['rank']}</th><td class=r>{one['steps']:,}</td>" + "".join(f"<td class=r>{_seconds(one[name])}</td>" for name in ("p50", "p90", "p99")) + "</tr>"
        for one in found["ranks"][:8]
    ]  # fmt: skip
    head = "<thead><tr><th scope=col>rank</th><th scope=col class=r>steps</th><th scope=col class=r>p50</th><th scope=col class=r>p90</th><th scope=col class=r>p99</th></tr></thead>"
    more = f"<p class='quiet small'>{len(found['ranks']) - 8:,} more ranks in --json</p>" if len(found["ranks"]) > 8 else ""
    text = f"{said}; longest {_seconds(found['longest'])}, of {found['steps']:,} steps that rank {found['ranks'][0]['rank']} traced, without saves, validations and profiled steps{longer}."
    return _figure(tag, "Step times", text, picture, f"<table>{head}<tbody>{''.join(rows)}</tbody></table>{more}")


def _spread(places: Sequence[float], least: float = 9.0) -> list[float]:
    found = list(places)
    for at in range(1, len(found)):
        found[at] = max(found[at], found[at - 1] + least)
    return found


def _restarts(tag: str, value: Value) -> str:
    if "seconds" not in value["goodput"]:
        return _lacking(tag, "Restarts", value["goodput"]["unknown"])
    if not value["restarts"]:
        return _card(tag, "Restarts", "None: one process had the run from its first step to its last.", "")
    rows = [
        f"<tr><td>{_e(one['time'] or 'unknown')}</td><td class=r>{'before its first' if one['step'] is None else number(one['step'])}</td><td>{_e(one['why'], 300)}</td></tr>"
        for one in value["restarts"][-20:]
    ]
    more = f" The last 20 of {len(value['restarts']):,}." if len(value["restarts"]) > 20 else ""
    head = "<thead><tr><th scope=col>when</th><th scope=col class=r>from step</th><th scope=col>why the one before ended</th></tr></thead>"
    return _card(tag, "Restarts", f"Each process after the first.{more}", f"<table>{head}<tbody>{''.join(rows)}</tbody></table>")


def _cell(value: float | None, shown: Callable[[float], str], why: str = "", note: str = "") -> str:
    """A number's cell; unknown with its reason."""
    if value is None:
        return f"<td class='un r'>unknown{f': {_e(why, 160)}' if why else ''}</td>"
    return f"<td class=r>{_e(shown(value))}{f'<span class=n>{_e(note)}</span>' if note else ''}</td>"


def _scroll(label: str, table: str) -> str:
    return f"<div class=scroll role=region tabindex=0 aria-label={_q(label)}>{table}</div>"


def _at(energy: Mapping[str, Any], name: str, boundary: str) -> float | None:
    found = energy.get(name)
    return finite(found.get(boundary)) if isinstance(found, Mapping) else None


def _table_of_energy(tag: str, value: Value) -> str:
    """Boundary by boundary, each number with its provenance; money and carbon below, of the facility."""
    energy, title = value["energy"], "Energy, cost and carbon"
    if not energy:
        return _card(tag, title, f"unknown: {_e(value['headline']['mwh'].get('unknown', ''))}", "", wide=True)
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("mean draw", "watts", lambda it: " ".join(scaled(it, "W"))),
        ("energy", "joules", lambda it: " ".join(_energy(it))),
        ("tokens/s/MW", "tokens_per_s_mw", number),
        ("tokens/J", "tokens_per_joule", number),
        ("kWh per 10^9 tokens", "kwh_per_gtoken", number),
        ("model GFLOP/J", "model_flop_per_joule", lambda it: number(it / 1e9)),
    ]
    rows = []
    for name in BOUNDARIES:
        if _at(energy, "joules", name) is None:
            rows.append(
                f"<tr><th scope=row>{_e(WORDS[name])}</th><td class=un colspan={len(columns)}>unknown: {_e(_said(value, name))}</td><td class=un>none</td></tr>"
            )
            continue
        said = energy.get("provenance")
        shares = _provenance(said.get(name) if isinstance(said, Mapping) else None)
        cells = "".join(_cell(_at(energy, key, name), shown) for _, key, shown in columns)
        rows.append(f"<tr><th scope=row>{_e(WORDS[name])}</th>{cells}<td>{_e(shares)}</td></tr>")
    head = "".join(f"<th scope=col class=r>{_e(name)}</th>" for name, _, _ in columns)
    table = f"<table><thead><tr><th scope=col>boundary</th>{head}<th scope=col>provenance of the row</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    head_shares = _provenance(value["headline"]["mwh"].get("provenance"))
    money = []
    for what, unit, key in (("cost", "€", "eur"), ("carbon", "kg CO2e", "kg_co2e")):
        whole, each = finite(energy.get(key)), finite(energy.get(f"{key}_per_gtoken"))
        why = value["headline"][key].get("unknown", "")
        money.append(
            f"<tr><th scope=row>{what}</th>{_cell(whole, lambda it, unit=unit: f'{number(it)} {unit}', why)}"
            f"{_cell(each, lambda it, unit=unit: f'{number(it)} {unit}', '' if whole is None else 'no tokens were kept')}<td>{_e(head_shares)}</td></tr>"
        )
    below = f"<table><thead><tr><th scope=col>of the energy</th><th scope=col class=r>whole run</th><th scope=col class=r>per 10^9 tokens</th><th scope=col>provenance of the energy</th></tr></thead><tbody>{''.join(money)}</tbody></table>"
    text = "Over all of wall-clock: evaluation, saves, restarts and held time included; tokens that a restart threw away are not counted. Boundaries nest: each holds the one above it."
    return _card(tag, title, text, _scroll("Energy by boundary", table) + "<br>" + _scroll("Cost and carbon", below), wide=True)


def _amount(value: float, unit: str) -> str:
    return _e(_bytes(value) if unit == "bytes" else " ".join(scaled(value, "W")) if unit == "W" else number(value))


def _plan(tag: str, value: Value) -> str:
    rows = []
    for row in value["plan"]["rows"]:
        cells = "".join(
            f"<td class=r>{_amount(figure['value'], row['unit'])}</td>"
            if figure["value"] is not None
            else f"<td class='un r'>{_e(_unplanned(figure['unknown']), 160)}</td>"
            for figure in (row["planned"], row["actual"])
        )
        if row["drift"] is None:
            drift = "<td class=un>not comparable</td>"
        elif row["drifted"]:
            drift = f"<td><span class=mark>{'over the budget' if row['most'] else 'drift'} {row['drift'] * 100:+.1f} %</span></td>"
        else:
            drift = f"<td>{row['drift'] * 100:+.1f} %{', not at its end' if row['open'] and row['drift'] < 0 else ''}</td>"
        rows.append(f"<tr><th scope=row>{_e(row['what'])}</th>{cells}{drift}</tr>")
    head = "<thead><tr><th scope=col>what</th><th scope=col class=r>planned</th><th scope=col class=r>actual</th><th scope=col>difference</th></tr></thead>"
    text = f"More than {DRIFT:.0%} from the plan is marked as drift.".replace("%", " %")
    return _card(tag, "Plan and actual", text, f"<table>{head}<tbody>{''.join(rows)}</tbody></table>")


def _unplanned(why: str) -> str:
    return why if why.startswith("not ") else f"unknown: {why}"


def _memory(tag: str, value: Value) -> str:
    found = value["memory"]
    if found["planned_bytes"]["value"] is None:
        return _lacking(tag, "Memory of a rank", found["planned_bytes"]["unknown"])
    peak = found["peak_bytes"]
    whole = max(found["planned_bytes"]["value"], peak["value"] or 0.0) or 1.0
    rows = [(name, "", 0.0, size / whole, 0, _bytes(size), _per_cent(size / whole)) for name, size in found["parts_bytes"].items()]
    rows.append(
        (
            "planned",
            "",
            0.0,
            found["planned_bytes"]["value"] / whole,
            4,
            _bytes(found["planned_bytes"]["value"]),
            _per_cent(found["planned_bytes"]["value"] / whole),
        )
    )
    if peak["value"] is not None:
        rows.append(("measured peak", "", 0.0, peak["value"] / whole, 2, _bytes(peak["value"]), _per_cent(peak["value"] / whole)))
    said = "" if peak["value"] is not None else f" Measured peak: {_e(_unplanned(peak['unknown']))}."
    return _card(
        tag,
        "Memory of a rank",
        f"The plan's parts; activations and workspace are estimates.{said}",
        _bars(rows, ("part", "bytes", "share"), "of the larger"),
    )


def _joules(tag: str, value: Value) -> str:
    """Joules by phase, and what the meters say of themselves."""
    energy, title = value["energy"], "Meters"
    if not energy:
        return _lacking(tag, title, value["headline"]["mwh"].get("unknown", ""))
    said = energy.get("phases")
    phases = {name: joules for name, one in said.items() if (joules := finite(one)) is not None} if isinstance(said, Mapping) else {}
    whole = sum(phases.values())
    rows = (
        [(name, "", 0.0, joules / whole, 0, " ".join(scaled(joules, "J")), _per_cent(joules / whole)) for name, joules in phases.items()]
        if whole > 0
        else []
    )
    parts = (
        _bars(rows, ("phase", "joules", "share"), "of rank 0's node")
        if rows
        else "<p class='quiet small'>Joules by phase unknown: no meter counted while they ran.</p>"
    )

    def share(name: str, why: str) -> str:
        found = finite(energy.get(name))
        return f"unknown: {why}" if found is None else _per_cent(found)

    told = {
        "power-capped": f"{share('capped_share', 'these meters give no reasons for clocks')} of the time",
        "held down by heat": f"{share('thermal_share', 'these meters give no reasons for clocks')} of the time",
        "counter against integral": share("disagreement", "no device has both"),
        "time without a reading": share("gap_share", "no device is metered"),
    }
    ramp, held = energy.get("ramp"), energy.get("held")
    steepest = finite(ramp.get("max_watts_per_10s")) if isinstance(ramp, Mapping) else None
    told["steepest change in 10 s"] = "unknown: fewer than two whole bins" if steepest is None else " ".join(scaled(steepest, "W"))
    if isinstance(held, Mapping) and finite(held.get("seconds")) is not None:
        joules = finite(held.get("joules"))
        spent = "joules unknown" if joules is None else " ".join(_energy(joules))
        told["held idle"] = f"{_span(held['seconds'])}, {spent}" + (f": {held['why']}" if held.get("why") else "")
    meters = energy.get("meters")
    if isinstance(meters, Mapping):
        told |= {f"meter, {what}": str(how) for what, how in meters.items()}
    pairs = "".join(f"<dt>{_e(name)}</dt><dd>{_e(text)}</dd>" for name, text in told.items())
    return _card(
        tag,
        title,
        "Joules of rank 0's node by what its loop did meanwhile, and what the meters say of themselves.",
        f"{parts}<br><dl class=kv>{pairs}</dl>",
    )


def _sources(tag: str, value: Value) -> str:
    found = value["energy"].get("sources")
    rows = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
    if not rows:
        return ""
    lines = []
    for one in rows[:40]:
        given = finite(one.get("value"))
        amount = number(given) if given is not None else one.get("value") if isinstance(one.get("value"), str) else "unknown"
        lines.append(
            f"<tr><th scope=row>{_e(one.get('what') or 'unnamed')}</th><td class=r>{_e(amount)}</td><td>{_e(one.get('basis') or 'unknown')}</td><td>{_e(one.get('source') or 'no source')}</td></tr>"
        )
    head = (
        "<thead><tr><th scope=col>figure</th><th scope=col class=r>value</th><th scope=col>basis</th><th scope=col>source</th></tr></thead>"
    )
    text = "What the energy rests on beside the meters."
    return _card(tag, "Sources", text, _scroll("Sources of figures", f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"), wide=True)


def _pairs(tag: str, title: str, text: str, pairs: Mapping[str, str], why: str) -> str:
    if not pairs:
        return _lacking(tag, title, why)
    return _card(
        tag, title, text, f"<dl class=kv>{''.join(f'<dt>{_e(name)}</dt><dd>{_e(said)}</dd>' for name, said in pairs.items())}</dl>"
    )


def _identity(tag: str, value: Value) -> str:
    run = value["run"]
    pairs = {
        "folder": run["folder"], "id": run["id"], "created": run["created"], "plan sha256": run["plan_sha256"], "identity": run["identity"],
        "corpus": run["corpus"], "weights sha256": run["weights_sha256"],
    }  # fmt: skip
    pairs = {name: said if said is not None else "unknown: not recorded" for name, said in pairs.items()}
    versions = value["versions"] or {"versions": "unknown: they are written when a run finishes"}
    return _pairs(tag, "Identity and versions", "What this run is, and what it stood on.", pairs | versions, "")


# Several runs.


def _comparison(values: Sequence[Value], called: Sequence[str]) -> str:
    """The headline figures side by side with their differences from the first, and the curves over each other."""
    short = letters(len(values))
    rows: list[tuple[str, Callable[[Value], Value], Callable[[float], str]]] = [
        ("loss", lambda it: it["headline"]["loss"], lambda it: f"{it:.4f}"),
        ("validation loss", lambda it: it["headline"]["val_loss"], lambda it: f"{it:.4f}"),
        ("tokens, retained", lambda it: it["headline"]["tokens"], number),
        ("tokens/s", lambda it: it["headline"]["tokens_per_s"], number),
        ("MFU", lambda it: it["headline"]["mfu"], _per_cent),
        ("goodput", lambda it: it["headline"]["goodput"], _per_cent),
        ("wall-clock", lambda it: it["headline"]["wall_s"], _span),
        ("tokens/s/MW", lambda it: it["headline"]["tokens_per_s_mw"], number),
        ("energy", lambda it: it["headline"]["mwh"], lambda it: " ".join(_energy(it * 3.6e9))),
        ("cost, €", lambda it: it["headline"]["eur"], number),
        ("carbon, kg CO2e", lambda it: it["headline"]["kg_co2e"], number),
        ("step time, p50", lambda it: _step(it, "p50"), _seconds),
        ("step time, p99", lambda it: _step(it, "p99"), _seconds),
    ]
    lines = []
    for name, pick, shown in rows:
        first = pick(values[0])["value"]
        cells = []
        for at, value in enumerate(values):
            figure = pick(value)
            if figure["value"] is None:
                cells.append(f"<td class='un r'>unknown<span class=n>{_e(figure['unknown'], 120)}</span></td>")
                continue
            notes = [f"{(figure['value'] / first - 1) * 100:+.1f} %"] if at and first else []
            if figure.get("boundary"):
                notes.append(f"{WORDS[figure['boundary']]}; {_provenance(figure.get('provenance'))}")
            cells.append(_cell(figure["value"], shown, note="; ".join(notes)))
        lines.append(f"<tr><th scope=row>{_e(name)}</th>{''.join(cells)}</tr>")
    keys = [
        f'<svg class=key role="img" aria-label={_q(f"line of run {letter}")} viewBox="0 0 34 10" focusable="false"><title>line of run {letter}</title><path class="cv c{at % TONES} d{at % DASHES}" d="M0 5h34"/></svg>'
        for at, letter in enumerate(short)
    ]
    head = "".join(f"<th scope=col class=r>{key}{_e(name, 60)}</th>" for key, name in zip(keys, called, strict=True))
    table = f"<table><thead><tr><th scope=col>figure</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    settings = [value["settings"] for value in values]
    differ = [name for name in dict.fromkeys(name for one in settings for name in one) if len({one.get(name) for one in settings}) > 1]
    absent = "unknown: not in its plan"
    other = "".join(
        f"<tr><th scope=row>{_e(name)}</th>{''.join(f'<td class=r>{_e(one.get(name) or absent, 200)}</td>' for one in settings)}</tr>"
        for name in differ
    )
    heads = "".join(f"<th scope=col class=r>{_e(name, 60)}</th>" for name in called)
    unlike = (
        _scroll("Settings that differ", f"<table><thead><tr><th scope=col>setting</th>{heads}</tr></thead><tbody>{other}</tbody></table>")
        if other
        else "<p class='quiet small'>None of the main settings differs.</p>"
    )

    def overlaid(title: str, text: str, points: Callable[[Value], Any], x_label: str, **how: Any) -> str:
        curves = [
            _curve(name, points(value), at, at, label=letter)
            for at, (value, name, letter) in enumerate(zip(values, called, short, strict=True))
        ]
        return _lines("h2", title, text, curves, x_label, **how)

    hours = max((one for value in values for one in value["watts"]["t_s"] if one is not None), default=0.0)
    scale, unit = _clock(hours)

    def efficiency(value: Value) -> list[list[float | None]]:
        boundary = value["headline"]["tokens_per_s_mw"].get("boundary")
        if boundary is None:
            return []
        return [
            [None if at is None else at / scale, one]
            for at, one in zip(value["watts"]["t_s"], value["watts"]["tokens_per_s_mw"][boundary], strict=True)
        ]

    cards = [
        _card(
            "h2",
            "Figures",
            f"Differences are from {_e(called[0], 80)}. Curves below have its letter, colour and pattern.",
            _scroll("Figures of the runs", table),
            wide=True,
        ),
        overlaid(
            "Loss",
            "Mean of each window.",
            lambda it: it["curves"]["loss"],
            "step",
            shown=lambda it: f"{it:.4g}",
            empty="no run has a window yet",
        ),
        overlaid(
            "Speed",
            "Tokens a second while they trained.",
            lambda it: it["curves"]["tokens_per_s"],
            "step",
            zero=True,
            empty="no run has a window yet",
        ),
        overlaid(
            "Tokens/s per MW",
            "Each at its headline's boundary: compare only alike ones.",
            efficiency,
            unit,
            zero=True,
            empty="no run has known joules at its headline's boundary",
        ),
        _card("h2", "Settings that differ", "Of the main settings.", unlike),
    ]
    return f"<section aria-label='Side by side'><div class=grid style='margin-top:26px'>{''.join(cards)}</div></section>"


def _step(value: Value, name: str) -> Value:
    found = value["step_s"]
    return {"value": found[name]} if name in found else {"value": None, "unknown": found["unknown"]}
