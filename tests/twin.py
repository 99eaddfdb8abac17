"""A miniclip CLIP and a transformers CLIPModel with the same weights, every one of them random.

Freshly initialised weights hide faults: a bias that is zero can be lost, a LayerNorm that is the
identity can be swapped with another. So every parameter is redrawn, and the logit scale is ln 100,
the largest that OpenAI's training allows, at which rounding shows most.
"""

import math
import re

import torch
import transformers
from torch import Tensor, nn

from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig
from miniclip.checkpoint import TRANSFORMERS, layout_name

# The two towers differ in every number they can differ in, so that none can stand in for another.
TINY = CLIPConfig(
    vision=VisionConfig(
        width=48, layers=3, heads=4, mlp_width=100, image_size=40, patch_size=8, ln_eps=2e-5
    ),
    text=TextConfig(
        width=40, layers=2, heads=2, mlp_width=92, vocab_size=600, context_length=20,
        bos_token_id=598, eos_token_id=599,
    ),
    embed_dim=36,
)  # fmt: skip


def twins(
    config: CLIPConfig,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[CLIP, transformers.CLIPModel]:
    """(ours, theirs), in evaluation mode. No tensor is shared: a change to one leaves the other."""
    with torch.device("meta"):
        ours = CLIP(config)
        theirs = transformers.CLIPModel._from_config(
            transformers_config(config), attn_implementation=attention
        )
    randomize(ours.to_empty(device="cpu"), seed)
    ours.to(device, dtype).set_attention(attention)
    copy_weights(ours, theirs)
    return ours.eval(), theirs.eval()


def copy_weights(ours: CLIP, theirs: transformers.CLIPModel) -> None:
    """Give theirs a copy of our weights, in our precision and on our device."""
    weights = ours.state_dict().items()
    copies = {layout_name(name, TRANSFORMERS): weight.detach().clone() for name, weight in weights}
    theirs.load_state_dict(copies, strict=True, assign=True)
    for module in theirs.modules():  # a buffer that no checkpoint has, still on the meta device
        if isinstance(getattr(module, "position_ids", None), Tensor):
            count = module.position_ids.shape[-1]
            module.position_ids = torch.arange(count, device=ours.logit_scale.device)[None]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter, so that activations keep a size near 1 and each weight counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.fill_(math.log(100))
            continue
        is_table = name.endswith(("token_embed.weight", "pos_embed"))
        std = 0.3 if parameter.ndim < 2 or is_table else parameter[0].numel() ** -0.5
        mean = 1.0 if re.search(r"ln_\w+\.weight$", name) else 0.0
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, std, generator=generator))


def random_inputs(
    config: CLIPConfig, images: int = 2, texts: int = 3, tokens: int = 9, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise (images, channels, S, S), and ids (texts, tokens) whose end token moves from row to row
    and is followed by random ids, as no padding is fixed."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    size = (images, vision.channels, vision.image_size, vision.image_size)
    ids = torch.randint(3, text.vocab_size - 2, (texts, tokens), generator=generator)
    end = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1
    rows = torch.arange(texts)
    ids[rows, tokens - 1 - rows % (tokens - 1)] = end
    return torch.randn(size, generator=generator), ids


def transformers_config(config: CLIPConfig) -> transformers.CLIPConfig:
    """Written out field by field: miniclip's own `to_dict` is one of the things under test."""
    vision, text = config.vision, config.text
    return transformers.CLIPConfig(
        projection_dim=config.embed_dim,
        logit_scale_init_value=config.logit_scale_init,
        vision_config=dict(
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.mlp_width,
            hidden_act=vision.act,
            layer_norm_eps=vision.ln_eps,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.channels,
            projection_dim=config.embed_dim,
        ),
        text_config=dict(
            hidden_size=text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            intermediate_size=text.mlp_width,
            hidden_act=text.act,
            layer_norm_eps=text.ln_eps,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            projection_dim=config.embed_dim,
        ),
    )
