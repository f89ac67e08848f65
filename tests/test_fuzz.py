"""Broken and hostile input: a typed error, soon, and nothing written outside of the destination."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import string
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import psutil
import pytest
import torch
from anysize import AnysizeError, ImageError, MemoryBudgetError, ModelLoadError, ModelSpec, Upscaler
from anysize.files import read_picture, write_picture
from anysize.models import community, load_weights
from anysize.models.architectures import SRVGGNetCompact
from conftest import ENGINES
from fuzzing import EDITS, Samples, Tally, cases, edited
from hypothesis import given
from hypothesis import strategies as st
from toys import image_spec, nearest, numpy_session


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """A small picture in each format, with metadata."""
    import pyvips

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = Samples()
    for suffix in (".png", ".jpg", ".webp", ".tif", ".avif", ".gif"):
        channels = 3 if suffix in (".jpg", ".gif") else 4
        image = pyvips.Image.new_from_array(rng.integers(0, 256, (13, 17, channels), np.uint8))
        image = image.copy(interpretation="srgb")
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", bytes(range(200)))
        image.write_to_file(str(folder / f"x{suffix}"))
        found[suffix] = (folder / f"x{suffix}").read_bytes()
    return found


@given(suffix=st.sampled_from([".png", ".jpg", ".webp", ".tif", ".avif", ".gif"]), edits=EDITS)
@cases(300)
def test_bytes_of_pictures(pictures: Samples, tmp_path: Path, tally: Tally, suffix: str, edits: Any) -> None:
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / f"x{suffix}").write_bytes(edited(pictures[suffix], edits))
    with tally.case(ImageError):
        picture = read_picture(tmp_path / f"x{suffix}", pixel_limit=10**7)
        assert picture.array.ndim == 3
        assert picture.array.size <= 4 * 10**7
    with tally.case(ImageError):
        upscaler = Upscaler(numpy_session(nearest(1), image_spec()))
        anysize.upscale_file(tmp_path / f"x{suffix}", tmp_path / "out.png", upscaler)
    (tmp_path / "out.png").unlink(missing_ok=True)
    assert [f.name for f in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize("width", [65_535, 2**31 - 1])
def test_a_header_of_a_huge_picture_costs_nothing(tmp_path: Path, width: int) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 16, 6, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(ImageError):
        anysize.upscale_file(tmp_path / "bomb.png", tmp_path / "out.png", "default")
    assert time.monotonic() - started < 2
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """Calling it leaves 500 MiB to the process, until the test is over, on systems that can limit that."""
    if sys.platform != "linux":
        yield lambda: None
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)

    def limit() -> None:
        most = psutil.Process().memory_info().data + 500 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_holds_what_its_header_claims(
    tmp_path: Path, progressive: bool, little_memory: Callable[[], None]
) -> None:
    """A progressive one would take six bytes per pixel, here 2.8 GB, before its data is looked at."""
    import pyvips

    flat = pyvips.Image.black(4000, 3000).cast("uchar")
    options = {"Q": 1, "optimize_coding": True, "interlace": progressive}
    flat.jpegsave(str(tmp_path / "flat.jpg"), **options)
    assert read_picture(tmp_path / "flat.jpg").array.shape == (3000, 4000, 1)
    data = bytearray(pyvips.Image.black(16, 16).cast("uchar").jpegsave_buffer(**options))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = (22_000).to_bytes(2, "big") * 2
    (tmp_path / "bomb.jpg").write_bytes(data)
    little_memory()
    with pytest.raises(ImageError, match="too few bytes for 22000 x 22000"):
        read_picture(tmp_path / "bomb.jpg")


def test_a_gif_holds_what_its_header_claims(tmp_path: Path, little_memory: Callable[[], None]) -> None:
    """Missing pixels are given as zeros: 35 bytes were a picture of 22000 x 22000, in 3.3 GB."""
    import pyvips

    small = pyvips.Image.black(16, 16).cast("uchar")
    data = bytearray(small.gifsave_buffer())
    data[6:10] = (2000).to_bytes(2, "little") * 2  # a canvas may be larger than what is on it
    (tmp_path / "canvas.gif").write_bytes(data)
    at = data.index(b"\x2c\0\0\0\0\x10\0\x10\0") + 5
    data[6:10] = data[at : at + 4] = (22_000).to_bytes(2, "little") * 2
    (tmp_path / "bomb.gif").write_bytes(data)
    pyvips.Image.black(8000, 6000).cast("uchar").gifsave(str(tmp_path / "flat.gif"))
    assert read_picture(tmp_path / "canvas.gif").array.shape[:2] == (2000, 2000)
    assert read_picture(tmp_path / "flat.gif").array.shape[:2] == (6000, 8000)
    little_memory()
    with pytest.raises(ImageError, match="too few bytes for 22000 x 22000 pixels of GIF"):
        read_picture(tmp_path / "bomb.gif")


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
@pytest.mark.parametrize("after", [False, True])
def test_texts_of_a_png_fill_no_memory(
    tmp_path: Path, kind: str, after: bool, little_memory: Callable[[], None]
) -> None:
    """Each compressed text of some kilobytes is made up to 8 MB of: 2.3 MB took 2.3 GB."""
    import pyvips

    png = pyvips.Image.black(8, 8).cast("uchar").pngsave_buffer()
    text = zlib.compress(b"A" * 7_900_000)
    body = kind.encode() + (b"k\0\0" if kind == "zTXt" else b"k\0\1\0\0\0") + text
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    at = png.index(b"IEND" if after else b"IDAT") - 4
    for count, name in ((2, "text"), (300, "bomb")):
        (tmp_path / f"{name}.png").write_bytes(png[:at] + chunk * count + png[at:])
    little_memory()
    assert read_picture(tmp_path / "text.png").array.shape == (8, 8, 1)
    with pytest.raises(ImageError, match="compressed texts"):
        read_picture(tmp_path / "bomb.png")


@pytest.fixture(scope="module")
def weights() -> Samples:
    from safetensors.torch import save

    state = SRVGGNetCompact(3, 4, 1, 2).state_dict()
    file = io.BytesIO()
    torch.save({"params": state}, file)
    old = io.BytesIO()
    torch.save({"params": state}, old, _use_new_zipfile_serialization=False)
    return Samples({".safetensors": save(state), ".pth": file.getvalue(), ".pt": old.getvalue()})


@given(suffix=st.sampled_from([".safetensors", ".pth", ".pt"]), edits=EDITS)
@cases(300)
def test_bytes_of_weights(weights: Samples, tmp_path: Path, tally: Tally, suffix: str, edits: Any) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(edited(weights[suffix], edits))
    with tally.case(ModelLoadError):
        load_weights(path)


@pytest.mark.parametrize("claims", ["repeated", "blocks", "archive", "spandrel", "tables"])
def test_weights_that_claim_a_larger_model(
    tmp_path: Path, claims: str, little_memory: Callable[[], None]
) -> None:
    """Refused before it is built: these took 10, 2.8 and 14 GB."""
    path, one = tmp_path / "x.pth", torch.zeros(1)
    state = {
        "conv_first.weight": torch.zeros(64, 3, 3, 3),
        "conv_last.weight": torch.zeros(3, 64, 3, 3),
        "body.0.rdb1.conv1.weight": torch.zeros(32, 64, 3, 3),
    }
    says = "claim more values than the file has bytes"
    if claims == "repeated":
        state = {key: one.expand(3000, 3000, 3, 3) for key in state}
    elif claims == "blocks":
        state["body.999.rdb1.conv1.weight"], says = one, "looks like RRDBNet, but .*conv_first.bias"
    elif claims == "spandrel":
        if not community.installed():
            pytest.skip("needs spandrel")
        community.import_spandrel()
        from spandrel.architectures.SPAN import SPAN

        small = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)
        state = dict.fromkeys(small.state_dict(), one)
        state["conv_1.sk.weight"] = torch.zeros(2000, 3, 1, 1)
        says = "a larger model than a file of its size can hold"
    elif claims == "tables":
        if not community.installed():
            pytest.skip("needs spandrel")
        # of SwinIR, whose window is a square of as many places as this; tables have its fourth power
        block, says = "layers.0.residual_group.blocks.0.", "a larger model than a file of its size can hold"
        state = {
            "conv_first.weight": torch.zeros(2, 3, 3, 3),
            f"{block}norm1.weight": torch.zeros(2),
            f"{block}mlp.fc1.bias": torch.zeros(2),
            f"{block}attn.relative_position_index": torch.zeros(128**2),
            f"{block}attn.relative_position_bias_table": torch.zeros(1, 1),
        }
    torch.save(state, path)
    if claims == "archive":
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, part in parts.items():
                file.writestr(name, part)
        says = "its parts are compressed"
    little_memory()
    with pytest.raises(ModelLoadError, match=says):
        load_weights(path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("trick", ["bytes", "tuples", "deep", "tuple"])
def test_pickles_that_take_more_than_their_size(
    tmp_path: Path, trick: str, old: bool, little_memory: Callable[[], None]
) -> None:
    """450 bytes took 6.4 GB; 1.6 KB would have been hashed for hours; a long name was a `RecursionError`."""
    if trick == "bytes":
        made, says = b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R", "byte arrays"
    elif trick == "tuples":  # each holds the one before twice, and is hashed as a key
        made, says = b")" + b"q\0h\0\x86" * 60, "too many others"
    elif trick == "deep":
        made, says = b")" + b"\x85" * 60_000, "too many others"
    else:
        made, says = b"K\1\x85", "a key that is no name: a tuple"
    key, value = (b"X\1\0\0\0k", made) if trick == "bytes" else (made, b"N")
    file, path = io.BytesIO(), tmp_path / "x.pth"
    torch.save({"k": 1}, file, _use_new_zipfile_serialization=not old)
    whole = b"\x80\2}q\1" + key + value + b"s."
    if old:
        starts = [at for at in range(len(file.getvalue())) if file.getvalue().startswith(b"\x80\2", at)]
        path.write_bytes(file.getvalue()[: starts[3]] + whole + file.getvalue()[starts[4] :])
    else:
        with zipfile.ZipFile(file) as given, zipfile.ZipFile(path, "w") as changed:
            for name in given.namelist():
                changed.writestr(name, whole if name.endswith("data.pkl") else given.read(name))
    little_memory()
    with pytest.raises(ModelLoadError, match=says):
        load_weights(path)


KEYS = st.from_regex(
    r"(body|conv_first|model|conv_up1)\.(0|1|07|\u0663|999)?(\.rdb1\.conv1)?\.(weight|bias)", fullmatch=True
)
SHAPES = st.sampled_from([(4, 3, 3, 3), (3, 4, 3, 3), (12, 4, 3, 3), (2**40, 0, 3, 3), (0,), (), (4,)])


@given(shapes=st.dictionaries(KEYS, SHAPES, max_size=6))
@cases(200)
def test_keys_and_shapes_of_weights(tmp_path: Path, tally: Tally, shapes: dict[str, Any]) -> None:
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.pth")
    with tally.case(ModelLoadError):
        load_weights(tmp_path / "x.pth")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    header=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
    size=st.integers(-8, 2**63),
    body=st.binary(),
)
@cases(200)
def test_headers_of_safetensors(tmp_path: Path, tally: Tally, header: Any, size: int, body: bytes) -> None:
    text = json.dumps(header).encode()
    length = len(text) + size if size < 0 else size if size % 3 else len(text)
    path = tmp_path / "x.safetensors"
    path.write_bytes((length % 2**64).to_bytes(8, "little") + text + body)
    with tally.case(ModelLoadError):
        load_weights(path)


def test_methods_that_a_file_hides(tmp_path: Path) -> None:
    """Attributes come with mappings and tensors, and those of an instance are found before its methods."""
    module = SRVGGNetCompact(3, 8, 1, 2)
    state = OrderedDict(module.state_dict())
    state.get = state.keys = 5  # type: ignore[method-assign, assignment]
    for tensor in state.values():
        tensor.numel = tensor.to = 5  # type: ignore[method-assign, assignment]
    torch.save(state, tmp_path / "m.pth")
    loaded = load_weights(tmp_path / "m.pth").module
    x = torch.rand(1, 3, 8, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))


class Runs:
    """An object that runs code where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, exec, Path.touch, open, torch.load, __import__])
