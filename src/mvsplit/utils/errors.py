"""Errors that a user can fix."""


class UserError(ValueError):
    """A mistake in the user's config, files or machine; its message is one line."""


class AgreedError(UserError):
    """A mistake that all ranks have agreed on; rank 0 reports it for all."""
