"""Tiny random checkpoints of transformers, saved as those of the hub are: for tests of pretrained encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["save_audio", "save_image", "save_text"]

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def save_image(folder: Path, seed: int = 0) -> Path:
    """A vision transformer for pictures of 16 x 16 pixels."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(seed)
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_text(folder: Path, seed: int = 0) -> Path:
    """BERT with a vocabulary of letters as WordPieces."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **SMALL)
    BertModel(config).save_pretrained(folder)  # with the pooler of its pretraining
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


def save_audio(folder: Path, seed: int = 0, *, masked: bool = False) -> Path:
    """Wav2Vec2 for sounds at 8 kHz, of which the variant with layer norms is told where a sound ends."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        feat_extract_norm="layer" if masked else "group",
        do_stable_layer_norm=masked,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **SMALL,
    )
    torch.manual_seed(seed)
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=masked).save_pretrained(folder)
    return folder
