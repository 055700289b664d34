"""Writes the README's table of models from the configs and the manifest.

python scripts/update_readme.py            # rewrite the table in README.md
python scripts/update_readme.py --check    # exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import backbones
from backbones.info import ModelInfo
from backbones.manifest import WeightsEntry

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- models: written by scripts/update_readme.py -->", "<!-- /models -->"


def weights_cell(entries: list[WeightsEntry]) -> str:
    """Say in a few words what can be had and under which licenses; the default tag first."""
    if not entries:
        return "none known"
    default = entries[0]
    if default.available:
        licenses = ", ".join(dict.fromkeys(e.license for e in entries if e.available))
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        return f"`{default.tag}`{more}; {licenses}"
    others = ", ".join(f"`{entry.tag}` ({entry.license})" for entry in entries if entry.available)
    also = f"; also {others}" if others else ""
    if default.status == "page_only":
        return f"[web page]({default.page}), {default.license}{also}"
    return f"never released{also}"


def accuracy_cell(entries: list[WeightsEntry]) -> str:
    """Return the default tag's published top-1, with its size where that is not 224."""
    if not entries or entries[0].top1 is None:
        return "-"
    size = entries[0].input_size[-1]
    return f"{entries[0].top1:.1f}" + (f" @{size}" if size != 224 else "")


def count_cells(info: ModelInfo) -> str:
    """Return parameters and multiply-adds."""
    size = "" if info.input_size[-1] == 224 else f" @{info.input_size[-1]}"
    return f"{info.params / 1e6:.2f} | {info.macs / 1e9:.2f}{size}"


def table(counts: Callable[[ModelInfo], str] = count_cells) -> str:
    """Return the whole table as Markdown."""
    lines = []
    for family in backbones.list_families():
        names = backbones.list_models(family=family)
        infos = sorted((backbones.model_info(name) for name in names), key=lambda i: i.params)
        papers = dict.fromkeys(
            f"[{info.source.title}]({info.source.paper})" for info in infos if info.source
        )
        lines += [f"**{family}** — {'; '.join(papers)}", ""]
        lines += ["| model | parameters (M) | MACs (G) | top-1 (%) | weights (default; licenses) |"]
        lines += ["|---|---|---|---|---|"]
        for info in infos:
            aliases = "".join(f" (`{alias}`)" for alias in info.aliases)
            lines.append(
                f"| `{info.name}`{aliases} | {counts(info)}"
                f" | {accuracy_cell(list(info.weights))} | {weights_cell(list(info.weights))} |"
            )
        lines.append("")
    return "\n".join(lines)


def updated(text: str) -> str:
    """Return the README's text with a fresh table."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the README's table of models.")
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    fresh = updated(text)
    if args.check:
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
