"""CoOp: prompts made of learned vectors instead of words (Zhou et al. 2021, arXiv 2109.01134)."""

from torch import Tensor

from miniclip.follow import follow, tower_for
from miniclip.model import CLIP, unit_norm


def encode_prompts(model: CLIP, vectors: Tensor, eos: Tensor, *, normalize: bool = False) -> Tensor:
    """Embed texts that are given as token vectors: (B, T, W) -> (B, E).

    Args:
        vectors: the token embeddings of each text, from the start token to the end token.
        eos: (B,), the position of each text's end token.
        normalize: whether to scale the embeddings to length 1.

    >>> import torch
    >>> from miniclip import load
    >>> model, tokenizer, _ = load("shapes")
    >>> ids = tokenizer(["a red circle"])
    >>> vectors = model.text.token_embed(ids)
    >>> same = encode_prompts(model, vectors, model.text.eos_positions(ids))
    >>> torch.equal(same, model.encode_text(ids))
    True
    """
    tower = tower_for(model, eos)
    follow("encode_prompts", tower, ("forward", "embed_tokens"))
    x = tower.proj(tower.pool(tower.blocks(tower.add_positions(vectors)), eos))  # (B, E)
    return unit_norm(x) if normalize else x
