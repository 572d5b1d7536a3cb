"""Operators for fastpref."""
