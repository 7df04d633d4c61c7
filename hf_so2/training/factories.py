"""`second_order` and `second_order_arguments`: our optimizers in any kind of transformers' Trainer."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

from transformers import Trainer, TrainingArguments

from hf_so2.errors import ConfigurationError
from hf_so2.training.arguments import SecondOrderArgumentsMixin, SecondOrderTrainingArguments, with_own_fields
from hf_so2.training.trainer import SecondOrderMixin, SecondOrderTrainer


def second_order(trainer: Any) -> Any:
    """A kind of Trainer, such as TRL's `SFTTrainer`, with everything that `SecondOrderTrainer` adds to transformers'.

    The same Trainer always gives the same class, so that instances can be pickled and compared. For its arguments,
    apply `second_order_arguments` to the class of arguments that the Trainer expects:

        args = hf_so2.second_order_arguments(trl.SFTConfig)(output_dir="out", optim="kfac_mup", mup_base_width=64)
        hf_so2.second_order(trl.SFTTrainer)(model, args, train_dataset=rows).train()

    Args:
        trainer: `transformers.Trainer` or a subclass. A result of this function is returned as it is.

    Raises:
        ConfigurationError: `trainer` is no such class.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise ConfigurationError("trainer", _name(trainer), "must be transformers.Trainer or a subclass of it")
    return trainer if issubclass(trainer, SecondOrderMixin) else _second_order(cast(Hashable, trainer))


def second_order_arguments(arguments: Any) -> Any:
    """A class of arguments, such as TRL's `SFTConfig`, with the fields of `SecondOrderTrainingArguments` added.

    `HfArgumentParser` (and TRL's) reads its flags. A field that is left out takes the default of the optimizer's
    method. With an optimizer of transformers, it takes the default of `arguments`.

    Args:
        arguments: `transformers.TrainingArguments` or a subclass. A class of ours is returned as it is.

    Raises:
        ConfigurationError: `arguments` is no such class, or has its own field with the name of one of ours.
    """
    if not (isinstance(arguments, type) and issubclass(arguments, TrainingArguments)):
        allowed = "must be transformers.TrainingArguments or a subclass of it"
        raise ConfigurationError("arguments", _name(arguments), allowed)
    return (
        arguments
        if issubclass(arguments, SecondOrderArgumentsMixin)
        else _second_order_arguments(cast(Hashable, arguments))
    )


@cache
def _second_order(trainer: Any) -> type:
    if trainer is Trainer:
        return SecondOrderTrainer
    return _made(second_order, trainer, (SecondOrderMixin, trainer))


@cache
def _second_order_arguments(arguments: Any) -> type:
    if arguments is TrainingArguments:
        return SecondOrderTrainingArguments
    bases = (SecondOrderArgumentsMixin, with_own_fields(arguments))
    return _made(second_order_arguments, arguments, bases)


def _made(factory: Callable[[type], Any], original: type, bases: tuple[type, ...]) -> type:
    """A class with these bases. It is pickled as the call that makes it, since no module has it under its name.

    `training_args.bin` is such a pickle. Processes that have not called the factory read it.
    """
    metaclass = type(f"_MadeBy_{factory.__name__}", (type(original),), {})
    copyreg.pickle(metaclass, lambda made: (factory, (original,)))
    made: type = metaclass(
        f"SecondOrder{original.__name__}", bases, {"__module__": original.__module__, "__doc__": original.__doc__}
    )
    return made


def _name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
