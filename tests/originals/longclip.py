"""Zhang et al. 2024, Long-CLIP: github.com/beichenzbc/Long-CLIP"""

import torch
from originals.common import import_from, main, openai_state, small_clip, without
from torch import Tensor

from miniclip import CLIPConfig, TextConfig, VisionConfig

CONFIG = CLIPConfig(  # the authors' code needs heads of width 64 and texts of 77 tokens
    VisionConfig(width=64, layers=1, heads=1, mlp_width=256, image_size=8, patch_size=4),
    TextConfig(
        width=64, layers=2, heads=1, mlp_width=256, vocab_size=20, context_length=77,
        bos_token_id=18, eos_token_id=19,
    ),
    embed_dim=5,
)  # fmt: skip


def ids() -> Tensor:
    """Token ids (2, 248): a text of 100 tokens and a text of 248 tokens."""
    ids = torch.arange(2 * 248).view(2, 248).mul(7).remainder(18)
    ids[0, 99], ids[1, 247] = 19, 19
    return ids


def record(checkout: str) -> dict:
    import_from(checkout)
    without("torchvision.transforms")
    from model import longclip, model_longclip

    # Half precision and LayerNorms in float32 would hide a small difference.
    model_longclip.convert_weights = lambda model: model.double()
    model_longclip.LayerNorm.forward = torch.nn.LayerNorm.forward
    torch.jit.load = lambda *args, **options: (_ for _ in ()).throw(RuntimeError)
    torch.load = lambda *args, **options: openai_state(model=small_clip(CONFIG))
    torch.nn.Module.float = lambda self: self
    model, _ = longclip.load_from_clip(__file__, device="cpu")
    return {"positions": model.positional_embedding[:, ::16], "embeds": model.encode_text(ids())}


if __name__ == "__main__":
    main(record)
