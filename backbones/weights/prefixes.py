"""Where in a checkpoint a model lies: below which prefix, and between which wrappers' names.

Names differ between layouts, so that a place is first looked for by the shapes of what lies there.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from torch import Tensor

__all__ = ["overlap", "prefixes", "without_inner_words"]

_MAX_WORDS = 10  # of a prefix
_MAX_LENGTH = 200
_MAX_NODES = 64  # whose shapes are looked at
_MAX_PREFIXES = 8  # each costs a look at every key in every layout


def overlap(tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> int:
    """Return how many of a model's entries have a shape that some tensor has, each used once."""
    return (Counter(map(_shape, tensors.values())) & Counter(map(_shape, present.values()))).total()


def prefixes(tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes, with dot, below which a model's entries may lie, the likeliest first.

    Equal ones are in order of their length. A prefix below which lies less than half of what the
    likeliest has is left out.
    """
    counts: Counter[str] = Counter()
    for key in tensors:
        counts.update(_prefixes_of(key))
    nodes = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))[:_MAX_NODES]
    below: dict[str, Counter[tuple[int, ...]]] = {prefix: Counter() for prefix in nodes}
    for key, tensor in tensors.items():
        shape = _shape(tensor)
        for prefix in _prefixes_of(key):
            if prefix in below:
                below[prefix][shape] += 1
    wanted = Counter(map(_shape, present.values()))
    found = {prefix: (shapes & wanted).total() for prefix, shapes in below.items()}
    least = max(found.values(), default=0) / 2
    likely = [prefix for prefix in nodes if found[prefix] >= least]
    return sorted(likely, key=lambda prefix: (-found[prefix], len(prefix), prefix))[:_MAX_PREFIXES]


def without_inner_words(
    tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]
) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """Yield the tensors without words that a wrapper of inner modules put in, and these words.

    First words as PyTorch's wrappers call what they wrap (``_orig_mod``, ``_fsdp_wrapped_module``,
    ``module``); then every word that, wherever it stands, has nothing beside it, as the one child
    of a wrapper has. Words of the model's own names stay.
    """
    own = {word for key in present for word in key.split(".")}
    beside: defaultdict[str, set[str]] = defaultdict(set)
    above: defaultdict[str, set[str]] = defaultdict(set)
    for key in tensors:
        for prefix in filter(None, _prefixes_of(key)):
            parent, _, word = prefix[:-1].rpartition(".")
            beside[parent].add(word)
            if word not in own and not word.isdecimal():
                above[word].add(parent)
    private = {word for word in above if word.startswith("_") or word == "module"}
    alone = {word for word in above if all(beside[parent] == {word} for parent in above[word])}
    for words in dict.fromkeys((frozenset(private), frozenset(private | alone))):
        if not words:
            continue
        renamed: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            *path, name = key.split(".")
            renamed[".".join([*(word for word in path if word not in words), name])] = tensor
        if len(renamed) == len(tensors):
            yield renamed, tuple(sorted(words))


def _prefixes_of(key: str) -> Iterator[str]:
    """Yield the prefixes of a key, from the empty one on."""
    end = 0
    for _ in range(_MAX_WORDS + 1):
        yield key[:end]
        end = key.find(".", end) + 1
        if not 0 < end <= _MAX_LENGTH:
            break


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a shape without dimensions of size 1, which differ between layouts."""
    return tuple(size for size in tensor.shape if size != 1)
