"""``backbones weights``: what is released, where it lies, and whether it is the right file."""

import argparse
import dataclasses
import fnmatch
import shutil
from collections.abc import Callable
from typing import Any

from backbones import weights
from backbones.cli import weights_publishing
from backbones.cli.parsing import command, folder, tell
from backbones.errors import BackbonesError, UnknownModelError, nearest
from backbones.files import new_file
from backbones.manifest import Manifest, WeightsEntry, load_manifest, read_manifest
from backbones.registry import registry

__all__ = ["add_parser"]

STATUSES = ("released", "page_only", "unreleased")


def add_parser(commands: Any) -> None:
    """Describe the command and its verbs."""
    parser = command(
        commands,
        "weights",
        None,
        "list, fetch, verify, pin, convert and publish weights",
        "backbones weights list 'lsnet*'",
        "backbones weights fetch cpubone_s0",
        json=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, action, summary, example in (
        ("list", _list_entries, "list released weights", "list --pinned"),
        ("show", _show, "show everything known", "show lsnet_t"),
        (
            "fetch",
            _fetch_files,
            "download and verify; print the paths",
            "fetch 'lsnet*' --to /mnt/weights   # a mirror for BACKBONES_WEIGHTS_DIR",
        ),
        (
            "verify",
            _verify_files,
            "compare the files on this machine with the recorded digests, without network",
            "verify",
        ),
        (
            "lock",
            _lock,
            "download, and record digests and revisions in the manifest",
            "lock lsnet_t.in1k --manifest weights_manifest.yaml",
        ),
    ):
        parser = command(verbs, verb, action, summary, f"backbones weights {example}")
        parser.add_argument(
            "names",
            nargs="*",
            metavar="NAME",
            help="variant, variant.tag or pattern (default: all)",
        )
        parser.add_argument("--manifest", metavar="FILE", help="(default: the package's own)")
        if action in (_fetch_files, _verify_files, _lock):
            parser.add_argument("--cache-dir", metavar="DIR", help="where downloads are")
    listing, fetching = verbs.choices["list"], verbs.choices["fetch"]
    listing.add_argument("--status", choices=STATUSES, help="only of this status")
    listing.add_argument("--license", help="only under a matching license")
    listing.add_argument("--pinned", action="store_true", help="only those with a recorded digest")
    fetching.add_argument("--to", type=folder, metavar="DIR", help="copy into this mirror folder")
    fetching.add_argument("--again", action="store_true", help="download even what is cached")
    weights_publishing.add_parsers(verbs)


def _list_entries(args: argparse.Namespace) -> int:
    """Print a line an entry."""
    entries = [
        entry
        for entry in _selected(args)
        if args.status in (None, entry.status)
        and (args.license is None or fnmatch.fnmatch(entry.license, args.license.lower()))
        and (entry.sha256 or not args.pinned)
    ]
    lines = []
    for entry in entries:
        top1 = "-" if entry.top1 is None else f"{entry.top1:.1f}"
        pinned = "pinned" if entry.sha256 else "-"
        lines.append(
            f"{entry.name:48} {entry.status:10} {top1:>5} {pinned:6} {entry.license:20}"
            f" {entry.source}"
        )
    tell(args, [_facts(entry) for entry in entries], *lines)
    return 0


def _show(args: argparse.Namespace) -> int:
    """Print every field of the entries, and where their files are on this machine."""
    facts, lines = [], []
    for entry in _selected(args):
        copy = weights.local_copy(entry)
        facts.append(_facts(entry) | {"local copy": str(copy) if copy else None})
        known = {key: value for key, value in facts[-1].items() if value not in (None, (), [])}
        lines += [known.pop("name"), *(f"  {key}: {value}" for key, value in known.items())]
    tell(args, facts, *lines)
    return 0


def _fetch_files(args: argparse.Namespace) -> int:
    """Download; go on after a failure, and say so at the end."""
    if not args.names:
        raise UnknownModelError(
            "name what to fetch: a variant, a tag, or a pattern such as 'lsnet*'"
        )

    def fetched(entry: WeightsEntry) -> str:
        path = weights.fetch(entry, cache_dir=args.cache_dir, again=args.again)
        if args.to is None:
            return str(path)
        place = weights.mirror_path(entry, args.to)
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as file:
            shutil.copyfile(path, file)
        return str(place)

    entries = _selected(args)
    chosen = [entry for entry in entries if entry.available]
    return _each(args, chosen or entries, fetched)


def _verify_files(args: argparse.Namespace) -> int:
    """Check what is on this machine; 1 where a file is not the recorded one."""

    def verified(entry: WeightsEntry) -> str:
        path = weights.local_copy(entry, args.cache_dir)
        if path is None:
            return "not here"
        weights.verify(path, entry)
        return f"{'verified' if entry.sha256 else 'no digest recorded'}: {path}"

    entries = _selected(args)
    if not args.names:
        entries = [entry for entry in entries if weights.local_copy(entry, args.cache_dir)]
    return _each(args, entries, verified)


def _lock(args: argparse.Namespace) -> int:
    """Record digests, one entry at a time, so that an interruption loses little."""
    path = _manifest(args).path

    def locked(entry: WeightsEntry) -> str:
        pin = weights.measure_pin(entry, cache_dir=args.cache_dir)
        weights.write_pin(path, entry.name, pin)
        return f"sha256 {pin.sha256}, {pin.size} bytes, revision {pin.revision}"

    entries = [entry for entry in _selected(args) if entry.available]
    if not args.names:
        entries = [entry for entry in entries if entry.sha256 is None]
    return _each(args, entries, locked)


def _each(
    args: argparse.Namespace, entries: list[WeightsEntry], action: Callable[[WeightsEntry], str]
) -> int:
    """Run an action over entries and print what it says; 1 where it failed for any."""
    results: dict[str, dict[str, str]] = {}
    for entry in entries:
        try:
            results[entry.name] = {"ok": action(entry)}
        except (BackbonesError, OSError) as error:
            results[entry.name] = {"error": str(error)}
        if not args.json:
            ((kind, text),) = results[entry.name].items()
            print(f"{entry.name}: {'error: ' if kind == 'error' else ''}{text}", flush=True)
    tell(args, results)
    return 1 if any("error" in result for result in results.values()) else 0


def _manifest(args: argparse.Namespace) -> Manifest:
    return read_manifest(args.manifest) if args.manifest else load_manifest()


def _selected(args: argparse.Namespace) -> list[WeightsEntry]:
    """Return the entries of the names given: a variant stands for all its tags."""
    manifest = _manifest(args)
    chosen: dict[str, WeightsEntry] = {}
    for given in args.names or ["*"]:
        name = registry.aliases.get(given, given)
        found = {
            key: entry
            for key, entry in manifest.entries.items()
            if fnmatch.fnmatch(key, name) or fnmatch.fnmatch(entry.variant, name)
        }
        if not found:
            choices = [*manifest.entries, *manifest.by_variant]
            raise UnknownModelError(f"no weights {name!r}{nearest(name, choices)}")
        chosen |= found
    return list(chosen.values())


def _facts(entry: WeightsEntry) -> dict[str, Any]:
    facts = dataclasses.asdict(entry)
    for key in ("variant", "tag", "where"):
        del facts[key]
    return {"name": entry.name, **facts}
