"""``backbones predict``."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from backbones.cli.opening import (
    add_model,
    add_size,
    is_exported,
    open_model,
    open_runner,
    set_size,
)
from backbones.cli.parsing import command, folder, natural, positive, tell
from backbones.engines import ENGINES, PRECISIONS, Runner, file_suffixes
from backbones.errors import ConfigError, DataError
from backbones.inference import (
    FORMATS,
    Explainer,
    Row,
    Sheet,
    Source,
    class_names,
    open_source,
    predict,
    save_predictions,
)

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "predict",
        _run,
        "name what is on images, or compute their embeddings",
        "backbones predict convnext_tiny cat.jpg dog.jpg --top-k 3",
        "backbones predict model_best.safetensors photos --output rows.csv",
        "backbones predict lsnet_t photos --features --output embeddings.npz",
        "torchrun --nproc-per-node 2 -m backbones predict lsnet_t photos --output rows.parquet",
    )
    add_model(parser, also=f"; or an exported file ({', '.join(file_suffixes())})")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="images, folders, tar archives, lists of paths (.txt, .csv, - for standard input), or"
        " patterns ('shards-{000..009}.tar')",
    )
    parser.add_argument("--top-k", type=positive, default=5, help="classes of a row (default: 5)")
    add_size(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", metavar="FILE", help=f"file of rows: {', '.join(FORMATS)} (default: print)"
    )
    output.add_argument(
        "--features", action="store_true", help="embeddings instead of classes; needs --output"
    )
    output.add_argument(
        "--include-index", action="store_true", help="the index of each class too, in CSV"
    )
    output.add_argument("--fullname", action="store_true", help="absolute paths")
    output.add_argument(
        "--resume", action="store_true", help="go on after the rows that an earlier run left"
    )
    output.add_argument(
        "--parts", action="store_true", help="leave the output as a folder of parts"
    )
    output.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        help="do the I-th of N shares (default: as torchrun, SLURM or MPI say)",
    )
    output.add_argument(
        "--strict", action="store_true", help="stop at an image that cannot be read"
    )
    output.add_argument(
        "--sheet", metavar="HTML", help="a page of thumbnails with predictions, mistakes first"
    )
    output.add_argument(
        "--explain", type=folder, metavar="DIR", help="images with a heat map of what counted"
    )
    output.add_argument(
        "--explain-class", metavar="CLASS", help="of this class (default: the predicted one)"
    )
    output.add_argument(
        "--explain-method",
        choices=Explainer.METHODS,
        default=Explainer.METHODS[0],
        help="(default: %(default)s)",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=("auto", *ENGINES), default="auto")
    engine.add_argument("--precision", choices=PRECISIONS, default="fp32")
    engine.add_argument("--calibration", metavar="DIR", help="images for int8")
    engine.add_argument("-b", "--batch-size", type=positive, help="(default: the fastest of a few)")
    engine.add_argument("--threads", type=positive, help="(default: PyTorch's)")
    engine.add_argument(
        "-j", "--workers", type=natural, help="threads that decode (default: --threads)"
    )
    engine.add_argument(
        "--reduce",
        action="store_true",
        help="decode large JPEGs at a part of their size; faster, nearly the same",
    )


def _share(text: str) -> tuple[int, int]:
    first, slash, count = text.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N, such as 1/4, got {text!r}")
    return int(first) - 1, int(count)


def _run(args: argparse.Namespace) -> int:
    """Print rows, or write them to a file."""
    for option in ("features", "resume", "parts", "share", "include_index"):
        if getattr(args, option) and not args.output:
            raise ConfigError(f"--{option.replace('_', '-')} needs --output FILE")
    if args.sheet and (args.features or args.resume or args.share):
        raise ConfigError(
            "--sheet shows the predictions of one whole run; leave out --features,"
            " --resume and --share"
        )
    source = open_source(args.sources)
    assert isinstance(source, Source)
    for line in source.left_out:
        print(line, file=sys.stderr)
    model = _open(args)
    classes = model.metadata.get("classes") if isinstance(model, Runner) else class_names(model)
    options: dict[str, Any] = {
        "top_k": args.top_k,
        "engine": args.engine,
        "precision": args.precision,
        "calibration": args.calibration,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "workers": args.workers or None,
        "reduce": args.reduce,
        "strict": args.strict,
        "classes": classes,
        "progress": _say,
    }
    sheet = Sheet(source, classes) if args.sheet else None
    explainer = _explainer(args, model)
    bar = tqdm(total=len(source), unit="image", leave=False, disable=None)

    def each(first: int, rows: Sequence[Row], left: int) -> None:
        for number, row in enumerate(rows, start=first):
            if sheet is not None:
                sheet.add(number, row)
            if explainer is not None and row.error is None:
                explainer.write(source[number], row, args.explain)
        bar.total = bar.n + len(rows) + left
        bar.update(len(rows))

    with bar:
        if args.output:
            lines, facts = _save(args, source, model, each, options)
            code = 0
        else:
            lines, facts, code = _print(args, source, model, each, options)
    if sheet is not None:
        sheet.write(args.sheet)
        lines.append(f"{args.sheet}: open it in a browser")
    tell(args, facts, *lines)
    return code


def _open(args: argparse.Namespace) -> nn.Module | Runner:
    if is_exported(args):
        return open_runner(args, "explain")
    model = open_model(args)
    set_size(model, args)
    return model


def _explainer(args: argparse.Namespace, model: Any) -> Explainer | None:
    if args.explain is None:
        return None
    return Explainer(
        model,
        resolve_model_data_config(model),
        method=args.explain_method,
        target=args.explain_class,
    )


def _say(line: str) -> None:
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)


def _save(
    args: argparse.Namespace, source: Source, model: Any, each: Any, options: dict[str, Any]
) -> tuple[list[str], Any]:
    try:
        summary = save_predictions(
            source,
            model,
            args.output,
            features=args.features,
            include_index=args.include_index,
            full_paths=args.fullname,
            resume=args.resume,
            parts=args.parts,
            share=args.share,
            each=each,
            **options,
        )
    except KeyboardInterrupt:
        if Path(f"{args.output}.partial").exists():
            told = f"{args.output}.partial holds what is done; --resume goes on"
            print(told, file=sys.stderr)
        raise
    return [str(summary)], summary.as_dict()


def _print(
    args: argparse.Namespace, source: Source, model: Any, each: Any, options: dict[str, Any]
) -> tuple[list[str], Any, int]:
    facts, bad = [], []
    with closing(predict(source, model, full_paths=args.fullname, **options)) as rows:
        for number, row in enumerate(rows):
            each(number, [row], len(source) - number - 1)
            facts.append(row.as_dict())
            if row.error is not None:
                bad.append(row.error)
            elif not args.json:
                found = (f"  {one.probability:7.2%}  {one.name}" for one in row.predictions)
                tqdm.write("\n".join([row.path, *found]))
    if bad and len(bad) == len(facts):
        raise DataError("\n       ".join(bad))
    for error in bad:
        print(f"error: {error}", file=sys.stderr)
    return [], facts, 2 if bad else 0
