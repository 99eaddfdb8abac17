"""Run a tower on another engine: PyTorch's compiler, ONNX Runtime or OpenVINO.

Before each matrix product on a CPU, PyTorch packs the weight: it reorders the numbers. An engine
packs each weight only once. This saves the most time for a single image.

```python
from miniclip.engines import on_engine

encode = on_engine(model.vision, "onnxruntime")  # or "compile", "openvino"; text towers too
embeds = encode(pixels)  # model.vision(pixels), up to rounding
```

    miniclip embed photographs --out index.safetensors --engine auto
    miniclip parity everyday --engine onnxruntime
    miniclip bench --suite vision text --engine compile onnxruntime openvino compile-bf16

The last command, with all engines and two threads, gave these times in milliseconds. The number in
brackets is a median ratio: the time divided by eager's time in the same round. Differences are
divided by the embedding's norm:

                       1 image          16 images        16 captions      largest difference
    eager              75               605              117
    compile            62 (0.84)        531 (0.87)        98 (0.82)       rounding of float32
    onnxruntime        58 (0.77)        577 (0.96)        97 (0.81)       rounding of float32
    openvino           57 (0.76)        595 (0.98)       109 (0.92)       rounding of float32
    compile-bf16       36 (0.51)        264 (0.43)        49 (0.44)       1e-2
    openvino-bf16      32 (0.45)        195 (0.33)        51 (0.39)       1e-2
    onnxruntime-int8   21 (0.29)        165 (0.28)        37 (0.33)       3e-2

2026-11-29, Intel Xeon, torch 2.13.0, onnxruntime 1.32.0, openvino 2026.4.1. This CPU has AMX, which
multiplies matrices of bfloat16 and of int8.

`on_engine` returns a function with a snapshot of the weights. The function raises an error if
the tower has a hook, a tensor has changed, or a module or a setting was replaced. It does not
notice an edit in place through `.data`, an edit inside a list or a dict, or a change of an
attribute whose name begins with an underscore.

Engines with `bf16` or `int8` in their name have larger rounding errors than float32.
`onnxruntime-int8` has 8-bit weights and quantises activations dynamically. `bench` and `parity`
show the rounding error. Commands that save or evaluate embeddings do not accept these engines.
"""

import copy
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from miniclip.errors import ContextLengthError
from miniclip.files.checks import check_ids, check_pixels
from miniclip.follow import tower_for
from miniclip.model import CLIP, unit_norm

Encode = Callable[[Tensor], Tensor]


def compiled(tower: nn.Module) -> Encode:
    """Compile a tower so that each weight is packed only once. PyTorch makes one graph for the
    shape of the first input, and a slower graph for all other shapes."""
    if next(tower.parameters()).is_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("torch.compile needs a C++ compiler, found none: install g++")
    from torch._inductor import config

    graph = torch.compile(tower)

    def run(x: Tensor) -> Tensor:
        # torch.compile(tower, options={"freezing": True}) would not freeze the weights.
        with config.patch(freezing=True):
            return graph(x)

    return run


def compiled_bf16(tower: nn.Module) -> Encode:
    """Compile a tower in bfloat16."""
    return compiled(copy.deepcopy(tower).bfloat16())


@contextmanager
def silence() -> Iterator[None]:
    """Hide the warnings and the log messages of exporters."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def write_onnx(tower: Any, path: Path) -> None:
    """Write a tower as an ONNX file. The numbers of images, texts and tokens may vary."""
    if (dtype := next(tower.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"the engine needs float32 weights, found {dtype}: load the model in float32, or use "
            "the engine compile"
        )
    if hasattr(tower, "patch_embed"):
        config = tower.config
        example = torch.zeros(2, config.channels, *config.height_width)
        sizes = {0: torch.export.Dim("images")}
    else:
        length = tower.config.context_length
        example = torch.full((2, min(3, length)), tower.config.eos_token_id)
        sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", min=2, max=length)}
    with silence():
        torch.onnx.export(  # a copy, because the exporter replaces the parameters while it runs
            copy.deepcopy(tower),
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=(sizes,),
            verbose=False,
        )


def onnxruntime(tower: nn.Module, int8: bool = False) -> Encode:
    """Run a tower in ONNX Runtime on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = Path(folder, "tower.onnx")
        write_onnx(tower, path)
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            path = Path(folder, "int8.onnx")
            with silence():
                quantize_dynamic(
                    path.with_name("tower.onnx"), path, weight_type=QuantType.QInt8,
                    op_types_to_quantize=["MatMul", "Gemm"], use_external_data_format=True,
                )  # fmt: skip
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def openvino(tower: nn.Module, precision: str = "f32") -> Encode:
    """Run a tower in OpenVINO on the CPU. Without `precision`, OpenVINO might choose bfloat16."""
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    with TemporaryDirectory() as folder:
        path = Path(folder, "tower.onnx")
        write_onnx(tower, path)
        model = openvino_core().compile_model(path, "CPU", settings)
    return lambda x: torch.from_numpy(model(x.numpy())[0])


