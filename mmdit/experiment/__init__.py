"""Assembly: the configuration of a run, its parts, the training itself, and loading of trained
models."""
