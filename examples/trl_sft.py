"""TRL's SFTTrainer with K-FAC: a tiny model and made-up completions, nothing is downloaded. Needs `pip install trl`."""

import datasets
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import hf_so2

set_seed(0)
words = ["[PAD]", "[EOS]", *(f"w{number}" for number in range(30))]
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(words)
    )
)  # fmt: skip
data = datasets.Dataset.from_dict(
    {
        "prompt": [f"w{n} w{n + 1}" for n in range(20)] * 4,
        "completion": [f" w{n + 2} w{n + 3}" for n in range(20)] * 4,
    }
)

args = hf_so2.second_order_arguments(trl.SFTConfig)(
    output_dir="out/trl_sft",
    optim="kfac",
    max_steps=20,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    bf16=False,  # TRL asks for it by default
)
trainer = hf_so2.second_order(trl.SFTTrainer)(
    model=model, args=args, train_dataset=data, processing_class=tokenizer
)  # fmt: skip
print(trainer.train().metrics)
