"""How the features of several modalities become one answer; one file a way."""

from hesse.multimodal.fusion.concatenate import Concatenate

__all__ = ["Concatenate"]
