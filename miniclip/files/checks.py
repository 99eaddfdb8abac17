"""Checks of configs, inputs, tokenizers and transforms, with errors that quote the wrong values.

The six main files call these functions. The functions accept any object with the needed fields.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from miniclip.errors import ContextLengthError, shown, wrong

MAX_PIXELS = 178_956_970
"""The largest number of pixels of an image. It is Pillow's limit for files, 2 * `MAX_IMAGE_PIXELS`.
The resized image has the same limit, because resizing makes a strip of 1 x 100,000 very large."""
ACTIVATION_NAMES = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
REFERENCES = ("transformers", "openai")
LEGACY_EOS = 2
"""The id of the end token in OpenAI's config files. It is wrong: the tokenizer ends a text with
49407. If a config has this id, transformers and miniclip pool a text at its largest id."""

LONGEST_CONTEXT = 100_000
"""The largest context length of a tokenizer. transformers writes 1e30 if there is no limit."""

# ------------------------------------------------------------------------------------------------
# configs


def check_config(config: Any) -> None:
    """Check the config of a vision or a text tower. Raises ValueError."""
    check_tower(config)
    kind = type(config).__name__
    if hasattr(config, "patch_size"):
        positive(config, "patch_size", "channels")
        _one_or_each(config, "image_size", 2, "one for the height and one for the width")
        if type(config.registers) is not int or not 0 <= config.registers < 2**31:
            raise wrong(f"{kind}: registers", config.registers, "a whole number, 0 or more")
        if config.patch_size > min(config.height_width):
            raise ValueError(
                f"{kind}: patch_size {config.patch_size} is larger than image_size "
                f"{config.image_size}; an image needs at least one patch"
            )
    if hasattr(config, "vocab_size"):
        positive(config, "vocab_size", "context_length")
        for name in ("bos_token_id", "eos_token_id"):
            value, last = getattr(config, name), config.vocab_size - 1
            if type(value) is not int or not 0 <= value < config.vocab_size:
                ids = f"an id from 0 to {last}, because vocab_size is {config.vocab_size}"
                raise wrong(f"{kind}: {name}", value, ids)
        if config.eos_token_id != LEGACY_EOS:
            object.__setattr__(config, "literal_eos", False)  # this field is used only with id 2


def check_tower(config: Any) -> None:
    """Check a tower's fields. A tuple of equal numbers above 0 becomes one number."""
    kind = type(config).__name__
    positive(config, "width", "layers")
    if config.layers > 1000:  # published towers have at most 48 layers
        raise wrong(f"{kind}: layers", config.layers, "at most 1,000")
    for name in ("heads", "mlp_width"):  # surgery may remove all heads or the MLP of a layer
        _one_or_each(config, name, config.layers, "one for each layer", least=0)
    if config.head_width is not None:
        positive(config, "head_width")
        if config.heads == config.width / config.head_width:
            object.__setattr__(config, "head_width", None)
    elif isinstance(config.heads, tuple):
        found = f"heads is {shown(config.heads)}"
        raise ValueError(f"{kind}: {found}; different numbers of heads need a head_width")
    elif config.width % config.heads:
        raise ValueError(
            f"{kind}: width {config.width} does not divide into {config.heads} heads of equal width"
        )
    if config.act not in ACTIVATION_NAMES:
        names = f"one of {', '.join(ACTIVATION_NAMES)}: the activation used in training"
        raise wrong(f"{kind}: act", config.act, names)
    if not _is_finite(config.ln_eps) or config.ln_eps <= 0:
        raise wrong(f"{kind}: ln_eps", config.ln_eps, "a number above 0")


def check_clip(config: Any) -> None:
    """Check the tower classes, `embed_dim` and `logit_scale_init` of a CLIPConfig."""
    for name, kind in config.tower_classes.items():
        if not isinstance(getattr(config, name), kind):
            found = type(getattr(config, name)).__name__
            raise ValueError(f"CLIPConfig: {name} must be a {kind.__name__}, not {found}")
    positive(config, "embed_dim")
    if not _is_finite(config.logit_scale_init):
        number = "a finite number (it is stored as a logarithm)"
        raise wrong("CLIPConfig: logit_scale_init", config.logit_scale_init, number)


