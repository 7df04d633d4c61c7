"""The one way in which linear algebra can fail here."""


class DecompositionError(ArithmeticError):
    """A matrix that cannot be decomposed, in float64 either: indefinite after damping, or not finite."""
