"""What a host sees: messages at documented levels, counters, spans; and nothing printed."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import anysize
import numpy as np
import pytest
from anysize import ExecutionError, ImageError, Stats, Tiling, Upscaler
from anysize.backends import get_backend
from anysize.files import write_picture
from conftest import ENGINES, ToyBox
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from toys import Faulty, image_spec, nearest, not_a_number, numpy_session

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "observability.md").read_text()


def messages() -> set[tuple[str, str]]:
    """What the code says to its logger: (level, format)."""
    found = set()
    for room in ("runtime", "backends", "exporters", "models", "integrations"):
        for file in (ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[first, *_]
                    ) if level in ("debug", "info", "warning", "error", "critical", "exception", "log"):
                        assert isinstance(first, ast.Constant), f"{file}:{node.lineno}"
                        found.add((level.upper(), re.sub(r"%[.\d]*[a-z]", "…", first.value)))
    return found


def test_every_message_is_documented() -> None:
    rows = set(re.findall(r"^\| ([A-Z]+) \| `(.+?)` \|", PAGE, re.M))
    assert rows == messages()
    assert {level for level, _ in rows} == {"WARNING", "INFO", "DEBUG"}


def test_one_logger() -> None:
    """A message by another name would be seen by nobody who goes by the page."""
    for room in ("runtime", "backends", "exporters", "models", "integrations"):
        for file in (ROOT / room).glob("*.py"):
            for name in re.findall(r"getLogger\((.*?)\)", file.read_text()):
                assert name in ('"anysize"', 'f"torch.{part}"'), file


@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_is_printed(tmp_path: Path, backend: str, damaged: bool) -> None:
    """Also by libvips, whose warnings go through the logger `pyvips`."""
    write_picture(tmp_path / "x.jpg", np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    if damaged:
        data = (tmp_path / "x.jpg").read_bytes()
        (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2])
    code = f"""
import anysize
try:
    anysize.upscale_file("x.jpg", "y.png", backend={backend!r})
except anysize.ImageError as error:
    assert {damaged}
else:
    assert not {damaged}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_counters_of_failures(toybox: ToyBox, picture: Callable[..., np.ndarray]) -> None:
    first, other = ENGINES[:2]
    faulty = Faulty(get_backend(first), not_a_number, 2)
    session = anysize.load(toybox.file("Doubling"), backend=faulty, options={"fallback": (other,)})
    Upscaler(session, tiling=Tiling("tile", 16))(picture(40, 40))
    stats = session.stats
    assert (stats.failed, stats.discarded, len(stats.fallbacks)) == (1, 1, 1)
    assert stats.calls == faulty.calls - 1 + 1  # the other engine's
    alone = anysize.load(toybox.file("Doubling"), backend=Faulty(get_backend(first), not_a_number, 0))
    with pytest.raises(anysize.IntegrityError):
        Upscaler(alone)(picture(40, 40))
    assert (alone.stats.failed, alone.stats.calls) == (1, 0)


def test_counters_add_up_over_engines(toybox: ToyBox) -> None:
    """A counter that is added to `Stats` is in the session's sum too."""
    session = anysize.load(toybox.file("Doubling"), options={"fallback": (ENGINES[1],)}, backend=ENGINES[0])
    numbers = [name for name, value in vars(Stats()).items() if isinstance(value, (int, float))]
    ones = {name: 1 for name in numbers if name != "live"}
    for guard in session._guards:
        guard._stats = replace(guard._stats, **ones)
    assert {name: getattr(session.stats, name) for name in ones} == dict.fromkeys(ones, 2)


def test_a_result_that_came_twice_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    session = numpy_session(nearest(2), image_spec(2))
    with caplog.at_level(logging.INFO, "anysize"):
        for value in (-1.0, -2.0):  # both are cut off at 0 by the model that stands here
            session.run({"x": np.zeros((1, 3, 8, 8), np.float32)})
            session.run({"x": np.full((1, 3, 8, 8), value, np.float32)})
    assert session.stats.repeated == len(
        [r for r in caplog.records if r.message.startswith("a result came twice")]
    )


# -- spans


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What this test's spans become, whatever other tests have set up."""
    found, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield found
    provider.shutdown()


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == f"anysize.{name}"]