def positive(config: object, *names: str) -> None:
    """Raise ValueError unless these fields of a config are whole numbers above 0."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 0 < value < 2**31:
            number = "a positive whole number of at most 31 bits"
            raise wrong(f"{type(config).__name__}: {name}", value, number)


def _one_or_each(config: object, name: str, count: int, each: str, least: int = 1) -> None:
    value = getattr(config, name)
    if not isinstance(value, tuple):
        return positive(config, name)
    if len(value) != count or not all(type(v) is int and least <= v < 2**31 for v in value):
        numbers = f"one positive whole number, or {count} of them, {each}"
        raise wrong(f"{type(config).__name__}: {name}", value, numbers)
    if len(set(value)) == 1 and value[0]:
        object.__setattr__(config, name, value[0])


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


# ------------------------------------------------------------------------------------------------
# inputs of a tower


def numbers(chosen: Iterable[int], count: int, where: str, kind: str) -> list[int]:
    """Return `chosen` as a list. Raises ValueError unless each number is from 0 to count - 1."""
    chosen = list(chosen)
    if absent := sorted({number for number in chosen if number not in range(count)}):
        raise ValueError(f"{where}: no {kind} {absent}; expected numbers from 0 to {count - 1}")
    return chosen


FROM_PICTURES = "The checkpoint's ImageTransform makes pixels: encode_image(transform([image]))"
FROM_TEXTS = "The checkpoint's Tokenizer makes ids: encode_text(tokenizer(texts))"


def check_pixels(pixels: Any, config: Any) -> None:
    """Raise TypeError or ValueError unless pixels are floats (B, channels, height, width)."""
    size = (config.channels, *config.height_width)
    shape = f"(B, {', '.join(map(str, size))})"
    if not isinstance(pixels, Tensor):
        found = type(pixels).__name__
        raise TypeError(f"expected pixels as a tensor {shape}, found {found}. {FROM_PICTURES}")
    if not pixels.is_floating_point():
        raise ValueError(
            f"expected normalised pixels as floats, found {pixels.dtype}. {FROM_PICTURES}"
        )
    if pixels.ndim != 4 or pixels.shape[1:] != size:
        advice = FROM_PICTURES
        if pixels.shape == size:
            advice = "For one image, add the batch: encode_image(pixels[None])"
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}; this vision tower reads {shape}. {advice}"
        )


def check_ids(ids: Any, vocab_size: int) -> None:
    """Raise TypeError or ValueError unless ids are whole numbers (B, T) below `vocab_size`."""
    if not isinstance(ids, Tensor):
        found = type(ids).__name__
        raise TypeError(f"expected token ids as a tensor (B, T), found {found}. {FROM_TEXTS}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected token ids as int64 or int32, found {ids.dtype}. {FROM_TEXTS}")
    if ids.ndim != 2:
        raise ValueError(
            f"ids have shape {tuple(ids.shape)}; expected (B, T), a row for each text. For one "
            "text, add the batch: encode_text(ids[None])"
        )
    if ids.numel() and can_look_at(ids):
        least, most = (int(id) for id in ids.aminmax())
        if least < 0 or most >= vocab_size:
            raise ValueError(
                f"ids go from {least} to {most}; this text tower knows 0 to {vocab_size - 1}. "
                + FROM_TEXTS
            )


def can_look_at(x: Tensor) -> bool:
    """Whether values can be read. True on CPU, outside torch.compile, vmap and torch.func.grad."""
    if torch.compiler.is_compiling():
        return False
    return x.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_has_eos(is_eos: Tensor, eos_token_id: int) -> None:
    """Raise ValueError if a row of ids has no end token. `is_eos` (B, T) is true at end tokens."""
    if can_look_at(is_eos) and not (has_eos := is_eos.any(-1)).all():
        raise ValueError(
            f"row {has_eos.int().argmin()} of ids has no end token ({eos_token_id}). The "
            "checkpoint's Tokenizer adds one"
        )


def check_token_vectors(x: Tensor, pos_embed: Tensor) -> None:
    """Raise ValueError unless token vectors have the shape that a text tower reads."""
    positions, width = pos_embed.shape
    if x.ndim != 3 or x.shape[2] != width:
        raise ValueError(f"token vectors have shape {tuple(x.shape)}; expected (B, T, {width})")
    if x.shape[1] > positions:
        raise ContextLengthError(
            f"the texts have {x.shape[1]} tokens; this text tower has {positions} positions. "
            f"Shorten the texts, or tokenize with truncate=True, pad_to={positions}"
        )


# ------------------------------------------------------------------------------------------------
# tokenizer and transform


def as_list(texts: Any, what: str = "text") -> list[str]:
    """Return one text or an iterable of texts as a list. Raises TypeError for anything else.

    >>> as_list("a cat"), as_list(word for word in ("cat", "dog"))
    (['a cat'], ['cat', 'dog'])
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise TypeError(f"expected a {what} or a list of {what}s, found {type(texts).__name__}")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what} {i}: expected a {what}, found {type(text).__name__}")
    return texts