def test_pickles_that_run_code_are_refused(
    tmp_path: Path, function: Any, packed: bool, protocol: int, tally: Tally
) -> None:
    marker = tmp_path / "was-here"
    argument: Any = {
        os.system: f"touch {marker}",
        eval: f"open({str(marker)!r}, 'w')",
        exec: f"open({str(marker)!r}, 'w')",
        Path.touch: marker,
        open: str(marker),
    }.get(function, "os")
    hostile = {
        "params": {"body.0.weight": Runs(function, *([argument, "w"] if function is open else [argument]))}
    }
    data = pickle.dumps(hostile, protocol)
    if packed:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as file:
            for name, part in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little")):
                file.writestr(f"archive/{name}", part)
        data = made.getvalue()
    for suffix in (".pth", ".ckpt", ".pt", ".safetensors"):
        (tmp_path / f"x{suffix}").write_bytes(data)
        with pytest.raises(ModelLoadError):
            anysize.load(tmp_path / f"x{suffix}", backend="torch")
        with tally.case(ModelLoadError):
            load_weights(tmp_path / f"x{suffix}")
        assert not marker.exists()


SPEC = image_spec(2).to_json()


@given(edits=EDITS, wild=JSON, key=st.sampled_from(sorted(json.loads(SPEC))))
@cases(300)
def test_contracts_inside_of_models(tally: Tally, edits: Any, wild: Any, key: str) -> None:
    broken = edited(SPEC.encode(), edits).decode(errors="replace")
    for text in (broken, json.dumps(wild), json.dumps({**json.loads(SPEC), key: wild})):
        with tally.case(ModelLoadError):
            spec = ModelSpec.from_json(text)
            assert ModelSpec.from_json(spec.to_json()) == spec


