"""Memory: what is left is known, what a model takes is measured, and what does not fit never begins."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import anysize.memory
import numpy as np
import pytest
import torch
from anysize import Dim, MemoryBudgetError, Options, SizePolicy, Stylizer, Tiling, Upscaler, load
from anysize.memory import Held, available, measure, peak, resident
from anysize.models.architectures import SRVGGNetCompact
from anysize.tuning import Tuned
from conftest import ENGINES, ToyBox
from toys import Anime, image_spec, nearest, numpy_session

GRAPHS = [name for name in ENGINES if name != "torch"]


def test_a_container_counts(tmp_path: Path) -> None:
    """Both kinds of them; files that could be let go do not."""
    machine = available(tmp_path)
    assert machine > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 200\nactive_file 100\n")
    assert available(tmp_path) == pytest.approx(machine, rel=0.1)
    (tmp_path / "memory.max").write_text("5000\n")
    assert available(tmp_path) == 5000 - 700
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("4000\n")
    (old / "memory.usage_in_bytes").write_text("4500\n")
    (old / "memory.stat").write_text("total_inactive_file 50\ntotal_active_file 50\n")
    assert available(tmp_path) == 0


def test_the_peak_stays() -> None:
    before = resident()
    held = np.ones(2**25, np.float32)
    most = peak()
    assert most >= before + 0.9 * held.nbytes
    del held
    assert peak() >= most - 2**21  # Linux counts in steps


@pytest.mark.parametrize(
    ("engine", "name", "side"),
    [
        *((engine, "WholePicture", 5000) for engine in GRAPHS),
        ("torch", "Anime", 1000),  # took 8 % more than was foretold from first runs, on a machine of CI
        ("torch", "Compact", 3000),
    ],
)
def test_what_was_measured_holds_for_a_larger_picture(
    engine: str, name: str, side: int, toybox: ToyBox, tmp_path: Path
) -> None:
    """A child of its own runs many times the pixels measured: within the estimate, and not far from it.

    ONNX Runtime's arena grows in regions that double, and a convolution's blocks of 16 channels (AVX-512)
    fill them badly: of WholePicture it was seen to hold 2.2 to 3.8 times the tensors alive, up and down as
    sides go from 1000 to 6500. So an estimate that holds for all is up to 1.25 * 3.8 / 2.2 of what one takes.
    """
    if engine == "torch":
        module = Anime(1) if name == "Anime" else SRVGGNetCompact(features=16, convolutions=2, scale=1)
        source = tmp_path / "weights.pt"
        torch.save(module.state_dict(), source)
    else:
        source = toybox.file(name)
    session = load(source, backend=engine)
    held = measure(session)
    assert held is not None
    code = f"""
import numpy as np
from anysize import load
from anysize.memory import peak, resident
session, before = load({str(source)!r}, backend={engine!r}), resident()
session(np.zeros((1, 3, {side}, {side}), np.float32))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    estimate = held.bytes(session.working_bytes({"n": 1, "h": side, "w": side}))
    assert int(done.stdout) <= estimate <= (2.2 if engine == "onnxruntime" else 1.6) * int(done.stdout)


