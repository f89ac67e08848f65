"""Tiles in lockstep: statistics of the whole picture, and its result, without ever holding it whole."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
import toys
from anysize import (
    Cancelled,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    NotStreamable,
    OptionError,
    Tiling,
    Upscaler,
)
from anysize.backends import get_backend
from anysize.exporters import export
from anysize.lockstep import LockstepRun, LockstepRunner
from anysize.session import Session
from conftest import ENGINES, ToyBox
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

GRAPHS = [name for name in ENGINES if name != "torch"]


class Everything(nn.Module):
    """Each kind of operator that stages know, between normalisations, at several rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Conv2d(3, 8, 5, padding=2)
        self.first = nn.InstanceNorm2d(8, affine=True)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.second = nn.GroupNorm(4, 16)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="replicate")
        self.gate = nn.Conv2d(16, 16, 1)
        self.up = nn.Conv2d(24, 12, 3, padding=1, padding_mode="reflect")
        self.slopes = nn.PReLU(12)
        self.norm = nn.BatchNorm2d(12)
        self.tail = nn.Conv2d(18, 3, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.leaky_relu(self.first(self.head(x)), 0.1)
        b = F.gelu(self.second(self.down(a)))
        b = b + self.dilated(b) * torch.sigmoid(self.gate(b.mean((2, 3), keepdim=True)))
        b = torch.maximum(F.max_pool2d(b, 3, 1, 1), b - b.amax((2, 3), keepdim=True))
        b = F.interpolate(b, x.shape[2:], mode="bilinear", align_corners=True)
        c = self.norm(self.slopes(self.up(torch.cat((a, b), 1))))
        d = F.avg_pool2d(F.pixel_shuffle(c, 2), 2, 2)
        e = F.interpolate(F.interpolate(d, scale_factor=2.0, mode="bilinear"), x.shape[2:], mode="nearest")
        return torch.tanh(self.tail(torch.cat((c, d, e), 1)))


def run(runner: LockstepRunner, x: np.ndarray, rows: int) -> np.ndarray:
    """The whole output of (C, H, W); every row is put once, from the top down."""
    shape = runner.model.shapes(*x.shape[1:])[runner.model.output][1:]
    result, puts = np.full(shape, np.nan, np.float32), []

    def put(top: int, values: np.ndarray) -> None:
        puts.append((top, top + values.shape[1]))
        result[:, top : top + values.shape[1]] = values

    lockstep = LockstepRun(runner, x, rows)
    lockstep.run(put)
    lockstep.close()
    assert [0, *(end for _, end in puts)] == [*(begin for begin, _ in puts), shape[1]]
    return result


@pytest.fixture(scope="module", params=GRAPHS)
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    file = tmp_path_factory.mktemp("lockstep") / "everything.onnx"
    export(Everything().eval(), file, inputs=[("n", 3, "h", "w")])
    session = anysize.load(file, backend=request.param, options=anysize.Options(shapes="dynamic"))
    return session, session.lockstep()


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(8, 120), st.integers(8, 60)), rows=st.integers(1, 130))
def test_equals_the_whole(everything: tuple, size: tuple[int, int], rows: int) -> None:
    session, runner = everything
    x = np.random.default_rng(size[0]).random((3, *size), np.float32)
    want = session(x[None])[0]
    assert np.abs(run(runner, x, rows) - want).max() <= 2e-5


@pytest.mark.parametrize("align_corners", [0, 1])
def test_animegan(align_corners: int, toybox: ToyBox) -> None:
    file = toybox.file("Anime", align_corners=align_corners)
    picture = np.random.default_rng(0).random((203, 150, 3), np.float32)
    for engine in GRAPHS:
        whole = anysize.Stylizer(file, backend=engine, tiling=Tiling("whole"))
        tiled = anysize.Stylizer(whole.session, tiling=Tiling("lockstep", tile=32))
        assert np.abs(tiled(picture) - whole(picture)).max() <= 1e-5
        assert (tiled.report.method, tiled.report.tile, tiled.report.exact) == ("lockstep", 32, True)
        assert "each stage of the model together" in tiled.report.reason
        ran = (tiled.report.backend, tiled.report.device, tiled.report.precision)
        assert ran == (engine, "cpu", "f32")


def test_alpha_and_progress(toybox: ToyBox) -> None:
    upscale = Upscaler(toybox.file("WholePicture"), backend=GRAPHS[0], tiling=Tiling("lockstep", 8))
    picture = np.random.default_rng(0).integers(0, 256, (61, 40, 4), np.uint8)
    steps: list[tuple[int, int]] = []
    result = upscale(picture, progress=lambda *step: steps.append(step))
    np.testing.assert_allclose(result, Upscaler(upscale.session, tiling=Tiling("whole"))(picture), atol=1)
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    with pytest.raises(Cancelled, match="before tile 0 of stage 0"):
        upscale(picture, cancel=lambda: True)


