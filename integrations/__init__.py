"""Adapters for host applications, a module for each: diffusers, ComfyUI, web UIs, chaiNNer, and web services.

Each imports its host inside the host's own process; none is needed to import this.
"""
