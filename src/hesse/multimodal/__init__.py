"""Tables of images, sounds, texts and columns: read, understood, made into tensors, and a model for them.

A table goes through three hands. :func:`read_table` makes columns of texts and numbers out of any file or
data frame; :func:`make_schema` finds out what each column is and keeps the numbers that encoding needs;
:func:`encode` makes the tensors, which :class:`FusedModel` takes, one encoder a modality and one head for
all.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("pyarrow") is None:
    raise ImportError("Reading tables needs pyarrow. Install it with: pip install 'hesse[train]'", name="pyarrow")

from hesse.multimodal.columns import Column
from hesse.multimodal.dataset import Dataset, encode
from hesse.multimodal.model import FusedModel
from hesse.multimodal.schema import Schema, make_schema
from hesse.multimodal.table import Table, read_table

__all__ = ["Column", "Dataset", "FusedModel", "Schema", "Table", "encode", "make_schema", "read_table"]
