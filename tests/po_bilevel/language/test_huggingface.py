"""Models of transformers, small and random, against their own logits."""

import subprocess
import sys

import pytest
import torch
from po_bilevel.language import HuggingFaceModel, HuggingFaceTokenizer
from po_bilevel.language.causal import logits
from torch import nn
from torch.autograd import forward_ad

import po_kernels as pk

transformers = pytest.importorskip("transformers")

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.05, sliding_window=16),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": lambda: transformers.CohereConfig(
        **{name: x for name, x in SIZES.items() if name != "head_dim"}, logit_scale=0.25
    ),
    "phi": lambda: transformers.PhiConfig(**{name: x for name, x in SIZES.items() if name != "head_dim"}),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
}


def random_model(name="llama"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also biases, which start at 0
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(request.param)


def padded(rows, side):
    length = max(map(len, rows)) + 2
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, place], mask[number, place] = torch.tensor(row), True
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_the_models_own_whatever_the_padding(model, side):
    rows = [[5, 9, 3, 7, 11], [4, 6], [8]]
    ours = HuggingFaceModel(model)
    ids, mask = padded(rows, side)
    found = logits(ours(ids, mask), ours.head())
    for row, here, each in zip(rows, mask, found, strict=True):
        own = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(each[here], own, rtol=1e-4, atol=1e-5)


def test_tokens_after_a_cache_are_as_without(model):
    ours = HuggingFaceModel(model)
    ids, mask = padded([[5, 9, 3], [4]], "left")
    new = torch.randint(3, VOCABULARY, (4, 3))
    _, cache = ours.extend(ids, mask)
    cache = ours.repeated(cache, 2)
    ids, mask = (x.repeat_interleave(2, dim=0) for x in (ids, mask))
    for step in range(3):
        ids = torch.cat([ids, new[:, step : step + 1]], dim=1)
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.bool)], dim=1)
        hidden, cache = ours.extend(ids[:, -1:], mask, cache)
        torch.testing.assert_close(hidden, ours(ids, mask)[:, -1:], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_models_own_log_probabilities(model):
    ours = HuggingFaceModel(model)
    ids = torch.randint(3, VOCABULARY, (3, 6))
    taken = ids[:, 1:]
    own = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, taken[..., None]).sum()
    head = ours.head()
    hidden = head.scale * ours(ids, torch.ones_like(ids, dtype=torch.bool))[:, :-1]
    bias = None if head.bias is None else head.scale * head.bias
    found = pk.linear_token_log_prob(hidden, head.weight, taken, bias=bias, softcap=head.softcap).log_prob.sum()
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected, got = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (own, found))
    for name, x, y in zip(names, expected, got, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bloom"])  # whose activation has none
def test_derivatives_in_forward_mode(name):
    ours = HuggingFaceModel(random_model(name))
    ids, mask = padded([[5, 9, 3], [4]], "left")
    theta = {name: x.detach() for name, x in ours.named_parameters()}
    v = {name: 0.3 * torch.randn_like(x) for name, x in theta.items()}

    def hidden(step):
        moved = {name: x + step * v[name] for name, x in theta.items()}
        return torch.func.functional_call(ours, moved, (ids, mask))[mask]

    _, found = torch.func.jvp(hidden, (torch.tensor(0.0),), (torch.tensor(1.0),))
    with torch.no_grad():
        expected = (hidden(1e-3) - hidden(-1e-3)) / 2e-3
    # The rounding of float32 over the step, and the third derivative times the step's square.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_the_padding_token_has_a_gradient_where_a_text_has_it():
    model = random_model("qwen3")
    table = model.get_input_embeddings()
    assert table.padding_idx == 0
    ours = HuggingFaceModel(model)
    ids, mask = torch.tensor([[0, 5, 0, 0]]), torch.tensor([[False, True, True, False]])
    hidden = ours(ids, mask)[mask]
    cotangent, v = torch.randn_like(hidden), torch.zeros_like(table.weight)
    v[0] = torch.randn(len(v[0]))
    gradient = torch.autograd.grad(hidden, table.weight, cotangent)[0]
    assert table.padding_idx == 0
    name = next(name for name, x in ours.named_parameters() if x is table.weight)
    with forward_ad.dual_level(), torch.no_grad():
        moved = {name: forward_ad.make_dual(table.weight.detach(), v)}
        tangent = forward_ad.unpack_dual(torch.func.functional_call(ours, moved, (ids, mask))[mask]).tangent
    assert (gradient * v).sum().abs() > 0.1
    torch.testing.assert_close((gradient * v).sum(), (tangent * cotangent).sum(), rtol=1e-5, atol=1e-5)


def test_the_context_is_the_configurations():
    assert HuggingFaceModel(random_model()).context == 32
    assert HuggingFaceModel(random_model("gpt2")).context == 32
    assert HuggingFaceModel(random_model("bloom")).context is None


def test_the_check_leaves_training_as_it_was():
    model = random_model("gpt2").train()
    model.transformer.h[0].eval()
    HuggingFaceModel(model)
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].training


def test_half_precision_passes_the_check():
    assert HuggingFaceModel(random_model("gemma2").bfloat16()).head().weight.dtype == torch.bfloat16


def test_nan_is_refused():
    """Here of transformers: in float64 its masks underflow in Gemma's softmax, which is in float32."""
    with pytest.raises(ValueError, match="by nan of the largest"):
        HuggingFaceModel(random_model("gemma2").double())


def test_what_is_no_such_model_is_refused():
    with pytest.raises(TypeError, match=r"HuggingFaceModel: model: expected a transformers.PreTrainedModel"):
        HuggingFaceModel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="language-modelling head, got LlamaModel"):
        HuggingFaceModel(random_model().model)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="expected a decoder, got T5ForConditionalGeneration"):
        HuggingFaceModel(transformers.T5ForConditionalGeneration(config))


def test_another_head_than_a_linear_layer_is_refused():
    class Adapted(nn.Linear):
        pass

    model = random_model("qwen3")
    model.lm_head = Adapted(16, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"expected a head that is a torch.nn.Linear, got .*Adapted"):
        HuggingFaceModel(model)


def test_a_model_that_does_more_to_its_logits_is_refused():
    class Warmer(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = 1.01 * found.logits
            return found

    with pytest.raises(ValueError, match="the logits of Warmer are others than those of its hidden states"):
        HuggingFaceModel(Warmer(CONFIGS["llama"]()))


def tokenizer(**special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "rose": 4, "is": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_nothing_is_imported_unasked():
    code = (
        "import sys, po_bilevel, po_bilevel.language.huggingface, po_bilevel.integrations\n"
        "print({'transformers', 'trl', 'verl', 'peft'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_texts_and_tokens():
    ours = HuggingFaceTokenizer(tokenizer(unk_token="<unk>", bos_token="<s>", eos_token="</s>"))
    assert ours.end == 2
    assert ours.encode("a rose is a rose") == [3, 4, 5, 3, 4]
    assert ours.decode(torch.tensor([1, 3, 4, 2])) == "a rose"


def test_tokenizers_that_are_refused():
    with pytest.raises(ValueError, match="expected one with an eos_token"):
        HuggingFaceTokenizer(tokenizer(unk_token="<unk>"))
    with pytest.raises(TypeError, match="expected a tokenizer of transformers, got str"):
        HuggingFaceTokenizer("gpt2")
