"""`from_pretrained` and `save_pretrained` for models, configs, tokenizers and transforms."""

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol, TypeVar

from torch import nn

from miniclip.errors import CheckpointError, blaming, listed, warn
from miniclip.files import configs, images
from miniclip.files.hub import as_path, resolve
from miniclip.files.models import Fork, Stored, open_model, read_fields, without_weights
from miniclip.files.modules import check_described, class_of, keeps_tensors, state_of
from miniclip.files.saving import one_version, write_model
from miniclip.files.vocabularies import Vocabulary, read_vocabulary, write_vocabulary

M = TypeVar("M", bound="Pretrained")
T = TypeVar("T", bound=Any)


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The entries that are fields of a dataclass. JSON's lists become tuples."""
    known = {f.name: values[f.name] for f in fields(kind) if f.name in values}
    return {name: tuple(v) if type(v) is list else v for name, v in known.items()}


def tower_config(kind: Any, values: dict[str, Any]) -> Any:
    """A VisionConfig or TextConfig from a dictionary. Entries that are not fields are ignored."""
    try:
        return kind(**_known(kind, values))
    except ValueError as error:
        section = "vision_config" if hasattr(kind, "patch_size") else "text_config"
        raise ValueError(f"in {section}: {error}") from None


if TYPE_CHECKING:
    P = ParamSpec("P")
    R = TypeVar("R", covariant=True)

    class _HasForward(Protocol[P, R]):
        def forward(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    class _Called:
        """Give `__call__` the argument types and the result type of the class's own `forward`."""

        def __get__(self, module: _HasForward[P, R], owner: Any = None) -> Callable[P, R]: ...


class Pretrained(nn.Module):
    """A model with `from_pretrained` and `save_pretrained`.

    The `model_type` of a subclass is the subclass's name, unless the subclass sets `model_type`. So
    no other class loads the saved files by mistake. `tensor_names` maps the new parameters of a
    subclass to their names in a file, such as
    {"text.blocks.{}.mlp.gate": "text_model.encoder.layers.{}.mlp.gate"}.
    """

    towers: ClassVar[tuple[str, ...]]  # the towers that a checkpoint must have
    model_type: ClassVar[str] = "clip"
    tensor_names: ClassVar[dict[str, str]] = {}
    config: Any
    if TYPE_CHECKING:
        __call__: _Called  # type: ignore[assignment]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        is_fork = any(hasattr(base, "towers") for base in cls.__bases__)
        if is_fork and "model_type" not in vars(cls):
            cls.model_type = cls.__name__

    @classmethod
    def build(cls: Any, values: dict[str, Any], embed_dim: int | None) -> Any:
        """Build a model with random weights from the fields of a checkpoint's config."""
        if len(cls.towers) == 2:
            return cls(cls.config_class.from_fields(values))
        return cls(tower_config(cls.config_class, values[cls.towers[0]]), embed_dim)

    @classmethod
    @one_version
    def from_pretrained(cls: type[M], name: str | PathLike[str], **options: Any) -> M:
        """Load the model of a checkpoint, in evaluation mode. `miniclip.load` explains the options.

        Parameters on a CPU are memory-mapped if they keep the file's dtype. They take no memory
        of their own until they are changed. Changes are never written to the file. Parameters keep
        the file's strides, as in transformers, because strides can change the last bit of a
        product. If a tower's checkpoint has no projection, `proj` returns its input. Raises
        CheckpointError.
        """
        return cls.from_stored(open_model(name, fork=cls.fork(), **options))

    @classmethod
    def from_stored(cls: type[M], stored: Stored) -> M:
        """Build the model from the contents of a checkpoint's files."""
        stored.check_towers(cls.towers)
        build = partial(cls.build, stored.fields, stored.embed_dim(cls.towers[0]))
        with stored.skeleton():
            model = without_weights(build)
        prefix = f"{cls.towers[0]}." if len(cls.towers) == 1 else ""
        state = stored.state_dict(model, prefix)
        if keeps_tensors(model) or not next(model.parameters()).is_meta:
            dtype = next(t.dtype for t in state.values() if t.is_floating_point())
            model = build().to(stored.device, dtype)  # the file may lack some of these tensors
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | PathLike[str], layout: str = "transformers") -> None:
        """Write the config and the weights.

        `layout` is "transformers", "openai" or "open_clip". `miniclip.save` writes a whole
        checkpoint. Hooks and patched methods are not saved; a warning names the patched methods.
        If FSDP2 has sharded the model, call this in all processes. Raises CheckpointError, for
        example if the model has an activation or an adapter that the config does not describe.
        """
        if len(self.towers) < 2:
            raise CheckpointError(f"{directory}: a tower cannot be saved alone; save its CLIP")
        with blaming(f"{directory}: not saved"):
            check_described(self)
        state, fork = state_of(self), class_of(self).fork()
        write_model(directory, asdict(self.config), state, layout, fork)

    @classmethod
    def fork(cls) -> Fork:
        """The model type, the class name and the tensor names in the files of this class."""
        return Fork(cls.model_type, cls.__name__, cls.tensor_names)


