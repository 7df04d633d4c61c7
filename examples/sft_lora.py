"""TRL's SFTTrainer with LoRA and K-FAC: the adapters are trained. Needs `pip install trl peft`. Seconds on a CPU."""

import datasets
import peft
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
# The embedding and the head are trained whole, for a model that has learnt nothing yet; leave the line out for yours.
adapters = peft.LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])

args = hf_so2.second_order_arguments(trl.SFTConfig)(
    output_dir="out/sft_lora",
    optim="kfac",  # without _mup: the checkpoint was not trained with muP
    max_steps=30,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    bf16=False,  # TRL asks for it by default
)
trainer = hf_so2.second_order(trl.SFTTrainer)(
    model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=adapters
)  # fmt: skip
print(trainer.train().metrics)
print(trainer.coverage())
trainer.save_model()  # the adapters
