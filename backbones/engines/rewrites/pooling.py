"""Pooling of whole maps as reductions."""

from timm.layers import SelectAdaptivePool2d

__all__ = ["pool_by_reductions"]


def pool_by_reductions(pool: SelectAdaptivePool2d) -> SelectAdaptivePool2d:
    """Let timm's pooling of whole maps reduce height and width, in place.

    Of maps in channels last the adaptive average restores the layout of its single position:
    exported, that is a look-up by integers that the file computes.
    """
    kind = pool.pool_type
    if kind and not kind.startswith("fast"):
        pool.pool = SelectAdaptivePool2d(pool_type=f"fast{kind}").pool
    return pool
