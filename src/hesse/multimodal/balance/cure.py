"""A cure for starving modalities: one loss around a model with towers, and a hand on what flows back into each tower.

All of them are one thing: ``w_0 * fused + sum_m w_m * own_m`` with the gradients of the two changed where they meet, at
the features of modality m. A head and loss for each modality fixes the weights; G-Blend finds them by validation;
OGM-GE has no own losses and turns down the gradient of the fast; MMPareto turns the two gradients away from
each other where they disagree; PMR's own losses are distances to prototypes.

A cure is a module around the model. While it trains its outputs are those of the fused model, of each modality alone,
and who was present, side by side in one tensor, so that every optimiser, and curvature at the outputs, sees a plain
model and a plain loss. In eval mode it is the model: it answers, as networks with auxiliary heads do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FUSED", "Batch", "Cure", "CureLoss", "LossFn", "chosen", "rows"]

FUSED = "fused"  # the name of the fused output beside those of the modalities
MARK = "hesse.balance"  # on the node of the graph that made a cure's outputs

LossFn = Callable[[Any, Any], Tensor]
Batch = tuple[Mapping[str, Any], Any]


class Cure(nn.Module, ABC):
    """What all cures have in common: the passage through the model, the loss, and its weights.

    Args:
        model: with ``features(**inputs) -> {modality: [B, width]}`` and ``fuse(features, present) -> [B, outputs]``.
            Its inputs are pairs ``(data, present)``, present bool ``[B]``, by modality.
        outputs: of the model.
        widths: of each modality's features.

    Attributes:
        model: as it was given: it is what is evaluated and kept.
        weights: of the losses, ``[1 + modalities]``, the fused one first.

    Give the optimiser the cure (``cure.parameters()``, or ``cure`` itself to those that take a module), and train
    ``hesse.closure(cure, cure.loss(loss_fn), (inputs, targets))``. Call :meth:`begin_epoch` before each epoch. All
    that is remembered is in ``state_dict``.

    Rows in which a modality is absent take no part in its own loss, and none in what is measured of it.

    Raises:
        ValueError: fewer than two modalities, or not those of the model.
    """

    weights: Tensor

    def __init__(self, model: nn.Module, outputs: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(
                f"{type(self).__name__} balances two modalities or more; widths names {', '.join(widths) or 'none'}."
            )
        if FUSED in widths:
            raise ValueError(f"A modality may not be called {FUSED!r}: that is the name of what is made of all.")
        self.model = model
        self.outputs = outputs
        self.widths = dict(widths)
        self.register_buffer("weights", torch.ones(1 + len(widths)))
        self._meant: set[str] = set()  # modalities at whose features the gradient of the loss has yet to arrive

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.widths)

    @abstractmethod
    def own(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each modality says alone, ``[B, outputs]``, from its features ``[B, width]``."""

    def flow(self, key: str, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The features of a modality on their ways to the fusion and to its own output: twice the same.

        Cures that change gradients do so here, by hooks on the tensors, where :meth:`meant` says so.
        """
        return feature, feature

    def begin_epoch(self, loss_fn: LossFn, train: Iterable[Batch], valid: Iterable[Batch]) -> None:
        """Look at the model before an epoch; most cures need not.

        Args:
            loss_fn: of the fused outputs, as given to :meth:`loss`.
            train, valid: batches ``(inputs, targets)`` of rows that are, and are not, trained on.
        """

    def fit(self, loss_fn: LossFn, valid: Iterable[Batch]) -> dict[str, float]:
        """Find what the answer needs besides weights, on rows that are not trained on; most cures need nothing.

        Returns:
            The shares of the answer, by ``"fused"`` and modality.
        """
        return {FUSED: 1.0, **dict.fromkeys(self.modalities, 0.0)}

    def prepare(self, inputs: Any) -> Any:
        """As the model's own, if it has one: what no parameter takes part in is done once."""
        prepare = getattr(self.model, "prepare", None)
        return inputs if prepare is None else prepare(inputs)

    @property
    def answer_columns(self) -> slice:
        """Of the outputs in training, those of the fused model: for who watches."""
        return slice(0, self.outputs)

    @property
    def own_losses(self) -> tuple[str, ...]:
        """The modalities that have a loss of their own."""
        return tuple(key for key, weight in zip(self.modalities, self.weights[1:].tolist(), strict=True) if weight)

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Modules of the cure that are not on the way to the fused outputs, but in each modality's own."""
        return tuple(name for name, _ in self.named_children() if name != "model")

    @property
    def encoders(self) -> Any:
        """The model's towers."""
        return self.model.encoders

    def features(self, **inputs: tuple[Any, Tensor]) -> dict[str, Tensor]:
        """The model's, ``[B, width]`` by modality."""
        found: dict[str, Tensor] = self.model.features(**inputs)  # type: ignore[operator]
        return found

    def fuse(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The answer ``[B, outputs]`` from features: the model's, if a cure says nothing else."""
        answer: Tensor = self.model.fuse(features, present)  # type: ignore[operator]
        return answer

    def forward(self, **inputs: tuple[Any, Tensor]) -> Tensor:
        """In training :meth:`parts`, for :meth:`loss`; in eval mode the answer ``[B, outputs]``."""
        return self.parts(**inputs) if self.training else self.predict(**inputs)

    def predict(self, **inputs: tuple[Any, Tensor]) -> Tensor:
        """The answer ``[B, outputs]``, in either mode."""
        return self.fuse(self.features(**inputs), {key: inputs[key][1] for key in self.modalities})

    def parts(self, **inputs: tuple[Any, Tensor]) -> Tensor:
        """``[B, outputs * (1 + modalities) + modalities]``: fused, each modality's own, and 1 for those present."""
        self._meant.clear()
        present = {key: inputs[key][1] for key in self.modalities}
        features = self.features(**inputs)
        if features.keys() != self.widths.keys():
            raise ValueError(
                f"{type(self).__name__} was told of the modalities {', '.join(self.widths)}, and the model's features "
                f"are {', '.join(features)}. Name them as the model does."
            )
        ways = {key: self.flow(key, features[key]) for key in self.modalities}
        fused = self.model.fuse({key: way[0] for key, way in ways.items()}, present)  # type: ignore[operator]
        own = self.own({key: way[1] for key, way in ways.items()}, present)
        here = torch.stack([present[key] for key in self.modalities], dim=1)
        outputs = torch.cat([fused, *(own[key] for key in self.modalities), here.to(fused.dtype)], dim=1)
        if outputs.grad_fn is not None:
            _notes(outputs.grad_fn)[MARK] = True
        return outputs

    def split(self, outputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs ``[B, outputs]`` by name, ``"fused"`` first, and who is present, bool ``[B]``, by modality."""
        m = len(self.widths)
        parts = outputs[:, : outputs.shape[1] - m].chunk(1 + m, dim=1)
        here = outputs[:, -m:] > 0.5
        return dict(zip((FUSED, *self.widths), parts, strict=True)), dict(zip(self.widths, here.unbind(1), strict=True))

    def loss(self, loss_fn: LossFn, own: Mapping[str, LossFn] | None = None) -> CureLoss:
        """``w_0 * fused + sum_m w_m * own_m`` as a function of this cure's outputs and of targets.

        Each is a mean over all rows, to which those without a modality add nothing to its own.

        Args:
            loss_fn: of the model's outputs and of targets, a mean over rows.
            own: losses of single modalities that are not ``loss_fn``.
        """
        return CureLoss(self, loss_fn, own or {})

    def adapt(self, parts: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Any) -> None:
        """Set what depends on this batch. Once a step, at its start: trial points see the same loss."""

    def losses_of(self, loss_fn: LossFn, own: Mapping[str, LossFn]) -> Iterator[tuple[float, LossFn, str]]:
        """What the loss is the sum of: a factor, a loss, and whose outputs it is of, ``"fused"`` or a modality."""
        weights = self.weights.tolist()
        yield weights[0], loss_fn, FUSED
        for key, weight in zip(self.modalities, weights[1:], strict=True):
            yield weight, own.get(key, loss_fn), key

    @torch.no_grad()
    def losses(
        self, loss_fn: LossFn, batches: Iterable[Batch], own: Mapping[str, LossFn] | None = None
    ) -> dict[str, float]:
        """Mean losses over batches, in eval mode: ``"fused"``, and each modality's own over its rows."""
        was_training = self.training
        self.eval()
        sums, counts = dict.fromkeys((FUSED, *self.widths), 0.0), dict.fromkeys((FUSED, *self.widths), 0)
        for inputs, targets in batches:
            parts, present = self.split(self.parts(**inputs))
            everyone = torch.ones(len(parts[FUSED]), dtype=torch.bool, device=parts[FUSED].device)
            for key, here in {FUSED: everyone, **present}.items():
                if n := int(here.sum()):
                    sums[key] += n * float((own or {}).get(key, loss_fn)(*rows(here, parts[key], targets)))
                    counts[key] += n
        self.train(was_training)
        return {key: sums[key] / counts[key] if counts[key] else 0.0 for key in sums}

    def meant(self, key: str, done: bool = True) -> bool:
        """Whether the gradient at this modality's features is that of the loss, which comes once a step.

        Others sample curvature from the same graph: what they find has to be the plain model's, or a second-order step
        would divide by the very change that was made. ``done``: the next is one of those.
        """
        found = key in self._meant
        if done:
            self._meant.discard(key)
        return found

    def mean_it(self) -> None:
        """The next gradient at each modality's features is that of the loss."""
        self._meant = set(self.widths)


class CureLoss:
    """The loss of a cure. It says what it is the sum of, so that its curvature is known where theirs is.

    Args:
        cure, loss_fn, own: see :meth:`Cure.loss`.

    Attributes:
        fused: the loss of the fused outputs alone at the start of the first step: what others' losses compare with.
    """

    def __init__(self, cure: Cure, loss_fn: LossFn, own: Mapping[str, LossFn]) -> None:
        self.cure, self.loss_fn, self.own = cure, loss_fn, own
        self.fused: float | None = None
        self.__name__ = getattr(loss_fn, "__name__", type(loss_fn).__name__)

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        cure = self.cure
        if live := cure.training and outputs.requires_grad and torch.is_grad_enabled() and _made_by_cure(outputs):
            with torch.no_grad():
                cure.adapt(*cure.split(outputs), targets)
                if self.fused is None:
                    self.fused = float(self.loss_fn(outputs[:, cure.answer_columns], targets))
        value = outputs.new_zeros(())
        for factor, loss_fn, columns, places, actual in self.summands(outputs, targets):
            part = outputs[:, columns] if places is None else outputs[:, columns].index_select(0, places)
            value = value + factor * loss_fn(part, actual)
        if live:
            value.register_hook(lambda gradient: cure.mean_it())
        return value

    def summands(self, outputs: Tensor, targets: Any) -> Iterator[tuple[float, LossFn, slice, Tensor | None, Any]]:
        """``(factor, loss_fn, columns, rows, targets)`` of each loss: of ``outputs[rows, columns]`` and its targets."""
        cure = self.cure
        present = cure.split(outputs)[1]
        for factor, loss_fn, key in cure.losses_of(self.loss_fn, self.own):
            place = (FUSED, *cure.modalities).index(key) * cure.outputs
            columns = slice(place, place + cure.outputs)
            here = None if key == FUSED else present[key]
            if not factor or not (here is None or bool(here.any())):
                continue
            if here is None or bool(here.all()):
                yield factor, loss_fn, columns, None, targets
            else:
                # A mean over all rows: the loss of a batch is then that of its halves, on one process or on two.
                share = float(here.double().mean())
                yield share * factor, loss_fn, columns, here.nonzero()[:, 0], chosen(here, targets)


def rows(present: Tensor, outputs: Tensor, targets: Any) -> tuple[Tensor, Any]:
    """Outputs and targets of the rows that are present; targets are a tensor or a tuple of them."""
    return (outputs, targets) if bool(present.all()) else (outputs[present], chosen(present, targets))


def chosen(rows: Tensor, targets: Any) -> Any:
    """Of these rows, a tensor or several."""
    return type(targets)(t[rows] for t in targets) if isinstance(targets, tuple | list) else targets[rows]


def _made_by_cure(outputs: Tensor) -> bool:
    """Whether the graph of the outputs leads to a cure's own, and is not that of the loss alone."""
    stack: list[Any] = [outputs.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if MARK in _notes(node):
            return True
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    return False


def _notes(node: Any) -> dict[str, Any]:
    """What may be kept with a node of a graph, as long as the graph lives; torch's stubs take it for a method."""
    notes: dict[str, Any] = node.metadata
    return notes
