"""One module for each command: `add` adds it to the parser, `run` runs it. They import the standard library only until a command runs."""
