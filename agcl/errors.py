"""The errors a user can cause and mend; the command line prints them as one line."""


class AgclError(ValueError):
    """A setting, file or model that cannot work; the message names it and the remedy in one line."""


class UnsupportedModelError(AgclError):
    """A model or one of its operations that attribution cannot see into."""