@pytest.mark.parametrize("method", ["stream", "tile", "whole"])
@pytest.mark.parametrize("streams", [1, 2])
def test_runs_are_children_of_their_picture(
    spans: InMemorySpanExporter, tmp_path: Path, picture: Callable[..., np.ndarray], method: str, streams: int
) -> None:
    engine = next(name for name in ENGINES if name != "torch")
    upscale = Upscaler(
        "default", backend=engine, tiling=Tiling(method, 32), options=anysize.Options(streams=streams)
    )
    (load,) = named(spans, "load")
    assert load.attributes is not None
    assert load.attributes["anysize.source"] == "default"
    x = picture(70, 90)
    write_picture(tmp_path / "x.png", x)
    spans.clear()
    upscale(x)
    (whole,) = named(spans, "upscale")
    runs = named(spans, "run")
    assert len(runs) == (1 if method == "whole" else len(runs)) > 0
    assert all(run.parent == whole.context for run in (*runs, *named(spans, "compile")))
    assert whole.attributes is not None
    assert whole.attributes["anysize.method"] == method
    assert whole.attributes["anysize.picture"] == "(70, 90, 3)"
    spans.clear()
    anysize.upscale_file(tmp_path / "x.png", tmp_path / "y.png", upscale)
    (file,) = named(spans, "upscale_file")
    outer = file if method == "stream" else named(spans, "upscale")[0]
    assert all(run.parent == outer.context for run in named(spans, "run"))
    assert file.attributes is not None
    assert file.attributes["anysize.output"] == str(tmp_path / "y.png")


def test_a_batch_is_the_callers(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    from anysize.batch import plan_jobs, run_jobs

    for name in "abc":
        write_picture(tmp_path / f"{name}.png", np.full((9, 9, 3), ord(name), np.uint8))
    with trace.get_tracer("host").start_as_current_span("host") as host:
        for _, error in run_jobs(plan_jobs([tmp_path], tmp_path / "out", 4), Upscaler()):
            assert isinstance(error, anysize.ImageError)  # there is no such folder
    files = named(spans, "upscale_file")
    assert len(files) == 3
    assert all(file.parent == host.get_span_context() for file in files)
    assert all(not file.status.is_ok for file in files)


def test_an_error_is_told(
    spans: InMemorySpanExporter, toybox: ToyBox, picture: Callable[..., np.ndarray]
) -> None:
    def fail(outputs: object) -> object:
        raise RuntimeError("planted failure")

    upscale = Upscaler(
        anysize.load(toybox.file("Doubling"), backend=Faulty(get_backend(ENGINES[0]), fail, 0))
    )
    with pytest.raises(ExecutionError):
        upscale(picture(20, 20))
    for name in ("run", "upscale"):
        (span,) = named(spans, name)
        assert not span.status.is_ok
        assert "planted failure" in str(span.status.description)
    spans.clear()
    with pytest.raises(ImageError):
        upscale(np.zeros((3, 3, 9), np.uint8))
    (span,) = named(spans, "upscale")
    assert not span.status.is_ok


def test_stages_and_processes_have_spans(spans: InMemorySpanExporter, toybox: ToyBox) -> None:
    x = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
    engine = next(name for name in ENGINES if name != "torch")
    upscale = Upscaler(toybox.file("SqueezeExcite"), backend=engine, tiling=Tiling("lockstep", 16))
    upscale(x)  # which tries the stages first
    before = upscale.session.stats.calls
    spans.clear()
    upscale(x)
    (whole,) = named(spans, "upscale")
    assert len(named(spans, "run")) == upscale.session.stats.calls - before > 4
    assert all(run.parent == whole.context for run in (*named(spans, "run"), *named(spans, "compile")))
    spans.clear()
    alone = anysize.Isolated(toybox.file("Doubling"))
    alone(x)
    alone.close()
    (span,) = named(spans, "upscale")
    assert span.attributes is not None
    assert span.attributes["anysize.method"] == alone.report.method  # type: ignore[union-attr]


def test_nothing_is_imported_for_it() -> None:
    code = "import anysize, sys; anysize.load('default'); print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_half_imported_it_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be importing it just now."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", type(sys)("opentelemetry.trace"))
    threading.Thread(target=anysize.load, args=("default",)).start()
    assert anysize.Upscaler()(np.zeros((8, 8, 3), np.uint8)).shape == (32, 32, 3)
