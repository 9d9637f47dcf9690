"""One module for each command: `add` adds it to the parser, `run` runs it. Heavy imports wait until a command runs."""
