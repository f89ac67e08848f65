"""`Stylizer`: a picture in, the same picture in another style out, at its own size; one, or many at once."""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from anysize.backends import Backend
from anysize.backends.base import Array
from anysize.backends.cache import Cache
from anysize.backends.errors import ModelLoadError, OptionError
from anysize.pixels import Picture, fill_hidden, open_picture, quantise, to_float
from anysize.report import Report
from anysize.session import Options, Session, load, whole_number
from anysize.sizes import SizePlan, SizePolicy
from anysize.sources import Source, version_of
from anysize.tiling import Tiling
from anysize.upscale import Upscaler
from anysize.work import ArrayRows, Cancel, Progress, Work


class ResultCache:
    """Results on disk, by everything they follow from. Safe for threads and for several processes.

    `folder`: where; made when needed. `limit`: bytes kept; beyond it, what was used longest ago goes first.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = 2**30) -> None:
        whole_number("limit", limit)
        self._cache = Cache(Path(folder).absolute(), f"results of anysize {version_of('anysize')}", limit)

    def get(self, *key: str) -> Array | None:
        """The array put under this key; None if none was, or it is damaged."""
        data = self._cache.get(*key)
        return None if data is None else np.load(io.BytesIO(data), allow_pickle=False)

    def put(self, result: Array, *key: str) -> None:
        """Keep an array under this key."""
        data = io.BytesIO()
        np.save(data, result, allow_pickle=False)
        self._cache.put(data.getvalue(), *key)


def bucket_batch(session: Session, images: Sequence[Array], most: int = 8) -> list[Array]:
    """Run images of mixed sizes through a model of one input and one output: those of a size together.

    `images`: (C, H, W), each of a size that the contract allows. `most`: how many at once, if the contract
    allows as many. Returns their outputs, (C', H', W'), in the same order. Raises as `Session.run` does.
    """
    whole_number("most", most)
    source, result = session.spec.inputs[0].name, session.spec.outputs[0].name
    batch = session.spec.inputs[0].shape[0]
    limit = batch if isinstance(batch, int) else getattr(batch, "max", None)
    most = min(most, limit or most)
    buckets = defaultdict(list)
    for i, image in enumerate(images):
        buckets[image.shape].append(i)
    outputs: dict[int, Array] = {}
    for bucket in buckets.values():
        for start in range(0, len(bucket), most):
            chosen = bucket[start : start + most]
            made = session.run({source: np.stack([images[i] for i in chosen])}, finite=True)[result]
            outputs.update(zip(chosen, made, strict=True))
    return [outputs[i] for i in range(len(images))]


class Stylizer:
    """Restyle pictures of any size with one model on one engine. Thread-safe.

    `source`, `backend`, `precision`, `options` as `load` takes them, or a `Session`; the model must give back
    the size it takes. `policy`: a `SizePolicy` or the name of a preset; None: pictures keep their size, grown
    by mirrored pixels to the next one that the model takes, which are cut off again. `tiling`: as for an
    `Upscaler`; models with statistics of the whole picture cannot be tiled, and say so. `cache`: where
    results are kept, so that a picture is not run again with the same model and settings.

    Alpha is not restyled: it comes back as it was. Raises `ModelLoadError` for a model of another kind,
    `OptionError` for a cache where nothing tells whether the model is the same.
    """

    def __init__(
        self,
        source: Source | Session,
        policy: SizePolicy | str | None = None,
        *,
        backend: str | Backend = "auto",
        precision: str = "f32",
        options: Options | None = None,
        tiling: Tiling | None = None,
        cache: ResultCache | None = None,
    ) -> None:
        self.policy = SizePolicy.preset(policy) if isinstance(policy, str) else policy or SizePolicy()
        if not isinstance(self.policy, SizePolicy):
            raise OptionError(f"policy must be a SizePolicy or the name of one, not {policy!r}")
        if not isinstance(source, Session):
            source = load(source, backend=backend, precision=precision, options=options)
        self.session = source
        self._upscale = Upscaler(source, tiling=tiling)
        if self._upscale.scale != 1 or source.spec.channels != 3:
            found = "; ".join(map(str, (*source.spec.inputs, *source.spec.outputs)))
            raise ModelLoadError(f"not a model that restyles colour pictures at their size: {found}")
        guard = source._guards[0]
        # a module's own weights can be told by the file they came from only
        model = guard.model.digest or (source.spec.source_sha256 if guard.model.format == "module" else "")
        if cache is not None and not model:
            raise OptionError("nothing tells this model from another: cache those of weights or .onnx files")
        ran = (guard.backend.name, guard.backend.version, guard.options.device, guard.options.precision)
        self._settings = (model, *ran, repr(self.policy), repr(self._upscale.tiling))
        self._cache, self._last = cache, local()

    @property
    def report(self) -> Report | None:
        """What ran in the last finished call of this thread; None before the first."""
        return getattr(self._last, "report", None)

    def __call__(self, image: Any, *, progress: Progress | None = None, cancel: Cancel | None = None) -> Any:
        """Restyle one picture and return the same kind: array (HW or HWC; uint8, uint16, float) or PIL image.

        Raises `ImageError`, `ShapeError`, `OptionError`, `MemoryBudgetError`, `ExecutionError`,
        `IntegrityError`, `Cancelled`.
        """
        picture = open_picture(image)
        key = self._key(picture)
        result = self._known(key)
        if result is None:
            plan, colour = self._fitted(picture)
            styled = self._upscale(colour, progress=progress, cancel=cancel)
            report = self._upscale.report
            assert report is not None
            result = self._finished(picture, plan, styled)
            reason = report.reason if plan.target == plan.size else f"{plan}; {report.reason}"
            self._last.report = replace(report, width=result.shape[1], height=result.shape[0], reason=reason)
            self._keep(result, key, not report.fallbacks)
        return picture.restore(result)

    def batch(self, images: Iterable[Any], most: int = 8) -> list[Any]:
        """Restyle pictures of mixed sizes, whole: those that come to the same size together, `most` at once.

        Returns them in order. Raises as a call does, and `OptionError` with a limit of memory, which would
        have to be kept for all together.
        """
        if self._upscale.tiling.memory is not None:
            raise OptionError("with a limit of memory, restyle pictures one by one")
        pictures = [open_picture(image) for image in images]
        keys = [self._key(picture) for picture in pictures]
        results: list[Any] = [self._known(key) for key in keys]
        missing = [i for i, result in enumerate(results) if result is None]
        fitted = [self._fitted(pictures[i]) for i in missing]
        works = [
            Work(self.session, ArrayRows(colour), colour.dtype, None, lambda: False) for _, colour in fitted
        ]
        fallbacks = len(self.session.stats.fallbacks)
        outputs = bucket_batch(self.session, [work.inputs()[0] for work in works], most)
        as_asked = len(self.session.stats.fallbacks) == fallbacks
        for i, (plan, colour), work, values in zip(missing, fitted, works, outputs, strict=True):
            styled = np.empty(colour.shape, np.float32)
            work.store(values[:, : colour.shape[0], : colour.shape[1]], styled)
            result = self._finished(pictures[i], plan, styled)
            self._keep(result, keys[i], as_asked)
            results[i] = result
        return [picture.restore(result) for picture, result in zip(pictures, results, strict=True)]

    def close(self) -> None:
        """Free the session."""
        self.session.close()

    def _fitted(self, picture: Picture) -> tuple[SizePlan, Array]:
        """The plan for a picture, and its colour at that size, float32."""
        array = fill_hidden(picture.array)
        plan = self.policy.plan((array.shape[0], array.shape[1]))
        return plan, plan.apply(to_float(array[:, :, : -1 if picture.has_alpha else None]))

    def _finished(self, picture: Picture, plan: SizePlan, styled: Array) -> Array:
        """At the picture's size again, in its dtype, with its alpha."""
        result = quantise(plan.invert(styled), picture.array.dtype)
        if picture.has_alpha:
            alpha = picture.array[:, :, -1:]
            result = np.concatenate((result, alpha if self.policy.restore else plan.apply(alpha)), axis=2)
        return result

    # -- the cache of results

    def _key(self, picture: Picture) -> tuple[str, ...]:
        if self._cache is None:
            return ()
        array = np.ascontiguousarray(picture.array)
        pixels = hashlib.sha256(array.data).hexdigest()
        return (pixels, str(array.shape), array.dtype.str, *self._settings)

    def _known(self, key: tuple[str, ...]) -> Array | None:
        result = None if self._cache is None else self._cache.get(*key)
        if result is not None:
            guard = self.session._guards[0]
            self._last.report = Report(
                width=result.shape[1],
                height=result.shape[0],
                scale=1.0,
                model_scale=1,
                backend=guard.backend.name,
                device=guard.options.device,
                precision=guard.options.precision,
                method="cache",
                reason="the same picture was restyled before, with the same model and settings",
            )
        return result

    def _keep(self, result: Array, key: tuple[str, ...], as_asked: bool) -> None:
        """Not what a fallback made: the key says which engine it was."""
        if self._cache is not None and as_asked:
            self._cache.put(result, *key)
