"""One self-contained page of thumbnails with predictions, which opens from disk."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from os import PathLike
from pathlib import Path

from PIL import ImageOps

from backbones.errors import ConfigError
from backbones.files import write_text
from backbones.inference.rows import Row
from backbones.inference.sources import Item

__all__ = ["Sheet"]

_SIDE = 128  # pixels of a thumbnail
_MOST = 20_000  # images; about 100 MB
_SHOWN = 3  # predictions below an image

# The page works without a script too: figures stand in the order in which they are looked at.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff; }}
header {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: baseline; margin-bottom: 1rem; }}
h1 {{ font-size: 1.2rem; margin: 0; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }}
figure {{ margin: 0; padding: 8px; border: 2px solid #ddd; border-radius: 6px; overflow: hidden; }}
figure.wrong {{ border-color: #c33; }}
figure.bad {{ border-color: #c80; }}
figure[hidden] {{ display: none; }}
img {{ display: block; width: 100%; height: {side}px; object-fit: contain; background: #f4f4f4; }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere; }}
.path {{ color: #777; }}
.wrong .true {{ color: #c33; }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<span id="count">{summary}</span>
<label>Order <select id="order">{orders}</select></label>
<label>Show <select id="which"><option value="">all</option>{classes}</select></label>
</header>
<main>
{figures}
</main>
<script>
const main = document.querySelector("main"), all = [...main.children];
const order = document.querySelector("#order"), which = document.querySelector("#which");
const value = (f, name) => Number(f.dataset[name]);
const orders = {{
  mistakes: (a, b) => value(b, "wrong") - value(a, "wrong") || value(b, "p") - value(a, "p"),
  sure: (a, b) => value(b, "p") - value(a, "p"),
  unsure: (a, b) => value(a, "p") - value(b, "p"),
  source: (a, b) => value(a, "n") - value(b, "n"),
}};
function show() {{
  main.append(...all.sort(orders[order.value]));
  for (const f of all) f.hidden = Boolean(which.value) && f.dataset.c !== which.value;
}}
order.onchange = which.onchange = show;
</script>
</body>
</html>
"""
_ORDERS = {
    "mistakes": "mistakes first",
    "sure": "most confident first",
    "unsure": "least confident first",
    "source": "as in the source",
}


class Sheet:
    """Collects rows of predictions; the page is written at the end.

    Where the images lie in folders that are called like classes, mistakes are marked and stand
    first, the most confident ones at the top.

    Args:
        source: the images, by the number of their row.
        classes: names of the model's classes, where they are known.

    Raises:
        ConfigError: more images than a page can show.
    """

    def __init__(self, source: Sequence[Item], classes: Sequence[str] | None = None) -> None:
        if len(source) > _MOST:
            raise ConfigError(
                f"{len(source)} images are too many for one page, which shows {_MOST} at most; name"
                " a part of them"
            )
        self.source, self.classes = source, frozenset(classes or ())
        self._rows: list[tuple[int, Row, str]] = []

    def add(self, number: int, row: Row) -> None:
        """Take the row of an image, and make its thumbnail."""
        self._rows.append((number, row, "" if row.error else _thumbnail(self.source[number])))

    def write(self, path: str | PathLike[str], title: str = "Predictions") -> Path:
        """Write the page and return its path."""
        labeled = {row.folder for _, row, _ in self._rows} <= self.classes

        def is_wrong(row: Row) -> bool:
            return labeled and bool(row.predictions) and row.predictions[0].name != row.folder

        def rank(entry: tuple[int, Row, str]) -> tuple[bool, float, int]:
            number, row, _ = entry
            return (not is_wrong(row), -_confidence(row), number)

        rows = sorted(self._rows, key=rank) if labeled else self._rows
        first = "mistakes" if labeled else "source"
        orders = {first: _ORDERS[first], **_ORDERS}
        if not labeled:
            del orders["mistakes"]
        found = sorted({row.predictions[0].name for _, row, _ in rows if row.predictions})
        wrong = sum(is_wrong(row) for _, row, _ in rows)
        bad = sum(row.error is not None for _, row, _ in rows)
        facts = [f"{len(rows)} images"]
        facts += [f"{wrong} mistakes"] if labeled else []
        facts += [f"{bad} unreadable"] if bad else []
        text = _PAGE.format(
            title=escape(title),
            side=_SIDE,
            summary=", ".join(facts),
            orders=_options(orders.items()),
            classes=_options((name, name) for name in found),
            figures="\n".join(_figure(entry, labeled, is_wrong(entry[1])) for entry in rows),
        )
        return write_text(path, text)


def _options(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in pairs
    )


def _confidence(row: Row) -> float:
    return row.predictions[0].probability if row.predictions else 0.0


def _figure(entry: tuple[int, Row, str], labeled: bool, wrong: bool) -> str:
    number, row, picture = entry
    name = row.predictions[0].name if row.predictions else ""
    kind = "bad" if row.error else "wrong" if wrong else ""
    lines = [f"<b>{one.probability:.1%}</b> {escape(one.name)}" for one in row.predictions[:_SHOWN]]
    if row.error:
        lines.append(escape(row.error))
    elif labeled and wrong:
        lines.append(f'<span class="true">is {escape(row.folder or "")}</span>')
    lines.append(f'<span class="path">{escape(row.path)}</span>')
    image = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{picture}">' if picture else ""
    return (
        f'<figure class="{kind}" data-n="{number}" data-p="{_confidence(row)}"'
        f' data-wrong="{int(wrong)}" data-c="{escape(name)}">{image}'
        f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
    )


def _thumbnail(item: Item) -> str:
    """Return a small JPEG in base64."""
    image = item.open("RGB", reduce_to=(2 * _SIDE, 2 * _SIDE))
    small = ImageOps.contain(image, (_SIDE, _SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
