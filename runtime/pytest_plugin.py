"""pytest's fixture `backend`: each installed engine that takes weights or ONNX files, in turn.

pytest loads this by its entry point.

    def test_my_model(backend):
        anysize.assert_parity("model.pth", backends=[backend], sizes=[(33, 65)], atol=1e-3)

No engine is imported before a test asks for it; a test's own `parametrize`, or a fixture of this name in a
`conftest.py`, goes first.
"""

from __future__ import annotations

import pytest

_FORMATS = {"module", "onnx"}


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Each installed engine's name in turn, for `anysize.load(..., backend=backend)`."""
    if not hasattr(request, "param"):
        pytest.fail("the fixture 'backend' takes turns: name it among the test's arguments", pytrace=False)
    return str(request.param)


@pytest.hookimpl(trylast=True)  # after pytest's own, which sees to `parametrize`
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    given = [mark.args[0] if mark.args else mark.kwargs["argnames"] for mark in marks]
    names = {name.strip() for one in given for name in (one.split(",") if isinstance(one, str) else one)}
    definitions = () if "backend" in names else metafunc._arg2fixturedefs.get("backend", ())
    if definitions and definitions[-1].func.__module__ == __name__:
        from anysize.backends import describe_backends

        found = [
            i.name for i in describe_backends() if i.problem is None and _FORMATS.intersection(i.formats)
        ]
        metafunc.parametrize("backend", found, indirect=True)
