"""The ways a workflow can end badly. Each prints as one line; none shows a traceback."""


class UserError(Exception):
    """A mistake the user can mend: names the key or file, what was found, and the remedy. Exit status 2."""


class WorkflowError(Exception):
    """Something outside the user's input failed (storage, a worker). Names the thing and the remedy. Exit status 1."""


class Regression(Exception):
    """Results fell below what was expected of them (`evaluate.expected`). Names the figures. Exit status 3."""
