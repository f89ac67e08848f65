"""Known weights: a server that truncates, corrupts, redirects, fails; several calls at once; no server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
from anysize import ModelLoadError, OptionError
from anysize.cli import main
from anysize.models import registry
from anysize.models.architectures import SRVGGNetCompact
from anysize.models.registry import BUNDLED, KNOWN, bundled_file, fetch

NAME = "realesr-animevideov3"


class Server(ThreadingHTTPServer):
    """Serves `data`; `faults` are what it does wrong, one a request, then nothing."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.faults: list[str] = []
        self.asked: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else ""
        asked, data = self.headers.get("Range"), self.server.data
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/weights.pth")
            self.end_headers()
            return
        self.server.asked.append(asked)
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "no ranges" else 0
        self.send_response(206 if begin else 200)
        if begin:
            moved = begin + (7 if fault == "another range" else 0)
            self.send_header("Content-Range", f"bytes {moved}-{len(data) - 1}/{len(data)}")
        body = data[begin:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncate":
            body = body[: len(body) // 2]
        elif fault == "nothing":
            body = b""
        elif fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault == "stall":
            self.wfile.write(body[:200_000])
            time.sleep(0.4)
            return
        elif fault == "slow":
            for i in range(0, len(body), 2**14):
                self.wfile.write(body[i : i + 2**14])
                time.sleep(0.05)
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"params": SRVGGNetCompact(features=48, convolutions=16).state_dict()}, path)
    return path.read_bytes()


@pytest.fixture
def server(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(weights) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("ANYSIZE_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(registry, "_PAUSE", 0)
        facts = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        url = f"http://127.0.0.1:{served.server_address[1]}/weights.pth"
        monkeypatch.setitem(KNOWN, NAME, replace(KNOWN[NAME], url=url, **facts))
        yield served
        served.shutdown()
        thread.join()


def kept() -> list[str]:
    return sorted(path.name for path in registry.home().iterdir())


def test_fetched_once_and_loaded_by_name(server: Server, weights: bytes) -> None:
    with pytest.raises(ModelLoadError, match=f"here, or damaged; fetch it with: anysize models get {NAME}"):
        anysize.load(NAME)
    steps: list[tuple[int, int]] = []
    path = fetch(NAME, progress=lambda *step: steps.append(step))
    assert path.read_bytes() == weights
    assert kept() == ["weights.pth"]
    assert [have for have, _ in steps] == sorted(have for have, _ in steps)
    assert steps[-1] == (len(weights), len(weights))
    assert fetch(NAME) == path
    assert server.asked == [None]
    assert anysize.load(NAME, backend="torch")(np.zeros((1, 3, 5, 6), np.float32)).shape == (1, 3, 20, 24)
    with pytest.raises(
        OptionError, match="not a known model; known are default, default-x2, RealESRGAN_x4plus, "
    ):
        fetch("unknown")


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["truncate"], 1),
        (["truncate"] * 6, 6),
        (["truncate", "nothing", "nothing", "truncate", "500"], 5),
        (["truncate", "no ranges"], 1),
        (["truncate", "another range"], 2),
        (["truncate", "416"], 1),
        (["503"], 0),
    ],
)
def test_goes_on_where_it_stopped(server: Server, weights: bytes, faults: list[str], ranges: int) -> None:
    server.faults = list(faults)
    assert fetch(NAME).read_bytes() == weights
    assert kept() == ["weights.pth"]
    assert len([asked for asked in server.asked if asked]) == ranges


