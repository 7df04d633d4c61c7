"""The parts of `hf-so2 mup-coverage`: tasks, the stages that a family goes through, and the page."""

from .page import markdown
from .stages import STAGES, Family, examine
from .tasks import TASKS, Task

__all__ = ["STAGES", "TASKS", "Family", "Task", "examine", "markdown"]
