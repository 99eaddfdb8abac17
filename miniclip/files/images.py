"""The settings of an image transform, in transformers' two forms and in open_clip's."""

from os import PathLike
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError, blaming, shown
from miniclip.files.open_clip import preprocessing_from_open_clip, preprocessing_to_open_clip
from miniclip.files.reading import read_json, read_json_if_there
from miniclip.files.writing import blaming_disk, write_json

# What the file of each CLIP says, if it says it: the four steps, and how they are done.
_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic, by Pillow's number
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def from_transformers(settings: dict[str, Any]) -> dict[str, Any]:
    """A parsed preprocessor_config.json, old form or new, as fields of an ImageTransform.

    A field that is left out or null is left out. Raises ValueError for a setting that the transform
    cannot follow.

    >>> from_transformers({"size": {"shortest_edge": 336}, "crop_size": 224})
    {'size': 336, 'crop_size': 224}
    """
    settings = {field: value for field, value in settings.items() if value is not None}
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIP"))
    if not isinstance(kind, str) or not kind.startswith("CLIP"):
        raise ValueError(f"image_processor_type is {shown(kind)}; expected CLIPImageProcessor")
    for field, value in settings.items():
        expected = _FIXED.get(field, False)  # do_pad and its like are steps of other models
        if (field in _FIXED or field.startswith("do_")) and value != expected:
            raise ValueError(f"{field:.100} is {shown(value)}; a CLIP's transform has {expected!r}")
    sides = {"size": {"shortest_edge"}, "crop_size": {"height", "width"}}
    fields = {field: _side(settings.get(field, 224), field, keys) for field, keys in sides.items()}
    return fields | {f: settings[f] for f in ("image_mean", "image_std") if f in settings}


def _side(value: Any, field: str, keys: set[str]) -> Any:
    """The number of pixels in 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    sides = list(value.values()) if isinstance(value, dict) and value.keys() == keys else [value]
    if type(sides[0]) is not int or sides[0] != sides[-1]:
        form = " and ".join(f"'{key}'" for key in sorted(keys))
        raise ValueError(f"{field} is {shown(value)}; expected pixels, as one number or by {form}")
    return sides[0]


def to_transformers(fields: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json from the fields of an ImageTransform."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **_FIXED,
        "size": {"shortest_edge": fields["size"]},
        "crop_size": {"height": fields["crop_size"], "width": fields["crop_size"]},
        "image_mean": [*fields["image_mean"]],
        "image_std": [*fields["image_std"]],
    }


def read_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file that transformers reads first, and its fields of an ImageTransform.

    Since 5.0 CLIPProcessor saves the settings inside processor_config.json. Raises CheckpointError.
    """
    path = directory / "processor_config.json"
    settings = read_json_if_there(path).get("image_processor")
    if not isinstance(settings, dict):
        names = ("preprocessor_config.json", "open_clip_config.json")
        paths = [directory / name for name in names if (directory / name).is_file()]
        if not paths:
            raise CheckpointError(
                f"{directory}: no preprocessor_config.json, which says how images are resized and "
                "normalised. Most CLIPs want ImageTransform(image_size), which has OpenAI's values"
            )
        path = paths[0]
        settings = read_json(path)
    with blaming(path):
        if path.name == "open_clip_config.json":
            settings = preprocessing_from_open_clip(settings)
        return path, from_transformers(settings)


def write_settings(directory: str | PathLike[str], fields: dict[str, Any]) -> None:
    """Write preprocessor_config.json, and update the other files that have the same settings."""
    directory = Path(directory)
    settings = to_transformers(fields)
    with blaming_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        open_clip = directory / "open_clip_config.json"
        if saved := read_json_if_there(open_clip):  # first, because it may not express them
            with blaming(directory):
                preprocessing = preprocessing_to_open_clip(fields)
            write_json(open_clip, {**saved, "preprocess_cfg": preprocessing})
        processor = directory / "processor_config.json"
        if "image_processor" in (saved := read_json_if_there(processor)):
            write_json(processor, {**saved, "image_processor": settings})
        write_json(directory / "preprocessor_config.json", settings)