WORDS = st.sampled_from(
    [
        *("upscale", "export", "parity", "bench", "tune", "models", "get", "backends", "IN", "OUT", "FOLDER"),
        *(
            "-o",
            "-m",
            "-b",
            "--model",
            "--backend",
            "--tile",
            "--overlap",
            "--method",
            "--memory",
            "--outscale",
        ),
        *("--precision", "--json", "--device", "--threads", "--resume", "--verify", "--timeout", "--sizes"),
        *("--bisect", "--help", "--", "-", "", "0", "-1", "1e999", "nan", "2GiB", "tile", "stream", "4", "x"),
    ]
)


#: what runs, with whatever follows it
LINES = [["upscale", "IN", "-o", "OUT"], ["upscale", "IN", "-o", "FOLDER"]]
RIGHT = [
    *(
        ["--method", "whole"],
        ["--tile", "8"],
        ["--overlap", "1"],
        ["--overlap", "exact"],
        ["--memory", "1GiB"],
    ),
    *(["--outscale", "1.5"], ["--precision", "bf16"], ["--timeout", "9"], ["--threads", "1"], ["--json"]),
    *(["--resume"], ["--verify"], ["--backend", "torch"]),
]


@given(
    begin=st.sampled_from([[], *LINES]),
    options=st.lists(st.sampled_from(RIGHT), max_size=4),
    words=st.lists(WORDS | st.text(string.printable + "é\u202e\U0001f600", max_size=6), max_size=5),
)
@cases(60)
def test_arguments_of_the_command(
    tmp_path: Path, tally: Tally, begin: list[str], options: list[list[str]], words: list[str]
) -> None:
    from anysize.cli import main

    (tmp_path / "in").mkdir(exist_ok=True)
    write_picture(tmp_path / "in" / "a.png", np.zeros((5, 4, 3), np.uint8))
    names = {
        "IN": str(tmp_path / "in" / "a.png"),
        "OUT": str(tmp_path / "out.png"),
        "FOLDER": str(tmp_path / "out"),
    }
    errors = io.StringIO()
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        slow = {"bench", "tune", "parity", "export", "get"} & set(words)
        line = [names.get(word, word) for word in (*begin, *chain(*options), *words) if "\0" not in word]
        if slow:  # runs for minutes where it is right; an option may take the first of them
            line = [word for word in line if word != "--"] + ["--no-such-option"] * 2
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            tally.case(SystemExit),
        ):
            main(line)
    finally:
        os.chdir(here)
    (tmp_path / "out.png").unlink(missing_ok=True)
    assert "Traceback" not in errors.getvalue()
    assert "internal error" not in errors.getvalue()


