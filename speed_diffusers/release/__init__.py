"""Releases: a folder with a plain pipeline, its model card and pictures, and its way to the Hub."""

from .folder import Release, make_release
from .licences import Licences
from .push import push, push_after_training

__all__ = ["Licences", "Release", "make_release", "push", "push_after_training"]
