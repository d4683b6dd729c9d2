"""Training small models: the loop, its evaluation, checkpoints and sampling."""
