"""Systems compared by their translations alone: what :mod:`analysis.compare` is made of."""
