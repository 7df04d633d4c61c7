"""The tasks whose families are gone through: one of transformers' mappings each, a model for it, inputs and a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hf_so2.mup.running import first_output
from hf_so2.mup.tiny import tiny_config

_BATCH = 2


@dataclass(frozen=True)
class Task:
    """What a head is for.

    Args:
        name: as on the command line.
        auto_class: for instance `AutoModelForMaskedLM`.
        mapping: the name of its mapping in transformers, without `MODEL_FOR_` and `_MAPPING_NAMES`.
        what: plural, for headlines.
    """

    name: str
    auto_class: str
    mapping: str
    what: str

    @property
    def types(self) -> Mapping[str, Any]:
        """Model types with a class for this task."""
        found: Mapping[str, Any] = getattr(auto, f"MODEL_FOR_{self.mapping}_MAPPING_NAMES")
        return found

    def config(self, model_type: str) -> PretrainedConfig:
        """A tiny configuration for the task."""
        # The Reformer's base is one of a decoder.
        as_encoder = {"is_decoder": False} if model_type == "reformer" and self.name == "masked-lm" else {}
        config = tiny_config(model_type, **as_encoder)
        text = config.get_text_config(decoder=True)
        # To classify a sequence, decoders look for its end.
        if self.name == "sequence-classification" and getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = config.pad_token_id = 0
        return config

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """A fresh model of the class; where that takes a part of a composite config, of that part."""
        automatic: Any = getattr(auto, self.auto_class)
        model_class = automatic._model_mapping[type(config)]
        if isinstance(model_class, tuple):  # the first is what from_config takes
            only: PreTrainedModel = model_class[0](config)
            return only
        if model_class.config_class not in (type(config), None):
            for part in (config.get_text_config(decoder=True), *_parts(config)):
                if isinstance(part, model_class.config_class):
                    return model_class(part)
        model: PreTrainedModel = automatic.from_config(config)
        return model

    def loader(self, model: PreTrainedModel) -> Any:
        """What loads a saved model."""
        automatic: Any = getattr(auto, self.auto_class)
        classes = automatic._model_mapping.get(type(model.config), None)
        return automatic if classes is not None and not isinstance(classes, tuple) else type(model)

    def outputs(self, model: PreTrainedModel) -> tuple[Tensor, Mapping[str, Any]]:
        """What the head computes on two examples, and their inputs.

        Raises:
            Exception: whatever the family's own code raises of the simplest inputs, where it takes none.
        """
        return first_output(model, _BATCH, (Exception,))

    def loss(self, model: PreTrainedModel) -> Tensor:
        """Cross-entropy: of the next token for causal language models, else of labels drawn for every output."""
        logits, inputs = self.outputs(model)
        if self.name == "causal-lm":
            logits, labels = logits[:, :-1], inputs["input_ids"][:, 1:]
        else:
            if self.name == "question-answering":  # (batch, tokens, ends): which token it is
                logits = logits.transpose(1, 2)
            generator = torch.Generator().manual_seed(1)
            labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
        rows = logits.reshape(-1, logits.shape[-1]).float()
        return torch.nn.functional.cross_entropy(rows, labels.flatten())


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]


TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "AutoModelForCausalLM", "CAUSAL_LM", "causal language models"),
        Task("masked-lm", "AutoModelForMaskedLM", "MASKED_LM", "masked language models"),
        Task("seq2seq-lm", "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "sequence-to-sequence language models"),
        Task(
            "sequence-classification",
            "AutoModelForSequenceClassification",
            "SEQUENCE_CLASSIFICATION",
            "classifiers of sequences",
        ),
        Task(
            "token-classification", "AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", "classifiers of tokens"
        ),
        Task(
            "question-answering",
            "AutoModelForQuestionAnswering",
            "QUESTION_ANSWERING",
            "models that mark an answer",
        ),
        Task(
            "image-classification", "AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "classifiers of images"
        ),
        Task("audio-classification", "AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", "classifiers of audio"),
        Task("ctc", "AutoModelForCTC", "CTC", "speech recognizers with a CTC head"),
        Task(
            "speech-seq2seq",
            "AutoModelForSpeechSeq2Seq",
            "SPEECH_SEQ_2_SEQ",
            "sequence-to-sequence speech recognizers",
        ),
    )
}