def test_what_came_before_a_stall_is_kept(
    server: Server, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_TIMEOUT", 0.1)
    server.faults = ["stall"] * 3
    assert fetch(NAME).read_bytes() == weights
    assert server.asked == [None, *(f"bytes={n}-" for n in (200_000, 400_000, 600_000))]


def test_a_later_call_goes_on(server: Server, weights: bytes) -> None:
    server.faults = ["truncate", "nothing", "nothing", "nothing"]
    half = len(weights) // 2
    with pytest.raises(ModelLoadError, match=f"the connection ended after {half} of {len(weights)} bytes"):
        fetch(NAME)
    assert kept() == ["weights.pth.part"]
    server.asked.clear()
    assert fetch(NAME).read_bytes() == weights
    assert server.asked == [f"bytes={half}-"]
    assert kept() == ["weights.pth"]


def test_wrong_bytes_are_deleted(server: Server, weights: bytes) -> None:
    server.faults = ["corrupt"]
    with pytest.raises(ModelLoadError, match=r"has sha256 \w{64}, not \w{64}; it was deleted"):
        fetch(NAME)
    assert kept() == []
    path = fetch(NAME)
    path.write_bytes(weights[:-1] + b"?")  # damaged later
    with pytest.raises(ModelLoadError, match="not here, or damaged"):
        anysize.load(NAME)
    assert fetch(NAME).read_bytes() == weights


def test_errors_are_one_line(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.faults = ["404"]
    with pytest.raises(ModelLoadError, match=r"weights.pth answers 404 Not Found"):
        fetch(NAME)
    server.faults = ["500"] * 3
    with pytest.raises(ModelLoadError, match=r"cannot be loaded from .*: 500 Internal Server Error"):
        fetch(NAME)
    monkeypatch.setitem(KNOWN, NAME, replace(KNOWN[NAME], url="http://127.0.0.1:9/weights.pth"))
    with pytest.raises(ModelLoadError, match=r"cannot be loaded from .*: .*refused") as offline:
        fetch(NAME)
    assert "\n" not in str(offline.value)
    registry.home().mkdir(exist_ok=True, parents=True)
    assert kept() == []
    (registry.home() / "weights.pth").mkdir()
    with pytest.raises(OptionError, match=r"weights\.pth: is a folder"):
        fetch(NAME)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANYSIZE_HOME", str(tmp_path / "file"))
    with pytest.raises(OptionError, match="cannot be written"):
        fetch(NAME)


def test_redirects(server: Server, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    url = KNOWN[NAME].url.replace("weights.pth", "moved")
    monkeypatch.setitem(KNOWN, NAME, replace(KNOWN[NAME], url=url))
    server.faults = ["", "truncate"]  # the redirection takes one
    path = fetch(NAME)
    assert (path.name, path.read_bytes()) == ("moved", weights)
    assert server.asked == [None, f"bytes={len(weights) // 2}-"]


def test_several_at_once(server: Server, weights: bytes) -> None:
    server.faults = ["slow"] * 4
    with ThreadPoolExecutor(4) as pool:
        for path in pool.map(fetch, [NAME] * 4):
            assert path.read_bytes() == weights
    assert kept() == ["weights.pth"]


def test_one_that_is_killed_leaves_what_it_has(server: Server, weights: bytes) -> None:
    server.faults = ["slow"]
    code = f"""
from dataclasses import replace
from anysize.models.registry import BUNDLED, KNOWN, bundled_file, fetch
KNOWN[{NAME!r}] = replace(KNOWN[{NAME!r}], url={KNOWN[NAME].url!r}, size={len(weights)})
fetch({NAME!r}, progress=lambda have, size: print(have, flush=True))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (left,) = kept()
    have = (registry.home() / left).stat().st_size
    assert 0 < have < len(weights)
    server.asked.clear()
    assert fetch(NAME).read_bytes() == weights
    assert server.asked == [f"bytes={have}-"]
    assert kept() == ["weights.pth"]


def test_the_command(server: Server, weights: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["models", *arguments])
        return int(done.value.code or 0), *capsys.readouterr()

    code, out, _ = command("--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"] for row in rows] == [*BUNDLED, *KNOWN]
    for row in rows:
        assert len(row["sha256"]) == 64
        assert row["file"] == (str(bundled_file(row["name"])) if row["name"] in BUNDLED else None)
    code, out, _ = command("get", NAME)
    assert code == 0
    assert Path(out.strip()).read_bytes() == weights
    code, out, _ = command("get", "default")
    assert (code, out.strip()) == (0, str(bundled_file("default")))
    code, out, _ = command()
    assert code == 0
    assert "default: LumaCompact x4, Apache-2.0, bundled" in out
    assert f"{NAME}: SRVGGNetCompact x4, BSD-3-Clause, {len(weights) / 1e6:.1f} MB, here" in out
    assert "RealESRGAN_x4plus: RRDBNet x4, BSD-3-Clause, 67.0 MB, not here" in out
    assert "https://" in out
    code, out, err = command("get", "other")
    assert (code, out) == (2, "")
    assert "other: not a known model" in err


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_a_bundled_file_that_is_damaged_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would run, and give a wrong picture."""
    engine = {".onnx": "openvino", ".safetensors": "torch"}[suffix]
    data = bytearray(bundled_file("default", suffix).read_bytes())
    monkeypatch.setattr(registry, "_HERE", tmp_path)
    with pytest.raises(ModelLoadError, match=f"default{suffix}: cannot be read: No such file"):
        anysize.load("default", backend=engine)
    file = tmp_path / f"default{suffix}"
    file.write_bytes(data)
    assert bundled_file("default", suffix) == file
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelLoadError, match="is damaged, its sha256 is"):
        anysize.load("default", backend=engine)
    with pytest.raises(SystemExit, match="0"):
        main(["models"])
    assert "default: LumaCompact x4, Apache-2.0, damaged: install anysize again" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["models", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (rows[0]["name"], rows[0]["file"]) == ("default", None)


def test_the_file_at_hand_is_the_one_listed(assets: Path) -> None:
    known, file = KNOWN[NAME], assets / "weights" / f"{NAME}.pth"
    assert file.stat().st_size == known.size
    assert hashlib.sha256(file.read_bytes()).hexdigest() == known.sha256
