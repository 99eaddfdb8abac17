"""Retrieval between images and their captions: ranks, and recall."""

from itertools import product

import numpy as np
import torch
from torch import Tensor

from miniclip.terminal import progress

BLOCK = 512, 4096  # the numbers of images and captions in one float32 matrix product
PAIRS = 65_536  # the number of pairs that are compared at once in float64


def retrieval_ranks(
    image_embeds: Tensor, text_embeds: Tensor, image_of: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the rank of each image's best caption, and the rank of each caption's image.

    Rank 1 is the best. An image's best caption is compared with the captions of other images. A
    caption's image is compared with all other images. If scores are equal, the smaller index
    ranks higher. As in `Index.search`, scores are computed in float32. If two scores are too close
    for float32, they are computed again in float64. Memory does not grow with the number of pairs.

    Args:
        image_embeds: unit vectors of images (N, E), float32.
        text_embeds: unit vectors of captions (M, E), float32.
        image_of: the image of each caption (M,). Each image has at least one caption.

    Returns:
        The ranks of the images (N,) and of the captions (M,).

    >>> retrieval_ranks(torch.eye(2), torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 1]))
    (tensor([1, 1]), tensor([1, 1, 2]))
    """
    n, m = len(image_embeds), len(text_embeds)
    if len(image_of.unique()) != n:
        raise ValueError(f"{n - len(image_of.unique())} of {n} images have no caption")

    def exact(images: Tensor, texts: Tensor) -> Tensor:
        some = zip(images.split(PAIRS), texts.split(PAIRS), strict=True)
        return torch.cat([(image_embeds[i].double() * text_embeds[j]).sum(1) for i, j in some])

    own = exact(image_of, torch.arange(m))  # (M,), the score of each caption with its image
    best_score = own.new_empty(n).scatter_reduce(0, image_of, own, "amax", include_self=False)
    is_best = (own == best_score[image_of]).nonzero().squeeze(1)
    first = torch.full((n,), m).scatter_reduce(0, image_of[is_best], is_best, "amin")  # (N,)

    # Twice the largest error of a float32 product, plus the rounding error of `wanted.float()`.
    rounding = (image_embeds.shape[1] + 4) * torch.finfo(torch.float32).eps
    image_ranks, text_ranks = torch.ones(n, dtype=torch.int64), torch.ones(m, dtype=torch.int64)
    parts = (torch.arange(count).split(size) for count, size in zip((n, m), BLOCK, strict=True))
    for i, j in progress([*product(*parts)], "block"):
        scores = image_embeds[i] @ text_embeds[j].T  # (B, C)
        # Autocast and torch.set_float32_matmul_precision may round this product to bfloat16.
        if not (scores[0] - exact(i[:1].expand(len(j)), j)).abs().max() <= rounding:
            scores = image_embeds[i].double() @ text_embeds[j].double().T
        for ranks, which, dim, wanted, place, wanted_place in (
            (image_ranks, i, 1, best_score[i, None], j[None, :], first[i, None]),
            (text_ranks, j, 0, own[None, j], i[:, None], image_of[None, j]),
        ):
            ahead = scores - wanted.float()  # (B, C)
            ranks[which] += (ahead > rounding).sum(dim)
            near = (ahead.abs() <= rounding) & (image_of[None, j] != i[:, None])
            rows, columns = near.nonzero(as_tuple=True)
            score = exact(i[rows], j[columns])
            wanted, place, wanted_place = (
                x.expand(near.shape)[rows, columns] for x in (wanted, place, wanted_place)
            )
            wins = (score > wanted) | ((score == wanted) & (place < wanted_place))
            winners = (rows if dim else columns)[wins]
            ranks[which] += winners.bincount(minlength=len(which))
    return image_ranks, text_ranks


def recall(ranks: Tensor) -> dict[str, float]:
    """Return recall@1, recall@5, recall@10 and the median rank.

    >>> recall(torch.tensor([1, 2, 7, 50]))
    {'recall@1': 0.25, 'recall@5': 0.5, 'recall@10': 0.75, 'median_rank': 4.5}
    """
    shares = {f"recall@{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return shares | {"median_rank": float(np.median(ranks.numpy()))}
