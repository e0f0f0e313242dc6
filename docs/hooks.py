"""What mkdocs does to the pages: the generated reference and the long pages of the repository become pages of the site, and links work on both.

A page is written for the repository's own view: it links to files by their place there. For the site those links are turned to the page that the file
became, or to a copy of the file. `docs/reference/index.md#recipe` stands for the generated `reference/recipe.md`, which the repository does not have.
"""

import importlib.util
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Long pages that live elsewhere in the repository: where -> the page's path on the site.
LONG = {
    "README.md": "overview.md",
    "ENGINES.md": "engines.md",
    "PLANNER.md": "planner.md",
    "POWER.md": "power.md",
    "RELIABILITY.md": "reliability.md",
    "REPLICAS.md": "replicas.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "figures.md",
    "benchmarks/LOG.md": "log.md",
}
LINK = re.compile(r"(?<!\!)\[(?P<text>(?:`[^`]*`|[^\[\]`])+)\]\((?P<target>[^()\s]+)\)")
_FENCE = re.compile(r"^(?P<fence> {0,3}(?:```+|~~~+))[^\n]*\n.*?^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


def generate() -> Any:
    """docs/generate.py, which is no package."""
    spec = importlib.util.spec_from_file_location("gigatrain_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def prose(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` done to what is outside of fenced blocks."""
    parts, at = [], 0
    for match in _FENCE.finditer(text):
        parts += [change(text[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, change(text[at:])])


def placed(source: str) -> str | None:
    """The site's path of a file of the repository (`docs/howto/slurm.md`, `POWER.md`); None for one that only is copied."""
    if source in LONG:
        return LONG[source]
    if recipe := re.fullmatch(r"recipes/([^/]+)/README\.md", source):
        return f"recipes/{recipe[1]}.md"
    return source.removeprefix("docs/") if source.startswith("docs/") and source.endswith(".md") else None


def target(source: str, link: str) -> tuple[str, str]:
    """Where a link of the file `source` leads in the repository: `(path, anchor)`."""
    path, _, anchor = link.partition("#")
    return (posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source), anchor


def site_links(source: str, text: str, copied: set[str]) -> str:
    """The page with its links turned to the site's; files that are not pages are added to `copied`, and lie on the site under `files/`."""
    here = placed(source)
    assert here is not None

    def turned(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", match["target"]):
            return match[0]
        path, anchor = target(source, match["target"])
        page = placed(path)
        if path == "docs/reference/index.md" and anchor:
            page, anchor = f"reference/{anchor}.md", ""
        if page is None:
            if not (ROOT / path).is_file():  # a folder: the site has none
                return match["text"]
            copied.add(path)
            page = f"files/{path}"
        if page == here and anchor:
            return f"[{match['text']}](#{anchor})"
        return f"[{match['text']}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{'#' if anchor else ''}{anchor})"

    return prose(text, lambda part: LINK.sub(turned, part))


def named(here: str, text: str, places: Mapping[str, str]) -> str:
    """Names in code that have a place (`train.steps`, `gigatrain plan`), and long pages that are named (POWER.md), become links to it."""
    root = posixpath.dirname(here) or "."
    pages = re.compile(rf"(?<![\w/`\[.-])({'|'.join(re.escape(name) for name in LONG if '/' not in name)})(?![\w`])")

    def outside(part: str) -> str:
        parts, at = [], 0
        taken = sorted(
            [*((m.start(), m.end(), None) for m in LINK.finditer(part)), *((m.start(), m.end(), m) for m in _CODE.finditer(part))],
            key=lambda one: one[:2],
        )
        for begin, end, code in taken:
            if begin < at:
                continue
            parts.append(pages.sub(lambda m: f"[{m[0]}]({posixpath.relpath(LONG[m[0]], root)})", part[at:begin]))
            whole = part[begin:end]
            name = whole.strip("`").split(" = ")[0] if code else ""
            parts.append(f"[{whole}]({_relative(places[name], root)})" if name in places else whole)
            at = end
        return "".join([*parts, pages.sub(lambda m: f"[{m[0]}]({posixpath.relpath(LONG[m[0]], root)})", part[at:])])

    def lines(part: str) -> str:  # neither headings, whose anchors come of their text, nor blocks that are indented
        return "\n".join(line if re.match(r"#|    ", line) else outside(line) for line in part.split("\n"))

    return prose(text, lines)


def _relative(place: str, root: str) -> str:
    page, _, anchor = place.partition("#")
    return f"{posixpath.relpath(page, root)}#{anchor}"


def places(made: Any) -> dict[str, str]:
    """What a name in code leads to: keys of recipes, then of sites, and commands."""
    found = {key: f"reference/site.md#{key}" for key in made.keys("site") if "." in key}
    found |= {key: f"reference/recipe.md#{key}" for key in made.keys("recipe") if "." in key}
    found |= {f"[{key}]": f"reference/recipe.md#{key}" for key, schema in made.keys("recipe").items() if not schema}
    return found | {name: f"reference/commands.md#{name.replace(' ', '-')}" for name in made.parsers()}


def lists(text: str) -> str:
    """An empty line before a list that follows a paragraph at once: GitHub sees a list there, Python-Markdown does not."""
    item = re.compile(r"(?:[-*]|\d+\.) ")

    def spaced(part: str) -> str:
        found: list[str] = []
        for line in part.split("\n"):
            before = found[-1] if found else ""
            if item.match(line) and before.strip() and not item.match(before) and not before.startswith((" ", "#")):
                found.append("")
            found.append(line)
        return "\n".join(found)

    return prose(text, spaced)


def written() -> list[str]:
    """Every page that someone or some program wrote into the repository."""
    found = (*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md")))
    return [*LONG, *(path.relative_to(ROOT).as_posix() for path in found)]


def pages() -> tuple[dict[str, str], set[str]]:
    """Site path -> Markdown of every page, and the files of the repository that pages link to and the site copies."""
    made, copied = generate(), set()
    known = places(made)
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in written()}
    found = {}
    for source, text in sources.items():
        here = placed(source)
        assert here is not None
        found[here] = named(here, site_links(source, lists(text), copied), known)
    return found | {name: named(name, text, known) for name, text in made.reference().items()}, copied


def outer() -> list[tuple[str, str]]:
    """`(page, address)` of every link that leaves the site. They are listed and not asked: that would need a network."""
    found, _ = pages()
    addresses = ((page, address) for page, text in sorted(found.items()) for address in re.findall(r"https?://[^\s)>\]`\"]+", text))
    return list(dict.fromkeys(addresses))


def on_files(files: Any, config: Any) -> Any:
    """Takes the place of what mkdocs found in docs/: our pages, with their links as the site's."""
    from mkdocs.structure.files import File

    found, copied = pages()
    for name, text in found.items():
        if (old := files.get_file_from_path(name)) is not None:
            files.remove(old)
        files.append(File.generated(config, name, content=text))
    for name in sorted(copied):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


if __name__ == "__main__":
    for one, where in outer():
        print(f"{one:28} {where}")
