"""The same input through two CLIPs, compared tensor by tensor in the order data flows.

The two are miniclip and transformers, or a fork and the original. Both run in one precision and in
float64. In float32 the unchanged model agrees with transformers to the last bit, and one whose
operations are in another order to rounding. In float64 a difference that is more than rounding has
nowhere left to hide. The first tensor that differs is explained by `diagnosis.py`.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip import diagnosis
from miniclip.checkpoint import Loaded
from miniclip.config import LEGACY_EOS, CLIPConfig
from miniclip.errors import CheckpointError
from miniclip.files.configs import beyond_transformers
from miniclip.files.hub import has_files, resolve
from miniclip.files.models import check_device, meta_device
from miniclip.files.names import TRANSFORMERS, layout_name
from miniclip.model import CLIP
from miniclip.peers import import_transformers, versions
from miniclip.presets import PRESETS
from miniclip.terminal import progress
from miniclip.tokenizer import Tokenizer
from miniclip.transform import ImageTransform

if TYPE_CHECKING:
    from transformers import CLIPModel

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
"""What rounding explains on a CPU: of logits, and of other tensors relative to the largest number
there if it is above 1."""
ON_DEVICES = 1e-4  # the same in float32 where the adding up is in another order, as on GPUs
IN_PATTERN = 1e-6  # asked for float64, for transformers takes its softmax in float32 even there
MERGED = 1e-6  # in float64, where the two have other parameters: what is merged is also rounded
HALF = 2.0  # in half precision: how much larger our largest error may be than the other's


class Difference(NamedTuple):
    """How far two models are apart at a site: the largest difference of any number.

    The truth, for the errors, is what the second model computes in float64.
    """

    site: str
    absolute: float
    relative: float  # to the largest number there
    float64: float  # absolute, where both run in float64
    model_error: float  # how far the first model is from the truth
    other_error: float  # how far the second is
    within_tolerance: bool


class Report(NamedTuple):
    """Every site in the order data flows, the first out of tolerance, and what it looks like."""

    rows: list[Difference]
    first: str | None
    cause: str | None  # "" where nothing is known

    def __str__(self) -> str:
        if self.first is None:
            return f"within tolerance at all {len(self.rows)} sites"
        failed = sum(not row.within_tolerance for row in self.rows)
        verdict = f"out of tolerance at {failed} of {len(self.rows)} sites, first at {self.first}"
        return f"{verdict}\nlikely cause: {self.cause}" if self.cause else verdict


def compare(
    model: "CLIP | CLIPModel | Loaded",
    other: "CLIP | CLIPModel | Loaded",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Report:
    """Run two models of one shape on the same random input; compare them site by site.

    Where a tokenizer and a transform come with both, as from `miniclip.load`, `tokens` and `pixels`
    are the first sites. Then come, for each tower, `embeddings`; for each block `resid_pre`, `q`,
    `k`, `v`, `pattern`, `attn_out`, `mlp_out`, `resid_post`; `pooled` and `projected`; and at last
    `logits` and the rest of the output. A model of another class will do if its modules have our
    names, or transformers'; what only one of the two models has is left out. Both are rounded to
    `dtype`, run uncompiled, and then as they were. In the float64 runs what asks for float32, as a
    softmax may whatever the precision of the rest, gets float64; they do not count for weights one
    rounding apart.
    Raises ValueError for models of different depth.

    >>> from miniclip import load
    >>> report = compare(load("shapes"), load("shapes"))
    >>> report.first is None, report.rows[0].site, report.rows[-1].site
    (True, 'tokens', 'text_embeds')
    """
    check_device(device)
    ours, theirs = (_as_loaded(m) for m in (model, other))
    stages = []
    if ours.tokenizer and theirs.tokenizer:
        stages.append(_compare_tokenizers(ours.tokenizer, theirs.tokenizer))
    if ours.transform and theirs.transform:
        stages.append(_compare_transforms(ours.transform, theirs.transform))
    stages.append(_compare_models(ours.model, theirs.model, dtype, torch.device(device), seed))
    rows = [row for stage, _ in stages for row in stage]
    first = next((row.site for row in rows if not row.within_tolerance), None)
    cause = next((cause for _, cause in stages if cause is not None), None)
    return Report(rows, first, cause)


def assert_parity(
    model: "CLIP | CLIPModel | Loaded", other: "CLIP | CLIPModel | Loaded", **options: Any
) -> None:
    """For a fork's own tests: raises an AssertionError that names the first site and the cause.

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


