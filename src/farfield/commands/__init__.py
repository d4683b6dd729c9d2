"""The commands of the ``farfield`` program, one module each. They import what they need when they run."""