def test_what_cannot_be_measured_is_none(toybox: ToyBox, caplog: pytest.LogCaptureFixture) -> None:
    assert measure(numpy_session(nearest(1), image_spec(1))) is None

    class Local(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert measure(load(Local().eval(), backend="torch")) is None
    assert "was not measured" in caplog.text
    assert "Local" in caplog.text


def test_plans_go_by_what_was_measured(toybox: ToyBox) -> None:
    session = load(toybox.file("WholePicture"), backend=GRAPHS[0])
    needs = []
    for held in (None, Held(1.0, 0), Held(3.0, 2**30)):
        session.tuned = Tuned((), 4, held)
        with pytest.raises(MemoryBudgetError) as caught:
            Upscaler(session, tiling=Tiling("whole", memory=1))(np.zeros((1000, 1000, 3), np.uint8))
        needs.append(int(re.search(r"about (\d+) MiB more", str(caught.value))[1]))
    alive = session.working_bytes({"n": 1, "h": 1000, "w": 1000}) / 2**20
    assert needs == pytest.approx([2 * alive + 40, 1.25 * alive, 1.25 * (3 * alive + 1024)], abs=2)
    assert session.stats.calls == 0
    assert Tuned.from_json(session.tuned.to_json()) == session.tuned


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with little memory left."""
    monkeypatch.setattr("anysize.planning.available", lambda: 500 * 2**20)


@pytest.mark.usefixtures("little")
def test_a_picture_too_large_for_the_machine_never_begins(toybox: ToyBox) -> None:
    file = toybox.file("WholePicture")
    session = load(file, backend=GRAPHS[0])
    large = np.zeros((3000, 4000, 3), np.uint8)
    whole = Stylizer(session, tiling=Tiling("whole"))
    with pytest.raises(MemoryBudgetError, match=r"500 MiB of memory .* about \d+ MiB more; make the picture"):
        whole(large)
    with pytest.raises(MemoryBudgetError, match=r"about \d+ MiB more"):
        whole.batch([large])
    with pytest.raises(MemoryBudgetError, match=r"the picture and its result take 1\d+ MiB"):
        Upscaler(session)(np.zeros((4, 10_000_000, 3), np.uint8))
    assert session.stats.calls == 0
    small = Stylizer(session, SizePolicy(max_side=1000), tiling=Tiling("whole"))
    assert small(large).shape == large.shape
    assert "3000" in small.report.reason
    lockstep = Stylizer(session)
    assert lockstep(large[:1500]).shape == (1500, 4000, 3)
    assert lockstep.report.method == "lockstep"
    insisting = Upscaler(session, tiling=Tiling("whole", memory="64GiB"))
    assert insisting(large[:1500]).shape == (1500, 4000, 3)


@pytest.mark.usefixtures("little")
def test_a_batch_takes_as_many_as_fit(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    stylize = Stylizer(toybox.file("WholePicture"), backend=GRAPHS[0])
    pictures = [np.full((800, 900, 3), i, np.uint8) for i in range(7)]
    few = stylize.batch(pictures, most=7)
    calls = stylize.session.stats.calls
    assert 1 < calls < 7
    monkeypatch.undo()
    np.testing.assert_allclose(stylize.batch(pictures, most=7), few, atol=1)
    assert stylize.session.stats.calls == calls + 1


def test_a_module_that_does_not_run_without_data_runs(toybox: ToyBox) -> None:
    """Its memory is not known; a limit is refused, none is no obstacle."""

    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.abs().max()) >= 0 else x

    session = load(Looks().eval(), backend="torch")
    picture = np.zeros((300, 400, 3), np.uint8)
    assert Upscaler(session, tiling=Tiling("whole"))(picture).shape == picture.shape
    with pytest.raises(MemoryBudgetError, match="cannot be told in advance"):
        Upscaler(session, tiling=Tiling("whole", memory="64GiB"))(picture)


def test_a_child_that_fails_is_said(
    toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = load(toybox.file("Convolution"), backend=GRAPHS[0])
    broken: Any = replace(session._guards[0].model, data=b"nothing")
    monkeypatch.setattr(session._guards[0], "model", broken)
    monkeypatch.setattr(session, "working_bytes", lambda sizes: 2**20 * sizes["h"])
    assert measure(session) is None
    assert "was not measured: " in caplog.text
    monkeypatch.setattr(anysize.memory, "_TIMEOUT", 0.01)
    assert measure(session) is None
    assert "timed out" in caplog.text


def test_tuning_keeps_it(toybox: ToyBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.tuning.SECONDS", 0.5)
    monkeypatch.setattr("anysize.memory._POINTS", (2**22, 2**24))
    engine, options = GRAPHS[0], Options(cache_dir=tmp_path, tune=True)
    first = load(toybox.file("WholePicture"), backend=engine, options=options)
    assert first.tuned.held is not None
    assert 0.3 < first.tuned.held.factor < 4
    again = load(toybox.file("WholePicture"), backend=engine, options=Options(cache_dir=tmp_path))
    assert again.tuned == first.tuned


def test_a_model_of_small_sizes_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where two sizes do not differ enough, nothing is measured."""
    session = numpy_session(nearest(1), image_spec(1))
    assert measure(session) is None
    file_session = load("default", backend=GRAPHS[0])
    spec = file_session.spec
    dims = {name: replace(dim, max=64) for name, dim in spec.dims.items()}
    tensors = tuple(
        replace(t, shape=tuple(dims.get(s.name, s) if isinstance(s, Dim) else s for s in t.shape))
        for t in spec.inputs
    )
    guard = file_session._guards[0]
    guard.model = replace(guard.model, spec=replace(spec, inputs=tensors))
    guard.spec = guard.model.spec
    assert measure(file_session) is None
    assert "was not measured: its graph does not tell enough" in caplog.text


def test_a_batch_of_many_is_planned_at_once(toybox: ToyBox) -> None:
    stylize = Stylizer(toybox.file("WholePicture"), backend=GRAPHS[0])
    started = time.perf_counter()
    stylize.batch([np.zeros((300, 300, 3), np.uint8)], most=10**9)
    assert time.perf_counter() - started < 5
