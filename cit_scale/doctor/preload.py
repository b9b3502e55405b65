"""What the process imports from which the checks are forked."""

import numpy  # noqa: F401
import torch  # noqa: F401
