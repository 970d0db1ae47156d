"""Texts to token ids of one fixed length, by a tokenizer of a backbone or by a small word list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unsc_plugin.errors import DataError

VOCABULARY = 8192
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def train_words(texts: Sequence[str], size: int = VOCABULARY) -> Any:
    """Return a `tokenizers.Tokenizer` of the `size` most frequent lower-case words and marks.

    Texts are split at white space and punctuation; [PAD] is 0, [UNK] 1, [CLS] 2, [SEP] 3. The same
    texts give the same numbers (ties in frequency go by the alphabet).

    >>> words = train_words(["Who wrote it?", "who did it"])
    >>> words.encode("who WROTE that").tokens
    ['[CLS]', 'who', 'wrote', '[UNK]', '[SEP]']
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, int64 (n, max_length), padded and truncated.

    `texts` is one column of texts or two (pairs). `tokenizer` is one of :func:`train_words` or a
    fast tokenizer of transformers.

    Raises:
        DataError: a tokenizer without a padding token.
    """
    if not texts[0]:
        empty = torch.zeros((0, max_length), dtype=torch.int64)
        return {"input_ids": empty, "attention_mask": empty.clone()}
    columns = [list(column) for column in texts]
    if hasattr(tokenizer, "encode_batch"):
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length)
        rows = tokenizer.encode_batch(
            columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        )
        ids, mask = [row.ids for row in rows], [row.attention_mask for row in rows]
    else:
        if tokenizer.pad_token_id is None:
            raise DataError(
                f"expected a tokenizer with a padding token, got {type(tokenizer).__name__} "
                "without one; set its pad_token"
            )
        rows = tokenizer(
            *columns,
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "attention_mask": torch.tensor(mask, dtype=torch.int64),
    }


def describe(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer says of its ids, as fields of `DataInfo`.

    Of the word list's own marks [UNK] stands for a word, so it is content and not special.
    """
    if hasattr(tokenizer, "encode_batch"):
        size, pad = int(tokenizer.get_vocab_size()), SPECIALS.index("[PAD]")
        special = [at for at, mark in enumerate(SPECIALS) if mark != "[UNK]"]
    else:
        size, pad = len(tokenizer), int(tokenizer.pad_token_id)
        special = sorted(set(map(int, tokenizer.all_special_ids)))
    return {"vocab_size": size, "pad_token_id": pad, "special_token_ids": tuple(special)}
