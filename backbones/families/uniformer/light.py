"""UniFormer's light form: attention over half of the tokens, the others held by one.

Source: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (arXiv
2201.09450), section 5, "Hourglass UniFormer". A class token goes along, and every token has a
score: how much the class token has attended to it. The score is at least float32 and passes from
block to block beside the feature map; nothing is kept between calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import Tensor, nn

from backbones.families.uniformer.blocks import AttentionBlock, scaled
from backbones.layers import Head, fx_leaf
from backbones.stages import Stage

__all__ = [
    "FullBlock",
    "PrunedBlock",
    "State",
    "TokenStage",
    "condense",
    "pooled",
    "rescore",
    "restore",
]

# Feature map (B, C, H, W), class token (B, 1, C), score of each position (B, N).
State = tuple[Tensor, Tensor, Tensor]


def _normalized(scores: Tensor) -> Tensor:
    """Divide scores (B, N), none of them negative, by their sum."""
    return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


@fx_leaf
def pooled(score: Tensor, size: Sequence[int]) -> Tensor:
    """Return the scores (B, N) of a map of this size at half the height and width.

    Their sum stays, also where an odd last row or column is left out.
    """
    halved = F.avg_pool2d(score.unflatten(1, size).unsqueeze(1), 2).flatten(1)
    return _normalized(halved) * score.sum(1, keepdim=True)


@fx_leaf
def condense(tokens: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Return which half of the tokens scores highest, (B, K), and these with one for all others.

    Args:
        tokens: (B, N, C).
        score: (B, N).

    Returns:
        Positions of the K = N // 2 tokens in no certain order, (B, K), and a sequence
        (B, K + 1, C): these tokens, then the mean of the others, weighted by their scores.
    """
    index = _best(score, tokens.shape[1] // 2)
    if tokens.shape[1] == 1:  # as it is, for OpenVINO joins and scatters no empty tensors
        return index, tokens
    weights = _normalized(score.scatter(1, index, 0.0)).to(tokens.dtype)
    rest = weights.unsqueeze(1) @ tokens  # B 1 C
    return index, torch.cat((tokens.gather(1, _spread(index, tokens)), rest), dim=1)


@fx_leaf
def restore(tokens: Tensor, index: Tensor, chosen: Tensor, change: Tensor) -> Tensor:
    """Return all tokens (B, N, C): `chosen` (B, K, C) at `index`, the others changed alike.

    `change` (B, 1, C) is added to the others.
    """
    others = (tokens + change).to(chosen.dtype)
    if tokens.shape[1] == 1:
        return others
    return others.scatter(1, _spread(index, tokens), chosen)


@fx_leaf
def rescore(score: Tensor, index: Tensor, attention: Tensor) -> Tensor:
    """Return the mean of old and new scores (B, N) for the tokens at `index`, old ones elsewhere.

    `attention` (B, K + 1) is what the class token pays to each of them and to the one for the rest.
    Of one or two tokens the only other one takes the latter, as in the authors' code, which takes
    such a map to be whole.
    """
    others = score if score.shape[1] > 2 else (score + attention[:, -1:]) / 2
    if score.shape[1] == 1:
        return others
    return others.scatter(1, index, (score.gather(1, index) + attention[:, :-1]) / 2)


def _best(score: Tensor, count: int) -> Tensor:
    """Return where a row of scores (B, N) is highest, (B, count); of equals the first ones.

    A fresh model's scores are all equal, and which of equals `topk` takes differs between engines.
    """
    best = score.topk(count).indices
    if count == 0:
        return best
    # Not by the values of `topk`: of these alone LiteRT's converter makes a sort, which it lacks.
    least = score.gather(1, best).amin(1, keepdim=True)  # B 1
    # In numbers, as not all programs that read exported files know truth values.
    sign = (score - least).sign()
    above, equal = sign.relu().float(), (1 - sign.abs()).float()  # B N, 1 or 0
    room = count - above.sum(1, keepdim=True)
    fits = (room + 1 - equal.cumsum(1)).clamp(0, 1)
    chosen = above + equal * fits  # as many ones as asked for
    return chosen.topk(count).indices


def _spread(index: Tensor, tokens: Tensor) -> Tensor:
    """Return an index (B, K) for all channels of tokens (B, N, C), (B, K, C)."""
    return index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])


