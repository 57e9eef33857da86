"""open_lm as transformers classes; every export carries copies of these files."""
