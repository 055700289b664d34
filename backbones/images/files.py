"""The image files below a folder, or inside a tar archive, and what is there besides them."""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from backbones.errors import DataError
from backbones.images.opening import open_image

__all__ = ["ImageFiles", "list_images", "read_names", "read_text", "some"]

# Made by synchronizing disks, archives and desktops; compared in lower case.
_MACHINE_MADE = {
    *("@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
# Formats of which Pillow knows no more than the name, or that need another program.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SPLITS = (
    ("train", "training"),
    ("validation", "val", "valid", "eval", "evaluation"),
    ("test", "testing"),
)
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class ImageFiles:
    """Images in a folder or archive, in natural order.

    `place` is the folder, or the archive (with a folder in it), for messages. `paths` of images,
    `folders` (the uppermost ones), files of `other` kinds, and hidden or machine-made files and
    folders (`hidden`) are relative to it, with forward slashes.
    """

    place: Path
    paths: tuple[str, ...]
    folders: tuple[str, ...]
    other: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    archive: "_Archive | None" = field(default=None, repr=False)
    inner: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, path: str, mode: str = "RGB", **options: Any) -> Image.Image:
        """Decode one of the images; arguments are those of `open_image`."""
        if self.archive is None:
            return open_image(self.place / path, mode, **options)
        content = self.archive.read(self.inner + path)
        return open_image(content, mode, name=self.place / path, **options)

    def below(self, folder: str) -> "ImageFiles":
        """Return what is in one of the folders."""

        def within(paths: Sequence[str]) -> tuple[str, ...]:
            start = folder + "/"
            return tuple(path[len(start) :] for path in paths if path.startswith(start))

        paths, other = within(self.paths), within(self.other)
        here = self.place / folder
        folders = set(_uppermost(paths) + _uppermost(other))
        if self.archive is None:
            folders |= {e.name for e in os.scandir(here) if e.is_dir() and not _is_hidden(e.name)}
        return replace(
            self,
            place=here,
            paths=paths,
            folders=tuple(sorted(folders, key=_natural)),
            other=other,
            hidden=within(self.hidden),
            inner=f"{self.inner}{folder}/",
        )

    def split(self, name: str) -> "ImageFiles | None":
        """Return the images of a split, also under its other usual names and in other cases of
        letters; None without one."""
        kin = next((names for names in _SPLITS if name.lower() in names), ())
        by_name = {folder: folder for folder in self.folders}
        by_name = {**{f.lower(): f for f in self.split_folders}, **by_name}
        found = next((by_name[one] for one in (name, *kin) if one in by_name), None)
        usual = found is not None and found.lower() in _ALL_SPLITS
        if found is None or (usual and found not in self.split_folders):
            return None
        return self.below(found)

    @property
    def split_folders(self) -> list[str]:
        """Folders that are called as splits are, and are not classes beside others."""
        loose = {up for up, slash, rest in map(_parted, self.paths) if slash and "/" not in rest}
        classes = {folder for folder in loose if folder.lower() not in _ALL_SPLITS}
        named = [folder for folder in self.folders if folder.lower() in _ALL_SPLITS]
        return [folder for folder in named if not (classes and folder in loose)]

    def left_out(self) -> list[str]:
        """Return a line on files of other kinds and one on hidden ones, where there are any."""
        lines = []
        if self.other:
            kinds = Counter(
                PurePosixPath(path).suffix.lower() or "no suffix" for path in self.other
            )
            counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            lines.append(f"{_files(self.other)} of other kinds left out: {counts}")
        if self.hidden:
            lines.append(
                f"{len(self.hidden)} hidden or machine-made left out: {some(self.hidden, _SHOWN)}"
            )
        return lines


def list_images(place: str | PathLike[str]) -> ImageFiles:
    """Find the images in any depth of a folder or of an uncompressed tar archive.

    Every format that Pillow reads counts, by the suffix in any case of letters. Names that begin
    with a dot and what disks and desktops leave behind (``@eaDir``, ``__MACOSX``, ``Thumbs.db``)
    are no images, and nothing in such folders is. An archive that holds one folder is as that
    folder.

    Raises:
        DataError: no such folder or archive, or one that cannot be read.
    """
    place = Path(place)
    if place.is_dir():
        return _sorted_out(place, _walk(place), None)
    if not place.exists():
        raise DataError(f"{place}: no such folder")
    files = _sorted_out(place, *_open_tar(place))
    while len(files.folders) == 1 and files.folders[0].lower() not in _ALL_SPLITS:
        if any(path.count("/") < 2 for path in files.paths):
            break
        files = files.below(files.folders[0])
    return files


