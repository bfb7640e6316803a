"""What a sub-command raises when the user has to change something."""


class CommandError(Exception):
    """A message for the user, printed as one line; the command ends with exit code 2."""
