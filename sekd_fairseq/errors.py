"""Errors of the plugin; those that both packages raise are in :mod:`analysis.runs.errors`."""

from analysis.runs.errors import UserError, one_line_errors

__all__ = ["CacheError", "UserError", "one_line_errors"]


class CacheError(UserError):
    """A teacher cache is missing, incomplete, damaged, or belongs to other data."""