class FullBlock(AttentionBlock):
    """The first block with a class token: attention over all tokens, which gives the score."""

    def forward(self, state: tuple[Tensor, Tensor]) -> State:  # type: ignore[override]
        x, token = state  # token: 1 1 C
        x = self.pos_conv(x)  # B C H W
        size = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # B N C
        y = torch.cat((token.expand(x.shape[0], -1, -1), tokens), dim=1)  # B 1+N C
        q, k, v = self.attn.heads(self.norm1(y))
        score = self.attn.first_row(q, k)[:, 1:]
        y = y + self.drop_path(scaled(self.attn.mix(q, k, v), self.gamma1))
        y = y + self.drop_path(self.mix_channels(y))
        return y[:, 1:].transpose(1, 2).unflatten(2, size), y[:, :1], score


class PrunedBlock(AttentionBlock):
    """Attention and MLP of the class token, the better half of the tokens and one for the others.

    The others are changed by what the branches add to the one that stands for them, which drop path
    spares. The new score of a token is the mean of its old one and of the attention paid to it.
    """

    def forward(self, state: State) -> State:  # type: ignore[override]
        x, token, score = state
        x = self.pos_conv(x)  # B C H W
        size = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # B N C
        index, few = condense(tokens, score)
        y = torch.cat((token, few), dim=1)  # B K+2 C
        q, k, v = self.attn.heads(self.norm1(y))
        score = rescore(score, index, self.attn.first_row(q, k)[:, 1:])
        mixed = scaled(self.attn.mix(q, k, v), self.gamma1)
        y = y + self.drop_path(mixed)
        changed = self.mix_channels(y)
        y = y + self.drop_path(changed)
        tokens = restore(tokens, index, y[:, 1:-1], (mixed + changed)[:, -1:])
        return tokens.transpose(1, 2).unflatten(2, size), y[:, :1], score


class TokenStage(Stage):
    """A stage of the light form: beside the feature map go the class token and the scores.

    Args:
        downsample: the patch embedding in front.
        blocks: where the class token comes in, first a `FullBlock`; then `PrunedBlock`.
        in_dim: channels of the class token that comes in; None where it comes in here.
        dim: channels of the stage.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        in_dim: int | None,
        dim: int,
    ) -> None:
        super().__init__(downsample, blocks)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if in_dim is None else None
        self.cls_proj = nn.Linear(in_dim, dim) if in_dim is not None else None
        self.maps = nn.Identity()  # whose output is the stage's feature map, for hooks
        self.aux_head: Head | None = None  # on the class token

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        token: Tensor | None = None,
        score: Tensor | None = None,
        checkpointing: bool = False,
    ) -> State:
        """Map the state after the stage before, at first a feature map alone, to that after this.

        Args:
            x: (B, C, H, W).
            token: (B, 1, C).
            score: (B, N).
            checkpointing: keep only what goes from block to block, and recompute the rest.
        """
        size = x.shape[-2:]
        x = self.downsample(x)  # B C' H' W'
        if self.cls_proj is None or token is None or score is None:
            state: Any = x, self.cls_token
        else:
            state = x, self.cls_proj(token), pooled(score, size)
        if checkpointing:
            state = checkpoint_seq(self.blocks, state, use_reentrant=False)
        else:
            state = self.blocks(state)
        x, token, score = state
        return self.maps(x), token, score

    def class_logits(self, token: Tensor) -> Tensor:
        """Return the auxiliary head's logits of a class token (B, 1, C), (B, num_classes)."""
        head: Any = self.aux_head
        return head(token.transpose(1, 2).unsqueeze(-1))  # as a map of one position

    def reparameterize(self) -> None:
        """Drop the auxiliary head, which only training uses."""
        self.aux_head = None