# ------------------------------------------------------------------------------------------------
# The three stages. Each gives rows, and the cause of the first that is out of tolerance, or None.

Stage = tuple[list[Difference], str | None]


def _compare_tokenizers(ours: Tokenizer, theirs: Tokenizer) -> Stage:
    one, other = (partial(tokenizer, truncate=True) for tokenizer in (ours, theirs))
    words = _words(ours, theirs)

    def ids_of(tokenizer: Callable[[Sequence[str]], Tensor]) -> Tensor:
        return torch.cat([tokenizer(t).flatten() for t in (diagnosis.TEXTS, words) if t])

    found, raised = _outputs(ids_of, one, other)
    if raised:
        return [_infinitely_far("tokens")], raised
    row = _exact("tokens", *found)
    if not row.within_tolerance:
        return [row], diagnosis.cause_in_tokens(one, other, words)
    # That two merges have changed places shows in few words, and in none of a vocabulary.
    merges = [getattr(tokenizer, "merges", []) for tokenizer in (ours, theirs)]
    for rank, (mine, yours) in enumerate(zip(*merges)):
        if mine != yours:
            cause = f"merge {rank} is {' '.join(mine)!r} in model, {' '.join(yours)!r} in other"
            return [_infinitely_far("tokens")], cause
    return [row], None


def _words(*tokenizers: Any) -> list[str]:
    """The vocabularies, but for bytes that are no text; these in characters, with which a word ends
    or goes on. Nothing of what is no Tokenizer: transformers' has the words of ours."""
    known = [tokenizer for tokenizer in tokenizers if isinstance(tokenizer, Tokenizer)]
    words = [t.decode([i]) for t in known for i in range(t.vocab_size)]
    places = (range(0x21, 0x800), range(0x800, 0xD800, 0x1000), range(0xE000, 0x110000, 0x1000))
    characters = [chr(place) for part in places for place in part] if known else []
    ends = [character + end for character in characters for end in ("", "a", "~")]
    text = (word for word in words if "\N{REPLACEMENT CHARACTER}" not in word)
    return [*dict.fromkeys([*text, *ends])]


def _compare_transforms(ours: ImageTransform, theirs: ImageTransform) -> Stage:
    sizes = (getattr(transform, "size", None) for transform in (ours, theirs))
    pictures = diagnosis.pictures(next(filter(None, sizes), ImageTransform.size))
    found, raised = _outputs(lambda transform: [*map(transform, pictures)], ours, theirs)
    if raised:
        return [_infinitely_far("pixels")], raised
    row = _exact("pixels", *(torch.cat([x.flatten() for x in pixels]) for pixels in found))
    if row.within_tolerance:
        return [row], None
    return [row], diagnosis.cause_in_pixels(ours, theirs, *found)


