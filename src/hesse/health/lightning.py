"""The monitor as a callback of Lightning's trainer.

    trainer = Trainer(callbacks=[hesse.health.lightning.Watch()])

Accelerate needs none: ``with hesse.watch(model):`` around the loop sees the steps of its wrapped optimizers.
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("hesse.health.lightning needs Lightning: pip install lightning", name="lightning") from error

from hesse.health.monitor import HealthReport, Monitor, watch

__all__ = ["Watch"]


class Watch(Callback):  # type: ignore[misc]
    """Watches ``trainer.fit``; numbers and findings go to TensorBoard too, where that is the trainer's logger.

    Args:
        settings: those of :func:`hesse.watch`.

    Attributes:
        monitor: as :func:`hesse.watch` returns it, once training has begun.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.monitor: Monitor | None = None
        self._saved: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        writer = getattr(trainer.logger, "experiment", None)
        settings = {"writer": writer, **self.settings} if hasattr(writer, "add_scalar") else self.settings
        self.monitor = watch(pl_module, **settings)
        if self._saved:
            self.monitor.load_state_dict(self._saved)
        self.monitor.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None and self.monitor is not None:
            self.monitor.tell(loss)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def report(self) -> HealthReport:
        """What was found so far."""
        if self.monitor is None:
            raise RuntimeError("There is nothing to report before trainer.fit() has begun.")
        return self.monitor.report()

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict() if self.monitor is not None else self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _end(self) -> None:
        if self.monitor is not None:
            self.monitor.__exit__(None, None, None)
