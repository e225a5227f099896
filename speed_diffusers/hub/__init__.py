"""The Hugging Face Hub: names and tokens, what its client's errors mean, and uploads that get over bad moments."""

from .failures import Problem, find_problem
from .upload import Destination, check_destination, check_name, upload

__all__ = ["Destination", "Problem", "check_destination", "check_name", "find_problem", "upload"]
