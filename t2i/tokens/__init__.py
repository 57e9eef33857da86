"""What a number means: vocabulary layout, sequences, text ids and image codes."""
