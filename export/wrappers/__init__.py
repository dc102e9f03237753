"""Modules with fixed inputs and outputs that families configure and trace."""
