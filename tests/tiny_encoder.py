"""A tiny encoder of text, as Hugging Face or sentence-transformers lay one out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BertModel

LONGEST = 24
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
WORDS += ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")


def save_bert(folder: Path, *, pooling: str | None = None) -> BertModel:
    """A tiny random BERT with a tokenizer of words, as sentence-transformers lays it out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=LONGEST,
    )
    torch.manual_seed(0)
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, specials)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    if pooling is not None:
        modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
        listed = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in modules]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        flags = {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True}
        flags["pooling_mode_max_tokens"] = False
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return model
