"""Cures for modalities that starve: around any model with towers, for any optimiser.

Where one modality is learnt quickly it takes the loss away, and with it what drives the others. Each cure is one file;
:mod:`.cure` is what they have in common.
"""

from __future__ import annotations

from hesse.multimodal.balance.cure import Cure
from hesse.multimodal.balance.fallback import fallback
from hesse.multimodal.balance.gblend import GBlend
from hesse.multimodal.balance.heads import Heads
from hesse.multimodal.balance.mmpareto import MMPareto
from hesse.multimodal.balance.ogm_ge import OGMGE
from hesse.multimodal.balance.pmr import PMR
from hesse.multimodal.balance.pool import Pool

CURES: dict[str, type[Cure]] = {
    "pool": Pool,
    "heads": Heads,
    "gblend": GBlend,
    "ogm-ge": OGMGE,
    "mmpareto": MMPareto,
    "pmr": PMR,
}

__all__ = ["CURES", "OGMGE", "PMR", "Cure", "GBlend", "Heads", "MMPareto", "Pool", "fallback"]
