"""Data that the small models of this library are trained and measured on."""
