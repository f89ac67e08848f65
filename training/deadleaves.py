"""Procedural pictures for training: dead leaves, line art, hatching and smooth shading; no one's data.

Dead leaves (occluding shapes whose sizes follow a power law of exponent -3, which makes the picture
scale-invariant like natural images: Lee, Mumford & Huang 2001) are known to train restoration networks
to near natural-image quality (Achddou, Gousseau & Ladjal 2021). Everything is deterministic by seed.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def _noise(rng: np.random.Generator, size: int, exponent: float) -> Array:
    """Fractal noise, (size, size) float32 of mean 0 and deviation 1, spectrum 1/f**exponent."""
    f = np.fft.rfftfreq(size)[None, :] ** 2 + np.fft.fftfreq(size)[:, None] ** 2
    f[0, 0] = np.inf
    spectrum = f ** (-exponent / 2) * np.exp(2j * np.pi * rng.random(f.shape))
    field = np.fft.irfft2(spectrum, s=(size, size))
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def _texture(rng: np.random.Generator, size: int, yy: Array, xx: Array) -> Array:
    """A textured fill, (size, size, 3) float32 around a random colour."""
    colour = rng.random(3) ** rng.uniform(0.6, 1.6)
    fill = np.broadcast_to(colour, (size, size, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * xx + np.sin(angle) * yy) / size
    kind = rng.random()
    if kind < 0.35:  # smooth shading
        fill = fill + (ramp[..., None] - 0.5) * rng.normal(0, 0.35, 3)
    elif kind < 0.65:  # fractal grain
        fill = fill + _noise(rng, size, rng.uniform(0.6, 1.8))[..., None] * rng.normal(0, 0.08, 3)
    elif kind < 0.85:  # periodic: stripes, hatching, weave
        wave = np.sin(ramp * size * 2 * np.pi / rng.uniform(3, 24))
        if rng.random() < 0.5:
            wave = np.tanh(wave * rng.uniform(1, 8))
        fill = fill + wave[..., None] * rng.normal(0, 0.15, 3)
    return fill.astype(np.float32)


def _leaf(rng: np.random.Generator, yy: Array, xx: Array, size: int, radius: float) -> Array:
    """An antialiased mask, (size, size) float32 in 0..1, of one shape of about `radius` pixels."""
    cy, cx = rng.uniform(-0.1, 1.1, 2) * size
    angle = rng.uniform(0, 2 * np.pi)
    dx, dy = xx - cx, yy - cy
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = -np.sin(angle) * dx + np.cos(angle) * dy
    kind = rng.random()
    aspect = rng.uniform(0.3, 1.0)
    if kind < 0.35:
        distance = np.hypot(u, v / aspect) - radius
    elif kind < 0.6:
        distance = np.maximum(np.abs(u), np.abs(v) / aspect) - radius
    elif kind < 0.8:  # star-like blob
        theta = np.arctan2(v, u)
        wobble = 1 + 0.35 * np.sin(rng.integers(2, 8) * theta + rng.uniform(0, 6))
        distance = np.hypot(u, v) - radius * wobble
    else:  # a stroke: line or arc
        width = rng.uniform(0.6, 3.0)
        if rng.random() < 0.5:
            distance = np.maximum(np.abs(v) - width, np.abs(u) - 2 * radius)
        else:
            distance = np.abs(np.hypot(u, v) - radius) - width
    edge = rng.uniform(0.8, 1.5)
    return np.clip(0.5 - distance / edge, 0, 1).astype(np.float32)


def picture(seed: int, size: int = 256) -> Array:
    """One training picture: (size, size, 3) float32 in 0..1, wholly determined by `seed`."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    canvas = _texture(rng, size, yy, xx)
    count = int(rng.integers(60, 220))
    smallest, largest = 1.5, size * rng.uniform(0.15, 0.5)
    # inverse-transform sample of p(r) ~ r^-3 on [smallest, largest], painted large to small so that
    # small leaves are not all hidden
    u = rng.random(count)
    radii = 1 / np.sqrt(u / largest**2 + (1 - u) / smallest**2)
    radii = np.where(rng.random(count) < 0.35, rng.uniform(6, largest, count), radii)
    for radius in sorted(radii, reverse=True):
        mask = _leaf(rng, yy, xx, size, radius)[..., None]
        canvas = canvas * (1 - mask) + _texture(rng, size, yy, xx) * mask
    return np.clip(canvas, 0, 1)
