"""Token ids: the vocabulary's layout, sequences, text ids and image codes."""
