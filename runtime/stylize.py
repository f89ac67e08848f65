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
from anysize.backends.errors import Cancelled, ModelLoadError, OptionError
from anysize.pixels import Picture, fill_hidden, open_picture, quantise, to_float
from anysize.planning import fit_together
from anysize.report import Report
from anysize.session import Options, Session, code_digest, load, whole_number
from anysize.sizes import SizePlan, SizePolicy
from anysize.sources import Source
from anysize.tiling import Tiling
from anysize.upscale import Upscaler
from anysize.work import ArrayRows, Cancel, Progress, Work, as_check


class ResultCache:
    """Results on disk, by everything they follow from. Safe for threads and for several processes.

    `folder`: where; made when needed. `limit`: bytes kept; beyond it, what was used longest ago goes first.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = 2**30) -> None:
        whole_number("limit", limit)
        if not isinstance(folder, (str, os.PathLike)):
            raise OptionError(f"folder must be a path, not {folder!r}")
        self._cache = Cache(Path(folder).absolute(), f"results {code_digest('*.py')}", limit)

    def get(self, *key: str) -> Array | None:
        """The array put under this key; None if none was, or it is damaged."""
        data = self._cache.get(*key)
        try:
            return None if data is None else np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError):  # put there by something else
            return None

    def put(self, result: Array, *key: str) -> None:
        """Keep an array under this key."""
        if result.dtype.hasobject:
            raise OptionError("results are arrays of numbers")
        data = io.BytesIO()
        np.save(data, result, allow_pickle=False)
        self._cache.put(data.getvalue(), *key)


def bucket_batch(session: Session, images: Sequence[Array], most: int = 8) -> list[Array]:
    """Run images of mixed sizes through a model of one input and one output: those of a size together.

    `images`: (C, H, W), each of a size that the contract allows. `most`: how many at once, if the contract
    allows as many. Returns their outputs, (C', H', W'), in the same order. Raises as `Session.run` does.
    """
    whole_number("most", most)
    images = [np.asarray(image) for image in images]
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

    Alpha is not restyled: it comes back as it was, or cut as the colour is by a policy that cuts. Raises
    `ModelLoadError` for a model of another kind, `OptionError` for a cache where nothing tells whether the
    model is the same.
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
        policy = SizePolicy() if policy is None else policy
        self.policy = SizePolicy.preset(policy) if isinstance(policy, str) else policy
        if not isinstance(self.policy, SizePolicy):
            raise OptionError(f"policy must be a SizePolicy or the name of one, not {policy!r}")
        if not isinstance(cache, (ResultCache, type(None))):
            raise OptionError(f"cache must be a ResultCache, not {cache!r}")
        if not isinstance(source, Session):
            source = load(source, backend=backend, precision=precision, options=options)
        self.session = source
        self._upscale = Upscaler(source, tiling=tiling)
        if self._upscale.scale != 1 or source.spec.channels != 3:
            found = "; ".join(map(str, (*source.spec.inputs, *source.spec.outputs)))
            raise ModelLoadError(f"not a model that restyles colour pictures at their size: {found}")
        settings = (repr(self.policy), repr(self._upscale.tiling))
        self._settings = (*source.identity(), *settings) if cache is not None else ()
        self._cache, self._last = cache, local()

    @property
    def report(self) -> Report | None:
        """What ran in the last finished call of this thread, `batch` aside; None before the first."""
        return getattr(self._last, "report", None)

    def __call__(self, image: Any, *, progress: Progress | None = None, cancel: Cancel | None = None) -> Any:
        """Restyle one picture and return the same kind: array (HW or HWC; uint8, uint16, float) or PIL image.

        Raises `ImageError`, `ShapeError`, `OptionError`, `MemoryBudgetError`, `ExecutionError`,
        `IntegrityError`, `Cancelled`.
        """
        picture = open_picture(image)
        plan = self.policy.plan((picture.array.shape[0], picture.array.shape[1]))
        key = self._key(picture)
        result = self._known(key, picture, plan)
        if result is None:
            styled = self._upscale(self._fitted(picture, plan), progress=progress, cancel=cancel)
            report = self._upscale.report
            assert report is not None
            result = self._finished(picture, plan, styled)
            self._keep(result, key, not report.fallbacks)
            if plan.target != plan.size:
                report = replace(report, reason=f"{plan}; {report.reason}")
        else:
            if as_check(cancel)():
                raise Cancelled("cancelled before the picture was begun")
            if progress is not None:
                progress(1, 1)
            options, backend = self.session._guards[0].options, self.session.backend
            report = Report(
                scale=1.0,
                model_scale=1,
                backend=backend,
                device=options.device,
                precision=options.precision,
                method="cache",
                reason="the same picture was restyled before, with the same model and settings",
            )
        self._last.report = replace(report, width=result.shape[1], height=result.shape[0])
        return picture.restore(result)

    def batch(self, images: Iterable[Any], most: int = 8) -> list[Any]:
        """Restyle pictures of mixed sizes, whole: those that come to the same size together, `most` at once.

        Returns them in order; fewer run at once where there is not memory for more. Raises as a call does,
        and `OptionError` for a `tiling` of other than whole pictures, or with a limit of memory, which would
        have to be kept for all together.
        """
        whole_number("most", most)
        tiling = self._upscale.tiling
        if tiling.memory is not None:
            raise OptionError("with a limit of memory, restyle pictures one by one")
        if tiling not in (Tiling(), Tiling("whole")):
            raise OptionError(f"a batch runs whole pictures, not {tiling}; restyle them one by one")
        if (isinstance(images, np.ndarray) and images.ndim < 4) or not isinstance(images, Iterable):
            raise OptionError("a batch is several pictures; call the stylizer for one")
        pictures = [open_picture(image) for image in images]
        plans = [self.policy.plan((p.array.shape[0], p.array.shape[1])) for p in pictures]
        keys = [self._key(picture) for picture in pictures]
        results: list[Any] = list(map(self._known, keys, pictures, plans))
        missing = [i for i, result in enumerate(results) if result is None]
        fitted = [self._fitted(pictures[i], plans[i]) for i in missing]
        works = [
            Work(self.session, ArrayRows(colour), colour.dtype, None, lambda: False) for colour in fitted
        ]
        fallbacks = len(self.session.stats.fallbacks)
        # planes, what the model gives, and the result, in floats
        held = sum(3 * colour.nbytes for colour in fitted)
        sizes = {work.padded for work in works}
        most = min(most, max(1, len(works)))
        together = min((fit_together(self.session, *size, held, most) for size in sizes), default=most)
        outputs = bucket_batch(self.session, [work.inputs()[0] for work in works], together)
        as_asked = len(self.session.stats.fallbacks) == fallbacks
        for i, colour, work, values in zip(missing, fitted, works, outputs, strict=True):
            styled = np.empty(colour.shape, np.float32)
            work.store(values[:, : colour.shape[0], : colour.shape[1]], styled)
            results[i] = self._finished(pictures[i], plans[i], styled)
            self._keep(results[i], keys[i], as_asked)
        return [picture.restore(result) for picture, result in zip(pictures, results, strict=True)]

    def close(self) -> None:
        """Free the session."""
        self.session.close()

    def _fitted(self, picture: Picture, plan: SizePlan) -> Array:
        """Its colour at the size it runs at, float32."""
        colour = fill_hidden(picture.array)[:, :, : -1 if picture.has_alpha else None]
        return plan.apply(to_float(colour))

    def _finished(self, picture: Picture, plan: SizePlan, styled: Array) -> Array:
        """At the picture's size again, in its dtype, with its alpha."""
        result = quantise(plan.invert(styled), picture.array.dtype)
        if picture.has_alpha:
            alpha = picture.array[:, :, -1:]
            if plan.box != plan.size or not self.policy.restore:
                alpha = plan.invert(plan.apply(alpha))
            result = np.concatenate((result, alpha), axis=2)
        return result

    # -- the cache of results

    def _key(self, picture: Picture) -> tuple[str, ...]:
        if self._cache is None:
            return ()
        array = np.ascontiguousarray(picture.array)
        pixels = hashlib.sha256(array.data).hexdigest()
        return (pixels, str(array.shape), array.dtype.str, *self._settings)

    def _known(self, key: tuple[str, ...], picture: Picture, plan: SizePlan) -> Array | None:
        result = None if self._cache is None else self._cache.get(*key)
        size = plan.size if self.policy.restore else plan.target
        wanted = (*size, picture.array.shape[2]), picture.array.dtype
        return result if result is not None and (result.shape, result.dtype) == wanted else None

    def _keep(self, result: Array, key: tuple[str, ...], as_asked: bool) -> None:
        """Not what a fallback made: the key says which engine it was."""
        if self._cache is not None and as_asked:
            self._cache.put(result, *key)