@cache
def openvino_core() -> Any:
    """OpenVINO's Core, which stays until the process ends.

    OpenVINO gives the main thread a stack for signal handlers. If the garbage collector deleted the
    Core in another thread, this stack would be freed, and the next Ctrl-C would crash Python.
    """
    from openvino import Core

    return Core()


class Engine(NamedTuple):
    """An engine: the function that starts it, the packages that it needs, and its tolerance."""

    start: Callable[[Any], Encode]
    packages: tuple[str, ...] = ()
    tolerance: float = 2e-5  # for unit vectors; `differences` multiplies it for logits

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


ONNX = ("onnx", "onnxscript")
ENGINES = {
    "eager": Engine(lambda tower: tower),
    "compile": Engine(compiled),
    "onnxruntime": Engine(onnxruntime, (*ONNX, "onnxruntime")),
    "openvino": Engine(openvino, (*ONNX, "openvino")),
    "compile-bf16": Engine(compiled_bf16, (), 5e-2),
    "openvino-bf16": Engine(lambda tower: openvino(tower, "bf16"), (*ONNX, "openvino"), 5e-2),
    "onnxruntime-int8": Engine(lambda tower: onnxruntime(tower, True), (*ONNX, "onnxruntime"), 0.1),
}
FLOAT32 = ("eager", "compile", "onnxruntime", "openvino")
"""The engines that compute in float32."""


def find_engine(name: str) -> Engine:
    """Return an engine by its name. Raises ValueError if it is unknown or not installed."""
    if name not in ENGINES:
        raise ValueError(f"no engine is called {name!r}; expected {', '.join(ENGINES)}")
    if missing := ENGINES[name].missing:
        packages = " ".join(missing)
        raise ValueError(f"the engine {name} is not installed: pip install {packages}")
    return ENGINES[name]


def on_engine(tower: Any, name: str, check: bool = True) -> Encode:
    """Make a function that runs a tower on an engine.

    Args:
        tower: a vision or a text tower. Do not change it afterwards.
        name: one of ENGINES.
        check: compare the first output with the tower's output.

    Returns:
        A function that computes embeddings (B, E) as the tower does, but without gradients. Its
        input is pixels (B, channels, height, width) or ids (B, T).

    Raises:
        ValueError: the engine is not installed, the tower has hooks, or the tower was made in
            inference mode. The engine "eager" accepts such towers. The returned function raises
            ValueError if the tower has changed, or if the first output is out of the tolerance.

    >>> import miniclip
    >>> tower = miniclip.VisionTower.from_pretrained("shapes")
    >>> encode = on_engine(tower, "eager")
    >>> encode(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 128])
    """
    engine = find_engine(name)
    if name == "eager":
        return tower
    taken, like = snapshot(tower), next(tower.parameters())
    most = max(engine.tolerance, 8 * torch.finfo(like.dtype).eps)  # larger only in half precision
    if not like.is_cpu and not name.startswith("compile"):
        raise ValueError(f"the engine {name} runs on the CPU, but the tower is on {like.device}")
    with torch.inference_mode(False), torch.no_grad():
        run = engine.start(tower)
    is_checked = not check

    def encode(x: Tensor) -> Tensor:
        nonlocal is_checked
        check_input(tower, x)
        if (changed := difference(taken, snapshot(tower))) is not None:
            raise ValueError(
                f"{changed or 'the tower'} has changed since the tower was put on the engine "
                f"{name}, which still has the old weights: call on_engine again"
            )
        # PyTorch does not pack weights in inference mode, nor while it records gradients.
        with torch.inference_mode(False), torch.no_grad():
            x = x.to(like.dtype) if x.is_floating_point() else x.long()
            embeds = run(x.detach().contiguous()).to(like.dtype)
            if not is_checked and len(x):
                far = (unit_norm(embeds.float()) - unit_norm(tower(x).float())).abs().max().item()
                if not far <= most:
                    raise ValueError(
                        f"the engine {name} differs from the tower by {far:.1e}, expected at most "
                        f"{most:.0e}: use another engine for {type(tower).__name__}"
                    )
                is_checked = True
        return embeds

    return encode