class PretrainedConfig:
    """`from_pretrained`, `from_dict` and `to_dict` of a CLIPConfig."""

    tower_classes: ClassVar[dict[str, Any]]

    @classmethod
    def from_fields(cls: type[T], values: dict[str, Any]) -> T:
        """A config from nested dictionaries of fields. Entries that are not fields are ignored."""
        known = _known(cls, values)
        return cls(**known | {n: tower_config(k, values[n]) for n, k in cls.tower_classes.items()})

    @classmethod
    @one_version
    def from_pretrained(cls: type[T], name: str | PathLike[str], **options: Any) -> T:
        """Load a checkpoint's config. `options` may be `revision`, `subfolder`, `cache_dir` and
        `local_files_only`, as for `miniclip.load`. Raises CheckpointError."""
        path, values = read_fields(name, **options)
        with blaming(path):
            return cls.from_fields(values)

    @classmethod
    def from_dict(cls: type[T], config: dict[str, Any]) -> T:
        """Read the contents of transformers' config.json. Raises ValueError if it is not a CLIP."""
        return cls.from_fields(configs.from_transformers(config))

    def to_dict(self) -> dict[str, Any]:
        """The contents of transformers' config.json."""
        return configs.to_transformers(asdict(self))  # type: ignore[call-overload]


class PretrainedTokenizer:
    """`from_pretrained` and `save_pretrained` of a Tokenizer."""

    byte_symbols: ClassVar[dict[int, str]]
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, bool]
    special_tokens: dict[str, str]
    context_length: int

    @classmethod
    @one_version
    def from_pretrained(
        cls: type[T], name: str | PathLike[str], *, reference: str = "transformers", **options: Any
    ) -> T:
        """Load a checkpoint's tokenizer. `options` may be `revision`, `subfolder`, `cache_dir` and
        `local_files_only`, as for `miniclip.load`. Raises CheckpointError."""
        return cls.from_directory(resolve(name, "tokenizer", **options), reference=reference)

    @classmethod
    @one_version
    def from_directory(
        cls: type[T], directory: str | PathLike[str], *, reference: str = "transformers"
    ) -> T:
        """Read tokenizer.json, or vocab.json and merges.txt, or OpenAI's bpe_simple_vocab."""
        vocabulary = read_vocabulary(as_path(directory))
        options = {"added": vocabulary.added, "context_length": vocabulary.context_length}
        options |= {"reference": reference, **vocabulary.special}
        return cls(vocabulary.vocab, vocabulary.merges, **options)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write vocab.json, merges.txt and two small files, for miniclip and for transformers.

        `reference` is not written, because it is chosen at each load. Raises CheckpointError.
        """
        parts = (self.vocab, self.merges, self.added, self.special_tokens, self.context_length)
        write_vocabulary(directory, Vocabulary(*parts))


class PretrainedTransform:
    """`from_pretrained` and `save_pretrained` of an ImageTransform."""

    @classmethod
    @one_version
    def from_pretrained(
        cls: type[T], name: str | PathLike[str], *, reference: str = "transformers", **options: Any
    ) -> T:
        """Load a checkpoint's transform. `options` may be `revision`, `subfolder`, `cache_dir` and
        `local_files_only`, as for `miniclip.load`. Raises CheckpointError.

        If two files of the checkpoint disagree, warns and uses the file that transformers reads.
        """

        def read(path: Path) -> T:
            settings = images.read_settings(path)
            with blaming(path):
                return cls(**settings, reference=reference)

        first, *others = images.settings_files(resolve(name, "transform", **options))
        transform = read(first)
        for path in others:
            try:
                mine, theirs = asdict(transform), asdict(read(path))
                odd = [f"{f} {v} and {theirs[f]}" for f, v in mine.items() if v != theirs[f]]
            except CheckpointError as error:
                odd = [str(error)]
            if odd:
                found = listed(odd, most=6)
                warn(f"{first} and {path.name} disagree: {found}. {first.name} is used")
        return transform

    @classmethod
    def from_dict(cls: type[T], settings: dict[str, Any], *, reference: str = "transformers") -> T:
        """Read the contents of transformers' preprocessor_config.json, in its old or new form.

        Raises ValueError for a setting that an ImageTransform does not have.
        """
        return cls(**images.from_transformers(settings), reference=reference)

    def to_dict(self) -> dict[str, Any]:
        """The contents of transformers' preprocessor_config.json."""
        return images.to_transformers(asdict(self))  # type: ignore[call-overload]

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write preprocessor_config.json, for miniclip and for transformers.

        `reference` is not written, because it is chosen at each load. Raises CheckpointError.
        """
        images.write_settings(directory, asdict(self))  # type: ignore[call-overload]
