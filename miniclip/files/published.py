"""The published CLIPs: their shapes, their names, and the activation of each release."""

import re
from collections.abc import Mapping
from typing import Any

from miniclip.errors import shown

Fields = dict[str, Any]


def _fields(vision: tuple[int, ...], text: tuple[int, ...], act: str = "quick_gelu") -> Fields:
    names = ("width", "layers", "heads", "mlp_width", "patch_size", "image_size")
    width, layers, embed_dim = text
    words = {"width": width, "layers": layers, "heads": width // 64, "mlp_width": 4 * width}
    return {
        "vision": dict(zip(names, vision, strict=True)) | {"act": act},
        "text": words | {"act": act},
        "embed_dim": embed_dim,
    }


PUBLISHED = {
    # vision: width, layers, heads, MLP width, patch size, image size
    # text: width, layers, width of the embedding
    "B/32": _fields((768, 12, 12, 3072, 32, 224), (512, 12, 512)),
    "B/16": _fields((768, 12, 12, 3072, 16, 224), (512, 12, 512)),
    "L/14": _fields((1024, 24, 16, 4096, 14, 224), (768, 12, 768)),
    "L/14-336": _fields((1024, 24, 16, 4096, 14, 336), (768, 12, 768)),
    "H/14": _fields((1280, 32, 16, 5120, 14, 224), (1024, 24, 1024), "gelu"),
    "g/14": _fields((1408, 40, 16, 6144, 14, 224), (1024, 24, 1024), "gelu"),
    "bigG/14": _fields((1664, 48, 16, 8192, 14, 224), (1280, 32, 1280), "gelu"),
    "TinyCLIP-8M/16": _fields((256, 10, 4, 1024, 16, 224), (256, 3, 512), "gelu"),
    "TinyCLIP-39M/16": _fields((512, 12, 8, 2048, 16, 224), (512, 6, 512), "gelu"),
    "TinyCLIP-40M/32": _fields((512, 12, 8, 2048, 32, 224), (512, 6, 512), "gelu"),
    "TinyCLIP-61M/32": _fields((640, 12, 10, 2560, 32, 224), (512, 9, 512), "gelu"),
}
"""The shapes of OpenAI's CLIPs (tables 19 and 20 of the paper), of LAION's CLIPs
(github.com/mlfoundations/open_clip, model_configs) and of TinyCLIP (Wu et al. 2023, arXiv
2309.12314; github.com/microsoft/Cream, TinyCLIP/src/open_clip). The end token is 49407, although
OpenAI's own files say 2 (LEGACY_EOS)."""

OPENAI_NAMES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
"""For each ViT's name in openai/CLIP's `clip.load`, the hub id of the same weights."""


def openai_id(name: str) -> str | None:
    """The hub id of an OpenAI ViT, from its name in openai/CLIP or PUBLISHED. None for other names.

    >>> openai_id("ViT-L/14@336px") == openai_id("L/14-336"), openai_id("vit-b/32")
    (True, 'openai/clip-vit-base-patch32')
    """
    return {_plain(known): id for known, id in OPENAI_NAMES.items()}.get(_plain(name))


def shape_name(name: str) -> str:
    """Turn "ViT-B/32" into "B/32", a key of PUBLISHED. Return an unknown name unchanged."""
    return {_plain(known): known for known in PUBLISHED}.get(_plain(name), name)


def _plain(name: str) -> str:
    return re.sub(r"^vit-|(?<=\d)px$", "", name.lower()).replace("@", "-")


RELEASES = {
    "openai/clip-vit-base-patch32": ("B/32", "quick_gelu"),
    "openai/clip-vit-base-patch16": ("B/16", "quick_gelu"),
    "openai/clip-vit-large-patch14": ("L/14", "quick_gelu"),
    "openai/clip-vit-large-patch14-336": ("L/14-336", "quick_gelu"),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ("B/32", "gelu"),
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": ("B/16", "gelu"),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": ("L/14", "gelu"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("H/14", "gelu"),
    "apple/DFN5B-CLIP-ViT-H-14": ("H/14", "quick_gelu"),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": ("g/14", "gelu"),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("bigG/14", "gelu"),
    "timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b": ("bigG/14", "quick_gelu"),
    **{name: (name, "gelu") for name in PUBLISHED if name.startswith("TinyCLIP")},
}
"""The shape and the activation of each release. No two releases have the same pair."""


def published(name: str) -> Fields | None:
    """The config fields of a model. `name` is an OpenAI name ("ViT-L/14"), a hub id in RELEASES,
    or a key of PUBLISHED. None for any other name.

    >>> published("ViT-L/14")["text"]["act"]
    'quick_gelu'
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if (name := openai_id(name) or name) not in RELEASES:
        return None
    shape, act = RELEASES[name]
    fields = PUBLISHED[shape]
    return fields | {tower: fields[tower] | {"act": act} for tower in ("vision", "text")}


def releases_of(shapes: Mapping[str, Any]) -> dict[str, Fields]:
    """Return the releases that fit `shapes` (the config fields that a file's weights determine)."""

    def fits(fields: Fields) -> bool:
        known = ("width", "layers", "mlp_width", "patch_size")
        for tower in {"vision", "text"} & shapes.keys():
            found, expected = shapes[tower], fields[tower]
            if any(found[name] != expected[name] for name in known if name in expected):
                return False
        is_clips = shapes.get("text", {}).get("vocab_size", 49408) == 49408
        return is_clips and shapes.get("embed_dim", fields["embed_dim"]) == fields["embed_dim"]

    named = {name: published(name) for name in RELEASES}
    if "vision" not in shapes:  # SDXL and SD3 have LAION's bigG/14 text tower
        del named["timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b"]
    return {name: fields for name, fields in named.items() if fields and fits(fields)}


_TIMM_SIZES = {
    **{"xsmall": "TinyCLIP-8M/16", "medium": "TinyCLIP-39M/16", "betwixt": "TinyCLIP-61M/32"},
    **{"base": "B/32", "large": "L/14", "huge": "H/14", "giant": "g/14", "gigantic": "bigG/14"},
}


_QUICK_IN_TIMM = (  # timm's notes on these weights say "natively QuickGELU"
    r"\.(openai|metaclip_400m|metaclip_2pt5b|dfn5b)$|_base_patch32_.*\.laion400m_e3[12]$|"
    r"_large_.*\.dfn2b$|_huge_patch14_clip_224.*\.metaclip2_worldwide$"
)


def vision_of_timm(name: Any) -> Fields | None:
    """Return the config fields of a CLIP's vision tower, given the tower's name in timm.

    None for any other name. timm's CLIP towers have exact GELU unless the name contains
    "quickgelu".

    >>> vision_of_timm("vit_large_patch14_clip_quickgelu_336")["image_size"]
    336
    """
    pattern = r"vit_([a-z]+)_patch(\d+)_clip_(quickgelu_)?(\d+)(\.\w+)?"
    found = re.fullmatch(pattern, name) if isinstance(name, str) else None
    if not found or found[1] not in _TIMM_SIZES:
        return None
    act = "quick_gelu" if found[3] else "gelu"
    sizes = {"act": act, "patch_size": int(found[2]), "image_size": int(found[4])}
    return PUBLISHED[_TIMM_SIZES[found[1]]]["vision"] | sizes


def fields_of_timm(settings: dict[str, Any]) -> Fields:
    """Return the config fields of a vision tower from timm's config.json. Raises ValueError."""
    name, trained = settings["architecture"], settings.get("pretrained_cfg")
    tag = str(trained.get("tag")) if isinstance(trained, dict) else ""
    vision = vision_of_timm(name)
    if vision is None or settings.get("global_pool", "token") != "token":
        raise ValueError(f"architecture is {shown(name)}; expected timm's vit_*_patch*_clip_*")
    if vision["act"] == "gelu" and re.search(_QUICK_IN_TIMM, f"{name}.{tag}"):
        raise ValueError(
            f"architecture is {shown(name)}, which has GELU, but the weights {tag!r} were trained "
            "with QuickGELU. Choose a config, such as config='openai/clip-vit-base-patch32'"
        )
    return {"vision": vision, "embed_dim": settings.get("num_classes")}
