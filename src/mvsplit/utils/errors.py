"""Errors that a user can mend."""


class UserError(ValueError):
    """Something in the user's configuration, files or machine is wrong; the message says what, in one line."""


class AgreedError(UserError):
    """The same on all ranks, which have agreed on it; the first tells it for all."""
