"""A page that classifies photographs in the reader's browser, by ONNX Runtime's WebAssembly build.

The page asks its own folder and nothing else: photographs stay where they are. Preprocessing is a
part of the ONNX file, which is run and compared as other ONNX files are.
"""

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from backbones.engines.formats import Conversion, Format, FormatConfig, Notes
from backbones.engines.onnx import OnnxConfig, OnnxRuntimeRunner, to_onnx
from backbones.errors import ConfigError, MissingDependencyError, UnsupportedError, first_line

__all__ = ["FORMAT", "WebConfig"]

PACKAGE = "onnxruntime-web@1.30.0"
RUNTIME = {  # what the page needs of the package, and its SHA-256
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": (
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"
    ),
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}
MODEL, PAGE = "model.onnx", "index.html"
CHANNELS = (1, 3, 4)  # gray, RGB, RGBA
NPM_TIMEOUT_S = 300.0

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'self'; img-src 'self' blob:;
  script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; style-src 'unsafe-inline'">
<title>@title@</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.3rem; }
#drop { display: block; border: 2px dashed #888; border-radius: 8px; padding: 2rem;
  text-align: center; cursor: pointer; }
#drop.over, #drop:focus-within { border-color: #06c; background: #eef5ff; }
#drop input { position: absolute; opacity: 0; width: 1px; }
img { max-width: 100%; max-height: 22rem; display: block; margin: 1rem auto; }
ol { padding-left: 1.5rem; }
meter { width: 10rem; margin: 0 .5rem; }
footer { margin-top: 2rem; color: #666; font-size: .85rem; }
</style>
</head>
<body>
<h1>@title@</h1>
<label id="drop">Drop a photograph here, or choose one
<input id="file" type="file" accept="image/*"></label>
<p id="status" role="status">loading the model</p>
<img id="photo" alt="" hidden>
<ol id="classes"></ol>
<footer>@about@ Photographs are not sent anywhere. Runs on ONNX Runtime Web (MIT license).</footer>
<script type="application/json" id="facts">@facts@</script>
<script type="module">
import * as ort from "./ort.wasm.min.mjs";
const facts = JSON.parse(document.querySelector("#facts").textContent);
const [file, drop, status, photo, list] =
  ["file", "drop", "status", "photo", "classes"].map((id) => document.getElementById(id));
const LONGEST = 2048;  // of a photograph's sides, in pixels; larger ones are made smaller first

ort.env.wasm.wasmPaths = new URL("./", location.href).href;
// Threads share memory, which browsers allow only under the isolation headers.
ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
const session = ort.InferenceSession.create("@model@");

function bytes(bitmap) {
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const scaled = (side) => Math.max(1, Math.round(side * scale));
  const width = scaled(bitmap.width), height = scaled(bitmap.height);
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const from = context.getImageData(0, 0, width, height).data, count = facts.channels;
  const to = new Uint8Array(width * height * count);
  for (let i = 0, j = 0; i < from.length; i += 4, j += count) {
    if (count === 1) {  // as Pillow turns colors into gray
      to[j] = (19595 * from[i] + 38470 * from[i + 1] + 7471 * from[i + 2] + 32768) >> 16;
    } else {
      for (let c = 0; c < count; c++) to[j + c] = from[i + c];
    }
  }
  return new ort.Tensor("uint8", to, [1, height, width, count]);
}

async function classify(blob) {
  try {
    status.textContent = "looking";
    const images = bytes(await createImageBitmap(blob, { colorSpaceConversion: "none" }));
    photo.src = URL.createObjectURL(blob);
    photo.hidden = false;
    const loaded = await session, began = performance.now();
    const logits = [...(await loaded.run({ input: images })).logits.data].map(Number);
    const elapsed = performance.now() - began;
    const most = Math.max(...logits), powers = logits.map((x) => Math.exp(x - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    const best = powers.map((power, index) => [power / sum, index]);
    best.sort((a, b) => b[0] - a[0]);
    list.replaceChildren(...best.slice(0, 5).map(([probability, index]) => {
      const item = document.createElement("li"), bar = document.createElement("meter");
      bar.value = probability;
      item.dataset.index = index;
      item.dataset.probability = probability;
      const share = `${(100 * probability).toFixed(1)} %`;
      item.append(facts.classes?.[index] ?? `class ${index}`, bar, share);
      return item;
    }));
    status.textContent = `${elapsed.toFixed(0)} ms, ${ort.env.wasm.numThreads} thread(s)`;
  } catch (error) {
    list.replaceChildren();
    status.textContent = `this cannot be classified: ${error.message}`;
  }
}

file.onchange = () => file.files.length && classify(file.files[0]);
document.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
document.ondragleave = () => drop.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
};
const named = new URLSearchParams(location.search).get("image");  // a file of this folder
session.then(async () => {
  status.textContent = "ready";
  if (named) classify(await (await fetch(named)).blob());
}, (error) => { status.textContent = `the model cannot be loaded: ${error.message}`; });
</script>
</body>
</html>
"""


@dataclass(frozen=True)
class WebConfig(FormatConfig):
    """A folder with a page, the model, and ONNX Runtime Web.

    `runtime` is a folder that holds the files of `RUNTIME`, as the npm package has them in
    ``dist``; None fetches them by npm, in the version of `PACKAGE`.
    """

    runtime: str | PathLike[str] | None = None


def _to_page(conversion: Conversion, config: WebConfig, folder: Path) -> Notes:
    """Write ``index.html``, ``model.onnx`` and the runtime into a folder."""
    if conversion.outputs != ("logits",):
        raise UnsupportedError("a page shows classes, not feature maps; leave features out")
    channels = conversion.example.shape[-1]
    if channels not in CHANNELS:
        raise UnsupportedError(f"photographs have {CHANNELS} channels, not {channels}")
    notes = to_onnx(conversion, OnnxConfig(), folder / MODEL)
    if len(list(folder.iterdir())) > 1:
        raise UnsupportedError("browsers take no model beyond 2 GB")
    (folder / PAGE).write_text(_page(conversion, channels), encoding="utf-8")
    if config.runtime is not None:
        _copy_runtime(Path(config.runtime), folder)
    else:
        _fetch_runtime(folder)
    return notes


def _page(conversion: Conversion, channels: int) -> str:
    known = conversion.metadata
    facts = json.dumps({"classes": known.get("classes"), "channels": channels})
    license = known.get("license")
    parts = {
        "title": escape(str(known.get("name") or "Classifier")),
        "about": escape(f"License of the weights: {license}.") if license else "",
        "facts": facts.replace("<", "\\u003c"),  # ends no script
        "model": MODEL,
    }
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], _PAGE)


def _copy_runtime(source: Path, folder: Path) -> None:
    absent = [name for name in RUNTIME if not (source / name).is_file()]
    if absent:
        raise ConfigError(
            f"{source} lacks {', '.join(absent)}; they are in dist/ of the npm package {PACKAGE}"
        )
    for name in RUNTIME:
        shutil.copyfile(source / name, folder / name)


def _fetch_runtime(folder: Path) -> None:
    """Take the runtime's files out of the npm package, and compare their digests."""
    way_out = (
        f"give a folder with {', '.join(RUNTIME)} from dist/ of the npm package {PACKAGE}"
        " (--web-runtime FOLDER, WebConfig(runtime=FOLDER))"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(f"npm is needed to fetch {PACKAGE}; install it, or {way_out}")
    with TemporaryDirectory() as name:
        try:
            subprocess.run(
                [npm, "pack", PACKAGE, "--silent", "--ignore-scripts"],
                cwd=name,
                check=True,
                capture_output=True,
                text=True,
                timeout=NPM_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            told = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
            reason = told.splitlines()[0] if told else first_line(error)
            raise MissingDependencyError(
                f"npm cannot fetch {PACKAGE} ({reason}); {way_out}"
            ) from error
        (package,) = Path(name).glob("*.tgz")
        with tarfile.open(package) as members:
            for file, digest in RUNTIME.items():
                member = members.extractfile(f"package/dist/{file}")
                content = b"" if member is None else member.read()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise MissingDependencyError(f"{file} of {PACKAGE} is another than expected")
                (folder / file).write_bytes(content)


def _open(folder: str | PathLike[str], *, threads: int | None = None) -> OnnxRuntimeRunner:
    """Run the page's model in ONNX Runtime here."""
    return OnnxRuntimeRunner(Path(folder) / MODEL, threads=threads)


FORMAT = Format(
    name="web",
    suffix="",
    config_class=WebConfig,
    convert=_to_page,
    open=_open,
    precisions=("fp32", "fp16", "int8"),
    folder=True,
    page=True,
)
