"""Architectures, weights files and the bundled models."""

from anysize.models.community import described, import_spandrel, is_descriptor
from anysize.models.diffusion import is_checkpoint, parts, recipes_of
from anysize.models.registry import BUNDLED, bundled_file
from anysize.models.weights import Weights, load_weights

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
