"""Token Merging: bipartite soft matching, merging and unmerging.

Source: arXiv 2210.09461, section 3. Tokens alternate between two sets A and B. Each token of A is
joined to the token of B that is most similar by cosine, the r most similar pairs are kept, and each
token of B becomes the mean of itself and of the tokens that are merged into it. Unmerging, which
dense prediction needs, gives every token the value of the one that it was merged into
(arXiv 2303.17604, section 3).

Shapes: B batch, N tokens before, M = N - r after, d channels.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def match(metric: Tensor, merged: int, front: int = 0, behind: int = 0) -> Tensor:
    """Return for each token the number of the merged token that it becomes part of: B x N.

    Merged tokens keep the order of those tokens that are merged into no other.

    Args:
        metric: What is compared, B x N x d.
        merged: Number r of tokens to merge, at most half.
        front, behind: Number of tokens at both ends that stay by themselves, such as class tokens.
    """
    count = metric.shape[1]
    own = torch.arange(count, device=metric.device).expand(len(metric), -1)
    tokens = F.normalize(metric[:, front:count - behind], dim=-1)
    similarity, nearest = _nearest(tokens[:, ::2], tokens[:, 1::2])
    chosen = similarity.topk(merged, -1).indices
    into = own.scatter(1, front + 2 * chosen, front + 2 * nearest.gather(1, chosen) + 1)
    return ((into == own).cumsum(1) - 1).gather(1, into)


def _nearest(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each vector of ``left`` the highest product with one of ``right``, and which."""
    held = 2**20 if left.device.type == 'cpu' else 2**26  # products at once: a cache's, or many
    parts = left.split(max(1, held // right.shape[1]), 1)
    values, indices = zip(*((part @ right.mT).max(-1) for part in parts))
    return torch.cat(values, 1), torch.cat(indices, 1)


def merge(x: Tensor, groups: Tensor, left: int) -> Tensor:
    """Average the tokens of each group: B x N x d to B x M x d, M = ``left``."""
    out = x.new_zeros(len(x), left, x.shape[-1])
    return out.scatter_reduce(1, groups[..., None].expand_as(x), x, 'mean', include_self=False)


def unmerge(x: Tensor, groups: Tensor) -> Tensor:
    """Give each token the value of its group: B x M x d to B x N x d."""
    return x.gather(1, groups[..., None].expand(-1, -1, x.shape[-1]))
