"""The training recipe: pictures by seed, a short run, and going on where one stopped."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from anysize.models import BUNDLED, bundled_file, load_weights
from torch.nn.functional import interpolate

from training import publish as publishing
from training import train as training
from training.pictures import KINDS, picture
from training.publish import publish
from training.train import RECIPES, Recipe, card, train

SMALL = Recipe(
    scale=4, features=16, convolutions=2, steps=30, batch=8, patch=12, rate=6e-2, pictures=6, size=64
)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_told_by_their_seed(kind: str) -> None:
    one, again, other = (picture(seed, 48, kind) for seed in (1, 1, 2))
    assert (one.shape, one.dtype) == ((48, 48, 3), np.uint8)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("size", [0, 31, 342])
def test_pictures_of_no_possible_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"not of {size}"):
        picture(0, size)


@pytest.mark.parametrize("scale", [2, 4])
def test_it_begins_near_bilinear_enlargement(scale: int) -> None:
    torch.manual_seed(0)
    net = training.network(replace(SMALL, scale=scale))
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        added = net(x) - interpolate(x, scale_factor=scale, mode="bilinear")
    assert 0 < added.abs().max() < 0.2
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-6, rtol=0)


def test_thirty_steps_learn_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two goes it gives the same weights as in one; the file is one that every program of them reads."""
    monkeypatch.setattr(training, "KEPT", 10)
    whole = train(SMALL, tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    unseen = [torch.from_numpy(picture(seed, SMALL.size)).permute(2, 0, 1) for seed in range(100, 112)]
    tried = [training.patches(SMALL, unseen, step) for step in range(10)]
    ways = load_weights(whole).module, partial(interpolate, scale_factor=SMALL.scale, mode="bilinear")
    with torch.no_grad():
        taught, plain = (sum(training.luma(way(x) - y).square().mean() for x, y in tried) for way in ways)
    assert taught < 0.99 * plain

    real = training.patches

    def stops(recipe: Recipe, at_hand: list[torch.Tensor], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 14:
            raise KeyboardInterrupt
        return real(recipe, at_hand, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "patches", stops)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, tmp_path / "parts")
    assert not (tmp_path / "parts/weights.safetensors").exists()
    parts = train(SMALL, tmp_path / "parts")
    assert parts.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(training, "ProcessPoolExecutor", None)  # one that has ended draws no picture
    assert train(SMALL, tmp_path / "parts").read_bytes() == whole.read_bytes()
    assert load_weights(parts).architecture == "LumaCompact"
    assert load_weights(parts).sha256 in card("small", SMALL, tmp_path / "parts")


def test_flats_are_flat_and_small() -> None:
    sizes = set()
    for step in range(40):
        small = training.flats(SMALL, step)
        count, channels, height, width = small.shape
        assert (count, channels) == (12, 3)
        assert torch.equal(small, small[..., :1, :1].expand_as(small))
        assert set(small[:3].unique().tolist()) <= {0, 1}
        assert torch.equal(small[3:8], small[3:8, :1].expand(-1, 3, -1, -1))
        sizes |= {height, width}
    assert min(sizes) == 1
    assert 16 < max(sizes) <= 31


@pytest.mark.parametrize("name", RECIPES)
def test_the_bundled_models_are_of_their_recipes(name: str) -> None:
    card, bundled = (Path(training.__file__).parent / f"{name}.md").read_text(), BUNDLED[name]
    assert RECIPES[name].scale == bundled.scale
    known = training.determined_by(RECIPES[name])
    for key in (*asdict(RECIPES[name]), "sha256 of pictures.py"):  # versions may have gone on since
        assert f"| {key} | {known[key]} |" in card
    assert f"| {bundled.weights_sha256} |" in card
    for suffix, digest in ((".onnx", bundled.sha256), (".safetensors", bundled.weights_sha256)):
        assert hashlib.sha256(bundled_file(name, suffix).read_bytes()).hexdigest() == digest


def test_a_state_of_another_recipe_or_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(SMALL, steps=1, pictures=1)
    train(short, tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(short, rate=1e-4), tmp_path)
    monkeypatch.setattr(training, "version", lambda name: "0.1")
    with pytest.raises(ValueError, match="another recipe"):
        train(short, tmp_path)
    for broken in (b"", b"state", (tmp_path / "state.pt").read_bytes()[:1000]):
        (tmp_path / "state.pt").write_bytes(broken)
        with pytest.raises(ValueError, match=f"{tmp_path.name}: its state cannot be read"):
            train(short, tmp_path)


def test_publishing_changes_nothing_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "MODELS", tmp_path)
    monkeypatch.setattr(publishing, "CARDS", tmp_path)
    (tmp_path / "bundled.json").write_text("[]")
    state = tmp_path / "state"
    train(replace(SMALL, steps=1), state)
    with pytest.raises(SystemExit, match="finish the training first"):
        publish("default", state)
    assert {path.name for path in tmp_path.iterdir()} == {"bundled.json", "state"}
    (state / "card.md").write_text("of a model before")
    with pytest.raises(SystemExit, match="other weights"):
        publish("default", state)
    assert {path.name for path in tmp_path.iterdir()} == {"bundled.json", "state"}
    (state / "card.md").write_text(card("default", SMALL, state))
    publish("default", state)
    (facts,) = json.loads((tmp_path / "bundled.json").read_text())
    files = {"default.onnx": "sha256", "default.safetensors": "weights_sha256"}
    for file, key in files.items():
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == facts[key]
    assert facts["weights_sha256"] in (tmp_path / "default.md").read_text()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert len(before) == 4
    monkeypatch.setattr(publishing, "LIMIT", 100)
    with pytest.raises(SystemExit, match="more than the 100"):
        publish("default", state)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_those_that_draw_end_with_the_one_that_trains(tmp_path: Path) -> None:
    """Even if it is killed, and can tell them nothing."""
    code = (
        "import os, signal\n"
        "from training.train import pictures, Recipe\n"
        "if __name__ == '__main__':\n"
        "    drawing = pictures(Recipe(scale=4, pictures=1, size=32), 0)\n"
        "    next(drawing)\n"
        "    import multiprocessing\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    root = Path(training.__file__).parent.parent
    told = tmp_path / "told"
    with told.open("w") as file:  # a pipe would be awaited while one of them holds it
        environment = {**os.environ, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, script], stdout=file, cwd=root, env=environment)
    pids = [int(pid) for pid in told.read_text().split()]
    assert pids
    deadline = time.monotonic() + 30
    while any(map(_works, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _works(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # one that nobody awaits stays listed
    except psutil.NoSuchProcess:
        return False
