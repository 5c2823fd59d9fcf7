"""How the features of several modalities become one answer; one file a way."""

from hesse.multimodal.fusion.bottleneck import Bottleneck
from hesse.multimodal.fusion.concatenate import Concatenate
from hesse.multimodal.fusion.gated import Gated
from hesse.multimodal.fusion.late import Late
from hesse.multimodal.fusion.low_rank import LowRank

__all__ = ["FUSIONS", "Bottleneck", "Concatenate", "Gated", "Late", "LowRank"]

FUSIONS = ("concat", "gated", "bottleneck", "tensor", "late")
"""The ways by name, as ``--fusion`` and ``FusedModel`` take them."""
