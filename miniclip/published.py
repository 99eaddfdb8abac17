"""Configs of published models, by name. No weights."""

from miniclip.config import CLIPConfig
from miniclip.files import published

PUBLISHED = {name: CLIPConfig.from_fields(fields) for name, fields in published.PUBLISHED.items()}
