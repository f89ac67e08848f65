"""A model in a process of its own: the same pictures, and whatever happens there is an error here."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import psutil
import pytest
from anysize import (
    AnysizeError,
    Cancelled,
    ExecutionError,
    ImageError,
    IntegrityError,
    MemoryBudgetError,
    ModelLoadError,
    OptionError,
    Options,
    ShapeError,
    Tiling,
    TimedOut,
    Upscaler,
    isolate,
    isolate_worker,
    time_limit,
)
from anysize.files import write_picture
from anysize.isolate import Isolated
from conftest import ENGINES, ToyBox
from PIL import Image

#: the process with an engine that goes wrong, in a way that the name of its model says
FAULTY = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import toys
from anysize.backends import get_backend, registry
from anysize.isolate_worker import main
from anysize.session import Session

def fault(outputs):
    if open({{flag!r}}).read() == "crash":
        os.kill(os.getpid(), 11)
    if open({{flag!r}}).read() == "exit":
        os._exit(3)
    if open({{flag!r}}).read() == "hang":
        time.sleep(100)
    if open({{flag!r}}).read() == "memory":
        np.ones(2**40)
    if open({{flag!r}}).read() == "raise":
        raise RuntimeError("planted failure")
    if open({{flag!r}}).read() == "nan":
        return toys.not_a_number(outputs)
    if open({{flag!r}}).read().startswith("run "):
        exec(open({{flag!r}}).read()[4:])
    if open({{flag!r}}).read() == "print":
        print("engines print", flush=True)
        os.write(1, b"and so on")
        os.write(2, b"or complain")
    return outputs

engine = toys.Faulty(get_backend({ENGINES[0]!r}), fault, *range(10**6))
import anysize.session, anysize.sources
anysize.session.choose_backend = lambda *_: engine
main()
"""


@pytest.fixture
def faulty(
    toybox: ToyBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Isolated, Path]]:
    """A model whose engine does what a file says."""
    flag = tmp_path / "flag"
    flag.write_text("")
    monkeypatch.setattr(isolate, "_command", lambda: [sys.executable, "-c", FAULTY.format(flag=str(flag))])
    upscale = Isolated(toybox.file("Doubling"), tiling=Tiling("tile", 16))
    yield upscale, flag
    upscale.close()


def test_the_same_pictures(backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray]) -> None:
    plain = Upscaler("default", backend=backend)
    alone = Isolated("default", backend=backend)
    assert alone.scale == plain.scale == 4
    assert alone.identity() == plain.identity()
    for kind in ((40, 30, 3, np.uint8), (20, 31, 4, np.uint16), (9, 9, 1, np.float32)):
        x = picture(*kind)
        np.testing.assert_array_equal(alone(x), plain(x))
        assert alone.report is not None
        assert plain.report is not None
        for name in ("width", "height", "backend", "precision", "method", "exact"):
            assert getattr(alone.report, name) == getattr(plain.report, name)
    image = Image.fromarray(picture(10, 12)).convert("LA")
    result = alone(image, outscale=1.5)
    assert (result.mode, result.size) == ("LA", (18, 15))
    steps: list[tuple[int, int]] = []
    alone(picture(300, 300), progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1]
    alone.close()


def test_what_is_said_there_is_heard_here_and_nothing_is_printed(
    faulty: tuple[Isolated, Path],
    picture: Callable[..., np.ndarray],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    upscale, flag = faulty
    flag.write_text("print")
    upscale(picture(40, 40))
    assert not caplog.messages
    assert capfd.readouterr() == ("", "")
    upscale._child.kill()
    flag.write_text("")
    with caplog.at_level("DEBUG", "anysize"):
        upscale(picture(40, 40))
    assert [(r.name, r.levelname) for r in caplog.records] == [("anysize", "DEBUG")] * len(caplog.records)
    assert any(message.startswith("compiled for") for message in caplog.messages)


@pytest.mark.parametrize(
    ("what", "says"),
    [("crash", "process ended: SIGSEGV"), ("exit", "process ended: exit code 3")],
)
def test_the_end_of_the_process_is_an_error(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray], what: str, says: str
) -> None:
    upscale, flag = faulty
    want = upscale(picture(40, 40))
    flag.write_text(what)
    for _ in range(2):
        with pytest.raises(ExecutionError, match=says):
            upscale(picture(40, 40))
    flag.write_text("")
    np.testing.assert_array_equal(upscale(picture(40, 40)), want)


