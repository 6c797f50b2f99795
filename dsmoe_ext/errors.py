"""Expected failures: shown to the user in one line, without a traceback."""


class UserError(Exception):
    """Something the user can put right; the message says what is wrong and what to do."""
