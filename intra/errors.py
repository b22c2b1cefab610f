"""The two ways a workflow can end badly. Both print as one line; neither shows a traceback."""


class UserError(Exception):
    """A mistake the user can mend: names the key or file, what was found, and the remedy. Exit status 2."""


class WorkflowError(Exception):
    """Something outside the user's input failed (storage, a worker). Names the thing and the remedy. Exit status 1."""
