"""The walk of the memories in compiled code."""
