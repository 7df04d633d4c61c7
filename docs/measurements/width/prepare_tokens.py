"""Token ids of the embedded corpus as `configs/transfer.yaml` cuts it, in two small files.

python docs/measurements/width/prepare_tokens.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

from hf_so2.data import DataArguments, load_corpus

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
corpus = load_corpus(DataArguments(vocab_size=512, max_seq_length=128, max_eval_samples=512))
for name, blocks in (("train", corpus.train), ("eval", corpus.evaluation)):
    np.save(folder / f"{name}.npy", np.asarray(blocks.with_format("numpy")["input_ids"][:], dtype=np.uint16))
tokenizer = corpus.tokenizer
config = {
    "vocab_size": len(tokenizer),
    "bos_token_id": tokenizer.bos_token_id,
    "eos_token_id": tokenizer.eos_token_id,
    "pad_token_id": tokenizer.pad_token_id,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
(folder / "config.json").write_text(json.dumps(config))
