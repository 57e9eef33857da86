"""Processes that work together: launch, collectives, signals, and what happens when one is lost."""
