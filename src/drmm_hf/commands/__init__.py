"""One file a command: `add_arguments(parser)`, and `run(args)` that calls one library function and prints."""
