"""The verbs: each continues a run folder and returns it; the command line is a thin layer over them."""
