"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Something the user can put right. Commands print it as one line and exit with code 2."""
