"""Running a model of any modality on a few made-up inputs."""

from .outputs import first_output, run_on_example

__all__ = ["first_output", "run_on_example"]
