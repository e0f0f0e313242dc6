"""The page's colours, in a light and a dark set, whose contrast tests hold; and its style sheet with both."""

from pathlib import Path

from gigatrain.observe.report.curves import TONES

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


def style() -> str:
    """page.css with both sets of colours."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    tones = (
        f".c{at} {{ stroke: var(--t{at}) }}\n.f{at} {{ fill: var(--t{at}) }}\n.chart .x{at} {{ color: var(--t{at}) }}"
        for at in range(TONES)
    )
    style = style.replace("TONES", "\n".join(tones))
    for mode, colours in PALETTE.items():
        style = style.replace(mode.upper(), "; ".join(f"--{name}: {colour}" for name, colour in colours.items()))
    return style
