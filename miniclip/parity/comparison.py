"""Compare two CLIPs tensor by tensor, in the order data flows."""

from typing import TYPE_CHECKING, Any

import torch

from miniclip.checkpoint import Loaded
from miniclip.files.models import check_device
from miniclip.model import CLIP
from miniclip.parity.models import compare_models
from miniclip.parity.pixels import compare_transforms
from miniclip.parity.report import Report
from miniclip.parity.tokens import compare_tokenizers

if TYPE_CHECKING:
    from transformers import CLIPModel


def compare(
    model: "CLIP | CLIPModel | Loaded",
    other: "CLIP | CLIPModel | Loaded",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Report:
    """Run two models of one shape on the same random input; compare them site by site.

    If both come with a tokenizer and a transform, as from `miniclip.load`, `tokens` and `pixels`
    are the first sites. Then, for each tower: `embeddings`; for each block `resid_pre`, `q`, `k`,
    `v`, `pattern`, `attn_out`, `mlp_out`, `resid_post`; `pooled` and `projected`. Last come
    `logits` and every other tensor of the output. A site that one of the models lacks is left out.

    A fork will do if its modules have our names, or transformers' names. Both models are rounded to
    `dtype`, run uncompiled, and are then as they were. The float64 runs override explicit casts to
    float32, such as a float32 softmax. They do not count for weights that are one rounding apart.
    Raises ValueError for models of different depth, and for a model whose towers have no blocks.

    >>> from miniclip import load
    >>> report = compare(load("shapes"), load("shapes"))
    >>> report.first is None, report.rows[0].site, report.rows[-1].site
    (True, 'tokens', 'text_embeds')
    """
    check_device(device)
    ours, theirs = (_as_loaded(m) for m in (model, other))
    stages = []
    if ours.tokenizer and theirs.tokenizer:
        stages.append(compare_tokenizers(ours.tokenizer, theirs.tokenizer))
    if ours.transform and theirs.transform:
        stages.append(compare_transforms(ours.transform, theirs.transform))
    stages.append(compare_models(ours.model, theirs.model, dtype, torch.device(device), seed))
    rows = [row for stage, _ in stages for row in stage]
    first = next((row.site for row in rows if not row.within_tolerance), None)
    cause = next((cause for _, cause in stages if cause is not None), None)
    return Report(rows, first, cause)


def assert_parity(
    model: "CLIP | CLIPModel | Loaded", other: "CLIP | CLIPModel | Loaded", **options: Any
) -> None:
    """Raise an AssertionError that names the first site and the cause. For a fork's own tests.

    Arguments as for `compare`.

    >>> from miniclip import CLIP
    >>> assert_parity(CLIP.from_pretrained("shapes"), CLIP.from_pretrained("shapes"))
    """
    report = compare(model, other, **options)
    if report.first is not None:
        row = next(row for row in report.rows if row.site == report.first)
        raise AssertionError(
            f"{report}\nthere: absolute {row.absolute:.1e}, relative {row.relative:.1e}, "
            f"in float64 {row.float64:.1e}"
        )


def _as_loaded(model: "CLIP | CLIPModel | Loaded") -> Loaded:
    if isinstance(model, Loaded):
        return model
    nothing: Any = None
    return Loaded(model, nothing, nothing)
