"""Farfield in other libraries' models. Import the one you need; none is imported with farfield."""
