"""What several test files share: oracles and generators. Importable because tests/conftest.py puts this folder on the path."""
