"""Writes the tables of families (README.md) and of models (configs/README.md).

python scripts/update_tables.py            # rewrite both tables; counting takes a minute
python scripts/update_tables.py --check    # exit with 1 if one of them is out of date

Both come from configs/*.yaml, weights_manifest.yaml and the models themselves. A family or variant
without released weights has a row too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import backbones
from backbones.info import ModelInfo
from backbones.manifest import WeightsEntry

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- written by scripts/update_tables.py -->", "<!-- /written -->"
UNRELEASED, UNKNOWN = "never released", "none known"


def infos_of(family: str) -> list[ModelInfo]:
    """Return the facts of a family's variants, the smallest first."""
    infos = (backbones.model_info(name) for name in backbones.list_models(family=family))
    return sorted(infos, key=lambda info: info.params)


# The README's table: a row a family.


def family_table() -> str:
    """Return the table of families as Markdown."""
    lines = [
        "| family | models | parameters (M) | top-1 (%) | licenses of the weights | paper |",
        "|---|---|---|---|---|---|",
    ]
    for family in backbones.list_families():
        infos = infos_of(family)
        sizes = span([info.params / 1e6 for info in infos])
        top1 = span([i.weights[0].top1 for i in infos if i.weights and i.weights[0].top1])
        entries = [entry for info in infos for entry in info.weights]
        papers = ", ".join(dict.fromkeys(paper_link(i, short=True) for i in infos if i.source))
        link = f"[{family}](configs/README.md#{family})"
        cells = (link, str(len(infos)), sizes, top1, license_cell(entries), papers)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values: list[float]) -> str:
    """Say the smallest and the largest of some values with one decimal."""
    if not values:
        return "-"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def license_cell(entries: list[WeightsEntry]) -> str:
    """Name the licenses of what was released, or say that nothing was."""
    released = [entry for entry in entries if entry.status != "unreleased"]
    licenses = ", ".join(dict.fromkeys(entry.license for entry in released))
    return licenses or (UNRELEASED if entries else UNKNOWN)


def paper_link(info: ModelInfo, short: bool = False) -> str:
    """Link a model's paper by its title, or by its number on arXiv where it has one."""
    assert info.source is not None
    title, address = info.source.title, info.source.paper
    if not address.startswith("http"):
        return title
    _, _, number = address.partition("arxiv.org/abs/")
    return f"[{number if short and number else title}]({address})"


# The table of configs/README.md: a row a model.


def model_table(counts: Callable[[ModelInfo], str] | None = None) -> str:
    """Return the tables of models as Markdown; `counts` writes parameters and multiply-adds."""
    lines = []
    for family in backbones.list_families():
        infos = infos_of(family)
        papers = dict.fromkeys(paper_link(info) for info in infos if info.source)
        lines += [f"## {family}", ""]
        lines += ["; ".join(papers), ""] if papers else []
        lines += ["| model | parameters (M) | MACs (G) | top-1 (%) | weights (default; licenses) |"]
        lines += ["|---|---|---|---|---|"]
        for info in infos:
            aliases = "".join(f" (`{alias}`)" for alias in info.aliases)
            cells = (counts or count_cells)(info)
            entries = list(info.weights)
            lines.append(
                f"| `{info.name}`{aliases} | {cells}"
                f" | {accuracy_cell(entries)} | {weights_cell(entries)} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def count_cells(info: ModelInfo) -> str:
    """Return parameters and multiply-adds."""
    size = "" if info.input_size[-1] == 224 else f" @{info.input_size[-1]}"
    return f"{info.params / 1e6:.2f} | {info.macs / 1e9:.2f}{size}"


def accuracy_cell(entries: list[WeightsEntry]) -> str:
    """Return the default tag's published top-1, with its size where that is not 224."""
    if not entries or entries[0].top1 is None:
        return "-"
    size = entries[0].input_size[-1]
    return f"{entries[0].top1:.1f}" + (f" @{size}" if size != 224 else "")


def weights_cell(entries: list[WeightsEntry]) -> str:
    """Say in a few words what can be had and under which licenses; the default tag first."""
    if not entries:
        return UNKNOWN
    default = entries[0]
    if default.available:
        licenses = ", ".join(dict.fromkeys(e.license for e in entries if e.available))
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        return f"`{default.tag}`{more}; {licenses}"
    others = ", ".join(f"`{entry.tag}` ({entry.license})" for entry in entries if entry.available)
    also = f"; also {others}" if others else ""
    if default.status == "page_only":
        return f"[web page]({default.page}), {default.license}{also}"
    return f"{UNRELEASED}{also}"


TABLES = {ROOT / "README.md": family_table, ROOT / "configs" / "README.md": model_table}


def written(text: str) -> str:
    """Return the table that stands in a file's text.

    Raises:
        ValueError: the text has no place for one.
    """
    if START not in text or END not in text:
        raise ValueError(
            f"the lines {START} and {END}, between which the table stands, are missing"
        )
    return text.partition(START)[2].partition(END)[0].strip()


def updated(text: str, table: str) -> str:
    """Return a file's text with a fresh table."""
    written(text)
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of families and models.")
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    args = parser.parse_args()
    outdated = 0
    for path, table in TABLES.items():
        text = path.read_text(encoding="utf-8")
        fresh = updated(text, table())
        outdated += fresh != text
        if not args.check:
            path.write_text(fresh, encoding="utf-8")
    return int(args.check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())
