"""Adapters of peft behind the interface of text policies."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", exc_type=ImportError)
    import transformers
    from po_bilevel.language.causal import logits
    from po_bilevel.language.huggingface import HuggingFaceModel

    from .models import WORDS, saved_model

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(folder, **options):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_model(folder))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def test_lora(tmp_path):
    model = adapted(tmp_path, target_modules=["q_proj", "v_proj", "down_proj"])
    ours = HuggingFaceModel(model)
    ids = torch.randint(len(WORDS), (2, 5))
    found = logits(ours(ids, torch.ones_like(ids, dtype=torch.bool)), ours.head())
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (found - model(input_ids=ids).logits).abs().max() > 0.01
    trained = [x for x in ours.parameters() if x.requires_grad]
    assert all(x.abs().max() > 0 for x in torch.autograd.grad(found.square().sum(), trained))
    assert len(trained) < len(list(ours.parameters()))


def test_an_adapter_of_the_head_is_refused(tmp_path):
    model = adapted(tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"expected a head that is a torch.nn.Linear, got peft\..*Linear"):
        HuggingFaceModel(model)


def test_a_prompt_that_is_learned_is_refused(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_model(tmp_path))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="are others than those of its hidden states and head"):
        HuggingFaceModel(peft.get_peft_model(model, config))
