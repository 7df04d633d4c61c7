"""A hundred and more wrong uses, each answered by one line with field, value and what is allowed.

Half are typed on the command line (`TYPED`), half are calls in Python (`CALLED`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_so2
from hf_so2 import commands

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
)  # fmt: skip
LAYERS = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


TYPED = """
train quickstart --lr 0.1 => unknown argument '--lr' (did you mean 'learning_rate'?)
train quickstart --max_stepz 3 => unknown argument '--max_stepz' (did you mean 'max_steps'?)
train quickstart --batch_size 8 => (did you mean 'per_device_train_batch_size'?)
train quickstart --optim KFAC => (did you mean 'kfac'?)
train quickstart --optim kfac_mupp => optim='kfac_mupp': must be one of
train quickstart --optim adam => optim='adam': must be one of
train --optim => argument --optim: expected one argument
train quickstart --damping -1 => damping=-1.0: must be a number above 0
train quickstart --damping abc => argument --damping: invalid float value: 'abc'
train quickstart --damping_rule tracee => damping_rule='tracee': must be one of trace, trace_mean
train quickstart --norm_control spectrall => norm_control='spectrall': must be one of none, kl_clip
train quickstart --momentum 1.0 => momentum=1.0: must be a number in [0, 1)
train quickstart --beta2 1.5 => beta2=1.5: must be a number in [0, 1)
train quickstart --preconditioner_update_steps 0 => preconditioner_update_steps=0: must be a whole number of at least 1
train quickstart --factor_update_steps 1.5 => factor-update-steps: invalid int value: '1.5'
train quickstart --fisher mcc => fisher='mcc': must be one of empirical, mc
train quickstart --learning_rate -0.1 => learning_rate=-0.1: must be a number above 0
train quickstart --learning_rate nan => learning_rate=nan: must be a number above 0
train quickstart --weight_decay -1 => weight_decay=-1.0: must be a number of at least 0
train quickstart --mup_base_width 0 => mup_base_width=0: must be a whole number of at least 1
train quickstart --mup_base_config base.json => mup_base_config='base.json': excludes mup_base_width
train quickstart --model_type llamma --use_cpu true --train_file FILE => model_type='llamma': must be a causal language
train quickstart --train_file missing.txt --use_cpu true => train_file='missing.txt': must be an existing file
train quickstart --resume_from_checkpoint gone --use_cpu true => resume_from_checkpoint='gone': must be the folder of
train quickstart --recipe missing.yaml => recipe='missing.yaml': must be an existing file
train quickstart --per_device_train_batch_size 0 => per_device_train_batch_size=0: must be at least 1
train quickstart --gradient_accumulation_steps 0 => gradient_accumulation_steps=0: must be at least 1
train quickstart --max_steps 0 => max_steps=0: must be a whole number of at least 1, or -1 for num_train_epochs
train quickstart --max_steps -1 --num_train_epochs -2 => num_train_epochs=-2.0: must be a number of at least 0
train quickstart --warmup_steps -1 => warmup_steps=-1.0: must be a number of at least 0
train quickstart --logging_steps 0 => logging_steps=0.0: must be a number above 0 where logging_strategy is steps
train quickstart --save_steps 0 => save_steps=0.0: must be a number above 0 where save_strategy is steps
train quickstart --eval_steps -5 => eval_steps=-5.0: must be a number above 0 where eval_strategy is steps
train quickstart --save_strategy sometimes => save_strategy='sometimes': must be one of no, steps, epoch, best
train quickstart --lr_scheduler_type cosin => lr_scheduler_type='cosin': must be one of linear, cosine
train quickstart --lr_scheduler_type cosine_with_min_lr => lr_scheduler_kwargs=None: must suit lr_scheduler_
train quickstart --lr_scheduler_kwargs {a => lr_scheduler_kwargs='{a': must be valid JSON
train quickstart --report_to wanbd => report_to='wanbd': must be one of none, all
train quickstart --curvature_log all => curvature_log='all': must be one of none, role, layer
train quickstart --optim adamw_mup --damping 0.1 => damping=0.1: has no effect on adamw; it needs a method with damping
train quickstart --optim shampoo_mup --fisher mc => fisher='mc': has no effect on shampoo; it needs a method
train quickstart --kl_clip 0.1 => kl_clip=0.1: has no effect on kfac; it needs norm_control='kl_clip'
train quickstart --deepspeed ds.json => deepspeed='ds.json': is not supported with optim=kfac_mup; use DDP
train quickstart --optim_args damping => optim_args='damping': must be name=value pairs with commas between them
train quickstart --optim_args damping=high => damping='high': must be a number (float)
train quickstart --adaptive_damping true => adaptive_damping=True: needs norm_control none or kl_clip, not spectral
train quickstart --gradient_worker_fraction 2 => gradient_worker_fraction=2.0: must be a number in [0, 1]
train quickstart --damping_overrides mlp => damping_overrides=['mlp']: must be a list of pattern=strength
train quickstart --block_size 0 => block_size=0: must be a whole number of at least 1, or none
train quickstart --skip_modules ( --use_cpu true --train_file FILE => skip_modules='(': must be a regular expression
train nothing.json => settings file='nothing.json': must be an existing YAML or JSON file
train quickstart quickstart => unknown argument 'quickstart'; a settings file must be the first one
sweep quickstart --trials 8 => widths=[]: must be given, or checkpoints
sweep quickstart --widths 64 --trials 0 => trials=0: must be above 0
coord-check quickstart --widths 64 => widths=[64]: must be at least two different hidden sizes
grid quickstart --optim=kfac --grid=seed=0 --output=. => output='.': must be a file
grid quickstart --optim kfac --output x.jsonl --descend seed => descend='seed': must be name=start*factor
benchmark --num_attention_heads 0 => num_attention_heads=0: must be at least 1
benchmark --tokens 100 => tokens=100: must be a multiple of sequence_length
benchmark --device quda => device='quda': must be a device of this machine
config quikstart => name='quikstart': must be one of quickstart, transfer
"""
LINES = [line.split(" => ") for line in TYPED.strip().splitlines()]


def test_the_list_is_long_enough() -> None:
    assert len(LINES) >= 50
    assert len(CALLED) >= 50
    assert len({typed for typed, _ in LINES}) == len(LINES)


@pytest.mark.parametrize(("typed", "said"), LINES, ids=[typed for typed, _ in LINES])
def test_on_the_command_line(
    typed: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Nothing is left in the folder."""
    folder = tmp_path_factory.mktemp("typed")
    monkeypatch.chdir(folder)
    argv = typed.split()
    if "FILE" in argv:
        corpus = tmp_path_factory.mktemp("corpus")
        (corpus / "corpus.txt").write_text("def f(x):\n    return x\n\n" * 400, "utf-8")
        argv[argv.index("FILE")] = str(corpus / "corpus.txt")
        argv += ["--cache_dir", str(corpus / "cache"), "--vocab_size", "258"]
    monkeypatch.setattr(sys, "argv", ["hf-so2", *argv])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert written.count("\n") == 1 or "FILE" in typed  # bars of the tokenizer come before
    error = written.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not list(folder.iterdir())


def build(name: Any = "kfac", model: Any = LAYERS, **settings: Any) -> Any:
    return hf_so2.build_optimizer(name, model, **settings)


def small(width: int = 32) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": width}))


def args(**fields: Any) -> hf_so2.SecondOrderTrainingArguments:
    return hf_so2.SecondOrderTrainingArguments(**({"output_dir": "out", "optim": "kfac", "use_cpu": True} | fields))


def train(**fields: Any) -> Any:
    return hf_so2.SecondOrderTrainer(model=small(), args=args(**fields))


def stepped(**settings: Any) -> hf_so2.SecondOrderOptimizer:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = hf_so2.build_optimizer("kfac", model, **settings)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


Call = Callable[[], Any]
CALLED: list[tuple[Call, str]] = [
    (lambda: build(LAYERS, "kfac"), "optim=Sequential( (0): Linear"),
    (lambda: build("kfacc"), "optim='kfacc': must be one of kfac"),
    (lambda: build("KFAC"), "did you mean 'kfac'?"),
    (lambda: build(None), "optim=None: must be one of"),
    (lambda: build(model=None), "model='NoneType': must be a torch.nn.Module"),
    (lambda: build(model="gpt2"), "model='str': must be a torch.nn.Module"),
    (lambda: build(model=LAYERS.state_dict()), "model='OrderedDict': must be a torch.nn.Module"),
    (lambda: build(model=LAYERS.parameters()), "model='generator': must be a torch.nn.Module"),
    (lambda: build(model=nn.ReLU()), "model='ReLU': must have a parameter that requires a gradient"),
    (
        lambda: build(model=nn.Linear(4, 4, dtype=torch.complex64)),
        "model='weight': is of torch.complex64; must be",
    ),
    (lambda: build(lr=0), "lr=0: must be a number above 0"),
    (lambda: build(lr="0.1"), "lr='0.1': must be a number above 0"),
    (lambda: build(lr=0.1, learning_rate=0.1), "learning_rate=0.1: must not be given beside lr"),
    (lambda: build(dampin=0.1), "(did you mean 'damping'?)"),
    (lambda: build(damping=True), "damping=True: must be a number above 0"),
    (lambda: build(momentum=1), "momentum=1: must be a number in [0, 1)"),
    (lambda: build(betas=(0.9, 0.99)), "betas=(0.9, 0.99): must be one of lr"),
    (lambda: build(nesterov="yes"), "nesterov='yes': must be true or false"),
    (lambda: build(factor_update_steps=2.0), "factor_update_steps=2.0: must be a whole number"),
    (lambda: build(skip_modules="("), "skip_modules='(': must be a list of regular expressions"),
    (lambda: build(skip_modules=["nothing"]), "skip_modules='nothing': must match a Linear or Conv1D module"),
    (lambda: build(damping_overrides=["zzz=0.1"]), "damping_overrides='zzz=0.1': must match the module"),
    (lambda: build(decay_parameters=["nope"]), "decay_parameters='nope': must be a list of names"),
    (lambda: build(decay_parameters="0.weight"), "decay_parameters='0.weight': must be a list of names"),
    (lambda: build("soap", damping=0.1), "damping=0.1: has no effect on soap; it needs a method with damping"),
    (lambda: build("shampoo", shampoo_root="qr"), "shampoo_root='qr': must be one of eigen, newton"),
    (lambda: build(adaptive_damping=True), "adaptive_damping=True: needs norm_control none or kl_clip"),
    (lambda: build(precondition_head=True), "precondition_head=True: has no effect on this model"),
    (lambda: build(base_config=CONFIG), "base_config='LlamaConfig': has no effect on kfac; kfac_mup scales"),
    (lambda: build("kfac_mup"), "base_config=None: kfac_mup needs the config at whose width it was tuned"),
    (lambda: build("kfac_mup", base_config=CONFIG), "base_config='LlamaConfig': a model from outside transformers"),
    (lambda: build("kfac_mup", small(), base_config=16), "base_config=16: must be a transformers configuration"),
    (lambda: build("kfac_mup", small(), base_config=BertConfig()), "base_config='bert': must be of the model's family"),
    (lambda: hf_so2.scale_width(small(), width=64), "config='LlamaForCausalLM': must be a"),
    (lambda: hf_so2.scale_width(64, width=64), "config='int': must be a transformers configuration"),
    (lambda: hf_so2.scale_width(CONFIG, width="64"), "width='64': must be a positive number"),
    (lambda: hf_so2.scale_width(CONFIG, width=33), "width=33: hidden size must be a multiple of"),
    (lambda: hf_so2.apply_mup(CONFIG, CONFIG), "model='LlamaConfig': must be a model, a torch.nn.Module"),
    (lambda: hf_so2.apply_mup(small(), small(64).config), "base_config=64: must not be wider than the model, 32"),
    (lambda: hf_so2.coordinate_check(small(), "kfac", [32, 64]), "base_config='LlamaForCausalLM'"),
    (lambda: hf_so2.coordinate_check(CONFIG, "kfac_mup", [32]), "widths=[32]: must be at least two different"),
    (lambda: hf_so2.coordinate_check(CONFIG, "kfac_mup", 64), "widths=64: must be a list of at least two different"),
    (lambda: args(optim="kfacc"), "optim='kfacc': must be one of"),
    (
        lambda: args(optim="adamw_torch", damping=0.1),
        "damping=0.1: has no effect on transformers' optimizer",
    ),
    (lambda: args(learning_rate="0.1"), "learning_rate='0.1': must be a number above 0"),
    (lambda: args(optim_args={"damping": 1}), "optim_args={'damping': 1}: must be a text of name=value pairs"),
    (lambda: args(mup_base_width="64"), "mup_base_width='64': must be a whole number"),
    (lambda: args(lr_scheduler_type="cosin"), "lr_scheduler_type='cosin': must be one of linear"),
    (lambda: args(save_strategy="sometimes"), "save_strategy='sometimes': must be one of no, steps, epoch, best"),
    (lambda: args(gradient_accumulation_steps="2"), "gradient_accumulation_steps='2': must be a whole number"),
    (lambda: args(max_steps="10"), "max_steps='10': must be a whole number of at least 1, or -1"),
    (lambda: args(max_steps=-3), "max_steps=-3: must be a whole number of at least 1, or -1"),
    (lambda: args(report_to="wanbd"), "report_to='wanbd': must be one of none"),
    (lambda: train(optim="kfac_mup"), "mup_base_width=None: optim=kfac_mup needs the width at which it was tuned"),
    (lambda: train(optim="kfac_mup", mup_base_width=64), "mup_base_width=64: must not be wider than the model, 32"),
    (lambda: train(optim="kfac_mup", mup_base_config={"model_type": "llamma"}), "must be a readable model config"),
    (lambda: hf_so2.SecondOrderTrainer(small()), "args='NoneType': must be SecondOrderTrainingArguments"),
    (lambda: hf_so2.SecondOrderTrainer(small(), args="out"), "args='str': must be SecondOrderTrainingArguments"),
    (lambda: train().train(resume_from_checkpoint="gone"), "resume_from_checkpoint='gone': must be the folder of a"),
    (lambda: hf_so2.second_order(TrainingArguments), "trainer='TrainingArguments': must be transformers.Trainer"),
    (lambda: hf_so2.second_order_arguments(Trainer), "arguments='Trainer': must be transformers.TrainingArguments"),
    (lambda: stepped().telemetry(by="all"), "by='all': must be one of role, layer"),
    (
        lambda: stepped().add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        "param_group=[(2,)]: cannot be",
    ),
    (lambda: stepped().announce("all", 1.0), "tokens='all': must be a whole number or None"),
    (lambda: stepped().announce(None, 0.0), "gradient_scale=0.0: must be a finite number other than 0"),
    (lambda: stepped().reevaluate_with(1.0), "loss='float': must be a function that returns the loss"),
    (lambda: stepped(fisher="mc"), "fisher='mc': needs a call of the optimizer's sample_fisher(logits)"),
]


@pytest.mark.parametrize(("call", "said"), CALLED, ids=[said for _, said in CALLED])
def test_in_python(call: Call, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hf_so2.ConfigurationError) as refused:
        call()
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    assert len(message) < 1000


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^state has no curvature, in_a_row, skipped_steps, steps: it is not what"):
        stepped().load_curvature_state_dict({})
