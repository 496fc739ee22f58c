"""Models and tokenizers of transformers behind the interface that policies of texts have."""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import optional
from .causal import CausalModel, Head, logits, positions

# What models of transformers multiply their logits by, by the name that their configuration has it under. Granite and
# its kin divide by `logits_scaling`, HyperCLOVA X multiplies by it.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class HuggingFaceModel(CausalModel):
    """A causal language model of transformers, also one that peft put adapters into.

    Logits are never made: hidden states come from the decoder below the head, and the head is read as parameters. That
    this is the same policy is checked once, on two tokens with padding on either side.

    Args:
        model: a `transformers.PreTrainedModel` with a language-modelling head, or a `peft.PeftModel` of one.

    Raises:
        MissingDependencyError: without the extra `text`.
        TypeError: something else than such a model.
        ValueError: an encoder-decoder, a head that is not exactly a `torch.nn.Linear` (quantised, or with an adapter),
            or a model whose own logits are others than those of its hidden states and head.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = HuggingFaceModel(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)))
        >>> model(torch.tensor([[3, 4]]), torch.tensor([[True, True]])).shape
        torch.Size([1, 2, 16])
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        transformers = optional.require("transformers", "text")
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(inner, transformers.PreTrainedModel):
            raise TypeError(
                f"HuggingFaceModel: model: expected a transformers.PreTrainedModel, or a peft.PeftModel of one, got "
                f"{type(model).__name__}"
            )
        name = type(inner).__name__
        if inner.config.is_encoder_decoder:
            raise ValueError(f"HuggingFaceModel: model: expected a decoder, got {name}, an encoder and decoder")
        if inner.base_model is inner or inner.get_output_embeddings() is None:
            raise ValueError(f"HuggingFaceModel: model: expected one with a language-modelling head, got {name}")
        self.model = model
        self.config: Any = inner.config.get_text_config()
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        accepted = inspect.signature(inner.base_model.forward).parameters
        self._has_positions = "position_ids" in accepted
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.head()
        self._check_logits(name)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `CausalModel.forward`."""
        return self._decoded(ids, mask, use_cache=False).last_hidden_state

    def extend(self, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """See `CausalModel.extend`."""
        found = self._decoded(ids, mask, use_cache=True, **{self._cache_name: cache})
        return found.last_hidden_state, found[self._cache_name]

    def repeated(self, cache: Any, times: int) -> Any:
        """See `CausalModel.repeated`."""
        cache.batch_repeat_interleave(times)
        return cache

    def head(self) -> Head:
        """See `CausalModel.head`."""
        output = self._inner.get_output_embeddings()
        if type(output) is not nn.Linear:
            raise ValueError(
                f"HuggingFaceModel: model: expected a head that is a torch.nn.Linear, got "
                f"{type(output).__module__}.{type(output).__qualname__}: its adapter or quantisation would be left out"
            )
        return Head(output.weight, output.bias, *head_scale(self.config))

    @property
    def _inner(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _decoded(self, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        if self._has_positions:
            options["position_ids"] = positions(mask)[:, -ids.shape[1] :]
        with contextlib.ExitStack() as stack:
            if any(forward_ad.unpack_dual(x).tangent is not None for x in self.parameters()):
                # The fused kernels have no derivative in forward mode.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            embedding = self._inner.get_input_embeddings()
            if getattr(embedding, "padding_idx", None) is not None:
                # It would drop the gradient of that token also where a text has it, as many have their end in prompts.
                stack.callback(setattr, embedding, "padding_idx", embedding.padding_idx)
                embedding.padding_idx = None
            return self._inner.base_model(input_ids=ids, attention_mask=mask.long(), **options)

    @torch.no_grad()
    def _check_logits(self, name: str) -> None:
        device = self.head().weight.device
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            two = torch.tensor([[0, 1]], device=device) % self.config.vocab_size
            expected = self.model(input_ids=two, use_cache=False).logits
            mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], device=device).bool()
            found = logits(self(two.repeat(2, 2), mask), self.head())[mask].view(2, 2, -1)
        finally:
            for module, before in training.items():
                module.training = before
        # Other kernels serve other masks: what is left of two sums of the same terms is half of the digits at least.
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        same = expected.shape[1:] == found.shape[1:]
        error = float(((found - expected) / scale).abs().max()) if same else float("inf")
        if not error <= torch.finfo(expected.dtype).eps ** 0.5:
            raise ValueError(
                f"HuggingFaceModel: model: the logits of {name} are others than those of its hidden states and head, "
                f"by {error:.2g} of the largest: it does more than this interface has, and would be another policy"
            )


def head_scale(config: Any) -> tuple[float, float | None]:
    """The scale and the softcap that the configuration of a text model has between its head and its logits."""
    scale = next((x for x in (getattr(config, name, None) for name in _FACTORS) if isinstance(x, (int, float))), 1.0)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return float(scale), getattr(config, "final_logit_softcapping", None)


class HuggingFaceTokenizer:
    """A tokenizer of transformers as policies of texts call one: no token is added, and special ones are left out.

    Args:
        tokenizer: a `transformers.PreTrainedTokenizerBase` with an end-of-text token.

    Attributes:
        end: the id of that token.

    Raises:
        MissingDependencyError: without the extra `text`.
        TypeError, ValueError: something else, or a tokenizer without an end-of-text token.

    Example:
        >>> import tokenizers, transformers
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="no"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
        >>> HuggingFaceTokenizer(tokenizer).encode("yes")
        [1]
    """

    def __init__(self, tokenizer: Any) -> None:
        transformers = optional.require("transformers", "text")
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise TypeError(
                f"HuggingFaceTokenizer: tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "HuggingFaceTokenizer: tokenizer: expected one with an eos_token, got None: nothing would end a text"
            )
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """The ids of the tokens of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(
            [int(each) for each in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
