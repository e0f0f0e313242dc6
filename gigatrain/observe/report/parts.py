"""What pages are put together from: cards, tables, bars. Everything that is given as a text is escaped here; what is `inside` is HTML already."""

from collections.abc import Callable, Iterable, Sequence

from gigatrain.observe.report.words import escaped, quoted

Shown = Callable[[float], str]


def card(tag: str, title: str, text: str, inside: str = "", *, wide: bool = False) -> str:
    note = f"<p>{escaped(text)}</p>" if text else ""
    return f"<section class='card{' wide' * wide}'><{tag}>{escaped(title)}</{tag}>{note}{inside}</section>"


def lacking(tag: str, title: str, why: str, *, wide: bool = False) -> str:
    """A card of what the run does not say."""
    return card(tag, title, f"unknown: {why}", wide=wide)


def figure(tag: str, title: str, text: str, picture: str, behind: str, *, wide: bool = False) -> str:
    """A picture, and `behind` it its numbers."""
    note = f"<figcaption><{tag}>{escaped(title)}</{tag}><p>{escaped(text)}</p></figcaption>"
    kind = "'card wide'" if wide else "card"
    return f"<figure class={kind}>{note}{picture}{behind}</figure>"


def column(*cards: str) -> str:
    """Cards above each other in one column of two."""
    return f"<div class=column>{''.join(cards)}</div>"


def table(head: Sequence[str], rows: Iterable[str], *, kind: str = "", right: Sequence[int] = ()) -> str:
    """`head`: texts, those at `right` over numbers; `rows`: the cells of each as HTML."""
    cells = "".join(f"<th scope=col{' class=r' * (at in right)}>{escaped(name, 80)}</th>" for at, name in enumerate(head))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table{f' class={kind}' if kind else ''}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def head(name: str, note: str = "") -> str:
    """The first cell of a row."""
    return f"<th scope=row>{escaped(name, 120)}{f'<small>{escaped(note)}</small>' if note else ''}</th>"


def cell(text: str, note: str = "") -> str:
    return f"<td class=r>{escaped(text)}{f'<small>{escaped(note)}</small>' if note else ''}</td>"


def sentence(text: str) -> str:
    """A cell of a sentence."""
    return f"<td>{escaped(text)}</td>"


def unknown(why: str, span: int = 1) -> str:
    """A cell of what has no number: never empty, never 0."""
    said = why if why.startswith(("not ", "unknown")) else f"unknown: {why}" if why else "unknown"
    return f"<td class='un{' r' * (span == 1)}'{f' colspan={span}' if span > 1 else ''}>{escaped(said, 200)}</td>"


def scrolled(label: str, inside: str) -> str:
    """What may be wider than a telephone, and is then moved by finger or by arrow keys."""
    return f"<div class=scroll role=region tabindex=0 aria-label={quoted(label)}>{inside}</div>"


def bars(names: tuple[str, str, str, str], rows: Iterable[tuple[str, str, float, float, int, str, str]]) -> str:
    """Rows of (name, note, where its bar begins, how long it is, tone, number, share); bars are shares of 1. `names` of the four columns."""
    lines = []
    for name, note, begin, length, tone, amount, share in rows:
        said = f"{name}: {amount}, {share}"
        drawn = (
            f"<rect class=f{tone} x='{1000 * begin:.5g}' y='0' width='{max(1000 * length, 2.0 if length > 0 else 0.0):.5g}' height='10'/>"
        )
        lines.append(f"{head(name, note)}<td class=b>{svg(said, drawn, '0 0 1000 10')}</td>{cell(amount)}{cell(share)}")
    return table(names, lines, kind="bars", right=(2, 3))


def svg(label: str, inside: str, box: str = "0 0 1000 1000", kind: str = "") -> str:
    """A picture that fills its place, whatever shape that has, and says what it shows."""
    shape = f"class={kind} " if kind else ""
    name = f"role=img aria-label={quoted(label)}"
    return f"<svg {shape}{name} viewBox='{box}' preserveAspectRatio=none focusable=false><title>{escaped(label)}</title>{inside}</svg>"


def pairs(said: Iterable[tuple[str, str]], kind: str = "kv") -> str:
    """Names and what they are."""
    return f"<dl class={kind}>{''.join(f'<div><dt>{escaped(name)}</dt><dd>{escaped(text)}</dd></div>' for name, text in said)}</dl>"
