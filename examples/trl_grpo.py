"""GRPO by TRL on our ops, and the reward learned beside it: a random model of two layers, in half a minute on a CPU.

pip install '.[trl]'
python examples/trl_grpo.py
"""

import tempfile
from collections.abc import Sequence

import torch
import transformers
import trl
from datasets import Dataset
from po_bilevel.integrations.trl import GRPOTrainer, RewardCallback, reward_function
from po_bilevel.language import Pairs, RewardLearner, Sampling, TextEmbeddingReward, TokenPolicy
from po_bilevel.language.huggingface import HuggingFaceModel, HuggingFaceTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

# What is to be answered: colours of things.
PAIRS = [("sky", "blue"), ("sea", "dark blue"), ("grass", "green"), ("fir", "dark green"), ("snow", "white")]
BETA, STEPS = 0.3, 100
torch.set_num_threads(1)  # which is faster at these sizes

words = sorted({word for pair in PAIRS for text in pair for word in text.split()})
vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
by_words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=by_words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)


def embedder(texts: Sequence[str]) -> torch.Tensor:
    """How often each word is in a text, (N, n); anything that makes numbers of texts will do."""
    return torch.tensor([[float(text.split().count(word)) for word in words] for text in texts])


with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)  # TRL loads the reference policy from there
    model = transformers.LlamaForCausalLM.from_pretrained(folder)

    # The reward compares embeddings under a precision U, of which only the diagonal is learned.
    reward = TextEmbeddingReward(embedder, kind="diagonal")
    pairs = Pairs.of(PAIRS)
    learner = RewardLearner(
        TokenPolicy(HuggingFaceModel(model), end=tokenizer.eos_token_id), HuggingFaceTokenizer(tokenizer), reward,
        inner=pairs, outer=pairs, coefficient=BETA, sampling=Sampling(num_samples=8, max_tokens=3),
        outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1),
    )  # fmt: skip
    args = trl.GRPOConfig(
        folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=25,
        max_steps=STEPS, learning_rate=3e-3, lr_scheduler_type="constant", per_device_train_batch_size=40,
        num_generations=8, max_completion_length=3, gradient_checkpointing=False,
        # A loss whose gradient is that of E[r] - beta KL, and advantages that know the reward's scale.
        loss_type="dr_grpo", beta=BETA, use_bias_correction_kl=True, scale_rewards="none",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward_function(reward), args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt, "target": answer} for prompt, answer in PAIRS]),
        callbacks=[RewardCallback(learner, every=2)],
    )  # fmt: skip
    trainer.train()
    for line in trainer.state.log_history[:-1]:
        names = ("step", "reward", "kl", "reward_learning/outer_loss", "reward_learning/reward_norm")
        print("  ".join(f"{name.split('/')[-1]} {line[name]:.4g}" for name in names))
    prompts = tokenizer([prompt for prompt, _ in PAIRS], return_tensors="pt", add_special_tokens=False)
    found = model.eval().generate(input_ids=prompts.input_ids, do_sample=False, max_new_tokens=4)
    print(tokenizer.batch_decode(found[:, 1:], skip_special_tokens=True))
