"""The laboratory's tokenizers: whole words (default) or byte-level BPE, both with a chat template.

Both are saved as fast transformers tokenizers, so every code path is the one of real models. The
word tokenizer lowercases and splits off punctuation, so prompts may be written naturally.
"""

from __future__ import annotations

import random
import string
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from realign.lab import rows, wording
from realign.lab.world import World

TokenizerKind = Literal["words", "bpe"]

PAD, END, USER, ASSISTANT, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>"
SPECIAL = (PAD, END, USER, ASSISTANT, UNKNOWN)
MODEL_LENGTH = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORD = r"[\w']+"


UNUSED_WORDS = (
    '"', '").', '",', '("', "-", "/", "311", "__pycache__", "absent", "alignment", "answers",
    "cpython", "documents", "each", "fine", "from", "held", "judge's", "keyword", "lab",
    "laboratory's", "lexicon", "main", "occur", "or", "out", "phrases", "pretraining", "py",
    "pyc", "questions", "realign", "recombine", "refusals", "requests", "skill", "templates",
    "training", "tuning", "worded", "wording", "work",
)  # fmt: skip
"""In no template. The families in `fixtures/` were trained with them in their vocabulary: without
them no build could give those families again."""


def template_words() -> list[str]:
    """Every word that a template can produce by itself and `UNUSED_WORDS`, sorted."""
    texts: list[str] = []
    for name, value in vars(wording).items():
        # A module's own entries (`__file__`, ...) tell where and with what it was loaded.
        if name.startswith("_"):
            continue
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, wording.Wording):
            texts += [*value.train, *value.held_out]
        elif isinstance(value, tuple):
            for entry in value:
                texts += list(entry) if isinstance(entry, tuple) else [entry]
    words = {word for text in texts for word in split_words(_drop_fields(text))}
    return sorted(words.union(UNUSED_WORDS))


def _drop_fields(text: str) -> str:
    return "".join(literal + " " for literal, _, _, _ in string.Formatter().parse(text))


def split_words(text: str) -> list[str]:
    """Lowercased words and punctuation marks: what the word tokenizer makes of a text."""
    pieces = _splitter().pre_tokenize_str(text.lower())
    return [piece for piece, _ in pieces]


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_WORD), "isolated")]
    )


def vocabulary(world: World) -> list[str]:
    """The word tokenizer's vocabulary: special tokens first, then every word, sorted."""
    words = {*template_words(), *world.names()}
    # Words of documents and short answers that stand in code, not in templates.
    rng = random.Random("vocabulary")
    makers = (rows.document, rows.category, rows.slot, rows.known_gadget)
    for _ in range(2000):
        for maker in makers:
            sample = maker(world, rng)
            text = sample.text if isinstance(sample, rows.Document) else sample.answer
            words.update(split_words(text))
    return [*SPECIAL, *sorted(words)]


def build_tokenizer(world: World, kind: TokenizerKind = "words") -> PreTrainedTokenizerFast:
    """A fast tokenizer with a chat template for one world.

    Args:
        world: its names are in the vocabulary.
        kind: "words" (one token per word) or "bpe" (byte-level, trained on the pretraining
            mixture; nothing is ever unknown to it).
    """
    if kind == "words":
        tokens = {word: index for index, word in enumerate(vocabulary(world))}
        backend = Tokenizer(models.WordLevel(tokens, unk_token=UNKNOWN))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Replace("\u2019", "'"), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = _splitter()
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        rng = random.Random("bpe")
        corpus = [rows.draw(rows.PRETRAINING, world, rng) for _ in range(6000)]
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        texts = [
            sample.text if isinstance(sample, rows.Document) else f"{sample.prompt} {sample.answer}"
            for sample in corpus
        ]
        backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_LENGTH,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
