"""Texts: files of them, prompts with their answers, and the tokens that they are made of."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import UsageError
from ..optional import require
from .policy import Tokens

# The token that `BytePairTokenizer` ends a text with.
END = "<|end|>"


class Tokenizer(Protocol):
    """What is asked of a tokenizer.

    Attributes:
        end: the token that ends a text.

    Example:
        >>> class Bytes:
        ...     end = 256
        ...
        ...     def encode(self, text):
        ...         return list(text.encode())
        ...
        ...     def decode(self, ids):
        ...         return bytes(each for each in ids if each != self.end).decode(errors="replace")
        >>> tokenizer: Tokenizer = Bytes()
        >>> answer_tokens(tokenizer, ["no", "yes"]).ids
        tensor([[110, 111, 256,   0],
                [121, 101, 115, 256]])
    """

    end: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, no special ones among them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""


class BytePairTokenizer:
    """Byte-level byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909), by the package `tokenizers`.

    Args:
        tokenizer: of that package.

    Attributes:
        end: the token that ends a text.
        vocabulary: V.

    Example:
        >>> tokenizer = BytePairTokenizer.train(["the cat", "the dog"], vocabulary=260)
        >>> tokenizer.decode(tokenizer.encode("a dog"))
        'a dog'
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end: int = tokenizer.token_to_id(END)
        self.vocabulary: int = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> "BytePairTokenizer":
        """One whose pairs are those of texts.

        Raises:
            MissingDependencyError: tokenizers is not installed.
            ValueError: a vocabulary that does not hold the 256 bytes and the end.
        """
        if vocabulary < 257:
            raise ValueError(f"BytePairTokenizer: vocabulary: expected at least 257 tokens, got {vocabulary}")
        tokenizers = require("tokenizers", "text")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`; an end that a text spells out is left out."""
        return [token for token in self._tokenizer.encode(text, add_special_tokens=False).ids if token != self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class Pairs(NamedTuple):
    """Prompts, and one or more answers of each.

    Attributes:
        prompts: all different.
        answers: of each prompt at least one; the same answer may be there several times.
    """

    prompts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> "Pairs":
        """Prompts in the order in which they come first, with all their answers.

        Raises:
            ValueError: there are none, or an answer is empty.

        Example:
            >>> from po_bilevel.language import Pairs
            >>> Pairs.of([("1+1=", "2"), ("capital of France?", "Paris"), ("1+1=", "two")]).answers
            (('2', 'two'), ('Paris',))
        """
        found: dict[str, list[str]] = {}
        for number, (prompt, answer) in enumerate(pairs):
            if not answer:
                raise ValueError(f"Pairs: pair {number}: expected an answer, got an empty one")
            found.setdefault(prompt, []).append(answer)
        if not found:
            raise ValueError("Pairs: expected at least one pair, got none")
        return cls(tuple(found), tuple(map(tuple, found.values())))

    @property
    def number(self) -> int:
        """How many pairs."""
        return sum(map(len, self.answers))

    def each(self) -> list[tuple[str, str]]:
        """All pairs."""
        return [(prompt, answer) for prompt, all_of in zip(*self, strict=True) for answer in all_of]


def read_text(path: Path) -> str:
    """A file of text, without the mark of UTF-8 that some editors begin it with.

    Raises:
        UsageError: it cannot be read, is empty, or is not UTF-8: names the line.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "text"
        >>> size = path.write_text("Once upon a time")
        >>> read_text(path)
        'Once upon a time'
    """
    try:
        raw = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"{path}: expected a file of text, got {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: expected UTF-8 text, got byte {raw[error.start]:#04x} in line {line}") from None
    if not text.strip():
        raise UsageError(f"{path}: expected a text, got an empty file")
    return text


def read_pairs(path: Path) -> Pairs:
    """A file of lines such as {"prompt": "...", "answer": "..."}; empty lines are passed over.

    Raises:
        UsageError: as `read_text`; a line that is no such object of text, or whose answer is empty: names it.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> size = path.write_text('{"prompt": "1+1=", "answer": "2"}')
        >>> read_pairs(path)
        Pairs(prompts=('1+1=',), answers=(('2',),))
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError) as error:  # longer integers than Python reads, brackets without end
            raise UsageError(f"{path}, line {number}: expected JSON, got {line[:60]!r}: {error}") from None
        prompt, answer = (pair.get(key) if isinstance(pair, dict) else None for key in ("prompt", "answer"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise UsageError(f'{path}, line {number}: expected {{"prompt": text, "answer": text}}, got {line[:60]!r}')
        if not answer:
            raise UsageError(f"{path}, line {number}: expected an answer, got an empty one")
        if re.search("[\ud800-\udfff]", prompt + answer):
            raise UsageError(f"{path}, line {number}: expected text, got half of a surrogate pair in {line[:60]!r}")
        found.append((prompt, answer))
    return Pairs.of(found)


def prompt_tokens(tokenizer: Tokenizer, prompts: Sequence[str], device: Any = None) -> Tokens:
    """Prompts padded on the left; an empty one is the token that ends the text before.

    Example:
        >>> tokenizer = BytePairTokenizer.train(["no", "yes"], vocabulary=257)
        >>> prompt_tokens(tokenizer, ["no", "yes"]).mask
        tensor([[False,  True,  True],
                [ True,  True,  True]])
    """
    return Tokens.padded([tokenizer.encode(text) or [tokenizer.end] for text in prompts], left=True, device=device)


def answer_tokens(tokenizer: Tokenizer, answers: Sequence[str], device: Any = None) -> Tokens:
    """Answers padded on the right, each with its end.

    Example:
        >>> tokenizer = BytePairTokenizer.train(["no", "yes"], vocabulary=257)
        >>> answer_tokens(tokenizer, ["no", "yes"]).mask
        tensor([[ True,  True,  True, False],
                [ True,  True,  True,  True]])
    """
    return Tokens.padded([[*tokenizer.encode(text), tokenizer.end] for text in answers], device=device)