def test_memory_decides(toybox: ToyBox) -> None:
    """With a limit that the whole does not fit, "auto" runs in lockstep, and "whole" is refused."""
    file = toybox.file("WholePicture")
    picture = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    session = anysize.load(file, backend="onnxruntime")
    want = Upscaler(session, tiling=Tiling("whole"))(picture)
    with pytest.raises(MemoryBudgetError) as caught:
        Upscaler(session, tiling=Tiling("whole", memory=2**20))(picture)
    held, need, _ = (int(n) for n in re.findall(r"(\d+) MiB", str(caught.value))[1:])
    limit = (held + need // 2) * 2**20  # lockstep takes a quarter
    upscale = Upscaler(session, tiling=Tiling(memory=limit))
    np.testing.assert_allclose(upscale(picture), want, atol=1)
    assert upscale.report.method == "lockstep"
    assert "is too little for this picture" in upscale.report.reason
    with pytest.raises(MemoryBudgetError, match="MiB more; allow"):
        Upscaler(session, tiling=Tiling("whole", memory=limit))(picture)
    with pytest.raises(MemoryBudgetError, match="MiB more; allow"):
        Upscaler(session, tiling=Tiling(memory=2**20))(picture)


def test_refused(toybox: ToyBox) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(2)
            return ((flat @ flat.transpose(1, 2)).softmax(-1) @ flat).reshape(x.shape)

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean((2, 3), keepdim=True) + F.interpolate(x, scale_factor=0.5).sum()

    for module, reason in ((Attention(), "operator"), (Turned(), "operator")):
        session = anysize.load(module.eval(), backend=GRAPHS[0])
        with pytest.raises(NotStreamable, match=reason):
            Upscaler(session, tiling=Tiling("lockstep"))(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(NotStreamable, match="use openvino or onnxruntime"):
        anysize.load(Attention(), backend="torch").lockstep()
    with pytest.raises(OptionError, match="leave overlap at 'exact'"):
        Tiling("lockstep", overlap=4)
    with pytest.raises(OptionError, match="or 'lockstep'"):
        Upscaler(toybox.file("WholePicture"), tiling=Tiling("tile"))(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("fault", [toys.raises, toys.not_a_number, toys.too_large, toys.too_small])
def test_a_fault_at_any_call_is_an_error(toybox: ToyBox, fault: Callable) -> None:
    """Never a picture: each run of a stage is checked, and the error names stage and tile."""
    engine = get_backend(GRAPHS[0])
    session = anysize.load(toybox.file("WholePicture"), backend=engine)
    places = [(i, j) for i in range(len(session.lockstep().model.stages)) for j in range(4)]
    picture = np.random.default_rng(0).random((64, 40, 3))
    for calls, place in enumerate(places):
        faulty = anysize.load(toybox.file("WholePicture"), backend=toys.Faulty(engine, fault, calls))
        with pytest.raises((ExecutionError, IntegrityError)) as caught:
            Upscaler(faulty, tiling=Tiling("lockstep", 16))(picture)
        assert caught.value.tile == (place[1], 0)
        assert f"in stage {place[0]} of " in str(caught.value)
    beyond = toys.Faulty(engine, fault, len(places))
    Upscaler(anysize.load(toybox.file("WholePicture"), backend=beyond), tiling=Tiling("lockstep", 16))(
        picture
    )
    assert beyond.calls == len(places)


def test_no_room_for_what_waits(toybox: ToyBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    upscale = Upscaler(toybox.file("WholePicture"), backend=GRAPHS[0], tiling=Tiling("lockstep", 16))
    with pytest.raises(MemoryBudgetError, match=r"No such file.*; the environment variable TMPDIR"):
        upscale(np.zeros((64, 40, 3), np.uint8))


@pytest.mark.skipif(len(GRAPHS) < 2, reason="needs two engines that take graphs")
def test_another_engine_goes_on(toybox: ToyBox) -> None:
    first, second = (get_backend(name) for name in GRAPHS[:2])
    file = toybox.file("WholePicture")
    faulty = anysize.load(file, backend=toys.Faulty(first, toys.raises, 5))
    session = Session([*faulty._guards, *anysize.load(file, backend=second)._guards])
    picture = np.random.default_rng(0).random((64, 40, 3), np.float32)
    upscale = Upscaler(session, tiling=Tiling("lockstep", 16))
    np.testing.assert_allclose(upscale(picture), Upscaler(file, backend=second)(picture), atol=1e-5)
    assert upscale.report.method == "whole"
    assert len(session.stats.fallbacks) == 1
    assert session.stats.calls >= 5
