"""Modules -> artifacts with a probed, verified contract. Names no architecture."""

from anysize.exporters.exporting import export
from anysize.exporters.probing import probe

__all__ = ["export", "probe"]
