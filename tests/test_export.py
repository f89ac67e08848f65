"""Contracts are probed, not declared: modules that no room of the library knows."""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Callable
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
import toys
from anysize import Dim, ExportError, ModelLoadError, ModelSpec, OptionError, Rule, ShapeError
from anysize.backends import Model
from anysize.exporters import export
from anysize.exporters.exporting import verification_sizes, verify
from conftest import ENGINES, ToyBox
from torch import nn
from torch.nn import functional as F

GRAPH_ENGINES = [e for e in ENGINES if e != "torch"]


def exported(tmp_path: Path, module: nn.Module, inputs: object) -> ModelSpec:
    file = export(module.eval(), tmp_path / "m.onnx", inputs=inputs)
    specs = [anysize.load(file, backend=engine).spec for engine in GRAPH_ENGINES]
    assert all(s == specs[0] for s in specs)
    return specs[0]


def test_stride_2_encoder_decoder(tmp_path: Path) -> None:
    spec = exported(tmp_path, toys.EncoderDecoder(), {"x": ("n", 3, "h", "w")})
    assert spec.dims == {"n": Dim("n"), "h": Dim("h", 4, None, 4), "w": Dim("w", 4, None, 4)}
    assert spec.output_rule == {"output": ("n", "3", "h", "w")}
    assert spec.scale == 1
    assert spec.tileable
    assert spec.radius == reach_by_hand(toys.EncoderDecoder(), 4)


def reach_by_hand(module: nn.Module, multiple: int) -> int:
    """The receptive radius along H from gradients of a linear, all-positive copy of the network."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_()
    worst = 0
    for row in range(24, 24 + multiple):
        x = torch.ones(1, 3, 64, 8, requires_grad=True)
        module(x)[:, :, row].sum().backward()
        rows = torch.nonzero(x.grad.abs().sum(dim=(0, 1, 3)))
        worst = max(worst, row - int(rows.min()), int(rows.max()) - row)
    return worst


def test_pixel_unshuffle(tmp_path: Path) -> None:
    spec = exported(tmp_path, toys.Unshuffle(2), [("n", 3, "h", "w")])
    assert spec.dims["h"] == Dim("h", 2, None, 2)
    assert spec.output_rule == {"output": ("n", "3", "h", "w")}
    assert spec.radius == 3  # one 3x3 convolution over blocks of 2: a block and the next one's far pixel
    assert spec.tileable


def test_fixed_size(tmp_path: Path) -> None:
    spec = exported(tmp_path, toys.FixedSize(24, 40), torch.rand(1, 3, 24, 40))
    assert spec.dims == {"n": Dim("n")}
    assert spec.inputs[0].shape == (Dim("n"), 3, 24, 40)
    assert spec.output_rule == {"output": ("n", "5")}
    assert spec.radius is None
    assert not spec.tileable


def test_floor_of_four(tmp_path: Path) -> None:
    spec = exported(tmp_path, toys.FloorOfFour(), {"x": ("n", 3, "h", "w")})
    assert spec.dims["h"] == Dim("h", 4)
    assert spec.outputs[0].shape[2:] == (Rule("h", 4, 4), Rule("w", 4, 4))
    assert spec.output_rule == {"output": ("n", "3", "4*(h//4)", "4*(w//4)")}
    assert spec.radius == 3


def test_two_linked_inputs(tmp_path: Path) -> None:
    spec = exported(tmp_path, toys.TwoInputs(), {"image": ("n", 3, "h", "w"), "mask": ("n", 1, "mh", "mw")})
    assert list(spec.dims) == ["n", "h", "w"]
    assert spec.inputs[1].shape == (Rule("n"), 1, Rule("h", 2), Rule("w", 2))
    assert spec.output_rule == {"output": ("n", "3", "h", "w")}
    with anysize.load(tmp_path / "m.onnx", backend=GRAPH_ENGINES[0]) as session:
        image, mask = np.zeros((1, 3, 10, 12), np.float32), np.zeros((1, 1, 20, 23), np.float32)
        with pytest.raises(ShapeError, match=r"'mask', axis 3: got 23, but must be 2\*w = 24") as caught:
            session.run({"image": image, "mask": mask})
        assert (caught.value.input, caught.value.axis, caught.value.got) == ("mask", 3, 23)
        assert caught.value.nearest == (24,)
        assert session.stats.calls == session.stats.compiles == 0


def test_whole_picture_statistics_are_not_tileable(tmp_path: Path) -> None:
    spec = exported(tmp_path, toys.WholePicture(), {"x": ("n", 3, "h", "w")})
    assert spec.radius is None
    assert not spec.tileable


def test_statistics_of_a_single_pixel(tmp_path: Path) -> None:
    """Each side may be 1, but PyTorch refuses both at once: the least size is one that always works."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 3, 1))
    spec = exported(tmp_path, module, {"input": ("n", 3, "h", "w")})
    assert spec.dims["h"] == Dim("h", 2)
    assert spec.dims["w"] == Dim("w", 2)


