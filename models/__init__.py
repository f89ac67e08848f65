"""Architectures, weights files and the bundled model."""

from anysize.models.weights import BUNDLED, Weights, bundled_file, load_weights

__all__ = ["BUNDLED", "Weights", "bundled_file", "load_weights"]
