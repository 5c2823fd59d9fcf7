"""The callback in a real trainer of Lightning, where that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's own


class Net(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        parts = [part for _ in range(10) for part in (nn.Linear(8, 8), act())]
        self.net = nn.Sequential(*parts, nn.Linear(8, 2))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_losses_and_findings_arrive(tmp_path: Path, accumulate: int) -> None:
    from hesse.health.lightning import Watch

    torch.manual_seed(0)
    x = torch.randn(640, 8)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)
    callback = Watch(every=5)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    trainer.fit(Net(nn.Sigmoid), data)
    assert callback.monitor is not None
    assert callback.monitor.steps == 20 // accumulate
    assert callback.monitor.records[-1]["loss"] is not None
    assert {f.kind for f in callback.report().findings} == {"vanishing"}
    again = Watch()
    again.load_state_dict(callback.state_dict())
    assert again.state_dict()["steps"] == 20 // accumulate
