"""Pages to look at: the report of one run and of one study."""
