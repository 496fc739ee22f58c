"""A tokenizer of words, small random models of transformers, and texts, made here: nothing is loaded from a hub."""

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrst"]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def saved_model(folder, kind="llama", **options):
    """Where a model of two layers lies: a trainer loads its reference from there."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **special, **options)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        name = {"llama": "LlamaConfig", "gemma2": "Gemma2Config"}[kind]
        config = getattr(transformers, name)(**sizes, head_dim=8, num_key_value_heads=1, **special, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def dataset():
    return Dataset.from_list([{"prompt": p, "target": t} for p, t in [("a b", "c d"), ("e", "f g"), ("h i j", "k")]])