NAMES = [
    *(
        "a b.png",
        "ü€😀.png",
        "-o.png",
        "--help.png",
        "new\nline.png",
        "quote'\".png",
        "a;b&c.png",
        "$(x).png",
    ),
    *("[page=1].png", "x.png[Q=1].png", "%s%d.png", "con.png", " lead.png", "trail .png", "\x01\x1b[31m.png"),
    *("~.png", "*.png", "?.png", "a" * 240 + ".png"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(tmp_path: Path, name: str) -> None:
    from anysize.cli import main

    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / name
    write_picture(source, np.zeros((5, 4, 3), np.uint8))
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "in" / "loop.png").symlink_to(tmp_path / "in" / "loop.png")
    with pytest.raises(SystemExit) as caught:
        main(["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--backend", ENGINES[0]])
    assert caught.value.code == 1  # the loop
    made = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert made == sorted(["anysize.jsonl", f"{source.stem}_x4.png"])
    with pytest.raises(SystemExit) as caught:
        main(["upscale", str(source), "-o", str(tmp_path / "in" / ".." / "up.png"), "--backend", ENGINES[0]])
    assert caught.value.code == 0
    assert {f.name for f in tmp_path.iterdir()} == {"in", "out", "up.png", "loop.png"}
    for wrong in (tmp_path / "loop.png", tmp_path / "loop.png" / "x.png"):
        with pytest.raises(AnysizeError):
            anysize.upscale_file(wrong, tmp_path / "y.png")


def test_a_contract_that_asks_for_all_memory() -> None:
    """Sizes that nothing holds: the picture would be padded to them."""
    upscale = Upscaler(numpy_session(nearest(1), image_spec(1, multiple=10**7)))
    with pytest.raises(MemoryBudgetError):
        upscale(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("text", [b"<svg", b"%PDF-1.4", b"<?xml", b"P6\n", b"\x89PNX", b"SIMPLE  ="])
def test_other_loaders_of_libvips_never_see_a_file(
    tmp_path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drawing of two kilobytes keeps the one for SVG busy for minutes before it says that it is one."""
    import pyvips

    monkeypatch.setattr(pyvips.Image, "new_from_source", None)
    (tmp_path / "x.png").write_bytes(text + bytes(100))
    with pytest.raises(ImageError, match="not a readable picture"):
        read_picture(tmp_path / "x.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    from anysize import manifest

    os.mkfifo(tmp_path / "x.png")
    os.mkfifo(tmp_path / manifest.NAME)
    for use, path in (
        (read_picture, tmp_path / "x.png"),
        (manifest.digest, tmp_path / "x.png"),
        (manifest.read, tmp_path),
    ):
        with pytest.raises(ImageError, match="not a file"):
            use(path)
