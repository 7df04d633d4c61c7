"""Trains a causal language model with a second-order (or any other) optimizer.

    hf-so2 train quickstart --optim kfac_mup
    accelerate launch -m hf_so2 train settings.yaml --optim kfac_mup

takes every flag of transformers' TrainingArguments and those of hf_so2; a first argument that ends in .yaml
or .json, or is a name that `hf-so2 config` lists, gives defaults, and so does --recipe with the file that
`hf-so2 sweep` leaves. Leaves in --output_dir the model and its tokenizer, all_results.json, trainer_state.json,
mup_report.txt, loss_curve.png, curvature.png and README.md (the model card). Exit code 2 and one line for a
user's mistake.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_so2 import cli
from hf_so2.data import Corpus, load_corpus
from hf_so2.errors import ConfigurationError
from hf_so2.folders import new_folders, remove_empty, require_folder
from hf_so2.metrics import causal_lm_metrics, summarize_logits
from hf_so2.models import build_model_and_config, require_positions
from hf_so2.mup import read_mup
from hf_so2.mup.widths import text_width
from hf_so2.training import checkpoints
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.training.trainer import SecondOrderTrainer
from hf_so2.transfer.reporting.curvature_plot import plot_curvature
from hf_so2.transfer.reporting.plots import plot_loss_curve
from hf_so2.transfer.runner import TYPES
from hf_so2.transfer.wide_run import beyond_proxies, comparison, extents, read_flags_and_recipe, share_batch


def main() -> None:
    """Data, model, Trainer; then train, evaluate and save."""
    flags, recipe, messages = read_flags_and_recipe(TYPES)
    model_args, data_args, args = cli.build(TYPES, flags)
    if recipe is not None:
        share_batch(args, recipe, messages)
    require_folder("output_dir", args.output_dir)
    checkpoint = checkpoints.to_resume(args.resume_from_checkpoint, args.output_dir)
    if args.process_index != 0:
        datasets.disable_progress_bars()
    logging.set_verbosity(args.get_process_log_level())
    args.dataloader_pin_memory &= args.device.type != "cpu"  # or every loader warns that it cannot

    with args.main_process_first(desc="data preparation"):
        corpus = load_corpus(data_args, model_args.model_name_or_path)
    if recipe is not None and (warning := beyond_proxies(*extents(recipe, args, data_args, len(corpus.train)))):
        messages.append(f"beware: {warning}")
    model, config = build_model_and_config(model_args, corpus.tokenizer, seed=args.seed, cache_dir=data_args.cache_dir)
    require_positions(config, data_args.max_seq_length)

    made = new_folders(Path(args.output_dir))
    try:
        trainer, report = build_trainer(args, model, corpus)
        if trainer.is_world_process_zero():
            print("\n".join([*messages, report]), flush=True)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except ConfigurationError:
        # transformers makes the folder before μP, the optimizer and a checkpoint have been looked at.
        if args.should_save:
            remove_empty(made)
        raise
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    for name in ("perplexity", "token_accuracy"):
        if f"eval_{name}" in metrics:  # not under --prediction_loss_only
            metrics[name] = metrics.pop(f"eval_{name}")
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        (output / "mup_report.txt").write_text(report + "\n", encoding="utf-8")
        title = f"{config.model_type}, {model.num_parameters() / 1e6:.1f} M parameters, {args.optim.value}"
        plot_loss_curve(trainer.state.log_history, output / "loss_curve.png", title)
        plot_curvature(trainer.state.log_history, output / "curvature.png", title)
        if recipe is not None and "eval_loss" in metrics:
            print(comparison(recipe, text_width(config), metrics["eval_loss"]))
        print(f"Saved the model and its reports in {output}")
    if recipe is not None:
        trainer.card_notes["recipe"] = "; ".join(messages)
    if args.push_to_hub:
        trainer.push_to_hub()  # with a model card
    else:
        trainer.create_model_card(model_name=Path(args.output_dir).name)


def build_trainer(
    args: SecondOrderTrainingArguments, model: PreTrainedModel, corpus: Corpus
) -> tuple[SecondOrderTrainer, str]:
    """The Trainer with its optimizer made, and the report of what that does with every weight."""
    trainer = SecondOrderTrainer(
        model=model,
        args=args,
        processing_class=corpus.tokenizer,
        compute_metrics=causal_lm_metrics,
        preprocess_logits_for_metrics=summarize_logits,
        **corpus.for_trainer(),
    )
    return trainer, coverage_report(trainer)


def coverage_report(trainer: SecondOrderTrainer) -> str:
    """Which weights are preconditioned, which fall back and why; before that, roles and multipliers in μP."""
    mup, coverage = read_mup(trainer.model), trainer.coverage()
    parts = [str(part) for part in (mup, coverage) if part is not None]
    return "\n\n".join(parts) or f"{trainer.args.optim.value} updates every weight; no μP multipliers."


if __name__ == "__main__":  # `accelerate launch -m hf_so2.commands.train`
    sys.exit(cli.main(main))
