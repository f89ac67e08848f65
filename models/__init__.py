"""Architectures, weights files and the bundled model."""

from anysize.models.community import described, import_spandrel, is_descriptor
from anysize.models.diffusion import is_checkpoint, parts, recipes_of
from anysize.models.weights import BUNDLED, Weights, bundled_file, load_weights

__all__ = [
    "BUNDLED",
    "Weights",
    "bundled_file",
    "described",
    "import_spandrel",
    "is_checkpoint",
    "is_descriptor",
    "load_weights",
    "parts",
    "recipes_of",
]
