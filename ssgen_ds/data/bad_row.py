"""What is wrong with one row of the data."""


class BadRow(Exception):
    """What is wrong with one row. The reader adds the place, `file:line`."""
