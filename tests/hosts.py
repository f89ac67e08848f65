"""Doubles of hosts that cannot be installed as packages. They fail on a wrong signature.

Each says which published file it follows, at which commit.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The adapter, imported beside these doubles, and gone with them."""
    for home, attribute in (
        (sys.modules, name),
        (vars(importlib.import_module("anysize.integrations")), name.rpartition(".")[2]),
    ):
        monkeypatch.setitem(home, attribute, None)  # so that it is put back as it was
        del home[attribute]
    return importlib.import_module(name)


class Interrupted(BaseException):
    """`InterruptProcessingException` of comfy/model_management.py, Comfy-Org/ComfyUI."""


class Bar:
    """`ProgressBar` of comfy/utils.py."""

    made: list[Bar]

    def __init__(self, total: int, node_id: Any = None) -> None:
        self.total, self.seen = total, list[int]()
        Bar.made.append(self)

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.seen.append(value)


def comfyui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`folder_paths`, `comfy.utils` and `comfy.model_management`, as the nodes use them.

    Follows execution.py of Comfy-Org/ComfyUI at 04e2a914334246661a77665aa14068a0670e3321.
    """
    Bar.made = []
    host = SimpleNamespace(models=tmp_path, interrupted=False, made={})
    folders = {"upscale_models": ([tmp_path / "upscale_models"], {".pth", ".safetensors"})}
    folders["upscale_models"][0][0].mkdir()

    def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
        folders[folder_name] = ([Path(full_folder_path)], set())

    def get_filename_list(folder_name: str) -> list[str]:
        paths, suffixes = folders[folder_name]  # a KeyError for a folder that nobody registered
        files = [f for path in paths if path.is_dir() for f in path.iterdir()]
        return sorted(f.name for f in files if not suffixes or f.suffix in suffixes)

    def get_full_path(folder_name: str, filename: str) -> str | None:
        found = [path / filename for path in folders[folder_name][0] if (path / filename).is_file()]
        return str(found[0]) if found else None

    def throw_exception_if_processing_interrupted() -> None:
        if host.interrupted:
            host.interrupted = False
            raise Interrupted

    stand_in(
        monkeypatch,
        "folder_paths",
        models_dir=str(tmp_path),
        add_model_folder_path=add_model_folder_path,
        get_filename_list=get_filename_list,
        get_full_path=get_full_path,
    )
    stand_in(monkeypatch, "comfy")
    stand_in(monkeypatch, "comfy.utils", ProgressBar=Bar)
    stand_in(
        monkeypatch,
        "comfy.model_management",
        processing_interrupted=lambda: host.interrupted,
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
    )
    module = fresh(monkeypatch, "anysize.integrations.comfyui")
    host.nodes, host.names = module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS

    def execute(name: str, **inputs: Any) -> tuple[Any, ...]:
        """A node as `validate_inputs`, `get_input_data` and `_async_map_node_over_list` run it."""
        cls = host.nodes[name]
        cls.RELATIVE_PYTHON_MODULE = "custom_nodes.anysize"  # which the host sets
        required = cls.INPUT_TYPES()["required"]
        assert set(inputs) == set(required)
        for key, declared in required.items():
            assert isinstance(declared, tuple)
            kind = declared[0]
            if isinstance(kind, list):  # of which the user chooses
                assert inputs[key] in kind
            elif kind == "IMAGE":
                assert isinstance(inputs[key], torch.Tensor)
            else:  # an output of a node that declares this type
                assert any(type(inputs[key]) is type(made) for made in host.made.get(kind, ()))
        assert isinstance(cls.CATEGORY, str)
        assert isinstance(cls.RETURN_TYPES, tuple)
        with torch.inference_mode():
            results = getattr(cls(), cls.FUNCTION)(**inputs)
        assert isinstance(results, tuple)
        for kind, made in zip(cls.RETURN_TYPES, results, strict=True):
            assert isinstance(kind, str)
            assert (kind == "IMAGE") == isinstance(made, torch.Tensor)
            host.made.setdefault(kind, []).append(made)
        return results

    host.execute = execute
    return host


def webui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str = "SD.Next") -> Any:
    """`modules.shared` and `modules.upscaler`, and how both find and call an upscaler.

    Follows modules/upscaler.py of vladmandic/sdnext at 1cc7e7fad38f8d2b2bce21c9005bd6417a257daf and of
    AUTOMATIC1111/stable-diffusion-webui at 984b952eb30798ea478cb97b7ca79ff32196f4ce, and
    modules/modelloader.py of the latter at 8137bdba61fd57cc1ddae801f6080d51e13d70c5.
    """
    shared = SimpleNamespace(models_path=str(tmp_path), state=SimpleNamespace(interrupted=False))

    class Upscaler:
        name: Any = None
        model_path: Any = None
        user_path: Any = None
        scalers: Any = None

        def __init__(self, create_dirs: bool = False) -> None:
            self.scale = 1
            if self.model_path is None and self.name:
                self.model_path = str(tmp_path / self.name)

        def upscale(self, img: Any, scale: float, selected_model: str) -> Any:
            self.scale = scale
            step = 8 if kind == "AUTOMATIC1111" else 1
            width, height = (int(side * scale) // step * step for side in img.size)
            for _ in range(3):
                before = img.size
                img = self.do_upscale(img, selected_model)  # type: ignore[attr-defined]
                if img.size == before or (img.width >= width and img.height >= height):
                    break
            return img if img.size == (width, height) else img.resize((width, height))

    class UpscalerData:
        def __init__(
            self, name: str, path: str, upscaler: Any = None, scale: int = 4, model: Any = None
        ) -> None:
            assert isinstance(path, str)
            self.name, self.data_path, self.scaler, self.scale = name, path, upscaler, scale

    stand_in(monkeypatch, "modules", shared=shared)
    stand_in(monkeypatch, "modules.shared", **vars(shared))
    stand_in(monkeypatch, "modules.upscaler", Upscaler=Upscaler, UpscalerData=UpscalerData)
    fresh(monkeypatch, "anysize.integrations.webui")

    def scalers(dirname: str | None = None) -> list[Any]:
        """`load_upscalers`: the direct subclasses, made with one argument, without a try."""
        found = []
        for cls in Upscaler.__subclasses__():
            assert cls.__name__.startswith("Upscaler")
            scaler = cls(dirname)  # type: ignore[arg-type]
            assert scaler.scale == 1  # the base class's own was called
            scaler.user_path = dirname
            found += scaler.scalers or []
        return found

    def run(data: Any, img: Any, scale: float) -> Any:
        """Which of its data the host names the model by is where they differ."""
        chosen = data.name if kind == "SD.Next" else data.data_path
        return data.scaler.upscale(img, scale, chosen)

    return SimpleNamespace(scalers=scalers, run=run, shared=shared, models=tmp_path)
