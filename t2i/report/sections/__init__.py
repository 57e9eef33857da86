"""Sections of a study's report; the data, table, figure and sentence of each are in one file."""
