"""What several test files share: oracles and generators. tests/conftest.py makes it importable."""
