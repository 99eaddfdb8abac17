"""Context managers that ablate, patch, replace or leave out a part of a model's computation."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from miniclip.files.checks import numbers
from miniclip.follow import follow
from miniclip.model import CLIP, VisionTower
from miniclip.sites import Edit, hooks
from miniclip.surgery.weights import copied


@contextmanager
def ablate_heads(
    model: CLIP, tower: str, heads: Mapping[int, Collection[int]], mode: str = "zero"
) -> Iterator[None]:
    """Switch off heads while the `with` block is open.

    The ablation of Gandelsman et al. 2023, `lens.ablate_contributions`, changes only the embedding.

    Args:
        heads: {layer: [head, ...]}. Raises ValueError for a layer or head that does not exist, and
            for a fork's attention that does not run its site `z`.
        mode: "zero" removes what a head adds to the residual stream, as `prune_heads` does.
            "mean" replaces a head's output with its mean over the batch, separately for each token.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> with ablate_heads(model, "vision", {2: [0, 1], 3: [2]}):
    ...     without = model.encode_image(pixels)
    """
    if mode not in ("zero", "mean"):
        raise ValueError(f"mode is {mode!r}; expected 'zero' or 'mean'")
    chosen = {f"{tower}.blocks.{layer}.attn": list(some) for layer, some in heads.items()}
    silenced: set[str] = set()

    def silence(z: Tensor, name: str) -> Tensor:  # (B, T, H, D)
        attn = name.removesuffix(".z")
        silenced.add(attn)
        some = numbers(chosen[attn], z.shape[2], name, "heads")
        z = z.clone()
        z[:, :, some] = 0 if mode == "zero" else z[:, :, some].mean(0)
        return z

    def check(out: Tensor, name: str) -> None:
        if name not in silenced:
            raise ValueError(
                f"ablate_heads edits the site `z`, but the attention {name} has not run this site"
            )

    edits: dict[str, Edit] = {f"{name}.z": silence for name in chosen}
    with hooks(model, edits | dict.fromkeys(chosen, check)):
        yield


def patch_from(
    acts: Mapping[str, Tensor],
    *,
    positions: Tensor | Sequence | slice = slice(None),
    heads: Collection[int] | None = None,
) -> dict[str, Edit]:
    """Make functions for `hooks` that replace a run's tensors with cached tensors.

    This is activation patching (Meng et al. 2022, arXiv 2202.05262).

    Args:
        acts: tensors (B, T, ...) of another run with the same shapes, from `cache`.
        positions: the tokens to replace (in a pattern, the query tokens). (B,) means one token of
            each input. (B, k) means k tokens of each input. A slice or (1, k) means the same tokens
            of all inputs.
        heads: the heads to replace, at the sites attn.q, k, v, scores, pattern and z.

    >>> from miniclip import CLIP
    >>> from miniclip.sites import cache
    >>> model, (one, other) = CLIP.from_pretrained("shapes"), torch.rand(2, 1, 3, 64, 64)
    >>> with cache(model, "vision.blocks.1") as acts: expected = model.encode_image(one)
    >>> with hooks(model, patch_from(acts)): found = model.encode_image(other)
    >>> torch.equal(found, expected)
    True
    """

    def patch(tensor: Tensor, name: str) -> Tensor:
        source = acts[name]
        if source.shape != tensor.shape:
            raise ValueError(
                f"{name}: the cached tensor has shape {tuple(source.shape)}, but this run's "
                f"tensor has shape {tuple(tensor.shape)}; expected the same number of inputs and "
                "the same number of tokens"
            )
        site = name.removesuffix(".input")
        is_pattern = site.endswith((".scores", ".pattern"))  # (B, H, T, T)
        has_heads = is_pattern or site.endswith((".q", ".k", ".v", ".z"))  # (B, T, H, D)
        if heads is not None and not has_heads:
            raise ValueError(f"{name} has no heads to choose from; expected a site such as attn.z")
        if positions != slice(None) and not has_heads and tensor.ndim != 3:
            raise ValueError(f"{name} has no tokens to choose from; expected a tensor (B, T, ...)")
        B, T = tensor.shape[0], tensor.shape[2 if is_pattern else 1]
        places = torch.arange(T)[positions][None] if isinstance(positions, slice) else positions
        places = torch.as_tensor(places, device=tensor.device)
        if places.ndim not in (1, 2) or len(places) not in (1, B):
            raise ValueError(
                f"positions have shape {tuple(places.shape)}; expected ({B},) or ({B}, k) for "
                "tokens of each input, or (1, k) for the same tokens of all inputs"
            )
        chosen = torch.zeros(B, T, dtype=torch.bool, device=tensor.device)
        rows = torch.arange(B, device=tensor.device)[:, None]
        chosen[rows, places.view(len(places), -1)] = True
        chosen = chosen.view(B, T, *[1] * (tensor.ndim - 2))
        if heads is not None:
            count = tensor.shape[1 if is_pattern else 2]
            wanted = torch.zeros(count, 1, dtype=torch.bool, device=tensor.device)
            wanted[numbers(heads, count, name, "heads")] = True
            chosen = chosen & wanted  # (B, T, H, 1)
        chosen = chosen.transpose(1, 2) if is_pattern else chosen
        return torch.where(chosen, source.to(tensor), tensor)

    return dict.fromkeys(acts, patch)


@contextmanager
def splice(model: CLIP, site: str, module: nn.Module, error_term: bool = False) -> Iterator[None]:
    """Send the tensor at a site through your own module: an adapter, or a sparse autoencoder.

    Args:
        site: a name or a glob.
        module: its output must have the shape of its input.
        error_term: add the autoencoder's reconstruction error back as a constant (Marks et al.
            2024, arXiv 2403.19647). The model's output then does not change. Gradients pass through
            the autoencoder's features. `hooks` on the autoencoder still change the output.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> with splice(model, "vision.blocks.2", nn.Identity()): spliced = model.encode_image(pixels)
    >>> torch.equal(spliced, model.encode_image(pixels))
    True
    """
    # The error term needs the module's output without hooks, or it would cancel the hooks' effect.
    unhooked = copied(module, shares_weights=True) if error_term else module

    def through(tensor: Tensor, name: str) -> Tensor:
        out = module(tensor)
        return out + (tensor - unhooked(tensor)).detach() if error_term else out

    with hooks(model, {site: through}):
        yield


@contextmanager
def move_to_registers(
    model: CLIP, neurons: Mapping[int, Collection[int]], count: int = 1, scale: float = 1.0
) -> Iterator[None]:
    """Let neurons write to new tokens, not to patches, while the `with` block is open.

    These are test-time registers, which need no training (Jiang et al. 2025, arXiv 2506.08010). The
    activation at the new tokens is `scale` * m. As in the authors' code, m is one number for each
    image and layer. It is the activation with the largest absolute value, over all tokens and all
    chosen neurons. In the text of the paper, each neuron moves its own largest activation, and its
    activations at all other tokens become 0.

    Args:
        neurons: {layer: [neuron, ...]}. Their activations become 0 at the patches, and do not
            change at the class token.
        count: the number of new tokens. They are zero before `ln_pre`, and come before the patches.

    >>> from miniclip import CLIP
    >>> model, pixels = CLIP.from_pretrained("shapes"), torch.zeros(1, 3, 64, 64)
    >>> with move_to_registers(model, {1: [3, 50], 2: [7]}): moved = model.encode_image(pixels)
    >>> torch.equal(moved, model.encode_image(pixels))
    False
    """
    tower = model.vision
    own = ("forward", "embed_tokens", "pool")
    follow("move_to_registers", tower, own, attention=("forward", "qkv"), mlp=("forward",))
    first = 1 + tower.config.registers
    patches = first + count

    def add_tokens(x: Tensor, name: str) -> Tensor:  # (B, 1 + R + P, W)
        zeros = x.new_zeros(len(x), count, x.shape[-1])
        return torch.cat([x[:, :first], zeros, x[:, first:]], dim=1)

    def move(act: Tensor, name: str) -> Tensor:
        chosen = numbers(neurons[int(name.split(".")[2])], act.shape[-1], name, "neurons")
        highest, lowest = act[..., chosen].amax((1, 2)), act[..., chosen].amin((1, 2))  # (B,)
        most = torch.where(highest.abs() > lowest.abs(), highest, lowest)
        act = act.clone()
        act[:, first:patches, chosen] = scale * most[:, None, None]
        act[:, patches:, chosen] = 0
        return act

    moves: dict[str, Edit] = {f"vision.blocks.{layer}.mlp.act": move for layer in neurons}
    with hooks(model, moves | {"vision.ln_pre.input": add_tokens}):
        yield


@contextmanager
def patch_dropout(model: CLIP, share: float) -> Iterator[None]:
    """Leave out a random `share` of each image's patches in training mode. See PatchDropout.

    Raises ValueError for a share outside [0, 1).

    >>> from miniclip import CLIP
    >>> from miniclip.sites import cache
    >>> model, pixels = CLIP.from_pretrained("shapes").train(), torch.zeros(1, 3, 64, 64)
    >>> with patch_dropout(model, 0.75), cache(model, "vision.blocks.0") as acts:
    ...     _ = model.encode_image(pixels)
    >>> acts["vision.blocks.0"].shape[1]  # the class token and 16 of 64 patches
    17
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}; expected 0 or more, and less than 1")
    with closing(PatchDropout(model.vision, share)):
        yield


class PatchDropout:
    """A hook for training on a random part of each image's patches.

    This is FLIP (Li et al. 2022, arXiv 2212.00794). The hook edits the output of `vision.ln_pre`,
    the residual stream before the first block. The class token and registers stay. The remaining
    patches keep their order and their positions.
    """

    def __init__(self, tower: VisionTower, share: float) -> None:
        follow("patch_dropout", tower, ("forward", "embed_tokens"), attention=("forward", "qkv"))
        self.share = share
        self.ahead = 1 + tower.config.registers  # tokens before the patches
        self.close = tower.ln_pre.register_forward_hook(self).remove

    def __call__(self, module: nn.Module, inputs: object, x: Tensor) -> Tensor:
        if not module.training or not self.share:
            return x
        batch, tokens, width = x.shape
        patches = tokens - self.ahead
        kept = max(1, round(patches * (1 - self.share)))
        order = torch.rand(batch, patches, device=x.device).argsort(dim=1)
        chosen = order[:, :kept].sort(dim=1).values + self.ahead  # (B, kept)
        ahead = torch.arange(self.ahead, device=x.device).expand(batch, -1)
        chosen = torch.cat([ahead, chosen], dim=1)
        return x.gather(1, chosen[:, :, None].expand(-1, -1, width))