def check_input(tower: Any, x: Any) -> None:
    """Raise the errors that the tower would raise, because an engine checks nothing."""
    if hasattr(tower, "patch_embed"):
        check_pixels(x, tower.config)
    else:
        check_ids(x, tower.config.vocab_size)
        if x.shape[1] > (most := tower.config.context_length):
            raise ContextLengthError(f"texts of {x.shape[1]} tokens; expected at most {most}")
        tower.eos_positions(x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("an engine has no gradients: call it under torch.no_grad()")


Snapshot = dict[str, tuple[list[Any], list[int]]]


def snapshot(tower: nn.Module) -> Snapshot:
    """Return the attributes and tensors of each module, and the tensors' versions and addresses.
    If any of these change, the tower has changed. Raises ValueError if a module has a hook."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    is_hooked = any(getattr(all_modules, f"_global_{kind}_hooks") for kind in kinds)
    found: Snapshot = {}
    for name, module in tower.named_modules(remove_duplicate=False):
        if is_hooked or any(getattr(module, f"_{kind}_hooks") for kind in kinds):
            raise ValueError(
                f"{name or 'the tower'} has a hook, which an engine cannot call: remove the hook, "
                "or run the tower without an engine"
            )
        own = [value for key, value in vars(module).items() if not key.startswith("_")]
        tensors = [*module._parameters.values(), *module._buffers.values()]
        tensors += [value for value in own if isinstance(value, Tensor)]
        if any(t is not None and t.is_inference() for t in tensors):
            raise ValueError(
                f"{name or 'the tower'} was made in inference mode, so an engine cannot notice "
                "when its tensors change: make it outside torch.inference_mode"
            )
        numbers = [n for t in tensors if t is not None for n in (t._version, t.data_ptr())]
        found[name] = [module, type(module), *own, *tensors], numbers
    return found


def difference(old: Snapshot, new: Snapshot) -> str | None:
    """The name of the first module that has changed, or None."""
    for name in old | new:
        (objects, numbers), (now, counted) = old.get(name, ([], [])), new.get(name, ([], []))
        is_same = len(objects) == len(now) and all(a is b for a, b in zip(objects, now))
        if not is_same or numbers != counted:
            return name
    return None


def use_engine(model: CLIP, name: str) -> None:
    """Make `model.encode_image` run on an engine. Raises the errors of `on_engine`."""
    encode_with(model, name, on_engine(tower_for(model, torch.empty(0)), name))


def encode_with(model: CLIP, name: str, encode: Encode) -> None:
    """Make `model.encode_image` call `encode`. Raise an error if the vision tower was replaced."""
    tower = model.vision

    def encode_image(model: CLIP, pixels: Tensor, normalize: bool = False) -> Tensor:
        if model.vision is not tower:
            raise ValueError(
                "the vision tower was replaced or copied since it was put on an engine: call "
                "use_engine again"
            )
        return unit_norm(encode(pixels)) if normalize else encode(pixels)

    vars(encode_image)["engine"] = name
    # `deepcopy` binds a method to the copied model, so the copy raises the error above. If it were
    # a plain function, the copy would still encode with this tower.
    model.encode_image = MethodType(encode_image, model)  # type: ignore[method-assign]


def engine_of(model: CLIP) -> str:
    """The engine that `model.encode_image` runs on."""
    return getattr(model.encode_image, "engine", "eager")


def use_fastest(model: CLIP, pixels: Sequence[Tensor]) -> str:
    """Make `model.encode_image` run on the engine that is fastest for these images, each (3, S, S).

    Only engines in float32 are tried. An engine is left out if it is not installed, or if its
    output is out of the tolerance. Returns a line that names the chosen engine.
    """
    if not pixels:
        return "engine eager: no image could be read, so the other engines were not timed"
    tower, x = tower_for(model, torch.empty(0)), torch.stack([*pixels])
    encoders: dict[str, Encode] = {}
    reasons: list[str] = []
    for name in FLOAT32:
        try:
            encode = on_engine(tower, name)
            encode(x)
        except Exception as error:  # an exporter or a runtime can raise any error
            reasons.append(str(error).partition("\n")[0])
        else:
            encoders[name] = encode
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for name, encode in [*encoders.items()] * 3:
        start = time.perf_counter()
        with torch.no_grad():
            encode(x)
        seconds[name].append(time.perf_counter() - start)
    best = min(encoders, key=lambda name: min(seconds[name]))
    if best != "eager":
        encode_with(model, best, encoders[best])
    ratio = min(seconds["eager"]) / min(seconds[best])
    about = [f"engine {best}, {ratio:.2f} times as fast as eager", *reasons]
    return "; left out: ".join([about[0], *about[1:]])


class Row(NamedTuple):
    """The difference between the outputs of an engine and of the tower."""

    what: str
    difference: float  # the largest absolute difference
    tolerance: float


@torch.no_grad()
def differences(model: CLIP, name: str, pixels: Tensor, ids: Tensor) -> list[Row]:
    """Compare an engine's unit vectors and logits with the model's unit vectors and logits."""
    expected = model(pixels, ids)
    towers = (tower_for(model, torch.empty(0)), tower_for(model, ids))
    encoders = [on_engine(tower, name, check=False) for tower in towers]
    found = [unit_norm(run(x)) for run, x in zip(encoders, (pixels, ids), strict=True)]
    logits = model.score(*found).T
    far = [
        (one - other).abs().max().item()
        for one, other in zip((*found, logits), (*expected[2:], expected[0]), strict=True)
    ]
    most, scale = ENGINES[name].tolerance, model.logit_scale.exp().item()
    most_of_logits = most * (max(scale / 100, 1) if name in FLOAT32 else scale)
    limits = (most, most, most_of_logits)
    return [Row(*row) for row in zip(("image_embeds", "text_embeds", "logits"), far, limits)]
