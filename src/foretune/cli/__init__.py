"""The command line: parse, call one verb, show the result."""
