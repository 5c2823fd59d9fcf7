"""A fixture for tests of your own models; pytest finds it where hesse is installed.

    def test_my_layer(assert_gradients):
        assert_gradients(MyLayer(), torch.randn(4, 8))

fails with the report as its message: which module, function and line is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hesse.check import Report

__all__ = ["assert_gradients"]


@pytest.fixture(scope="session")  # it holds nothing, and so goes with hypothesis
def assert_gradients() -> Callable[..., Report]:
    """``assert_gradients(model, inputs)`` takes what :func:`hesse.check.gradients` takes, and ``second_order=True``."""

    def check(model: Any, inputs: Any = None, *, second_order: bool = False, **settings: Any) -> Report:
        __tracebackhide__ = True
        import hesse  # torch is loaded by those tests only that use it

        report = hesse.check.gradients(model, inputs, **settings)
        if second_order and report.ok:
            settings.pop("parts", None)
            report = hesse.check.hessian(model, inputs, **settings)
        if not report.ok:
            pytest.fail(str(report))
        return report

    return check