def test_errors_are_those_of_the_process(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    upscale, flag = faulty
    child = upscale._child
    flag.write_text("raise")
    with pytest.raises(ExecutionError, match=r"planted failure \[.*tile \(row 0, column 0\)\]") as failed:
        upscale(picture(40, 40))
    assert failed.value.tile == (0, 0)
    assert failed.value.backend == ENGINES[0]
    flag.write_text("nan")
    with pytest.raises(IntegrityError, match="not finite") as caught:
        upscale(picture(40, 40))
    assert caught.value.got == "not finite"
    flag.write_text("memory")
    with pytest.raises((MemoryBudgetError, ExecutionError)):
        upscale(picture(40, 40))
    flag.write_text("print")
    assert upscale(picture(40, 40)).shape == (80, 80, 3)
    with pytest.raises(ImageError):
        upscale("no picture")
    with pytest.raises(OptionError):
        upscale(picture(4, 4), outscale=-1)
    with pytest.raises(OptionError, match="outscale"):
        upscale(picture(4, 4), outscale=10**400)
    assert upscale._child is child


def test_time_and_cancelling_end_a_busy_engine(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    upscale, flag = faulty
    flag.write_text("hang")
    started = time.monotonic()
    with pytest.raises(TimedOut), time_limit(0.5):
        upscale(picture(40, 40))
    assert 0.4 < time.monotonic() - started < 3
    cancel = threading.Event()
    threading.Timer(2, cancel.set).start()
    with pytest.raises(Cancelled):
        upscale(picture(40, 40), cancel=cancel)
    assert time.monotonic() - started < 20
    flag.write_text("")
    assert upscale(picture(40, 40)).shape == (80, 80, 3)


def test_who_waits_for_another_keeps_to_time_and_cancelling(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    """A busy process serves one picture; the next thread's limit does not wait for it."""
    upscale, flag = faulty
    flag.write_text("hang")
    end = threading.Event()

    def busy() -> None:
        with pytest.raises(Cancelled):
            upscale(picture(40, 40), cancel=end)

    first = threading.Thread(target=busy)
    first.start()
    time.sleep(0.5)
    started = time.monotonic()
    with pytest.raises(TimedOut), time_limit(0.3):
        upscale(picture(40, 40))
    with pytest.raises(Cancelled):
        upscale(picture(40, 40), cancel=lambda: time.monotonic() - started > 0.6)
    assert time.monotonic() - started < 3
    end.set()
    first.join()


def test_several_threads(toybox: ToyBox, picture: Callable[..., np.ndarray]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = Isolated(toybox.file("Nearest"))
    pictures = [picture(20 + i, 30 - i, seed=i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for got, x in zip(pool.map(alone, pictures), pictures, strict=True):
            np.testing.assert_array_equal(got, x.repeat(2, 0).repeat(2, 1))
    alone.close()
    alone.close()
    with pytest.raises(OptionError, match="closed"):
        alone(pictures[0])


def test_nobody_stays_behind(toybox: ToyBox, tmp_path: Path) -> None:
    """The process ends with the one that started it."""
    import subprocess

    code = (
        "import sys, os, signal; from anysize.isolate import Isolated; u = Isolated(sys.argv[1]); "
        "print(u._child._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, toybox.file("Nearest")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process is still there")


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        Isolated(tmp_path / "none.onnx")
    with pytest.raises(anysize.BackendNotFoundError):
        Isolated(backend="nothing")
    with pytest.raises(OptionError, match="a model in a file"):
        Isolated(object())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="memory must be"):
        Isolated(most="much")
    with pytest.raises(OptionError, match="tiling must be"):
        Isolated(tiling="x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="by its name"):
        Isolated(backend=object())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="are files"):
        Isolated(precision="int8", options=Options(calibration=(np.zeros((4, 4, 3)),)))
    (tmp_path / "broken.onnx").write_bytes(b"\x08" * 100)
    with pytest.raises(ModelLoadError):
        Isolated(tmp_path / "broken.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_process_takes_no_more_memory_than_it_may(picture: Callable[..., np.ndarray]) -> None:
    with pytest.raises(AnysizeError):
        Isolated("default", most="300MiB")(picture(3000, 3000))
    with pytest.raises(OptionError, match="in less than 256 MiB, not '20MiB'"):
        Isolated("default", most="20MiB")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_picture_that_the_process_cannot_hold(toybox: ToyBox, picture: Callable[..., np.ndarray]) -> None:
    upscale = Isolated(toybox.file("Nearest"), most="400MiB")
    for _ in range(2):
        with pytest.raises(MemoryBudgetError):
            upscale(np.zeros((16000, 12000, 3), np.uint8))
        assert upscale(picture(9, 7)).shape == (18, 14, 3)
    upscale.close()


def soon(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def stopped(upscale: Isolated) -> int:
    """The process, which does nothing until it is told to go on."""
    assert upscale._child is not None
    pid = upscale._child._process.pid
    os.kill(pid, signal.SIGSTOP)
    return pid


@pytest.mark.parametrize("how", ["progress", "cancel", "interrupted", "stopped"])
def test_no_answer_is_another_pictures(toybox: ToyBox, picture: Callable[..., np.ndarray], how: str) -> None:
    """Whatever ends the wait for one: it would be taken for the next picture's."""
    upscale = Isolated(toybox.file("Nearest"), tiling=Tiling("tile", 16))
    a, b = (picture(400, 300, seed=seed) for seed in (1, 2))

    def raises(*_: object) -> bool:
        raise {"interrupted": KeyboardInterrupt}.get(how, ImageError)("the caller's own")

    if how in ("interrupted", "stopped"):
        stopped(upscale)
    looks = iter([False])  # the first time; then it raises
    given: dict[str, Any] = {"progress": {"progress": raises}, "stopped": {}}.get(
        how, {"cancel": lambda: next(looks, None) is None and raises()}
    )
    started = time.monotonic()
    with pytest.raises((ImageError, KeyboardInterrupt, TimedOut)), time_limit(0.5):
        upscale(a, **given)
    assert time.monotonic() - started < 2
    np.testing.assert_array_equal(upscale(b), b.repeat(2, 0).repeat(2, 1))
    upscale.close()


def test_closing_ends_what_another_thread_runs(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    upscale, flag = faulty
    flag.write_text("hang")
    threading.Timer(0.5, upscale.close).start()
    started = time.monotonic()
    with pytest.raises(ExecutionError):
        upscale(picture(40, 40))
    assert time.monotonic() - started < 5


def test_what_is_dropped_or_does_not_open_leaves_no_process(toybox: ToyBox, tmp_path: Path) -> None:
    before = psutil.Process().children()
    upscale = Isolated(toybox.file("Nearest"))
    assert len(psutil.Process().children()) == len(before) + 1
    del upscale
    gc.collect()
    (tmp_path / "broken.onnx").write_bytes(b"\x08" * 100)
    with pytest.raises(ModelLoadError):
        Isolated(tmp_path / "broken.onnx")
    soon(lambda: psutil.Process().children() == before)
    (tmp_path / "x.onnx").write_bytes(toybox.file("Nearest").read_bytes())
    upscale = Isolated(tmp_path / "x.onnx")
    (tmp_path / "x.onnx").unlink()
    os.kill(stopped(upscale), signal.SIGKILL)
    time.sleep(0.2)
    for _ in range(2):  # the reason, each time
        with pytest.raises(ModelLoadError, match="no such"):
            upscale(np.zeros((4, 4, 3), np.uint8))
    upscale.close()


def test_a_batch_has_a_limit_for_each_picture_not_for_two(
    toybox: ToyBox, tmp_path: Path, picture: Callable[..., np.ndarray]
) -> None:
    """One that waits for another's run would use up its own time."""
    from anysize.batch import Job, run_jobs

    for name in "abcd":
        write_picture(tmp_path / f"{name}.png", picture(30, 30))
    upscale = Isolated(toybox.file("Nearest"))
    stopped(upscale)  # the first picture meets a process that hangs
    jobs = [Job(tmp_path / f"{name}.png", tmp_path / f"{name}_x2.png") for name in "abcd"]
    reports = [report for report, _ in run_jobs(jobs, upscale, timeout=10)]
    assert [report.status for report in reports] == ["failed", "ok", "ok", "ok"]
    upscale.close()


SAYS = """
import struct, sys, time
from anysize.isolate_worker import _START, read
given = sys.stdin.buffer
def say(text):
    sys.stdout.buffer.write(struct.pack("<I", len(text)) + text)
    sys.stdout.buffer.flush()
sys.stdout.buffer.write(_START)
read(given)
opened = {opened!r}
say(opened)
read(given)
say({text!r})
time.sleep(100)
"""
OPENED = b'{"scale": 2, "identity": ["x"]}'


@pytest.mark.parametrize(
    "text",
    [
        b'{"report": {}, "dtype": "|u1", "shape": [1000000000000]}',
        b'{"report": {}, "dtype": "(2,", "shape": [2]}',
        b'{"report": {}, "dtype": "|u1", "shape": [1e999]}',
        *(b"[1, 2]", b'"abc"', b'{"error": "x"}', b'{"error": "AnysizeError", "known": 5}', b"{}"),
        b'{"error": "ExecutionError", "text": "t", "known": {"__class__": 3, "__dict__": 3}}',
        b'{"error": "ExecutionError", "text": "t", "known": {"args": 5, "message": 5, "add_note": 5}}',
        b'{"error": "ExecutionError", "text": "t", "known": {"backend": 5, "tile": 5}}',
        *(b'{"progress": 3}', b'{"progress": ["a", "b"]}', b'{"progress": [1]}', b'{"report": 7}'),
    ],
)
def test_a_process_that_talks_nonsense(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    code = SAYS.format(opened=OPENED, text=text)
    monkeypatch.setattr(isolate, "_command", lambda: [sys.executable, "-c", code])
    upscale = Isolated()
    with pytest.raises(AnysizeError) as caught, time_limit(5):
        upscale(np.zeros((4, 4, 3), np.uint8))
    assert str(caught.value)
    upscale.close()


@pytest.mark.parametrize(
    "opened", [b'{"scale": "x", "identity": []}', b'{"scale": 2, "identity": 5}', b"[]", b'{"scale": 0}']
)
def test_a_process_that_opens_nonsense(monkeypatch: pytest.MonkeyPatch, opened: bytes) -> None:
    monkeypatch.setattr(
        isolate, "_command", lambda: [sys.executable, "-c", SAYS.format(opened=opened, text=b"")]
    )
    with pytest.raises(ModelLoadError), time_limit(5):
        Isolated()


def test_an_exception_while_a_process_is_ended_leaves_no_answer(
    toybox: ToyBox, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C, in whichever step."""
    upscale = Isolated(toybox.file("Nearest"), tiling=Tiling("tile", 16))
    x = picture(300, 200)

    def raises(*_: object) -> None:
        raise ImageError("the caller's own")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("_end", "_kill"):
        with monkeypatch.context() as patch:
            patch.setattr(isolate, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                upscale(x, progress=raises)
        for seed in (1, 2):
            other = picture(300, 200, seed=seed)
            np.testing.assert_array_equal(upscale(other), other.repeat(2, 0).repeat(2, 1))
    before = psutil.Process().children()
    assert len(before) >= 1
    upscale.close()
    assert len(psutil.Process().children()) == len(before) - 1


def test_the_program_may_go_to_another_folder_but_the_model_stays(
    toybox: ToyBox, tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("a", "Nearest"), ("b", "Doubling")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.onnx").write_bytes(toybox.file(name).read_bytes())
    monkeypatch.chdir(tmp_path / "a")
    upscale, x = Isolated("x.onnx"), picture(10, 12)
    want = upscale(x)
    monkeypatch.chdir(tmp_path / "b")
    upscale._child.kill()
    np.testing.assert_array_equal(upscale(x), want)
    upscale._child.kill()
    (tmp_path / "a" / "x.onnx").write_bytes(toybox.file("Doubling").read_bytes())
    with pytest.raises(ModelLoadError, match="no longer the model"):
        upscale(x)
    upscale.close()


def test_a_picture_within_a_picture_is_refused(toybox: ToyBox, picture: Callable[..., np.ndarray]) -> None:
    """It would wait for itself."""
    upscale = Isolated(toybox.file("Nearest"), tiling=Tiling("tile", 16))
    with pytest.raises(OptionError, match="busy with the picture"), time_limit(20):
        upscale(picture(300, 200), progress=lambda *_: upscale(picture(4, 4)))
    assert upscale(picture(4, 4)).shape == (8, 8, 3)
    upscale.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_what_the_process_has_started_ends_with_it(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """And does not keep its caller waiting by an end of the pipe."""
    upscale, flag = faulty
    note = tmp_path / "started"
    for ending in ("os.kill(os.getpid(), 11)", "time.sleep(100)"):
        flag.write_text(
            f"run pid = os.fork()\nif not pid: time.sleep(1000)\n"
            f"open({str(note)!r}, 'w').write(str(pid))\n{ending}"
        )
        started = time.monotonic()
        with pytest.raises((ExecutionError, TimedOut)), time_limit(5):
            upscale(picture(40, 40))
        assert time.monotonic() - started < 7
        pid = int(note.read_text())
        soon(lambda pid=pid: not psutil.pid_exists(pid))  # type: ignore[misc]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_fork_has_a_process_of_its_own(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    """Also one made while a thread that it does not have runs a picture."""
    upscale, flag = faulty
    x = picture(40, 40)
    want = upscale(x)
    flag.write_text("run time.sleep(1)")
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(upscale, x)
        time.sleep(0.3)
        if not (pid := os.fork()):
            flag.write_text("")
            os._exit(0 if np.array_equal(upscale(x), want) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        np.testing.assert_array_equal(running.result(), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_fork_of_a_moment_when_nobody_is_said_to_have_the_turn(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    """Another thread may have the lock and not have said so yet."""
    upscale, _ = faulty
    x = picture(40, 40)
    want = upscale(x)
    with upscale._turns[os.getpid()].lock:
        if not (pid := os.fork()):
            try:
                with time_limit(60):
                    os._exit(0 if np.array_equal(upscale(x), want) else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_no_file_that_can_be_opened_costs_no_picture(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray]
) -> None:
    """Whether the process goes on is looked up in files of the system."""
    import resource

    upscale, flag = faulty
    x = picture(40, 40)
    want = upscale(x)
    flag.write_text("run time.sleep(0.3)")
    before, held = resource.getrlimit(resource.RLIMIT_NOFILE), list[int]()

    def use_up(*_: int) -> None:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))

    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 20, before[1]))
    try:
        result = upscale(x, progress=use_up)
        assert held
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    np.testing.assert_array_equal(result, want)


def test_places_that_are_no_text(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python passes over such places of modules."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/somewhere"), b"/else"])
    Isolated(toybox.file("Nearest")).close()


def test_what_cannot_be_known_of_another_process(
    toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = toybox.file("Nearest")
    with pytest.raises(OptionError, match="verify must be True or False"):
        Isolated(file, verify=np.bool_(True))  # type: ignore[arg-type]
    gone = tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        with pytest.raises(OptionError, match="is relative to is gone"):
            Isolated(file, options=Options(cache_dir="c"))
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(ExecutionError, match="no other can be started"):
        Isolated(file)


def test_no_thread_at_all_is_an_error(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().children()

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ExecutionError, match="no thread can be started"):
            Isolated(toybox.file("Nearest"))
    assert psutil.Process().children() == before


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit")
def test_nothing_of_a_picture_is_kept(toybox: ToyBox) -> None:
    """The next of its size fits too, and the caller's own is the caller's alone."""
    upscale = Isolated(toybox.file("Nearest"), tiling=Tiling("tile", 256), most="600MiB")
    x = np.zeros((3000, 3000, 3), np.uint8)
    for _ in range(3):
        assert upscale(x).shape == (6000, 6000, 3)
    soon(lambda: sys.getrefcount(x) == 2)
    upscale.close()


def test_levels_and_long_messages(
    faulty: tuple[Isolated, Path], picture: Callable[..., np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    upscale, flag = faulty
    say = (
        "run from anysize.guard import log\nlog.debug('a'); log.warning('b %s', 'c'); log.error('d' * 2**25)"
    )
    flag.write_text(say)
    for level, heard in (("WARNING", {"b c"}), ("DEBUG", {"a", "b c"}), ("NOTSET", {"a", "b c"})):
        caplog.clear()
        with caplog.at_level("NOTSET"), caplog.at_level(level, "anysize"):
            upscale(picture(8, 8))
        assert {message for message in caplog.messages if len(message) < 10} == heard
        assert "d" * 2**16 in caplog.messages
    flag.write_text("run raise RuntimeError('e' * 2**25)")
    with pytest.raises(ExecutionError, match="eeee") as caught:
        upscale(picture(8, 8))
    assert len(str(caught.value)) < 2**17


def test_what_is_printed_as_python_starts_is_no_message(
    toybox: ToyBox, tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; os.write(1, b'started' * 9)"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    upscale = Isolated(toybox.file("Nearest"))
    assert upscale(picture(4, 4)).shape == (8, 8, 3)
    upscale.close()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from anysize.cli import main

    (tmp_path / "in").mkdir()
    for i in range(3):
        write_picture(tmp_path / "in" / f"{i}.png", np.full((9, 7 + i, 3), 40 * i, np.uint8))
    line = ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--isolate", "--resume"]
    for said in ("3 of 3 pictures done", "3 of 3 pictures done, 3 of them before"):
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 0
        assert said in capsys.readouterr().err


def test_attributes_of_errors_survive() -> None:
    error = ShapeError("x", 2, 7, "must be a multiple of 2", (6, 8))
    again = isolate._error(isolate_worker._said(error))
    assert type(again) is ShapeError
    assert str(again) == str(error)
    assert (again.axis, again.nearest) == (2, (6, 8))


def heard(*parts: bytes) -> Any:
    import io

    return isolate_worker.read(io.BytesIO(b"".join(parts)))


def test_messages_that_make_no_sense_are_refused() -> None:
    for parts in (
        (b"\xff\xff\xff\xff",),
        (b"\x02\0\0\0", b"{}"[:1]),
        (b"\x05\0\0\0", b"{bad}"),
        (b"\x1d\0\0\0", b'{"dtype": "O", "shape": [2]} '),
    ):
        with pytest.raises((ValueError, EOFError)):
            heard(*parts)


def test_another_picture_than_asked_for_is_an_error(
    toybox: ToyBox, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale = Isolated(toybox.file("Nearest"))
    real = isolate._Child.receive

    def other(self: Any, stop: Any) -> Any:
        message, data = real(self, stop)
        return message, data[:-1] if data.ndim == 3 else data

    monkeypatch.setattr(isolate._Child, "receive", other)
    with pytest.raises(IntegrityError, match="returned another picture"):
        upscale(picture(10, 12))
    upscale.close()


def test_no_process_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_command", lambda: ["/no/such/program"])
    with pytest.raises(ExecutionError, match="no process can be started"):
        Isolated()
