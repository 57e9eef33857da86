"""The commands: each reads its command line, calls the room that does the work, and prints what came of it."""