def test_absolute_positions_are_not_tileable() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.linspace(0, 1, x.shape[2])[None, None, :, None]

    spec = anysize.load(Ramp(), backend="torch").spec
    assert spec.radius is None
    assert not spec.tileable


def test_upper_bound_and_bounded_batch() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.rand(1, 3, 100, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 1 or x.shape[2] > 100:
                raise ValueError("too large")
            return x + self.table[:, :, : x.shape[2]]

    spec = anysize.load(Bounded(), backend="torch").spec
    assert spec.inputs[0].shape[0] == 1
    assert spec.dims["h"] == Dim("h", 1, 100)
    assert spec.dims["w"].max is None


@pytest.mark.parametrize("factor", [3, 5, 7, 16, 32, 64])
def test_multiples(factor: int) -> None:
    spec = anysize.load(toys.Windows(factor), backend="torch").spec
    assert spec.dims["h"] == Dim("h", factor, None, factor)
    assert spec.radius == factor - 1


def test_size_without_a_rule_is_an_error() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[2] % 8 != 1 or x.shape[3] % 8 != 1:
                raise ValueError("1 more than a multiple of 8")
            return x

    with pytest.raises(ModelLoadError, match=r"no rule|none of the sizes"):
        anysize.load(Odd(), backend="torch")


def test_a_module_that_runs_at_no_size_names_the_reason(tmp_path: Path) -> None:
    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("not today")

    with pytest.raises(ExportError, match="not today"):
        export(Never(), tmp_path / "m.onnx", inputs={"x": ("n", 3, "h", "w")})
    with pytest.raises(ExportError, match="not today"):
        export(Never(), tmp_path / "m.onnx", inputs=torch.rand(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_export_leaves_the_module_alone(tmp_path: Path) -> None:
    module = toys.Convolution().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    export(module, tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")])
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_openvino_ir_keeps_contract_and_full_precision(tmp_path: Path) -> None:
    module = toys.EncoderDecoder()
    file = export(module, tmp_path / "m.xml", inputs=[("n", 3, "h", "w")])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    session = anysize.load(file)
    assert session.backend == "openvino"
    assert session.spec.dims["h"].multiple_of == 4
    x = np.random.default_rng(0).random((1, 3, 20, 16), np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    assert np.abs(session(x) - want).max() < 1e-5  # fp16 weights would be off by 1e-4 and more


def test_one_file_and_declared_axes(tmp_path: Path) -> None:
    import onnx

    file = export(toys.Nearest(3), tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")])
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]
    graph = onnx.load(file).graph

    def axes(value: object) -> list:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert axes(graph.input[0]) == ["n", 3, "h", "w"]
    assert axes(graph.output[0]) == ["n", 3, "3*h", "3*w"]


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_weights_beyond_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """A protobuf message has no room for 2 GiB; here for 1000 bytes."""
    monkeypatch.setattr("anysize.exporters.exporting.ONE_FILE", 1000)
    module = toys.EncoderDecoder()
    file = export(module, tmp_path / f"m{suffix}", inputs=[("n", 3, "h", "w")])
    beside = {".onnx": "m.onnx.data", ".xml": "m.bin"}[suffix]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([file.name, beside])
    weights = sum(p.nbytes for p in module.parameters())
    assert (tmp_path / beside).stat().st_size > 0.9 * weights  # what is small stays
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()
    x = np.random.default_rng(0).random((1, 3, 20, 16), np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    for engine in GRAPH_ENGINES if suffix == ".onnx" else ["openvino"]:
        assert np.abs(anysize.load(file, backend=engine)(x) - want).max() < 1e-5
        with pytest.raises(ModelLoadError, match="too large to convert on the fly; export it"):
            anysize.load(module, backend=engine)


def test_what_is_exported_is_not_held_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("anysize.exporters.exporting.ONE_FILE", 1000)
    module = toys.Convolution()
    seen = []
    probe = anysize.exporters.exporting.probe_module

    def look(copy: nn.Module, *args: object, **kwargs: object) -> ModelSpec:
        seen.extend(p.data_ptr() for p in copy.parameters())
        return probe(copy, *args, **kwargs)

    monkeypatch.setattr("anysize.exporters.exporting.probe_module", look)
    export(module, tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")])
    assert seen == [p.data_ptr() for p in module.parameters()]


def test_verification_catches_a_graph_that_differs(toybox: ToyBox) -> None:
    module, onnx = toybox.make("Convolution")
    import copy

    from anysize.backends import get_backend

    other = copy.deepcopy(module)
    other.conv.bias.data += 1e-3
    with pytest.raises(ExportError, match=r"differs from eager by 0\.001"):
        verify(other, onnx, [get_backend(GRAPH_ENGINES[0])])


def test_verification_catches_a_lying_contract(toybox: ToyBox) -> None:
    module, onnx = toybox.make("EncoderDecoder")
    from anysize.backends import get_backend

    lie = Model(onnx.format, onnx.data, toys.image_spec())  # any size, it says
    with pytest.raises(ExportError, match="the module does not run at"):
        verify(module, lie, [get_backend(e) for e in GRAPH_ENGINES])


class Asks(nn.Module):
    """Does something else from some size on, which no small example shows."""

    def __init__(self, large: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.large = large
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convolution(x)
        return y * 0.5 if self.large(x.shape[2], x.shape[3]) else y


@pytest.mark.parametrize(
    ("large", "condition"),
    [
        (lambda h, w: w >= 3000, r"x\.shape\[3\] < 3000"),
        (lambda h, w: h * w > 20000, r"x\.shape\[\d\]\*x\.shape\[\d\] <= 20000"),
        (lambda h, w: h == 777, r"Ne\(x\.shape\[2\], 777\)"),
        (lambda h, w: w % 47 == 0, r"Ne\(Mod\(x\.shape\[3\], 47\), 0\)"),
        (lambda h, w: 100 < w < 200, r"x\.shape\[3\] <= 100"),
        (lambda h, w: w > 10**6, r"x\.shape\[3\] <= 1000000"),
    ],
)
def test_a_module_that_asks_about_sizes(
    tmp_path: Path, large: Callable[[int, int], bool], condition: str
) -> None:
    """Its trace is of one answer alone."""
    with pytest.raises(ExportError, match=f"at .*, where the trace's {condition} does not hold: .* differs"):
        export(Asks(large), tmp_path / "m.onnx", inputs={"x": (1, 3, "h", "w")})
    assert not list(tmp_path.iterdir())


def _cropped(convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[2:]
    if h % 8 or w % 8:
        x = F.pad(x, (0, 8 - w % 8, 0, 8 - h % 8), mode="replicate")
    y: torch.Tensor = convolution(x)
    return y[:, :, :h, :w]


def _in_strips(convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([convolution(x[:, :, top : top + 256]) for top in range(0, x.shape[2], 256)], 2)


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(_cropped, id="padded unless both are multiples"),
        pytest.param(_in_strips, id="in a loop over strips"),
        *(
            pytest.param(lambda c, x, ask=ask: c(x) * 0.5 if ask(*x.shape) else c(x), id=name)
            for name, ask in {
                "two at once": lambda n, c, h, w: h > 512 and w > 512,
                "one pair": lambda n, c, h, w: (h, w) == (64, 64),
                "nested": lambda n, c, h, w: w >= 128 if h >= 128 else False,
                "a chain": lambda n, c, h, w: 1.7 < w / h < 1.8,
                "a root": lambda n, c, h, w: (h * w) ** 0.5 > 100,
                "a logarithm": lambda n, c, h, w: math.log2(h) >= 8,
                "a divisor": lambda n, c, h, w: math.gcd(h, w) >= 64,
                "its text": lambda n, c, h, w: f"{h}x{w}" in ("256x256", "512x512"),
                "its kind": lambda n, c, h, w: isinstance(h, int) and h > 100,
                "single pictures": lambda n, c, h, w: n == 1 and h * w > 10000,
                "who asks": lambda n, c, h, w: not torch.compiler.is_compiling() and h * w > 10**5,
                "patches": lambda n, c, h, w: (h // 14) * (w // 14) == 37 * 37 and h // 14 == w // 14,
            }.items()
        ),
    ],
)
def test_a_trace_that_is_right_at_small_sizes(
    tmp_path: Path, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> None:
    """PyTorch keeps no condition of these, or one that tells too little."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self.convolution, x)

    with pytest.raises(ExportError, match=r"at \{.*\}.*: output 'output' (differs|has shape)"):
        export(Module(), tmp_path / "m.onnx", inputs={"x": ("n", 3, "h", "w")})
    assert not list(tmp_path.iterdir())


class PadsIfNeeded(nn.Module):
    """To multiples of 8; not at all where there is nothing to pad, which gives the same."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[2:]
        below, right = -h % 8, -w % 8
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        y: torch.Tensor = self.convolution(x)
        return y[:, :, :h, :w]


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_another_way_to_the_same_values_is_no_fault(engine: str) -> None:
    module = PadsIfNeeded().eval()
    x = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    with torch.inference_mode():
        want = module(torch.from_numpy(x)).numpy()
    with anysize.load(module, backend=engine) as session:
        np.testing.assert_allclose(session(x), want, atol=1e-5)


class Attends(nn.Module):
    """To all positions at once up to 256 x 256, which is where memory ends."""

    tileable = False  # which spares the search for a radius

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2).mT
        if flat.shape[1] > 65536:
            return x
        return ((flat @ flat.mT).softmax(-1) @ flat).mT.reshape(x.shape)


def test_another_way_that_is_too_large_to_try(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not do what was traced, which is too large to try"):
        export(Attends(), tmp_path / "m.onnx", inputs={"x": (1, 3, "h", "w")})


TABLES: dict[str, torch.Tensor] = {}


class SharesTables(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = str(tuple(x.shape))
        if key not in TABLES:
            TABLES[key] = torch.linspace(0, 1, 7)
        return x + TABLES[key].mean()


def test_tables_that_modules_share_stay_fit_for_use() -> None:
    """What runs without data would leave tensors without data there."""
    anysize.load(SharesTables(), backend="onnxruntime", options={"cache_dir": ""}).close()
    for side in (64, 128, 512):
        assert float(SharesTables()(torch.zeros(1, 3, side, side)).max()) == pytest.approx(0.5)


def test_a_module_that_asks_about_sizes_too_large_to_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "anysize")
    export(Asks(lambda h, w: h * w > 2**24), tmp_path / "m.onnx", inputs={"x": (1, 3, "h", "w")})
    assert "<= 16777216; larger pictures were not tried" in caplog.text


class Sorts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sort(dim=-1, stable=True).values


class Chooses(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * [1.0, 2.0][int(x.mean() > 0.5)]


@pytest.mark.parametrize(
    ("module", "culprit"), [(Sorts(), r"aten\.sort\.stable: "), (Chooses(), r"`return x \* \[1\.0, 2\.0\]")]
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, module: nn.Module, culprit: str) -> None:
    with pytest.raises(ExportError, match=f"torch cannot export this module: {culprit}"):
        export(module, tmp_path / "m.onnx", inputs={"x": (1, 3, "h", "w")})
    assert not list(tmp_path.iterdir())


def test_verification_sizes_cover_the_bound_and_are_not_square() -> None:
    sizes = verification_sizes(toys.image_spec(multiple=8))
    assert len(sizes) >= 4
    assert {"n": 1, "h": 8, "w": 8} in sizes
    assert any(s["h"] != s["w"] for s in sizes)
    assert any(s["n"] > 1 for s in sizes)


@pytest.mark.parametrize("inputs", [{}, {"x": ("n", 3.5, "h", "w")}])
def test_bad_inputs_are_refused(tmp_path: Path, inputs: object) -> None:
    with pytest.raises(OptionError):
        export(toys.Nearest(), tmp_path / "m.onnx", inputs=inputs)


@pytest.mark.parametrize("name", ["m.pt", "missing/m.onnx"])
def test_bad_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError):
        export(toys.Nearest(), tmp_path / name, inputs=[("n", 3, "h", "w")])


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_foreign_onnx_file_is_probed(tmp_path: Path, toybox: ToyBox, engine: str) -> None:
    import onnx

    for name, multiple, radius in (("Convolution", 1, 3), ("EncoderDecoder", 4, None)):
        proto = onnx.load(toybox.file(name))
        del proto.metadata_props[:]
        file = tmp_path / f"{name}.onnx"
        onnx.save(proto, file)
        session = anysize.load(file, backend=engine)
        want = toybox.make(name)[1].spec
        assert session.spec.dims["h"] == Dim("h", multiple, None, multiple)
        assert session.spec.output_rule == want.output_rule
        assert session.spec.radius == want.radius
        assert radius in (None, session.spec.radius)


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_reach_is_unknown_where_nothing_can_trace_it(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip and ReLU of OpenVINO swallow NaN: a gate that noise never opens would hide its reach."""
    import onnx
    from anysize import sources

    proto = onnx.load(toybox.file("EncoderDecoder"))
    del proto.metadata_props[:]
    file = toybox.folder / "foreign.onnx"
    onnx.save(proto, file)
    monkeypatch.setattr(sources, "available_backends", lambda: ["openvino"])
    spec = anysize.load(file, backend="openvino", options={"cache_dir": ""}).spec
    assert spec.radius is None
    assert not spec.tileable


def test_exporters_name_no_architecture() -> None:
    for file in (Path(anysize.__file__).parent / "exporters").glob("*.py"):
        text = file.read_text().lower()
        assert not [w for w in ("rrdb", "srvgg", "compact", "esrgan", "anime", "unet", "sana") if w in text]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("anysize.models")


@pytest.mark.parametrize(
    ("mode", "tileable"), [("zeros", True), ("reflect", True), ("replicate", True), ("circular", False)]
)
def test_padding_modes(mode: str, tileable: bool) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=2, padding_mode=mode), nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode)
    )
    spec = anysize.load(module, backend="torch").spec
    assert (spec.tileable, spec.radius) == (tileable, 3 if tileable else None)


def test_a_grid_hidden_by_padding_inside_is_found() -> None:
    """Windows over a picture padded inside the model: any size works, but tiles have to lie on the grid."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.windows = toys.Windows(7)
            self.convs = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            height, width = x.shape[2:]
            y = nn.functional.pad(x, (0, -width % 7, 0, -height % 7))
            return self.convs(self.windows(y))[:, :, :height, :width]

    spec = anysize.load(Hidden(), backend="torch").spec
    assert spec.dims["h"] == Dim("h")
    assert not spec.tileable


def test_diagonal_reach_is_found() -> None:
    module = nn.Conv2d(3, 3, 2, dilation=20, padding=10)
    assert anysize.load(module, backend="torch").spec.radius == 10


def test_a_module_that_cannot_be_copied_is_an_error(tmp_path: Path) -> None:
    import threading

    module = toys.Nearest()
    module.lock = threading.Lock()
    with pytest.raises(ExportError, match="cannot be copied"):
        export(module, tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")])


def test_an_input_named_output(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    assert list(exported(tmp_path, Named(), [("n", 3, "h", "w")]).output_rule) == ["result"]


def norms() -> dict[str, nn.Module]:
    return {
        "group of all": nn.GroupNorm(1, 6),
        "groups": nn.GroupNorm(3, 6),
        "group of one": nn.GroupNorm(6, 6),
        "no weights": nn.GroupNorm(2, 6, affine=False),
        "instance": nn.InstanceNorm2d(6),
        "instance with weights": nn.InstanceNorm2d(6, affine=True, eps=1e-2),
        "tracked": nn.InstanceNorm2d(6, track_running_stats=True),
        "tracked with weights": nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    }


@pytest.mark.parametrize("kind", norms())
def test_normalisations(tmp_path: Path, kind: str) -> None:
    """Exact on large pictures too, whose long sums in f32 are not: against float64."""
    torch.manual_seed(0)
    norm = norms()[kind]
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data.uniform_(0.5, 1.5)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.Conv2d(6, 3, 1)).eval()
    file = export(module, tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")])
    x = 10 + np.random.default_rng(0).random((2, 3, 600, 801), np.float32)  # a mean that is far from 0
    with torch.no_grad():
        want = module.double()(torch.from_numpy(x).double()).numpy()
    for engine in GRAPH_ENGINES:
        assert np.abs(anysize.load(file, backend=engine)(x) - want).max() <= 1e-4, engine


def test_a_file_does_not_tell_where_it_was_made(tmp_path: Path) -> None:
    file = export(toys.Convolution(), tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")])
    for made in (file, anysize.models.bundled_file("default", ".onnx")):
        for place in (Path(__file__).parent, Path(torch.__file__).parent, Path(anysize.__file__).parent):
            assert str(place).encode() not in made.read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [(), 0, (1, 0), (0, float("inf")), (0, 1e39), "ab", (0, 1, 2), (None, 1), (-3e38, 3e38), (0, 10**400)],
)
def test_a_range_that_is_none(wrong: object) -> None:
    with pytest.raises(OptionError, match="least and the largest"):
        export(toys.Nearest(), Path("m.onnx"), inputs=[("n", 3, "h", "w")], value_range=wrong)


def test_the_range_of_a_module(tmp_path: Path) -> None:
    module = toys.Nearest()
    module.value_range = (-1, 1)
    for given, found in ((None, (-1.0, 1.0)), (np.array([0.0, 255.0]), (0.0, 255.0))):
        file = export(module, tmp_path / "m.onnx", inputs=[("n", 3, "h", "w")], value_range=given)
        assert anysize.load(file, backend=GRAPH_ENGINES[0]).spec.value_range == found
