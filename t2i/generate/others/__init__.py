"""Models of others, drawn from by transformers' own classes: Janus, Emu3 and Chameleon."""
