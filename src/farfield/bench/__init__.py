"""Measuring: time, memory, error and quality, side by side.

- ``memory``: the peak memory of a block of code, and what is free;
- ``cost``: time and memory of one attention layer by length;
- ``compare``: the same language model trained once per attention;
- ``verdict``: what the runs say, and how sure that is;
- ``plots``, ``tables``, ``page``, ``report``: the figures, the terminal's tables, the HTML page, the files.

The last line's modules need the extra ``cli`` (rich, matplotlib); the others need torch and numpy only.
"""
