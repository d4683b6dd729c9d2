"""Pictures: who sees whom, and with what weight.

- ``pattern``: for every query and key, whether the key is seen exactly, through a summary, or not at all (integers,
  numpy);
- ``show``: drawings of that, as figures and for the terminal (need the extra ``cli``: matplotlib, rich).
"""
