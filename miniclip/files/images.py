"""Read and write the settings of an image transform, for transformers and for open_clip."""

from os import PathLike
from pathlib import Path
from typing import Any

from miniclip.errors import CheckpointError, blaming, shown, wrong
from miniclip.files.hub import CONFIGS, as_destination
from miniclip.files.open_clip import preprocessing_from_open_clip, preprocessing_to_open_clip
from miniclip.files.reading import read_json, read_json_if_there
from miniclip.files.writing import saving, write_json

# The settings that are the same in every CLIP. A file may leave them out.
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
    """Read a parsed preprocessor_config.json, in its old or new form, as ImageTransform fields.

    The default of `size` and `crop_size` is 224. Raises ValueError for a setting that an
    ImageTransform does not have.

    >>> from_transformers({"size": {"shortest_edge": 336}, "crop_size": 224})
    {'size': 336, 'crop_size': 224}
    """
    settings = {field: value for field, value in settings.items() if value is not None}
    size = settings.get("size", 224)
    is_squash = isinstance(size, dict) and size.keys() == {"height", "width"}
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIP"))
    if not isinstance(kind, str) or not kind.startswith("CLIP"):
        raise wrong("image_processor_type", kind, "CLIPImageProcessor")
    for field, value in settings.items():
        expected = _FIXED.get(field, False)  # every CLIP skips the other do_* steps
        is_checked = field in _FIXED or field.startswith("do_") or field == "use_square_size"
        is_checked |= field == "default_to_square" and isinstance(settings.get("size"), int)
        if is_checked and value != expected and not (field == "do_center_crop" and is_squash):
            raise ValueError(f"{field:.100} is {shown(value)}; every CLIP has {expected!r}")
    fields = {"size": _side(size, "size")}
    is_cropped = not is_squash or settings.get("do_center_crop", True)
    crop_size = settings.get("crop_size", 224) if is_cropped else fields["size"]
    fields["crop_size"] = _side(crop_size, "crop_size")
    fields |= {"squash": True} if is_squash else {}
    return fields | {f: settings[f] for f in ("image_mean", "image_std") if f in settings}


def _side(value: Any, field: str) -> Any:
    """Read a number of pixels: 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    forms = ({"shortest_edge"}, {"height", "width"})[field == "crop_size" :]
    is_form = isinstance(value, dict) and value.keys() in forms
    sides = list(value.values()) if is_form else [value]
    if type(sides[0]) is not int or sides[0] != sides[-1]:
        names = " or ".join(" and ".join(f"'{key}'" for key in sorted(keys)) for keys in forms)
        raise wrong(field, value, f"an integer (pixels), alone or as the value of {names}")
    return sides[0]


def to_transformers(fields: dict[str, Any]) -> dict[str, Any]:
    """The contents of preprocessor_config.json for the fields of an ImageTransform."""
    squashed = {"height": fields["size"], "width": fields["size"]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        **_FIXED,
        "size": squashed if fields["squash"] else {"shortest_edge": fields["size"]},
        "crop_size": {"height": fields["crop_size"], "width": fields["crop_size"]},
        "image_mean": [*fields["image_mean"]],
        "image_std": [*fields["image_std"]],
    }


def settings_files(directory: Path) -> list[Path]:
    """The files of a directory that contain image settings. transformers reads the first file.

    Since transformers 5.0, the settings are in processor_config.json. Raises CheckpointError.
    """
    processor = directory / "processor_config.json"
    has_settings = isinstance(read_json_if_there(processor).get("image_processor"), dict)
    names = ("preprocessor_config.json", CONFIGS["open_clip"])
    paths = [processor] * has_settings
    paths += [directory / name for name in names if (directory / name).is_file()]
    if not paths:
        raise CheckpointError(
            f"{directory}: no preprocessor_config.json, which says how images are resized and "
            "normalised. For most CLIPs, use ImageTransform(image_size), with OpenAI's values"
        )
    return paths


def read_settings(path: Path) -> dict[str, Any]:
    """Read the fields of an ImageTransform from one of `settings_files`. Raises CheckpointError."""
    settings = read_json(path)
    with blaming(path):
        if path.name == CONFIGS["open_clip"]:
            settings = preprocessing_from_open_clip(settings)
        settings = settings.get("image_processor", settings)
        if not isinstance(settings, dict):
            raise wrong("image_processor", settings, "an object")
        return from_transformers(settings)


def write_settings(directory: str | PathLike[str], fields: dict[str, Any]) -> None:
    """Write preprocessor_config.json, and update the other files that have the same settings."""
    directory = as_destination(directory)
    settings = to_transformers(fields)
    with saving(directory) as folder:
        if saved := read_json_if_there(directory / CONFIGS["open_clip"]):
            with blaming(directory):  # open_clip may not be able to express the settings
                preprocessing = preprocessing_to_open_clip(fields)
            write_json(folder / CONFIGS["open_clip"], {**saved, "preprocess_cfg": preprocessing})
        processor = directory / "processor_config.json"
        if "image_processor" in (saved := read_json_if_there(processor)):
            write_json(folder / processor.name, {**saved, "image_processor": settings})
        write_json(folder / "preprocessor_config.json", settings)
