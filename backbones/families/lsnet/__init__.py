"""LSNet."""

from backbones.families.lsnet.attention import DistanceAttention, attend
from backbones.families.lsnet.model import LSNet

__all__ = ["DistanceAttention", "LSNet", "attend"]
