"""The versions of the libraries that miniclip is compared with."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

DISTRIBUTIONS = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "open_clip": "open_clip_torch",
    "clip": "openai-clip",
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "instant_clip_tokenizer": "instant-clip-tokenizer",
    "hf_processors_rs": "hf-processors-rs",
}
"""The libraries that affect measured numbers, as {module name: name for pip}."""


def versions() -> dict[str, str]:
    """The version of Python, and of each library in DISTRIBUTIONS that has been imported.

    A module's `__version__` can be more exact than the version that pip knows, for example
    2.14.1+cu130. openai/CLIP has no `__version__`, so the version that pip knows is returned.
    """
    found = {"Python": platform.python_version()}
    for module, distribution in DISTRIBUTIONS.items():
        if module in sys.modules:
            stated = getattr(sys.modules[module], "__version__", None)
            found[distribution] = str(stated or installed_version(distribution))
    return found


def installed_version(distribution: str) -> str:
    """The version that pip knows, else "of unknown version", as for a folder on PYTHONPATH."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def import_transformers() -> ModuleType:
    """Import transformers and silence its log. Raises ValueError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install 'miniclip[test]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
