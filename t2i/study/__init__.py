"""Studies: many runs as one question, from the file that asks it to the numbers that answer it."""
