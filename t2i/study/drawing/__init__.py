"""Figures of a study: matplotlib figures out of curves; colour-blind safe, lines apart in print by their dashes."""
