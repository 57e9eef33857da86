"""Sections of a study's report: each has its data, table, figure and sentence in one file."""
