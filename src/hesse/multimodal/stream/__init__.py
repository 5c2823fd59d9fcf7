"""Tables larger than memory: read in pieces, shuffled by the piece and a buffer, decoded by workers ahead of the loop.

:func:`open_source` finds the pieces of a file, a folder or a data frame; :func:`divide` says which rows train;
:class:`Loader` deals them in batches, in an order that the seed and the epoch decide.
"""

from __future__ import annotations

from hesse.multimodal.stream.divide import Division, divide
from hesse.multimodal.stream.loader import Decoded, Loader, usual_workers
from hesse.multimodal.stream.source import Source, open_source
from hesse.multimodal.stream.tolerant import read_what_can_be

__all__ = ["Decoded", "Division", "Loader", "Source", "divide", "open_source", "read_what_can_be", "usual_workers"]
