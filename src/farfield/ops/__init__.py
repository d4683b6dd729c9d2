"""Operators: functions of tensors with a dense reference engine and a fast one each."""