def read_names(path: str | PathLike[str]) -> list[str]:
    """Return the lines of a text file of class names, one a line.

    A byte order mark, Windows line ends and empty lines at the end do not matter.

    Raises:
        DataError: there is no such text file.
    """
    text = read_text(path, "give a text file, one class a line")
    return [line.strip() for line in text.rstrip().split("\n")]


def read_text(path: str | PathLike[str], way_out: str) -> str:
    """Return what a text file in UTF-8 says, without byte order mark, with plain line ends.

    Raises:
        DataError: there is no such text file; the message ends with `way_out`.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise DataError(f"{path}: {reason}; {way_out}") from error


def some(names: Sequence[str], most: int) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Archive:
    """Files of an uncompressed tar, read by their place in it, so that processes may share it."""

    def __init__(self, path: Path, spans: Mapping[str, tuple[int, int]]) -> None:
        self.path, self.spans = path, spans

    def read(self, name: str) -> io.BytesIO:
        """Return the content of a file."""
        offset, size = self.spans[name]
        with self.path.open("rb") as stream:
            stream.seek(offset)
            return io.BytesIO(stream.read(size))


_ALL_SPLITS = {name for names in _SPLITS for name in names}


def _open_tar(path: Path) -> tuple[list[str], _Archive]:
    try:
        with tarfile.open(path, "r:") as tar:
            spans = dict(_spans(tar))
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: neither a folder nor a whole, uncompressed tar archive ({error}); unpack it"
        ) from error
    with path.open("rb") as stream:
        stream.seek(end)
        # An archive ends with blocks of zeros; one that was cut between two files does not.
        whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if not whole:
        raise DataError(f"{path}: the archive is cut short; fetch it again")
    return list(spans), _Archive(path, spans)


def _spans(
    tar: tarfile.TarFile, start: int = 0, folder: str = ""
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, place and size of each file; an archive inside counts as a folder."""
    for member in tar:
        name = folder + member.name.lstrip("/").removeprefix("./")
        inner = tar.extractfile(member) if member.isfile() else None
        if inner is not None and name.endswith(".tar"):
            with tarfile.open(fileobj=inner, mode="r:") as within:
                yield from _spans(within, start + member.offset_data, name[: -len(".tar")] + "/")
        elif inner is not None:
            yield name, (start + member.offset_data, member.size)


def _walk(root: Path) -> Iterator[str]:
    """Yield files and, ending in a slash, folders; those in hidden folders are not looked for."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    seen = set()
    for here, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(here)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        inner = Path(here).relative_to(root).as_posix()
        start = "" if inner == "." else f"{inner}/"
        yield from (f"{start}{name}/" for name in folders)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (start + name for name in names)


def _sorted_out(place: Path, found: Iterable[str], archive: _Archive | None) -> ImageFiles:
    suffixes = _suffixes()
    images: list[str] = []
    other: list[str] = []
    folders: set[str] = set()
    hidden: dict[str, None] = {}
    for path in found:
        parts = path.rstrip("/").split("/")
        bad = next((i for i, part in enumerate(parts) if _is_hidden(part)), None)
        if bad is not None:
            inside = bad + 1 < len(parts) or path.endswith("/")
            hidden["/".join(parts[: bad + 1]) + ("/" if inside else "")] = None
            continue
        if len(parts) > 1 or path.endswith("/"):
            folders.add(parts[0])
        if not path.endswith("/"):
            (images if PurePosixPath(path).suffix.lower() in suffixes else other).append(path)
    groups: tuple[Iterable[str], ...] = (images, folders, other, hidden)
    images_, folders_, other_, hidden_ = (tuple(sorted(group, key=_natural)) for group in groups)
    return ImageFiles(place, images_, folders_, other_, hidden_, archive)


def _suffixes() -> set[str]:
    Image.init()
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NOT_READ}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _MACHINE_MADE


def _uppermost(paths: Sequence[str]) -> list[str]:
    return [folder for folder, slash, _ in map(_parted, paths) if slash]


def _parted(path: str) -> tuple[str, str, str]:
    return path.partition("/")


def _files(paths: Sequence[str]) -> str:
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''}"


def _natural(text: str) -> tuple[list[Any], str]:
    """Return a key by which 2 comes before 10, as timm orders classes and files."""
    parts: list[Any] = re.split(r"(\d+)", text.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, text
