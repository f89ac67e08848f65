"""Architectures, weights files and the bundled model."""

from anysize.models.diffusion import is_checkpoint, parts, recipes_of
from anysize.models.weights import BUNDLED, Weights, bundled_file, load_weights

__all__ = ["BUNDLED", "Weights", "bundled_file", "is_checkpoint", "load_weights", "parts", "recipes_of"]
