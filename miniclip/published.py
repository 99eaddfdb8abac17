"""Configs of published models, by name, without weights."""

from miniclip.config import CLIPConfig
from miniclip.files import published
from miniclip.files.published import shape_name

PUBLISHED = {name: CLIPConfig.from_fields(fields) for name, fields in published.PUBLISHED.items()}


def published_shape(name: str) -> str:
    """Return the key of PUBLISHED for the name of a model. Raises ValueError for an unknown name.

    >>> published_shape("ViT-L/14@336px")
    'L/14-336'
    """
    if name not in PUBLISHED and (name := shape_name(shown := name)) not in PUBLISHED:
        raise ValueError(f"no shape is called {shown!r}; expected {', '.join(PUBLISHED)}")
    return name
