"""Running a model of any modality on a few made-up inputs."""

from .inputs import example_inputs
from .outputs import evaluating, main_output, run_on_example

__all__ = ["evaluating", "example_inputs", "main_output", "run_on_example"]
