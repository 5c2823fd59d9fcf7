"""What is said when one modality answers alone."""

from __future__ import annotations

from hesse.finding import Finding
from hesse.multimodal.balance.pool import Pool

__all__ = ["fallback"]


def fallback(pool: Pool) -> Finding | None:
    """The finding, if the pool has fallen back to its best single modality; ``where`` is its name.

    ``evidence`` has the validation losses of that modality alone and of all together, and the standard error of their
    difference.
    """
    if int(pool.alone) < 0:
        return None
    key = pool.modalities[int(pool.alone)]
    alone, together, error = pool.verdict.tolist()
    return Finding(
        "fallback",
        key,
        f"On validation rows all together (loss {together:.3g}) are not better than {key} alone ({alone:.3g}) "
        f"by more than chance (standard error {error:.2g}): {key} answers alone, and the others are not asked.",
        "If the others should help, see whether they differ between training and validation rows (speakers, cameras, "
        "places), and gather more rows of different ones; if not, leave them out.",
        value=together,
        limit=alone,
        evidence={"alone": alone, "together": together, "standard error": error},
    )