def _outputs(
    run: Callable[[Any], Any], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> tuple[list[Any], str]:
    """What both give, or the error that one of them raises. If both raise one, so does this."""
    found: list[Any] = []
    errors: dict[str, ValueError] = {}
    for name, function in (("model", ours), ("other", theirs)):
        try:
            found.append(run(function))
        except ValueError as error:
            errors[name] = error
    if len(errors) == 2:
        raise errors["model"]
    return found, "".join(f"{name} {_raises(error)}" for name, error in errors.items())


def _raises(error: Exception) -> str:
    return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _infinitely_far(site: str) -> Difference:
    return Difference._make([site, *[math.inf] * 5, False])


def _exact(site: str, one: Tensor, other: Tensor) -> Difference:
    """For what has to be equal: no rounding is there to explain a difference."""
    distance, size = _distance(one, other), max(other.abs().max().item(), 1e-30)
    return Difference(site, distance, distance / size, distance, distance, 0.0, distance == 0)


def _compare_models(
    ours: "CLIP | CLIPModel",
    theirs: "CLIP | CLIPModel",
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Stage:
    for name, model in zip(diagnosis.NAMES, (ours, theirs), strict=True):
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError(f"{name} is on the meta device, where weights have no numbers")
    if _depths(ours) != _depths(theirs):
        raise ValueError(
            f"the two models differ in their number of blocks: {_depths(ours)} and "
            f"{_depths(theirs)} in the vision and the text tower; expected the same"
        )
    configs = (_config(ours), _config(theirs))
    weights = [_weights(*pair, dtype) for pair in zip((ours, theirs), configs, strict=True)]
    exact = TOLERANCE[torch.float64]
    if _are_an_ulp_apart(*weights):
        exact = TOLERANCE.get(dtype, math.inf)
    elif weights[0].keys() != weights[1].keys():
        exact = MERGED
    inputs = _inputs(*configs, seed)
    plan = [(model, exactly) for model in (ours, theirs) for exactly in (False, True)]
    runs = [_run(model, dtype, exactly, device, *inputs) for model, exactly in _progress(plan)]
    for run, peer in ((runs[0], runs[2]), (runs[1], runs[3])):
        _lay_out_alike(run, peer, *map(len, inputs))
        _lay_out_alike(peer, run, *map(len, inputs))
    rows = []
    for site in dict.fromkeys(site for model in (ours, theirs) for site, *_ in _sites(model)):
        found = [run.tensors[site] for run in runs if site in run.tensors]
        if len(found) == len(runs):
            rows.append(_difference(site, found, dtype, exact, device))
        elif any(run.error for run in runs):
            rows.append(_infinitely_far(site))
    named = {"pixels": inputs[0].to(dtype), "ids": inputs[1]}
    sides = [
        diagnosis.Side(named | run.tensors, w, config)
        for run, w, config in zip(runs[1::2], weights, configs, strict=True)
    ]
    failed = next((row for row in rows if not row.within_tolerance), None)
    if failed is None:
        return _compare_unread(rows, sides, exact)
    return rows, _cause(failed, runs, sides, dtype)


def _cause(
    failed: Difference, runs: "list[Run]", sides: list[diagnosis.Side], dtype: torch.dtype
) -> str:
    """Of the first difference that is out of tolerance."""
    names = ("model", "model in float64", "other", "other in float64")
    if any(failed.site not in run.tensors for run in runs):
        return next(f"{name} {run.error}" for name, run in zip(names, runs) if run.error)
    truth = runs[-1].tensors[failed.site]
    if failed.float64 <= _limit(failed.site, TOLERANCE[torch.float64], truth):
        return "rounding: in float64 the two agree"
    for name, pair in zip(diagnosis.NAMES, (runs[:2], runs[2:]), strict=True):
        one, exactly = (run.tensors[failed.site] for run in pair)
        far = 0.01 * max(1.0, exactly.abs().max().item())
        if dtype in TOLERANCE and far < _distance(one, exactly) < math.inf:
            return f"{name} in float64 is far from itself: dropout in evaluation?"
    return diagnosis.cause_in_model(failed.site, *sides)


def _compare_unread(rows: list[Difference], sides: list[diagnosis.Side], exact: float) -> Stage:
    """Compare what no text reads: a vocabulary is too large for that, and a context too long."""
    site = "text.embeddings"
    ours, theirs = (side.weights for side in sides)
    for name in ("text.token_embed.weight", "text.pos_embed"):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            continue
        length = min(len(one), len(other))  # a fork may have added words
        distance = _distance(one[:length], other[:length])
        if distance > exact:
            relative = distance / max(other.abs().max().item(), 1e-30)
            far = Difference(site, distance, relative, distance, distance, 0.0, False)
            rows = [far if row.site == site else row for row in rows]
            return rows, diagnosis.differing_weights(site, *sides)
    return rows, None


def _lay_out_alike(one: "Run", other: "Run", images: int, texts: int) -> None:
    """Bring the tensors of one run to the shapes of the other, if only the layout differs.

    A fork may take a batch in pieces, or have its tokens before its batch.
    """
    for site, calls in one.calls.items():
        if site not in other.tensors or calls[0].shape == (shape := other.tensors[site].shape):
            continue
        for axis in range(len(shape)):
            try:
                joined = torch.cat(calls, axis)
            except (IndexError, RuntimeError):
                continue
            if joined.ndim == 2 and len(shape) == 3 and joined.numel() == math.prod(shape):
                joined = joined.reshape(shape)  # the tokens of a whole batch in one row
            # The batch comes first, which is how the formulas of `diagnosis` have it.
            batch = texts if site.startswith("text.") else images
            turned = joined.ndim == len(shape) == 3 and shape[0] == batch
            for tensor in (joined, joined.transpose(0, 1)) if turned else (joined,):
                if tensor.shape == shape != one.tensors[site].shape:
                    one.tensors[site] = tensor
                    one.tensors.pop(f"{site} again", None)


def _progress(plan: list[Any]) -> Iterator[Any]:
    return progress(plan, "run")


def _are_an_ulp_apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether weights differ, and by no more than rounding: an exponential and its logarithm, or a
    factor multiplied and divided by, in somebody's conversion."""
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
        return False
    pairs = [(ours[n], theirs[n]) for n in ours if not torch.equal(ours[n], theirs[n])]
    return bool(pairs) and all(
        ((one - other).abs() <= torch.finfo(one.dtype).eps * other.abs()).all()
        for one, other in pairs
    )


def _difference(
    site: str, found: list[Tensor], dtype: torch.dtype, exact: float, device: torch.device
) -> Difference:
    """`exact`: the tolerance in float64."""
    ours, ours_64, theirs, theirs_64 = found
    absolute, float64 = _distance(ours, theirs), _distance(ours_64, theirs_64)
    model_error, other_error = _distance(ours, theirs_64), _distance(theirs, theirs_64)
    if dtype == torch.float64 and site.endswith(".pattern"):
        within = absolute <= IN_PATTERN
    elif dtype in TOLERANCE:
        on_device = dtype == torch.float32 and device.type != "cpu"
        within = absolute <= _limit(site, ON_DEVICES if on_device else TOLERANCE[dtype], theirs_64)
    else:
        within = model_error <= HALF * other_error
    within &= float64 <= _limit(site, exact, theirs_64)
    relative = absolute / max(theirs_64.abs().max().item(), 1e-30)
    return Difference(site, absolute, relative, float64, model_error, other_error, within)


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    distance = (one.double() - other.double()).abs().max().item()
    return math.inf if math.isnan(distance) else distance


def _limit(site: str, tolerance: float, truth: Tensor) -> float:
    """The largest difference at a site that is within tolerance."""
    if site.startswith("logits") and tolerance != MERGED:
        return tolerance
    return tolerance * max(1.0, truth.abs().max().item())


# ------------------------------------------------------------------------------------------------
# The tensors of one model


class Run(NamedTuple):
    """What was seen of a model, on a CPU."""

    tensors: dict[str, Tensor]  # by site, in the order of the calls
    calls: dict[str, list[Tensor]]  # the same of each call of the module at the site
    error: str  # what the model raised, if it did


@torch.no_grad()
def _run(
    model: Any,  # CLIP | CLIPModel
    dtype: torch.dtype,
    exact: bool,
    device: torch.device,
    pixels: Tensor,
    ids: Tensor,
) -> Run:
    """Weights are rounded to `dtype`, and then, for an `exact` run, computed with in float64."""
    if exact and device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    precision = torch.float64 if exact else dtype
    run = Run({}, {}, "")
    seen_by: dict[str, nn.Module] = {}

    def forward(patterns: bool) -> str:
        """Patterns have a run of their own: to look at them makes a model take another path."""
        handles = []
        for site, module, read in _sites(model):
            if site.endswith(".pattern") == patterns and isinstance(module, nn.Module):

                def keep(
                    module: nn.Module,
                    args: tuple,
                    named: dict[str, Any],
                    out: Any,
                    site: str = site,
                    read: Read = read,
                ) -> None:
                    tensor = read((*args, *named.values()), out)
                    if not isinstance(tensor, Tensor):
                        return  # an attention that tells nothing of its pattern
                    tensor = tensor.cpu()
                    if seen_by.setdefault(site, module) is module:
                        run.calls.setdefault(site, []).append(tensor)
                    run.tensors[f"{site} again" if site in run.tensors else site] = tensor

                handles.append(module.register_forward_hook(keep, with_kwargs=True))
        try:
            output = model(**inputs) if _is_theirs(model) else model(*inputs.values())
            for site, tensor in _outputs_of(output):
                run.tensors.setdefault(site, tensor.cpu())
            if "logits" not in run.tensors:
                raise ValueError(f"it returns a {type(output).__name__} without logits_per_image")
        except Exception as error:  # whatever the code of a fork raises
            return _raises(error)
        finally:
            for handle in handles:
                handle.remove()
        return ""

    pixels = pixels.to(device, dtype).to(precision)
    inputs = {"pixel_values": pixels, "input_ids": ids.to(device)}
    uncompiled = torch.compiler.set_stance("force_eager")  # hooks do not reach compiled graphs
    with _taken_in(model, dtype, precision, device), uncompiled:
        with Float64ForFloat32() if exact else nullcontext():
            errors = [forward(patterns=False)]
            if hasattr(model, "set_attn_implementation"):  # transformers' own
                model.set_attn_implementation("eager")
            errors.append(forward(patterns=True))
    return run._replace(error=next(filter(None, errors), ""))


@contextmanager
def _taken_in(
    model: nn.Module, dtype: torch.dtype, precision: torch.dtype, device: torch.device
) -> Iterator[None]:
    """The model itself in evaluation, its weights rounded to `dtype` and taken in `precision`; then
    as it was. No copy, whose functions might hold on to modules of the original."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data for tensor in tensors]
    # `training`, and what a forward keeps: a mask, or a weight that a hook makes, as pruning does.
    kept = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    theirs: list[Any] = [m for m in model.modules() if _is_theirs(model) and hasattr(m, "config")]
    theirs = [m for m in theirs if hasattr(m.config, "_attn_implementation")]
    attention = [module.config._attn_implementation for module in theirs]
    try:
        model.eval()
        for tensor, data in zip(tensors, before, strict=True):
            number = data.is_floating_point()
            taken = data.to(device, dtype).to(precision) if number else data.to(device)
            # What a forward changes in place, as a counter, is not to be the original.
            tensor.data = taken.clone() if taken is data else taken
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
        for module, attributes, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, kind in zip(theirs, attention, strict=True):
            module.config._attn_implementation = kind


OUTPUTS = {
    "logits": "logits_per_image",
    "logits_per_text": "logits_per_text",
    "image_embeds": "image_embeds",
    "text_embeds": "text_embeds",
}
"""Sites, and what a CLIP's output calls them."""


def _outputs_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    if type(output) is tuple:  # OpenAI's
        output = dict(zip(OUTPUTS.values(), output[:2]))
    for site, name in OUTPUTS.items():
        tensor = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(tensor, Tensor):
            yield site, tensor


class Float64ForFloat32(TorchFunctionMode):
    """float64 for whoever asks for float32, as for a softmax in half precision, or for nothing, and
    for tensors that are no parameters, such as a mask, where they meet others of float64."""

    def __enter__(self) -> "Float64ForFloat32":
        """Change the default as well."""
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Change it back."""
        super().__exit__(*exception)
        torch.set_default_dtype(self.default)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`function`, asked for float64."""
        if function is Tensor.float:
            function = Tensor.double
        values = [torch.float64 if value is torch.float32 else value for value in args]
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        tensors = [value for value in (*values, *named.values()) if isinstance(value, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            # The first may be what a function changes in place.
            values[1:] = map(_doubled, values[1:])
            named = {name: v if name == "out" else _doubled(v) for name, v in named.items()}
        try:
            return function(*values, **named)
        except RuntimeError:
            if re.search(r"[^_]_$|^__setitem__$", getattr(function, "__name__", "")):
                raise  # what is changed in place has to stay the same tensor
            return function(*map(_doubled, values), **named)


def _doubled(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.double() if is_float else value


def _is_theirs(model: nn.Module) -> bool:
    return hasattr(model, "vision_model")


Read = Callable[[tuple, Any], Tensor]


def _sites(model: "CLIP | CLIPModel") -> Iterator[tuple[str, nn.Module | None, Read]]:
    """Each site, the module it is at, and how it is read off the module's arguments and output."""

    def argument(args: tuple, out: Any) -> Tensor:
        return args[0]

    def output(args: tuple, out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out  # their attention returns two

    def heads_joined(args: tuple, out: Tensor) -> Tensor:
        return out.flatten(2) if out.ndim > 3 else out  # (B, T, W), of ours (B, T, H, D)

    def pattern(args: tuple, out: Any) -> Tensor:
        return out[1] if isinstance(out, tuple) else out

    theirs = _is_theirs(model)
    for tower, projection in (("vision", "visual_projection"), ("text", "text_projection")):
        root = getattr(model, f"{tower}_model" if theirs else tower)
        blocks = root.encoder.layers if theirs else root.blocks
        proj = getattr(model, projection) if theirs else root.proj
        # Of the two places the first that is run counts: the text tower has no LayerNorm there.
        ln_pre = getattr(root, "pre_layrnorm" if theirs else "ln_pre", None)
        yield f"{tower}.embeddings", ln_pre, argument
        yield f"{tower}.embeddings", blocks[0], argument
        for i, block in enumerate(blocks):
            attn = block.self_attn if theirs else block.attn
            site = f"{tower}.blocks.{i}"
            yield f"{site}.resid_pre", block, argument
            for name in ("q", "k", "v"):
                module = getattr(attn, f"{name}_proj" if theirs else name, None)
                yield f"{site}.{name}", module, heads_joined
            yield f"{site}.pattern", attn if theirs else getattr(attn, "pattern", None), pattern
            yield f"{site}.attn_out", attn, output
            yield f"{site}.mlp_out", block.mlp, output
            yield f"{site}.resid_post", block, output
        yield f"{tower}.pooled", proj, argument
        yield f"{tower}.projected", proj, output
    for site in OUTPUTS:
        yield site, None, output


def _depths(model: "CLIP | CLIPModel") -> tuple[int, int]:
    sites = [site for site, *_ in _sites(model) if site.endswith(".resid_post")]
    vision = sum(site.startswith("vision.") for site in sites)
    return vision, len(sites) - vision


def _config(model: "CLIP | CLIPModel") -> CLIPConfig:
    return CLIPConfig.from_dict(model.config.to_dict()) if _is_theirs(model) else model.config


def _weights(
    model: "CLIP | CLIPModel", config: CLIPConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parameters under our names."""
    weights = {name.replace("_orig_mod.", ""): w for name, w in model.state_dict().items()}
    if _is_theirs(model):
        with torch.device("meta"):
            names = {name: layout_name(name, TRANSFORMERS) for name in CLIP(config).state_dict()}
        weights = {name: weights[theirs] for name, theirs in names.items() if theirs in weights}
    return {name: weight.cpu().to(dtype) for name, weight in weights.items()}


def _inputs(ours: CLIPConfig, theirs: CLIPConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Two images, and eight texts that end anywhere in either model, and most of them once more.

    They are as long as they can be with three positions left over, so that each position is read
    but the last, and positions that are counted from the end show.
    """
    tokens = max(2, min(ours.text.context_length, theirs.text.context_length) - 3)
    pixels, ids = random_inputs(ours, images=2, texts=8, tokens=tokens, seed=seed)
    ids %= min(ours.text.vocab_size, theirs.text.vocab_size)  # a fork may have added words
    ids[:, 0] = ours.text.bos_token_id
    ids[1, -1] = 0  # with which some pad
    ends = [
        text.vocab_size - 1 if text.eos_token_id == LEGACY_EOS else text.eos_token_id
        for text in (ours.text, theirs.text)
    ]
    rows, place = torch.arange(8), torch.arange(8) * (tokens - 2) // 7
    for i, end in enumerate(dict.fromkeys(ends)):
        ids[rows, 1 + (place + i) % (tokens - 1)] = end
    return pixels, ids


# ------------------------------------------------------------------------------------------------
# Pairs to compare


def load_pair(
    name: str | os.PathLike[str], against: str | os.PathLike[str] = "transformers", **options: Any
) -> tuple[Loaded, Loaded]:
    """A checkpoint as we load it, and its files as transformers does, or another checkpoint.

    `name` and `against` are embedded names, directories or hub ids; `options` are those of
    `miniclip.load` that say where from. Tokenizer and transform are None where a directory has
    only weights. Raises CheckpointError; ValueError where transformers cannot load such a model.
    """
    if against != "transformers":
        return _load(name, options), _load(against, options)
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file; transformers loads directories: name the one it is in")
    ours = _load(name, options)
    _check_expressible(ours.model.config)
    return ours, _load_with_transformers(name, ours, options)


def _load(name: str | os.PathLike[str], options: dict[str, Any]) -> Loaded:
    model = CLIP.from_pretrained(name, **options)
    kinds: dict[str, Any] = {"tokenizer": Tokenizer, "transform": ImageTransform}
    parts: list[Any] = [
        _load_part(kind, name, options) if has_files(part, name, **options) else None
        for part, kind in kinds.items()
    ]
    return Loaded(model, *parts)


def _load_part(kind: Any, name: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """A tokenizer or a transform; one that is refused, as a function that raises the reason.

    So a directory that asks for a transform which is no CLIP's is compared, and found to differ.
    """
    try:
        return kind.from_pretrained(name, **options)
    except CheckpointError as error:
        return partial(_raise, error)


def _raise(error: Exception, *args: Any, **options: Any) -> None:
    raise error


def _as_loaded(model: "CLIP | CLIPModel | Loaded") -> Loaded:
    if isinstance(model, Loaded):
        return model
    nothing: Any = None
    return Loaded(model, nothing, nothing)


def _load_with_transformers(
    name: str | os.PathLike[str], ours: Loaded, options: dict[str, Any]
) -> Loaded:
    """Theirs, the tokenizer and the transform in functions that are called like ours."""
    transformers = import_transformers()
    directory = resolve(name, "model", **options)
    model = transformers.CLIPModel.from_pretrained(directory, dtype=torch.float32)
    tokenizer: Any = None
    transform: Any = None
    if ours.tokenizer:
        directory = resolve(name, "tokenizer", **options)
        their_tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)

        def ids_of(texts: Sequence[str], truncate: bool) -> Tensor:
            rows = their_tokenizer(list(texts), padding=True, truncation=truncate)
            return torch.tensor(rows["input_ids"])

        tokenizer = ids_of
    if ours.transform:
        directory = resolve(name, "transform", **options)
        processor = transformers.CLIPImageProcessorPil.from_pretrained(directory)

        def pixels_of(picture: Image.Image) -> Tensor:
            return processor(picture, return_tensors="pt")["pixel_values"][0]

        transform = pixels_of
    return Loaded(model, tokenizer, transform)


def random_pair(shape: str, *, seed: int = 0) -> "tuple[CLIP, CLIPModel]":
    """Ours and transformers' with the same weights, drawn at random, in a shape of PRESETS.

    Needs no checkpoint. Raises ValueError for another shape.
    """
    if shape not in PRESETS:
        raise ValueError(f"no shape is called {shape!r}; expected {', '.join(PRESETS)}")
    import_transformers()
    with meta_device():
        model = CLIP(PRESETS[shape])
    randomize(model.to_empty(device="cpu"), seed)
    return model, transformers_twin(model)


def transformers_twin(model: CLIP) -> "CLIPModel":
    """A CLIPModel of transformers with a copy of our weights, if it can be one."""
    transformers = import_transformers()
    if model.model_type != "clip":
        raise ValueError(
            f"transformers' CLIPModel does not compute what {type(model).__name__} computes"
        )
    _check_expressible(model.config)
    config = transformers.CLIPConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        theirs = transformers.CLIPModel(config)
    copy_weights(model, theirs)
    return theirs.eval()


def _check_expressible(config: CLIPConfig) -> None:
    if odd := beyond_transformers(vars(config.vision)) + beyond_transformers(vars(config.text)):
        raise ValueError(f"transformers' CLIP cannot express {', '.join(odd)}: nothing to compare")


def copy_weights(ours: CLIP, theirs: "CLIPModel") -> None:
    """Give theirs a copy of our weights, in our precision and on our device."""
    weights = ours.state_dict().items()
    copies = {layout_name(name, TRANSFORMERS): weight.detach().clone() for name, weight in weights}
    theirs.load_state_dict(copies, strict=True, assign=True)
    for module in theirs.modules():  # a buffer that no checkpoint has, still on the meta device
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=ours.logit_scale.device)[None]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter, so that activations keep a size near 1 and each weight counts.

    Freshly initialised weights hide faults: a bias that is zero can be lost, a LayerNorm that is
    the identity can be swapped with another. The logit scale is ln 100, the largest that OpenAI's
    training allows, at which rounding shows most.
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
    """Noise (images, channels, height, width), and ids (texts, tokens) whose end token moves from
    row to row and is followed by random ids, as no padding is fixed."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    size = (images, vision.channels, *vision.height_width)
    ids = torch.randint(3, text.vocab_size - 2, (texts, tokens), generator=generator)
    end = text.eos_token_id if text.eos_token_id != LEGACY_EOS else text.vocab_size - 1
    rows = torch.arange(texts)
    ids[rows, tokens - 1 - rows % (tokens - 1)] = end
    return torch.randn(size, generator=generator), ids


# ------------------------------------------------------------------------------------------------


def summarize(rows: list[Difference]) -> list[Difference]:
    """One row for all blocks of a tower, with the largest of their differences."""
    depth = Counter(row.site.partition(".")[0] for row in rows if row.site.endswith(".resid_post"))
    largest: dict[str, Difference] = {}
    for row in rows:
        last = depth[row.site.partition(".")[0]] - 1
        site = re.sub(r"blocks\.\d+", f"blocks.0-{last}", row.site)
        seen = largest.get(site, row)
        numbers = map(max, seen[1:-1], row[1:-1])
        within = seen.within_tolerance and row.within_tolerance
        largest[site] = Difference._make([site, *numbers, within])
    return list(largest.values())


def nearer(rows: list[Difference]) -> dict[str, int]:
    """At how many sites of the models which of them is nearer to the truth."""
    errors = [row[4:6] for row in rows if row.site not in ("tokens", "pixels")]
    return {
        "model": sum(ours < theirs for ours, theirs in errors),
        "other": sum(ours > theirs for ours, theirs in errors),
        "equal": sum(ours == theirs for ours, theirs in errors),
    }


def environment(device: str | torch.device = "cpu") -> str:
    """The versions and the processor that numbers were measured with."""
    at_work = versions()
    named = ", ".join(f"{name} {at_work[name]}" for name in ("torch", "transformers"))
    if torch.device(device).type == "cuda":
        return f"{named}, {torch.cuda.get_device_name(device)}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{named}, CPU with {capability}, threads: {threads}"