def check_reference(reference: str) -> None:
    """Raise ValueError unless `reference` is one of REFERENCES."""
    if reference not in REFERENCES:
        raise wrong("reference", reference, " or ".join(map(repr, REFERENCES)))


def check_unit_norm(embeds: Tensor, dtype: Any) -> Tensor:
    """Return `embeds`. Raise ValueError unless they have length 1. The error names `dtype`."""
    if not ((embeds.float().norm(dim=-1) - 1).abs() < 0.5).all():  # also true for NaN
        raise ValueError(
            f"an embedding is NaN, infinite or zero: the model overflows in {dtype}; load it in "
            "float32 or bfloat16, which have a larger range"
        )
    return embeds


def check_context_length(length: Any) -> None:
    """Raise ValueError unless a start and an end token fit into the context length."""
    if type(length) is not int or length < 2:
        least = "2 or more, because every text has a start and an end token"
        raise wrong("context_length", length, least)
    if length > LONGEST_CONTEXT:
        most = f"at most {LONGEST_CONTEXT}, because files write larger numbers for 'no limit'"
        raise wrong("context_length", length, most)


def check_vocab_size(vocab_size: int, least: int) -> None:
    """Raise ValueError if a vocabulary is too small for the bytes and the special tokens."""
    if vocab_size < least:
        raise wrong("vocab_size", vocab_size, f"at least {least}, for bytes and special tokens")


def check_pad_to(pad_to: int | None, context_length: int) -> int:
    """The number of tokens that fit in a row of ids. Raises ValueError if `pad_to` is below 2."""
    if pad_to is not None and pad_to < 2:
        raise ValueError(f"pad_to is {pad_to}; the start and the end token alone need 2")
    return context_length if pad_to is None else min(pad_to, context_length)


def too_long(i: int, text: str, tokens: int, limit: int) -> ContextLengthError:
    """The error for a text with too many tokens."""
    return ContextLengthError(
        f"text {i} has {tokens} tokens with the start and the end token, and at most {limit} fit. "
        f"Shorten the text, or use truncate=True in Python. The text begins with {text[:40]!r}..."
    )


def check_tokens(
    vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], tokens: Iterable[str]
) -> None:
    """Raise ValueError if ids are not 0 to n-1, or if a token of `merges` or `tokens` has no id."""
    ids = {id for id in vocab.values() if type(id) is int}
    if missing := set(range(len(vocab))) - ids:
        raise ValueError(
            f"expected the {len(vocab)} tokens to have the ids 0 to {len(vocab) - 1}, each once; "
            f"no token has the id {min(missing)}"
        )
    for token in tokens:
        if token not in vocab:
            raise ValueError(f"the special token {shown(token)} is not in the vocabulary")
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(
                    f"merge {rank} joins {shown(left)} and {shown(right)}, but {shown(token)} is "
                    "not in the vocabulary; vocabulary and merges must come from the same tokenizer"
                )


def check_transform(transform: Any) -> None:
    """Check the settings of an ImageTransform."""
    for name in ("size", "crop_size"):
        value = getattr(transform, name)
        if type(value) is not int or not 1 <= value <= math.isqrt(MAX_PIXELS):
            raise wrong(name, value, f"a whole number from 1 to {math.isqrt(MAX_PIXELS)}")
    for name, least in (("image_mean", 0), ("image_std", 1e-3)):
        values = getattr(transform, name)
        three = isinstance(values, list | tuple) and len(values) == 3
        if not three or not all(type(v) in (int, float) and least <= v <= 1 for v in values):
            numbers = f"three numbers from {least} to 1, for R, G and B after division by 255"
            raise wrong(name, values, numbers)
    check_reference(transform.reference)
