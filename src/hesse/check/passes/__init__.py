"""The real pass, recorded: module calls, Functions, operations, hooks; and run again, some of it held."""
