"""The house keeps its shape: arrows only fall, and ``import hesse`` needs torch and numpy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hesse

ROOT = Path(__file__).parent.parent
EXTRA = ("pyarrow", "PIL", "sklearn", "soundfile", "safetensors", "typer", "rich", "jinja2", "plotly")


def run(program: str) -> str:
    """What a program prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_arrows_only_fall() -> None:
    run("import sys, importlinter.cli as linter; sys.exit(linter.lint_imports(no_cache=True))")


def test_import_hesse_waits_for_nothing() -> None:
    loaded = run("import sys, hesse; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert not {"torch", "numpy", *EXTRA} & set(loaded)


def test_closure_optimizer_check_and_watch_need_torch_and_numpy_alone() -> None:
    run(
        "import sys, torch, numpy, torch.func, torch.nn.attention\n"
        f"sys.modules.update(dict.fromkeys({EXTRA!r}))\n"  # None: an import of it fails
        "before = set(sys.modules)\n"
        "import hesse\n"
        "hesse.closure, hesse.optim.KFAC, hesse.check, hesse.watch, hesse.curvature, hesse.Finding\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert loaded <= {'hesse', 'torch', 'numpy'}, loaded\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = hesse.optim.KFAC(model)\n"
        "batch = torch.ones(4, 2), torch.ones(4, 1)\n"
        "with hesse.watch(model):\n"
        "    optimizer.step(hesse.closure(model, torch.nn.functional.mse_loss, batch))\n"
        "assert hesse.check.gradients(model, batch[0]).ok\n"
    )


def test_every_public_name_is_there() -> None:
    assert set(hesse.__all__) <= set(dir(hesse))
    assert all(getattr(hesse, name) is not None for name in hesse.__all__)
    with pytest.raises(AttributeError, match="'hesse' has no attribute 'nothing'"):
        hesse.nothing  # noqa: B018
