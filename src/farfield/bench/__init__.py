"""Measuring: time, memory, error and quality, side by side.

- ``memory``: the peak memory of a block of code, and what is free;
- ``cost``: time and memory of one attention layer by length;
- ``compare``: the same language model trained once per attention;
- ``verdict``: what the runs say, and how sure that is;
- ``sweep``: any recipe beside others and beside peers, on ready queries, keys and values (``farfield bench``);
- ``case``, ``subjects``, ``peers``: on what, and what is measured there;
- ``model``, ``ceilings``: useful FLOPs, bytes and least time, and what the machine reaches at best;
- ``budget``: how far from the truth a result in low precision may be;
- ``timing``, ``machine``, ``doctor``: clocks and forecasts, what a number depends on, what an issue report needs;
- ``plots``, ``tables``, ``html``, ``page``, ``report``, ``sweep_report``: figures, the terminal's tables, pages, files.

The last line's modules need the extra ``cli`` (rich, matplotlib), except ``html``; the others need torch and numpy
only.
"""
