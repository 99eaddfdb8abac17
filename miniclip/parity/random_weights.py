"""Random weights and random inputs at which a fault shows: no parameter is 0, 1 or a default."""

import math
import re

import torch
from torch import Tensor, nn

from miniclip.config import LEGACY_EOS, CLIPConfig, TextConfig


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter, so that activations keep a size near 1 and each weight counts.

    Initial weights hide faults: nobody sees a bias of zeros that is lost. The logit scale is
    ln 100, the largest that OpenAI's training allows. There rounding shows most.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.fill_(math.log(100))
            continue
        is_table = name.endswith(("token_embed.weight", "pos_embed", "register_embed"))
        std = 0.3 if parameter.ndim < 2 or is_table else parameter[0].numel() ** -0.5
        mean = 1.0 if re.search(r"ln_\w+\.weight$", name) else 0.0
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, std, generator=generator))


def random_inputs(
    config: CLIPConfig, images: int = 2, texts: int = 3, tokens: int = 9, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noise (images, channels, height, width), and ids (texts, tokens).

    The end token is at another position in each row. Random ids follow it: padding may be anything.
    """
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    size = (images, vision.channels, *vision.height_width)
    ids = torch.randint(3, text.vocab_size - 2, (texts, tokens), generator=generator)
    rows = torch.arange(texts)
    ids[rows, tokens - 1 - rows % (tokens - 1)] = end_token(text)
    return torch.randn(size, generator=generator), ids


def end_token(text: TextConfig) -> int:
    """The id that ends a text. With the legacy rule, a text is read at its largest id."""
    return text.eos_token_id if text.eos_token_id != LEGACY_EOS else text.vocab_size - 1
